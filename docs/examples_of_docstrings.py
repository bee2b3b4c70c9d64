"""Griffe extension: lines of a docstring that begin with `>>>` become its section Examples, which is shown as code."""

import re
from typing import Any

import griffe

FIRST = re.compile(r"(?m)^ *>>> ")


class Examples(griffe.Extension):
    """Puts the heading before the first example where the docstring has none."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        text = obj.docstring.value if obj.docstring else ""
        first = FIRST.search(text)
        if first is None or re.search(r"(?m)^Examples?:", text):
            return
        end = re.search(r"\n\s*\n(?! *>>>)", text[first.start() :])
        stop = first.start() + end.start() if end else len(text)
        examples = "\n".join("    " + line.strip() for line in text[first.start() : stop].splitlines())
        assert obj.docstring is not None
        obj.docstring.value = f"{text[: first.start()].rstrip()}\n\nExamples:\n{examples}\n{text[stop:]}"
