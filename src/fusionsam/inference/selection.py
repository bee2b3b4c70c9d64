"""Which pairs a command is asked for: two files, two folders, four-channel or radiometric files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import one_name
from fusionsam.data.pairing import Paired, left_aside, pair_folders
from fusionsam.data.radiometric import SUFFIXES as RADIOMETRIC
from fusionsam.data.splits import Entry, by_stem
from fusionsam.inference.options import PredictOptions
from fusionsam.io import say
from fusionsam.types import InputError


def select(options: PredictOptions) -> Paired:
    """The pairs that the options name, those that lack a camera, and what is left aside.

    Raises:
        InputError: nothing is given, or there; a file with a folder; a partner is missing and `stop_on_error` is set.
    """
    if options.rgbt is not None:
        found = _one_file_pairs(options.rgbt, SUFFIXES, _four_channels)
    elif options.radiometric is not None:
        found = _one_file_pairs(options.radiometric, RADIOMETRIC, lambda id, path: Entry(id, radiometric=path))
    elif options.visible is None and options.infrared is None:
        raise InputError(
            "predict: neither --visible nor --infrared nor --rgbt, --radiometric or --manifest was given; give at "
            "least one"
        )
    else:
        found = _two(options.visible, options.infrared, options.match)
    given = (options.rgbt, options.radiometric, options.visible, options.infrared)
    what, kinds = ("radiometric JPEG", RADIOMETRIC) if options.radiometric else ("image", SUFFIXES)
    _require_some(found, given, what, kinds)
    if found.alone and (options.stop_on_error or not found.entries):
        remedy = "" if options.match else "; name both alike, or give their names by --match '{id}_rgb' '{id}_th'"
        _refuse_alone(found, remedy)
    return found


def every_pair(visible: Path | None, infrared: Path | None, rgbt: Path | None = None) -> list[Entry]:
    """The pairs of two files, of two folders, or of files with four channels; what is left aside is said.

    Raises:
        InputError: as `select`, and where one pair lacks a camera.
    """
    if rgbt is not None and (visible is not None or infrared is not None):
        raise InputError(f"--rgbt {rgbt}: holds both images; leave --visible and --infrared out")
    if rgbt is None and visible is None and infrared is None:
        raise InputError("no picture was given; give --visible and --infrared")
    found = _two(visible, infrared, ()) if rgbt is None else _one_file_pairs(rgbt, SUFFIXES, _four_channels)
    _require_some(found, (rgbt, visible, infrared), "image", SUFFIXES)
    if found.alone:
        _refuse_alone(found, "; name both alike, or remove the rest")
    for line in found.aside:
        say(line)
    return found.entries


def _four_channels(id: str, path: Path) -> Entry:
    return Entry(id, rgbt=path)


def _require_some(found: Paired, given: Iterable[Path | None], what: str, kinds: Sequence[str]) -> None:
    if not found.entries and not found.alone:
        place = next(path for path in given if path is not None)
        raise InputError(f"{place}: holds no {what} ({', '.join(kinds)}); give a folder of pictures, or one file")


def _refuse_alone(found: Paired, remedy: str) -> NoReturn:
    reason = next(iter(found.alone.values()))
    count = f"{len(found.alone)} of {len(found.alone) + len(found.entries)} pairs lack a file"
    raise InputError(f"{reason} ({count}){remedy}")


def _there(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")


def _two(visible: Path | None, infrared: Path | None, match: tuple[str, ...]) -> Paired:
    given = [path for path in (visible, infrared) if path is not None]
    for path in given:
        _there(path)
    if len({path.is_dir() for path in given}) > 1:
        raise InputError(f"{given[0]} and {given[1]}: one is a folder and one a file; give two of a kind")
    if given[0].is_dir():
        return pair_folders(visible, infrared, match)
    if match:
        raise InputError(f"--match {' '.join(match)}: is of folders, and {given[0]} is a file; leave it out")
    return Paired([Entry(given[0].stem, visible=visible, infrared=infrared)])


def _one_file_pairs(path: Path, suffixes: tuple[str, ...], make: Callable[[str, Path], Entry]) -> Paired:
    _there(path)
    if not path.is_dir():
        return Paired([make(one_name(path.stem), path)])
    aside = left_aside(path, suffixes)
    found = [make(stem, file) for stem, file in by_stem(path, suffixes).items()]
    return Paired(found, aside=[aside] if aside else [])
