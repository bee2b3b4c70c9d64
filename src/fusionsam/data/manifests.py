"""The pairs that a manifest lists, wherever it lies: a CSV or Parquet table, or a pattern of file names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import joined, one_name, require_utf8
from fusionsam.data.pairing import Match, unfit_line
from fusionsam.data.splits import require_id
from fusionsam.data.storage import fetched, file_name, find, fixed_part, is_remote, join, local_path, parent
from fusionsam.data.tables import read_table, shown
from fusionsam.io import say
from fusionsam.types import InputError

CAMERAS = ("visible", "infrared", "radiometric")


@dataclass(frozen=True, slots=True)
class Listed:
    """One pair of a manifest: its id, and the addresses of its files: of two cameras, of which one may be None, or of a
    radiometric file, which holds both."""

    id: str
    visible: str | None
    infrared: str | None
    radiometric: str | None = None
    alone: str | None = None
    """Why it is no pair: a pattern found a file of one camera alone."""

    def files(self) -> dict[str, str]:
        """Column -> address."""
        found = {"visible": self.visible, "infrared": self.infrared, "radiometric": self.radiometric}
        return {column: address for column, address in found.items() if address is not None}


def read_manifest(manifest: str, match: tuple[str, ...] = ()) -> list[Listed]:
    """The pairs, in the order of the table or sorted by id.

    What a pattern leaves aside is said.

    Args:
        manifest: address of a CSV or Parquet table with the columns visible and infrared, of which one may be absent
            or empty, or radiometric, and perhaps id; relative files lie beside the table. Or a pattern with *.
        match: for a pattern, the two names of a pair's files (`pairing.Match`), perhaps with folders. A file that both
            fit is of the camera whose name says more of it.

    Returns:
        Pairs with unique ids. That of a row is its column id, or the stem of its first file, or where an earlier row
        has that, the last parts of its address. So rows that are added at the end leave those before them as they are.

    Raises:
        InputError: no such manifest, no pair in it, two pairs of one id, an id that no file can have, a path that is
            not UTF-8 or holds NUL; and as `Match`.
    """
    found = _matched(manifest, match) if "*" in manifest else _rows(manifest)
    if not found:
        raise InputError(f"{manifest}: lists no pair; give a table with at least one row, or another pattern")
    return found


def _rows(manifest: str) -> list[Listed]:
    if not is_remote(manifest) and local_path(manifest).is_dir():
        raise InputError(f"{manifest}: is a folder; give a CSV or Parquet table, or a pattern such as '{manifest}/*'")
    with fetched(manifest) as table:
        try:
            columns, rows = read_table(table)
        except InputError as error:
            raise InputError(str(error).replace(str(table), manifest)) from None
    if not {"visible", "infrared", "radiometric"} & columns:
        raise InputError(
            f"{manifest}: columns {shown(columns)}; expected visible, infrared (or radiometric) and perhaps id"
        )
    folder, found, seen = parent(manifest), list[Listed](), set[str]()
    for number, row in enumerate(rows):
        files = {camera: join(folder, row[camera]) for camera in CAMERAS if row.get(camera)}
        first, place = next(iter(files.values()), None), f"{manifest}: row {number + 1}"
        if first is None:
            raise InputError(f"{place} names neither visible nor infrared; fill in one of them")
        if "radiometric" in files and len(files) > 1:
            raise InputError(f"{place} names a radiometric file, which holds both pictures, and another; leave one out")
        for address in files.values():
            require_utf8(address, place)
            if "\0" in address:
                raise InputError(f"{place}: the path {address!r} holds NUL, which no file name has; mend the table")
        id = one_name(row.get("id") or PurePosixPath(file_name(first)).stem)
        if id in seen:
            id = one_name(row.get("id") or _long_id(first, folder))
        if id in seen:
            raise InputError(f"{manifest}: id {id!r} occurs more than once; list each pair once, or add a column id")
        require_id(id, place)
        seen.add(id)
        found.append(Listed(id, files.get("visible"), files.get("infrared"), files.get("radiometric")))
    return found


def _long_id(file: str, folder: str) -> str:
    """The address below `folder` joined by __, or its last two parts."""
    below = file.removeprefix(f"{folder}/")
    parts = PurePosixPath(below).with_suffix("").parts
    return "__".join(parts if below != file and ".." not in parts else parts[-2:])


def _matched(pattern: str, match: tuple[str, ...]) -> list[Listed]:
    if not match:
        raise InputError(f"{pattern}: is a pattern; name the two files of a pair by --match '{{id}}_rgb' '{{id}}_th'")
    names, root = Match(match), fixed_part(pattern)
    found = [file for file in find(pattern) if not file_name(file).startswith(".")]
    for file in found:
        require_utf8(file, pattern)
    below = {file.removeprefix(root).lstrip("/"): file for file in found}
    pictures = {name: file for name, file in below.items() if name.lower().endswith(SUFFIXES)}
    files, unfit = names.sort(pictures, pattern)
    unfit += [name for name in below if name not in pictures]
    if unfit:
        say(unfit_line(pattern, unfit))
    visible, infrared = (files[camera] for camera in ("visible", "infrared"))
    pairs = []
    for key, id in joined(sorted({*visible, *infrared}), pattern).items():
        pair = Listed(id, visible.get(key), infrared.get(key))
        require_id(id, next(iter(pair.files().values())))
        if len(pair.files()) < 2:
            lacking = "infrared" if pair.infrared is None else "visible"
            pair = replace(pair, alone=f"{pattern}: no {lacking} file for {id!r}; files are paired by --match")
        pairs.append(pair)
    if all(pair.alone for pair in pairs):
        raise InputError(f"{pairs[0].alone} (all {len(pairs)} lack one); write the patterns as the files are named")
    return sorted(pairs, key=lambda pair: pair.id)
