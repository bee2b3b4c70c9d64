"""The kinds of files that objects are exchanged in, by name."""

from __future__ import annotations

import os
from pathlib import Path

from fusionsam.data.labelling.coco import Coco
from fusionsam.data.labelling.cvat import Cvat
from fusionsam.data.labelling.exchange import Format
from fusionsam.data.labelling.label_studio import LabelStudio
from fusionsam.data.labelling.labelme import Labelme
from fusionsam.types import InputError

FORMATS: dict[str, Format] = {
    "coco": Coco(),
    "coco-polygons": Coco(polygons=True),
    "cvat": Cvat(),
    "labelme": Labelme(),
    "label-studio": LabelStudio(),
}


def named(text: str, flag: str) -> tuple[Format, Path]:
    """Format and file of FORMAT:FILE, ~ expanded: no shell does it behind a colon. InputError for another text."""
    name, colon, file = text.partition(":")
    if not colon or not file or name not in FORMATS:
        raise InputError(f"{flag}: found {text!r}; expected FORMAT:FILE, FORMAT being one of {', '.join(FORMATS)}")
    return FORMATS[name], Path(os.path.expanduser(file))
