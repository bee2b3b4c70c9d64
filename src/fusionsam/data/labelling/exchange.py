"""What all files of objects have in common: a picture, its objects' classes and masks. One reader and one writer a
format stand in modules of their own; here they meet a folder of drawings.

Objects are given as the later ones over the earlier ones, as a `Drawing` has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fusionsam.data.labelling.drawing import Box, Drawing
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.splits import Entry, one_name
from fusionsam.io import OutputFolder, digest, write_json
from fusionsam.types import InputError

EXPORTS = "exports.json"
"""In the folder of drawings: what it wrote elsewhere, path and digest."""
Color = tuple[int, int, int]
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Region:
    """One object: its class by name, and its mask bool (h,w) inside of `box` (x, y, w, h)."""

    class_name: str
    box: Box
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, class_name: str, whole: NDArray[np.bool_]) -> Region:
        """The object of a mask (H,W) of the whole picture."""
        rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
        if not len(rows):
            return cls(class_name, (0, 0, 0, 0), np.zeros((0, 0), bool))
        x, y, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        return cls(class_name, (x, y, right - x, bottom - y), whole[y:bottom, x:right].copy())

    def whole(self, size: Size) -> NDArray[np.bool_]:
        """The mask (H,W) of the whole picture."""
        x, y, width, height = self.box
        mask = np.zeros(size, bool)
        mask[y : y + height, x : x + width] = self.mask
        return mask


@dataclass(frozen=True)
class Annotated:
    """One picture by the name of its file, and its objects."""

    name: str
    size: Size
    regions: Sequence[Region]


class SizeOf(Protocol):
    """Asked by readers about every picture."""

    def __call__(self, name: str, guess: bool = False) -> Size | None:
        """The size that the picture of a name must have; None where it is not wanted, and its objects are not read. A
        name that is of no pair is told to the user, unless it is one guess of several."""


class Format(Protocol):
    """A kind of file."""

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures of a file. InputError for one that is not of this kind, or does not fit."""

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """Write pictures with the classes of a class file (the first is nothing's), in place of what an earlier call
        wrote there; how many objects."""


def of_folder(folder: LabelFolder) -> Iterator[Annotated]:
    """Every pair of the folder with objects, or that is done without one, named by its visible file (infrared where
    there is none): one that nobody came to is not empty."""
    for entry in folder.entries:
        if not folder.instances_path(entry.id).is_file():
            continue
        drawing, regions = folder.open(entry), []
        if not (drawing.classes or drawing.done):
            continue
        file = entry.visible or entry.infrared
        assert file is not None
        for one in drawing.objects():
            x, y, width, height = one["box"]
            mask = drawing.instances[y : y + height, x : x + width] == one["id"]
            regions.append(Region(folder.classes[one["class"]], (x, y, width, height), mask))
        yield Annotated(file.name, folder.size_of(entry), regions)


def export(targets: Sequence[tuple[Format, Path]], folder: LabelFolder) -> Iterator[tuple[int, Path]]:
    """The objects of the folder into each file, or folder of files; how many, and where.

    InputError, before anything is written, for a path that is given twice, and for one at which stands what is not this
    folder's last export: drawings of others, or one that was changed since."""
    record = OutputFolder(folder.out, "label")
    told = record.read(EXPORTS, damaged={}) or {}
    paths = [path.resolve() for _, path in targets]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"--export {path}: was given twice; give each file once")
        if _digest(path) not in ("", told.get(str(path))):
            raise InputError(
                f"{path}: is there, and is not what {folder.out} exported last; choose another file, or remove it"
            )
    for (format, given), path in zip(targets, paths, strict=True):
        count = format.write(given, of_folder(folder), folder.classes, folder.palette)
        told = {**told, str(path): _digest(path)}
        write_json(record / EXPORTS, told)
        yield count, given


def _digest(path: Path) -> str:
    """Of a file, or of a folder's files; one without a file is as good as none."""
    if not path.is_dir():
        return digest(path) if path.exists() else ""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(path)} {digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else ""


@dataclass(frozen=True)
class Taken:
    """What came of a file."""

    objects: int
    pairs: int
    others: tuple[str, ...]
    """Pictures that are of no pair."""


def into_folder(path: Path, format: Format, folder: LabelFolder) -> Taken:
    """The objects of a file into the folder's pairs. Pictures are found by the stem of their name, classes by theirs; a
    file of many pictures may hold more than these.

    InputError for a file that is not of the format or of other pictures, a class that the folder lacks, a picture of
    another size, or a pair that has objects already; then nothing is written."""
    others: dict[str, None] = {}
    for annotated, entry in _theirs(path, format, folder, others):  # twice: no more than one pair in memory
        if folder.progress[entry.id].objects:
            raise InputError(f"{path}: pair {entry.id!r} has objects already; choose another --out")
        for region in annotated.regions:
            if region.class_name not in folder.classes[1:]:
                known = ", ".join(folder.classes[1:])
                raise InputError(f"{path}: {annotated.name}: {region.class_name!r} is not among the classes {known}")
    done = set()
    for annotated, entry in _theirs(path, format, folder, others):
        drawing = folder.open(entry) if entry.id in done else Drawing.empty(annotated.size)
        for region in annotated.regions:
            x, y, width, height = region.box
            number = max(drawing.classes, default=0) + 1
            drawing.instances[y : y + height, x : x + width][region.mask] = number
            drawing.classes[number] = folder.classes.index(region.class_name)
        left = set(np.unique(drawing.instances).tolist())
        drawing.classes = {number: kind for number, kind in drawing.classes.items() if number in left}
        folder.save(entry, drawing, "import", source=path.name)
        done.add(entry.id)
    if not done and others:
        raise InputError(
            f"{path}: none of its {len(others)} pictures is of these pairs; found {next(iter(others))!r}, expected "
            f"names such as {folder.entries[0].id!r}"
        )
    return Taken(sum(folder.progress[id].objects for id in done), len(done), tuple(others))


def _theirs(
    path: Path, format: Format, folder: LabelFolder, others: dict[str, None]
) -> Iterator[tuple[Annotated, Entry]]:
    """The pictures of a file that have objects, and whose pairs are in the folder; names of the rest into `others`."""
    by_id = {entry.id: entry for entry in folder.entries}

    def entry_of(name: str) -> Entry | None:
        return by_id.get(one_name(PurePosixPath(name.replace("\\", "/")).stem))

    def size_of(name: str, guess: bool = False) -> Size | None:
        entry = entry_of(name)
        if entry is None and not guess:
            others[name] = None
        return None if entry is None else folder.size_of(entry)

    for annotated in format.read(path, size_of):
        entry = entry_of(annotated.name)
        if annotated.regions and entry is not None:
            yield annotated, entry


def require_size(where: str, found: tuple[object, object], expected: Size) -> None:
    """InputError unless a file's (height, width) of a picture are the pair's."""
    if found != expected:
        raise InputError(f"{where}: is {found[0]}x{found[1]}, the pair {expected[0]}x{expected[1]} (height x width)")
