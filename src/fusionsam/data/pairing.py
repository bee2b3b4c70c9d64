"""Which files are pairs: by their names, or by patterns of names; what is left aside is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import realpath
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import one_name, read_tree
from fusionsam.data.splits import Entry, by_stem, pictures
from fusionsam.types import InputError

T = TypeVar("T")
CAMERAS = ("visible", "infrared")
Key = tuple[str, ...]
"""Folders and id of a picture: alike for the pictures of a pair."""


@dataclass
class Paired:
    """The pairs of one or two folders, and what is none."""

    entries: list[Entry]
    alone: dict[str, str] = field(default_factory=dict)
    """Id -> why it is no pair: a camera has no file of that name."""
    aside: list[str] = field(default_factory=list)
    """A line a folder on the files that are no pictures, and one on those that fit no pattern."""


class Match:
    """The two patterns of --match, visible first, each with {id} once: '{id}_rgb' '{id}_th', or 'vi/{id}' 'ir/{id}'.

    A pattern that ends as pictures do (.png) takes files of that ending alone, in small letters or capitals.

    Raises:
        InputError: other than two patterns, equal ones, one without {id}.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.text = f"--match {' '.join(patterns)}"
        if len(patterns) != 2 or not all(text.count("{id}") == 1 for text in patterns) or patterns[0] == patterns[1]:
            raise InputError(
                f"{self.text}: expected two patterns, visible first, each with {{id}} once: '{{id}}_rgb' '{{id}}_th', "
                "or of a manifest also 'vi/{id}' 'ir/{id}'"
            )
        self._patterns = {camera: _read(text) for camera, text in zip(CAMERAS, patterns, strict=True)}

    def sort(
        self, files: Mapping[str, T], place: object, cameras: Iterable[str] = CAMERAS
    ) -> tuple[dict[str, dict[Key, T]], list[str]]:
        """Camera -> key -> file, and the names that fit no pattern.

        Args:
            files: name, with the folders below `place`, -> picture.
            place: where they lie, for messages.
            cameras: whose they may be.

        Raises:
            InputError: a camera without a file, two files of one camera and key, a name that fits both patterns alike.
        """
        found: dict[str, dict[Key, T]] = {camera: {} for camera in cameras}
        unfit = []
        for name, file in files.items():
            fits = self._fits(name, found)
            if not fits:
                unfit.append(name)
                continue
            if len(fits) > 1 and fits[0][0] == fits[1][0]:
                raise InputError(f"{file}: fits both patterns of {self.text} alike; write more of the names into them")
            _, camera, key = fits[0]
            if key in found[camera]:
                raise InputError(
                    f"{file} and {found[camera][key]}: are both the {camera} file of {'/'.join(key)!r}; put the ending "
                    "into the pattern of --match, as '{id}.png', or keep one of them"
                )
            found[camera][key] = file
        for camera in (camera for camera, there in found.items() if not there):
            first = f"the first of {len(files)} pictures is {next(iter(files))}" if files else "there is no picture"
            raise InputError(
                f"{place}: no file fits {self._patterns[camera].text!r}, the {camera} pattern of --match ({first}); "
                "write it as the files are named"
            )
        return found, unfit

    def _fits(self, name: str, cameras: Iterable[str]) -> list[tuple[tuple[int, bool], str, Key]]:
        """How much of the name a pattern says, camera and key; the pattern that says most first."""
        found = []
        for camera in cameras:
            pattern = self._patterns[camera]
            if (hit := pattern.form.fullmatch(one_name(name))) is not None:
                key = (*PurePosixPath(hit["folder"] or "").parts, hit["id"])
                found.append((pattern.said, camera, key))
        return sorted(found, reverse=True)


@dataclass(frozen=True, slots=True)
class _Pattern:
    text: str
    form: re.Pattern[str]
    said: tuple[int, bool]
    """How much it says of a name: letters before the ending, and whether there is one."""


def _read(text: str) -> _Pattern:
    ending = PurePosixPath(text).suffix
    stem, end = one_name(text), r"\.[^./]+"
    if ending.lower() in SUFFIXES:
        stem, end = stem[: -len(ending)], f"(?i:{re.escape(ending)})"
    before, after = map(re.escape, stem.split("{id}"))
    form = re.compile(f"(?:(?P<folder>.*)/)?{before}(?P<id>[^/]+){after}{end}", re.DOTALL)
    return _Pattern(text, form, (len(stem), end[0] == "("))


def pair_folders(visible: Path | None, infrared: Path | None, match: tuple[str, ...] = ()) -> Paired:
    """Files of two folders paired by stem, sorted; either may be None.

    Args:
        visible: folder of the visible pictures.
        infrared: folder of the infrared ones; with `match` it may be the same.
        match: the patterns of `Match`, of names without folders. A picture of one folder that both fit is of the
            camera whose pattern says more of the name.

    Raises:
        InputError: no folder, and as `Match` and `Tree.ids`.
    """
    given = {name: folder for name, folder in (("visible", visible), ("infrared", infrared)) if folder is not None}
    if match:
        return _matched(visible or infrared, infrared or visible, Match(match))  # type: ignore[arg-type]
    if not any(_pictures(folder) for folder in given.values()):
        return _nested(given)
    return _paired({name: by_stem(folder) for name, folder in given.items()}, given, [])


def _matched(visible: Path, infrared: Path, match: Match) -> Paired:
    given = dict(zip(CAMERAS, (visible, infrared), strict=True))
    cameras_of: dict[Path, list[str]] = {}
    for camera, folder in given.items():
        cameras_of.setdefault(visible if realpath(folder) == realpath(visible) else folder, []).append(camera)
    parts: dict[str, dict[str, Path]] = {}
    aside = []
    for folder, cameras in cameras_of.items():
        found, unfit = match.sort({path.name: path for path in pictures(folder)}, folder, cameras)
        parts |= {camera: {key[-1]: path for key, path in files.items()} for camera, files in found.items()}
        aside += [unfit_line(folder, unfit)] if unfit else []
    return _paired(parts, given, aside)


def _paired(parts: dict[str, dict[str, Path]], given: dict[str, Path], aside: list[str]) -> Paired:
    """Camera -> id -> file, as pairs."""
    aside = [*(line for folder in dict.fromkeys(given.values()) if (line := left_aside(folder))), *aside]
    ids = sorted(set.union(*(set(part) for part in parts.values())))
    alone = {}
    for id in ids:
        if lacking := [name for name, part in parts.items() if id not in part]:
            alone[id] = f"{given[lacking[0]]}: no {lacking[0]} file for {id!r}; files are paired by name"
    entries = [
        Entry(id, parts.get("visible", {}).get(id), parts.get("infrared", {}).get(id)) for id in ids if id not in alone
    ]
    return Paired(entries, alone, aside)


def _pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


def _nested(given: dict[str, Path]) -> Paired:
    """Pairs of folders that hold folders alone: one tree of both cameras (the same folder given twice), or a tree a
    camera, paired by the path below."""
    tree = read_tree(next(iter(given.values())) if len(set(given.values())) < len(given) else given)
    if tree is None:
        return Paired([])
    ids, entries, alone = tree.ids(), [], {}
    for key, there in sorted(tree.files.items()):
        lacking = [name for name in given if name not in there]
        if len(lacking) == len(given):
            continue  # a label
        if lacking:
            alone[ids[key]] = f"{given[lacking[0]]}: no {lacking[0]} file for {ids[key]!r}; paths are alike below it"
        else:
            entries.append(Entry(ids[key], there.get("visible"), there.get("infrared")))
    return Paired(entries, alone, [tree.line()])


def unfit_line(place: object, names: Sequence[str]) -> str:
    """One line on the files that fit no pattern."""
    return f"{place}: left aside, of no pattern of --match: {len(names)} files, the first {names[0]}"


def left_aside(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """One line on the files of a folder that are no pictures of these kinds; empty where there are none."""
    kinds: Counter[str] = Counter()
    for path in folder.iterdir():
        if path.name.startswith(".") or (path.suffix.lower() in suffixes and not path.is_dir()):
            continue
        kinds["folders" if path.is_dir() else path.suffix.lower() or "without an ending"] += 1
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{folder}: left aside, no pictures: {listed}" if listed else ""
