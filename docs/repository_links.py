"""MkDocs hook: links that leave docs/ lead to files of the repository, which the site does not hold.

On GitHub they work as links. On the site the path stands in their place, as code. That the files exist is checked by
tests/test_house.py.
"""

import os
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The page's text, with `text (`path`)` in the place of each link that leaves docs/."""

    def plain(link: re.Match[str]) -> str:
        folder = os.path.join("docs", os.path.dirname(page.file.src_uri))
        target = os.path.normpath(os.path.join(folder, link[2]))
        if target.startswith("docs" + os.sep):
            return link[0]
        return f"`{target}`" if link[1] in (target, f"`{target}`") else f"{link[1]} (`{target}`)"

    return LINK.sub(plain, markdown)
