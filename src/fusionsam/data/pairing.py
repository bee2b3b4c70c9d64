"""Which files of folders are pairs: by their names, or by patterns of names; what is left aside is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import read_tree
from fusionsam.data.splits import Entry, by_stem
from fusionsam.types import InputError


@dataclass
class Paired:
    """The pairs of one or two folders, and what is none."""

    entries: list[Entry]
    alone: dict[str, str] = field(default_factory=dict)
    """Id -> why it is no pair: a camera has no file of that name."""
    aside: list[str] = field(default_factory=list)
    """A line a folder on the files that are no pictures."""


def pair_folders(visible: Path | None, infrared: Path | None, match: tuple[str, ...] = ()) -> Paired:
    """Files of two folders paired by stem, sorted; either may be None.

    Args:
        visible: folder of the visible pictures.
        infrared: folder of the infrared ones; with `match` it may be the same.
        match: two patterns of stems, visible first, each with {id}: "{id}_rgb", "{id}_th".

    Raises:
        InputError: no folder, a pattern without {id}, nothing that fits.
    """
    given = {name: folder for name, folder in (("visible", visible), ("infrared", infrared)) if folder is not None}
    if not match and not any(_pictures(folder) for folder in given.values()):
        return _nested(given)
    if match:
        given = {"visible": visible or infrared, "infrared": infrared or visible}  # type: ignore[dict-item]
    patterns = _patterns(match, len(given))
    parts = {name: _named(by_stem(folder), patterns.get(name), folder) for name, folder in given.items()}
    aside = [line for folder in dict.fromkeys(given.values()) if (line := left_aside(folder))]
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


def _patterns(match: tuple[str, ...], cameras: int) -> dict[str, re.Pattern[str]]:
    if not match:
        return {}
    if len(match) != 2 or not all(pattern.count("{id}") == 1 for pattern in match) or match[0] == match[1]:
        raise InputError(
            f"--match {' '.join(match)}: expected two patterns, visible first, each with {{id}} once: "
            "'{id}_rgb' '{id}_th'"
        )
    compiled = [re.compile("(?P<id>.+)".join(map(re.escape, _stem(pattern).split("{id}")))) for pattern in match]
    return dict(zip(("visible", "infrared"), compiled, strict=True))


def _stem(pattern: str) -> str:
    """A pattern without the ending of a picture's file name."""
    suffix = Path(pattern).suffix.lower()
    return pattern[: -len(suffix)] if suffix in SUFFIXES else pattern


def _named(files: dict[str, Path], pattern: re.Pattern[str] | None, folder: Path) -> dict[str, Path]:
    if pattern is None:
        return files
    found = {hit["id"]: path for stem, path in files.items() if (hit := pattern.fullmatch(stem))}
    if not found:
        example = next(iter(files), None)
        shown = f"for example {example!r}" if example else "none there"
        raise InputError(f"{folder}: no file fits its pattern of --match; the names are of another form ({shown})")
    return found


def left_aside(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """One line on the files of a folder that are no pictures of these kinds; empty where there are none."""
    kinds: Counter[str] = Counter()
    for path in folder.iterdir():
        if path.name.startswith(".") or (path.suffix.lower() in suffixes and not path.is_dir()):
            continue
        kinds["folders" if path.is_dir() else path.suffix.lower() or "without an ending"] += 1
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{folder}: left aside, no pictures: {listed}" if listed else ""
