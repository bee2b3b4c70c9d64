"""Trees of folders as data sets have them: which picture is of which camera and split is read from the folders' names.

    LLVIP       visible/train/010001.jpg        infrared/train/010001.jpg
    M3FD        Vis/00001.png                   Ir/00001.png
    KAIST       set00/V000/visible/I00000.jpg   set00/V000/lwir/I00000.jpg
    FLIR ADAS 1 train/RGB/FLIR_00001.jpg        train/thermal_8_bit/FLIR_00001.jpeg
    FLIR ADAS 2 video_rgb_test/data/A.jpg       video_thermal_test/data/B.jpg    rgb_to_thermal_vid_map.json

Two pictures are a pair if their paths are alike but for the camera's name.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from fusionsam.config.datasets import CATALOG
from fusionsam.data.image_files import SUFFIXES
from fusionsam.types import InputError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FLIR_MAP = "rgb_to_thermal_vid_map.json"
"""FLIR ADAS 2: name of a visible frame -> name of the infrared one."""
_FLIR_2 = re.compile(r"(images|video)_(rgb|thermal)_(train|val|test)")
_CAMERAS = {
    name: (camera, rank)
    for camera, names in CATALOG["pairs"].folders.items()
    for rank, name in enumerate(names)
    if len(name) > 1  # one letter is anything, deep in a tree
}
"""Name of a folder -> visible, infrared or label, and which counts where two are there: the lowest."""


@dataclass(frozen=True)
class Place:
    """What the path of a picture below the root says."""

    key: tuple[str, ...]
    """The path without its ending and the camera's name: alike for the pictures of a pair."""
    camera: str
    split: str | None
    rank: int = 0
    """Of two files of one camera the lower one counts."""


@dataclass
class Tree:
    """The pictures of a tree."""

    root: Path
    files: dict[tuple[str, ...], dict[str, Path]] = field(default_factory=dict)
    """Key -> camera -> file."""
    splits: dict[tuple[str, ...], str | None] = field(default_factory=dict)
    aside: Counter[str] = field(default_factory=Counter)
    """Folder -> pictures in it that are of no camera, or of one that is there twice."""
    name: str = "a nested"

    def ids(self) -> dict[tuple[str, ...], str]:
        """File names where no two are alike, or else the path joined by __. InputError where two of those are alike."""
        if len({key[-1] for key in self.files}) == len(self.files):
            return {key: key[-1] for key in self.files}
        return joined(self.files, str(self.root))

    def line(self) -> str:
        """What was recognised, to be said."""
        pairs = [key for key, files in self.files.items() if {"visible", "infrared"} <= set(files)]
        counts = Counter(self.splits[key] for key in pairs)
        parts = ", ".join(f"{counts[split]} of {split}" for split in sorted(filter(None, counts)))
        left = ", ".join(f"{count} in {folder}" for folder, count in self.aside.most_common(3))
        return (
            f"{self.root}: read as {self.name} layout, {len(pairs)} pairs{f' ({parts})' if parts else ''}"
            f"{f'; left aside: {self.aside.total()} pictures ({left})' if left else ''}"
        )


def read_tree(roots: Mapping[str, Path] | Path) -> Tree | None:
    """The pictures below a root whose folders tell their cameras, or below one root a camera (by its name). None where
    no folder does. InputError for a damaged map of FLIR's, and for a path that is not UTF-8."""
    given = {"": roots} if isinstance(roots, Path) else dict(roots)
    tree = Tree(Path(os.path.commonpath([os.path.abspath(root) for root in given.values()])))
    kinds: set[str] = set()
    ranks: dict[tuple[tuple[str, ...], str], int] = {}
    for camera, root in given.items():
        renamed = _flir_map(root)
        for path in _pictures(root):
            relative = PurePath(camera) / path.relative_to(root)
            place = locate(relative, renamed)
            if place is None or (camera and place.camera != camera):
                tree.aside[str(path.parent)] += 1
                continue
            kinds.add(_kind(relative))
            where = place.key, place.camera
            if where in ranks:
                tree.aside[str((path if ranks[where] <= place.rank else tree.files[where[0]][where[1]]).parent)] += 1
            if ranks.get(where, len(_CAMERAS)) > place.rank:
                tree.files.setdefault(place.key, {})[place.camera] = path
                ranks[where] = place.rank
            tree.splits[place.key] = place.split
    if not any({"visible", "infrared"} & set(files) for files in tree.files.values()):
        return None
    tree.name = sorted(kinds)[0]
    return tree


def locate(relative: PurePath, renamed: Mapping[str, str] | None = None) -> Place | None:
    """Camera, split and key of a path below the root; None where no folder of it names a camera.

    >>> locate(PurePath("set00/V000/lwir/I00000.jpg"))
    Place(key=('set00', 'V000', 'I00000'), camera='infrared', split=None, rank=4)
    """
    camera, rank, split, key = "", 0, None, []
    for part in relative.parts[:-1]:
        name = part.lower()
        if found := _FLIR_2.fullmatch(name):
            camera = "visible" if found[2] == "rgb" else "infrared"
            split = found[3]
            key.append(f"{found[1]}_{found[3]}")
        elif name in _CAMERAS:
            camera, rank = _CAMERAS[name]
        else:
            split = SPLITS.get(name, split)
            key.append(part)
    stem = relative.stem
    if camera == "visible" and renamed:
        stem = PurePath(renamed.get(relative.name, relative.name)).stem
    return Place((*key, one_name(stem)), camera, split, rank) if camera else None


def one_name(text: str) -> str:
    """One form of names that look alike: macOS writes an umlaut as two characters (NFD), others as one (NFC)."""
    return unicodedata.normalize("NFC", text)


def joined(keys: Iterable[tuple[str, ...]], place: str) -> dict[tuple[str, ...], str]:
    """Key -> its parts joined by __, which results are named after. InputError where two keys would have one name."""
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        other = found.setdefault(id := "__".join(key), key)
        if other != key:
            raise InputError(
                f"{place}: {'/'.join(other)} and {'/'.join(key)} would both be named {id!r} in the results; rename one "
                "of them"
            )
    return {key: id for id, key in found.items()}


def require_utf8(name: str, place: str | Path) -> None:
    """InputError for a file name that is not UTF-8, as reports, tables and hashes of ids are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: the file name {name!r} is not UTF-8; rename it") from None


def _kind(relative: PurePath) -> str:
    """Whose layout a path is of."""
    parts = [part.lower() for part in relative.parts[:-1]]
    if any(_FLIR_2.fullmatch(part) for part in parts):
        return "FLIR ADAS 2's"
    if any(part.startswith("thermal_") and part.endswith("_bit") for part in parts):
        return "FLIR ADAS 1's"
    if any(re.fullmatch(r"set\d\d", part) for part in parts) and any(re.fullmatch(r"v\d\d\d", part) for part in parts):
        return "KAIST's"
    if len(parts) == 2 and parts[0] in _CAMERAS and parts[1] in SPLITS:
        return "LLVIP's"
    return "M3FD's" if parts in (["ir"], ["vis"]) else "a nested"


def _pictures(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below.sort()
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                path = Path(folder) / name
                require_utf8(str(path.relative_to(root)), root)
                yield path


def _flir_map(root: Path) -> dict[str, str]:
    path = root / FLIR_MAP
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(visible): str(infrared) for visible, infrared in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: is no map of names; expected FLIR's JSON, or move the file away") from None
