"""Roboflow's "semantic segmentation masks": NAME_mask.png of pixel values beside NAME.jpg, and _classes.csv of what the
values mean, in one folder or in its folders train, valid and test. Read only; nothing but this package is needed."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from fusionsam.data.label_files import read_label
from fusionsam.data.labelling.exchange import Annotated, Region, SizeOf, require_size
from fusionsam.types import InputError

CLASSES, ENDING = "_classes.csv", "_mask.png"
BACKGROUND = "background"
_HASH = re.compile(r"\.rf\.[0-9A-Za-z]+$")
_FORM = re.compile(r"_(png|jpe?g|tiff?|bmp|webp)$", re.IGNORECASE)


class RoboflowMasks:
    """A folder as Roboflow exports it."""

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures, by folder and name; one region a class."""
        folders = [file.parent for file in sorted(path.rglob(CLASSES))]
        if not folders:
            raise InputError(f"{path}: holds no {CLASSES}; expected a folder of Roboflow's semantic masks")
        for folder in folders:
            names = class_names(folder / CLASSES)
            masks = sorted(folder.glob(f"*{ENDING}"))
            if not masks:
                raise InputError(f"{folder}: holds no *{ENDING}; expected Roboflow's semantic masks beside {CLASSES}")
            for mask in masks:
                name = str(PurePath(mask.relative_to(path).parent) / f"{mask.name.removesuffix(ENDING)}.png")
                size = size_of(name)
                if size is None:
                    continue
                ids = read_label(mask).numpy()
                require_size(str(mask), ids.shape, size)
                values = sorted(set(ids.ravel().tolist()))
                if strange := [value for value in values if value not in names]:
                    raise InputError(f"{mask}: value {strange[0]} is not in {CLASSES}; expected {sorted(names)}")
                yield Annotated(name, size, [Region.of(names[value], ids == value) for value in values])


def class_names(path: Path) -> dict[int, str]:
    """Pixel value -> class."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))[1:]
        found = {int(value): name.strip() for value, name, *_ in rows}
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: is no list of classes ({reason}); expected Pixel Value, Class") from None
    if not found:
        raise InputError(f"{path}: lists no class; expected Pixel Value, Class")
    return found


def original_stems(name: str) -> list[str]:
    """Stems that a picture may have had before Roboflow renamed it: NAME_jpg.rf.HASH, then NAME_jpg, then NAME.

    >>> original_stems("train/0001_png.rf.3ab9.jpg")
    ['0001_png.rf.3ab9', '0001_png', '0001']
    """
    stem = PurePath(name.replace("\\", "/")).stem
    plain = _HASH.sub("", stem)
    return list(dict.fromkeys([stem, plain, _FORM.sub("", plain)]))
