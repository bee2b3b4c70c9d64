"""Annotations of other tools as a data set folder that training reads.

OUT/labels/ID.png     8 bits, class ids; 0 is what no object covers
OUT/classes.yaml      the classes, for `--data.class_file`
OUT/manifest.csv      pairs, labels and splits, for `--data.dataset manifest`
OUT/import.json       what it was made of
OUT/.import           the same while it is drawn: a killed import goes on there, and what stands in OUT stays until all
                      is drawn and judged
"""

from __future__ import annotations

import colorsys
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from fusionsam.config.datasets import MAX_CLASSES, besides, find
from fusionsam.data.image_files import image_size
from fusionsam.data.images import write_png
from fusionsam.data.labelling.coco import Coco, read_json
from fusionsam.data.labelling.cvat import Cvat
from fusionsam.data.labelling.exchange import Annotated, Size, SizeOf
from fusionsam.data.labelling.label_studio import LabelStudio
from fusionsam.data.labelling.labelme import Labelme
from fusionsam.data.labelling.roboflow import BACKGROUND, CLASSES, RoboflowMasks, original_stems
from fusionsam.data.layouts import SPLITS, one_name
from fusionsam.data.splits import Entry, held_out
from fusionsam.io import OTHER_OUT, Made, OutputFolder, State, digest, require_writable, write_json, write_text
from fusionsam.types import InputError, JsonObject


class Reader(Protocol):
    """What reads annotations."""

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures of a file or folder. InputError for one that is not of this kind, or does not fit."""


READERS: dict[str, Reader] = {
    "coco": Coco(), "cvat": Cvat(), "labelme": Labelme(), "label-studio": LabelStudio(), "roboflow": RoboflowMasks(),
}  # fmt: skip
RECORD, PART, REMEDY = "import.json", ".import", "choose another --out, or --overwrite"


@dataclass
class Imported:
    """What came of an import."""

    classes: list[str]
    pairs: int = 0
    """Pairs with a label."""
    kept: int = 0
    """Of them, those whose label was there from an import that was ended."""
    empty: int = 0
    """Of them, those without an object."""
    unknown: list[str] = field(default_factory=list)
    """Annotated pictures that are of no pair."""
    unlabelled: list[str] = field(default_factory=list)
    """Pairs that the annotations do not name."""
    met: set[str] = field(default_factory=set)
    """Classes of the annotations, those that were left out among them."""
    seen: set[str] = field(default_factory=set)
    """Classes that have a pixel."""
    hidden: int = 0
    """Objects that have none: of no area, or wholly under later ones."""
    two_sizes: int = 0
    """Pairs whose cameras have two sizes."""
    finished: bool = False
    """Everything was there already."""

    @property
    def unseen(self) -> list[str]:
        """Classes whose objects were drawn, and have no pixel."""
        return [name for name in self.classes if name in self.met - self.seen]


def detect(path: Path) -> str:
    """The name of the reader of `path`. InputError for what none reads."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        if next(path.rglob(CLASSES), None):
            return "roboflow"
        if next(path.glob("*.json"), None):
            return "labelme"
        raise InputError(
            f"{path}: holds neither {CLASSES} nor .json files; expected Roboflow's masks or labelme's files"
        )
    if path.suffix.lower() == ".xml":
        return "cvat"
    content = read_json(path)
    if isinstance(content, list):
        return "label-studio"
    if isinstance(content, dict) and "images" in content:
        return "coco"
    if isinstance(content, dict) and "shapes" in content:
        return "labelme"
    raise InputError(f"{path}: is of no known form; expected {', '.join(READERS)}; say which with --format")


def import_labels(
    source: Path,
    entries: Sequence[Entry],
    out: Path,
    form: str = "auto",
    class_file: Path | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
) -> Imported:
    """Draw the annotations of `source` as label maps of `entries`, and write the data set folder `out`.

    Args:
        source: a file of COCO, CVAT, Label Studio or labelme, or a folder of labelme's files or Roboflow's masks.
        entries: pairs; an annotated picture is found by the name of either of its files.
        out: the folder; one of an import that was ended is gone on with.
        form: a key of READERS, or auto.
        class_file: the classes, kept in `out` with palette and foreground; without one they are numbered in the order
            in which they are met, after `background`.
        drop: classes whose objects are left out.
        overwrite: make a folder anew that an import wrote.

    Raises:
        InputError: what cannot be read or does not fit, by the annotation; a folder of something else, also with
            `overwrite`; a pair that is annotated twice; no picture in common; a class to drop that is nowhere.
    """
    form = detect(source) if form == "auto" else form
    row = None if class_file is None else find("pairs", class_file)
    settings: dict[str, object] = {
        "digest": _digest(source), "format": form, "drop": sorted(drop),
        "class file": None if class_file is None else digest(class_file)[:16],
        "list of pairs": _digest_of([[entry.id, *_pictures(entry, out)] for entry in entries]),
    }  # fmt: skip
    require_writable(out)
    if _finished(out, str(source.resolve()), settings, overwrite):
        return Imported(list(find("pairs", out / "classes.yaml").classes), finished=True)
    part = _begun(out / PART, {"annotations": str(source.resolve()), **settings, "done": False})
    names = _Names(entries)
    found = Imported([BACKGROUND] if row is None else list(row.classes))
    for entry, label in _drawn(source, form, names, found, row is not None, set(drop)):
        path = part / "labels" / f"{entry.id}.png"
        found.pairs, found.empty = found.pairs + 1, found.empty + (not label.any())
        if path.is_file():
            found.kept += 1
        else:
            write_png(path, label)
    _require_some(source, found, names)
    _require_met(source, found, drop)
    content: dict[str, object] = {"classes": found.classes}
    if row is None or class_file is None:
        content["palette"] = [[0, 0, 0], *(_color(index) for index in range(len(found.classes) - 1))]
    else:
        content |= {"palette": [list(color) for color in row.palette], **besides(class_file)}
    write_text(part / "classes.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True), REMEDY)
    write_text(part / "manifest.csv", _manifest(out, entries, names, found), REMEDY)
    write_json(part / "done", {"annotations": str(source.resolve()), **settings, "done": True}, REMEDY)
    _take_place(part, out)
    return found


def _finished(out: Path, source: str, settings: Mapping[str, object], overwrite: bool) -> bool:
    """Whether this very import is there and finished. InputError for a folder of something else, and, without
    `overwrite`, for another import that was finished."""
    folder, files = OutputFolder(out, "data import"), ["classes.yaml", "manifest.csv"]
    stored = folder.read(RECORD)
    now = Made({"annotations": source}, settings)
    if stored is None:
        folder.state(RECORD, None, now, files, ["labels"])
        return False
    if not {"annotations", "digest", "format", "drop", "done"} <= set(stored):
        folder.foreign(RECORD)
    if overwrite or not stored["done"]:
        return False
    if lacking := [name for name in settings if name not in stored]:
        told = " and the ".join(lacking)
        raise InputError(f"{folder / RECORD}: is of an earlier version, which did not note the {told}; {REMEDY}")
    if changed := [name for name in settings if stored[name] != settings[name]]:
        raise InputError(f"{folder / RECORD}: was made with another {', '.join(changed)}; {REMEDY}")
    there = Made({"annotations": stored["annotations"]}, settings)
    if replace(folder, remedy=REMEDY).state(RECORD, there, now, files) is not State.FINISHED:
        raise InputError(f"{out}: {' or '.join(files)} of a finished import is gone; put it back, or {REMEDY}")
    return True


def _begun(part: Path, record: JsonObject) -> Path:
    """The folder to draw into, with what this very import drew before it was ended, and nothing else."""
    if OutputFolder(part, "data import").read(RECORD, damaged={}) != record:
        shutil.rmtree(part, ignore_errors=True)
        if part.exists():
            raise InputError(f"{part}: is of another import, and cannot be removed; remove it, or {OTHER_OUT}")
    write_json(part / RECORD, record, REMEDY)
    return part


def _take_place(part: Path, out: Path) -> None:
    """Put all of `part` in the place of what is in `out`. The record, first, says that it is not done until, last, it
    does: ended between the two, the import is made anew."""
    try:
        os.replace(part / RECORD, out / RECORD)
        if (out / "labels").exists():
            os.replace(out / "labels", part / "old")
        for name in ("labels", "classes.yaml", "manifest.csv"):
            os.replace(part / name, out / name)
        os.replace(part / "done", out / RECORD)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); {OTHER_OUT}") from error
    shutil.rmtree(part, ignore_errors=True)


class _Names:
    """From the names of annotated pictures to pairs."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.by_stem = {
            one_name(file.stem): entry for entry in entries for file in (entry.visible, entry.infrared) if file
        }
        self.by_stem |= {entry.id: entry for entry in entries}
        self.asked: dict[str, str] = {}
        """Id of a pair -> the annotated picture."""
        self.unknown: dict[str, None] = {}

    def find(self, name: str) -> Entry | None:
        """The pair of a picture."""
        stems = (one_name(stem) for stem in original_stems(name))
        return next((self.by_stem[stem] for stem in stems if stem in self.by_stem), None)

    def size_of(self, name: str, guess: bool = False) -> Size | None:
        """That of the pair's visible picture (infrared without one), which a label has; None for no pair."""
        entry = self.find(name)
        if entry is None:
            if not guess:
                self.unknown[name] = None
            return None
        if (before := self.asked.setdefault(entry.id, name)) != name:
            raise InputError(f"{name}: is of pair {entry.id!r}, as {before} is; annotate each pair once")
        return _label_size(entry)


def _label_size(entry: Entry) -> Size:
    file = entry.visible or entry.infrared
    assert file is not None
    return image_size(file, as_infrared=entry.visible is None)


def _drawn(
    source: Path, form: str, names: _Names, found: Imported, fixed: bool, drop: set[str]
) -> Iterator[tuple[Entry, NDArray[np.uint8]]]:
    """Pairs and their label maps; `found` is told of classes and unknown pictures."""
    drawn = set()
    size_of: SizeOf = names.size_of
    for picture in READERS[form].read(source, size_of):
        entry = names.find(picture.name)
        assert entry is not None
        if entry.id in drawn:
            raise InputError(f"{source}: annotates {picture.name} twice; expected each picture once")
        drawn.add(entry.id)
        yield entry, _paint(source, picture, found, fixed, drop)
    if form == "coco":  # a picture that is listed without an annotation shows background alone
        for id, name in names.asked.items():
            if id not in drawn and (entry := names.find(name)) is not None:
                yield entry, np.zeros(_label_size(entry), np.uint8)
    found.unknown = list(names.unknown)


def _paint(source: Path, picture: Annotated, found: Imported, fixed: bool, drop: set[str]) -> NDArray[np.uint8]:
    on_top, kinds, classes = np.zeros(picture.size, np.uint32), [0], found.classes
    for region in picture.regions:
        name = region.class_name
        found.met.add(name)
        if name in drop:
            continue
        if name not in classes:
            if fixed:
                raise InputError(
                    f"{source}: {picture.name}: class {name!r} is not in the class file ({', '.join(classes)}); add it "
                    f"there, or leave it out by --drop {name}"
                )
            if len(classes) == MAX_CLASSES:
                raise InputError(f"{source}: more than {MAX_CLASSES} classes; leave some out by --drop")
            classes.append(name)
        x, y, width, height = region.box
        on_top[y : y + height, x : x + width][region.mask] = len(kinds)
        kinds.append(classes.index(name))
    seen = set(np.unique(on_top).tolist()) - {0}
    found.seen |= {classes[kinds[number]] for number in seen}
    found.hidden += len(kinds) - 1 - len(seen)
    return np.array(kinds, np.uint8)[on_top]


def _require_some(source: Path, found: Imported, names: _Names) -> None:
    if not found.pairs:
        if not found.unknown:
            raise InputError(f"{source}: annotates no picture; annotate some, or give another --annotations")
        told, first = f"{len(found.unknown)} pictures (first: {found.unknown[0]})", next(iter(names.by_stem), "none")
        raise InputError(f"{source}: annotates {told}, none of them of a pair (first: {first}); names must be alike")


def _require_met(source: Path, found: Imported, drop: Sequence[str]) -> None:
    if strange := [name for name in drop if name not in found.met and name not in found.classes]:
        met = ", ".join(sorted(found.met)) or "none"
        raise InputError(f"{source}: --drop {strange[0]}: no object is of that class, met were {met}; drop one of them")


def _manifest(out: Path, entries: Sequence[Entry], names: _Names, found: Imported) -> str:
    """The manifest, with the split that the name of a picture tells, or a tenth as val; `found` is told of pairs."""
    labelled = [entry for entry in entries if entry.id in names.asked]
    found.unlabelled = [entry.id for entry in entries if entry.id not in names.asked]
    splits = {entry.id: _split(names.asked[entry.id], entry.id) for entry in labelled}
    train = [id for id, split in splits.items() if split == "train"]
    if len(train) > 1 and "val" not in splits.values():
        splits[train[-1]] = "val"  # training wants at least one pair to look at
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "visible", "infrared", "label", "split"])
    for entry in labelled:
        writer.writerow([entry.id, *_pictures(entry, out), f"labels/{entry.id}.png", splits[entry.id]])
        found.two_sizes += _differ(entry)
    return text.getvalue()


def _pictures(entry: Entry, out: Path) -> list[str]:
    """Visible and infrared file as the manifest names them."""
    return [os.path.relpath(path.resolve(), out.resolve()) if path else "" for path in (entry.visible, entry.infrared)]


def _split(name: str, id: str) -> str:
    parts = [SPLITS[part.lower()] for part in PurePath(name.replace("\\", "/")).parts[:-1] if part.lower() in SPLITS]
    return parts[-1] if parts else "val" if held_out(id) else "train"


def _differ(entry: Entry) -> bool:
    if entry.visible is None or entry.infrared is None:
        return False
    return image_size(entry.visible) != image_size(entry.infrared, as_infrared=True)


def _color(index: int) -> list[int]:
    """Colours far apart, the same every time: hues in steps of the golden ratio, three brightnesses in turn."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85, (1.0, 0.75, 0.5)[index // 12 % 3])
    return [round(255 * red), round(255 * green), round(255 * blue)]


def _digest(source: Path) -> str:
    """16 hex digits of the annotations: of a file its bytes, of a folder names, sizes and times."""
    if source.is_file():
        return digest(source)[:16]
    stamps = [
        (str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(source.rglob("*"))
        if path.is_file()
    ]
    return _digest_of(stamps)


def _digest_of(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
