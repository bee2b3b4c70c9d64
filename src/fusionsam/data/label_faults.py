"""Labels that would teach the wrong thing: masks whose only class is ignored, lossy files, one class alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusionsam.config.datasets import DatasetRow
from fusionsam.data.dataset import PairDataset, counted_from_1
from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.splits import Entry
from fusionsam.types import IGNORE, InputError

LOSSY = (".jpg", ".jpeg", ".webp")
"""Endings of files whose ids may not be those that were drawn."""


def label_faults(pixels: Tensor, row: DatasetRow, every_class: bool = False) -> list[str]:
    """What is wrong with labels of which int64 (256) pixels of each id were counted, each with the mend; mostly
    nothing. With `every_class` a class without a pixel is wrong, too."""
    seen = [index for index in range(row.num_classes) if pixels[index]]
    if row.num_classes < 2 or not pixels.sum():
        return []
    if len(seen) > 1:
        return _absent_faults(pixels, row) if every_class else []
    other = next(index for index in range(row.num_classes) if index not in seen)
    if pixels[IGNORE]:
        alone = f"nothing but {row.classes[seen[0]]!r} would be learned" if seen else "nothing would be learned"
        return [
            f"the labels hold {' and '.join(map(str, [*seen, IGNORE]))} alone, and {IGNORE} is ignored, so that "
            f"{alone}; if {IGNORE} is a class, give --labels-map {IGNORE}:{other}"
        ]
    return [
        f"every labelled pixel is of class {row.classes[seen[0]]!r}; expected at least two classes; check the class "
        f"file, or give --labels-map ID:{other} for the id that means {row.classes[other]!r}"
    ]


def _absent_faults(pixels: Tensor, row: DatasetRow) -> list[str]:
    """What to do about classes without a pixel, in one line; nothing where each has some."""
    absent = [index for index in range(row.num_classes) if not pixels[index]]
    if not absent:
        return []
    if absent == [0] and not row.labels_map:
        return [
            f"no pixel has id 0 (class {row.classes[0]!r}), the ids begin at 1; expected ids 0 to "
            f"{row.num_classes - 1}; if they count from 1, give --labels-map {counted_from_1(row.num_classes)}, "
            f"{_OR_WITHOUT}"
        ]
    names = ", ".join(repr(row.classes[index]) for index in absent)
    return [
        f"{'classes' if len(absent) > 1 else 'class'} {names} without a pixel in the training split; expected some of "
        f"each; if another id means it, give --labels-map ID:{absent[0]}, {_OR_WITHOUT}"
    ]


_OR_WITHOUT = "take it out of the class file, or train without it by --data.absent_classes true"


def absent_classes(pixels: Tensor, row: DatasetRow) -> list[str]:
    """Classes that no pixel has."""
    return [name for index, name in enumerate(row.classes) if not pixels[index]]


def lossy_labels(entries: Sequence[Entry]) -> list[Path]:
    """Label files in a form that does not keep ids."""
    return [entry.label for entry in entries if entry.label is not None and entry.label.suffix.lower() in LOSSY]


def unread_folders(root: Path, row: DatasetRow) -> list[str]:
    """Folders with pictures below `root`, or one folder deeper, whose name is none of the data set's."""
    known = {name.lower() for names in row.folders.values() for name in names}
    found = []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    folders += [inner for path in folders if path.name.lower() not in known for inner in sorted(path.iterdir())]
    for folder in folders:
        if folder.is_dir() and folder.name.lower() not in known and not folder.name.startswith("."):
            count = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
            if count:
                found.append(f"{folder}: {count} pictures are not read, its name is not known")
    return found


def require_lossless(entries: Sequence[Entry]) -> None:
    """InputError for label files in a form that does not keep ids."""
    if lossy := lossy_labels(entries):
        raise InputError(
            f"{lossy[0]}: a label in a lossy form ({len(lossy)} such files), whose ids are not those that were drawn; "
            "save labels as PNG (no --labels-map brings the ids back)"
        )


def require_teachable(train: PairDataset, row: DatasetRow, root: Path, absent_classes: bool = False) -> None:
    """InputError for a training split whose labels would teach the wrong thing, or that lacks a camera whose folder is
    there under another name. Labels are read only until every class was seen (with `absent_classes`: two of them)."""
    require_lossless(train.entries)
    enough = 2 if absent_classes else row.num_classes
    pixels = torch.zeros(256, dtype=torch.long)
    for index in range(len(train)):
        label = train.label(index)
        if label is not None:
            pixels += torch.bincount(label.clamp(0, IGNORE).flatten(), minlength=256)
        if int((pixels[: row.num_classes] > 0).sum()) >= enough:
            break
    for fault in label_faults(pixels, row, every_class=not absent_classes):
        raise InputError(f"{root}: {fault}")
    one_camera = not any(
        entry.rgbt or entry.radiometric or (entry.visible and entry.infrared) for entry in train.entries
    )
    if row.layout == "pairs" and one_camera and (unread := unread_folders(root, row)):
        camera = "visible" if train.entries[0].visible is None else "infrared"
        raise InputError(
            f"{unread[0]}, and one camera is missing; call it {camera}, or move it away to train on one camera alone"
        )
