"""The pairs that a manifest lists, wherever it lies: a CSV or Parquet table, or a pattern of file names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import one_name
from fusionsam.data.storage import fetched, file_name, find, fixed_part, is_remote, join, local_path, parent
from fusionsam.data.tables import read_table, shown
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

    def files(self) -> dict[str, str]:
        """Column -> address."""
        found = {"visible": self.visible, "infrared": self.infrared, "radiometric": self.radiometric}
        return {column: address for column, address in found.items() if address is not None}


def read_manifest(manifest: str, match: tuple[str, ...] = ()) -> list[Listed]:
    """The pairs, in the order of the table or sorted by id.

    Args:
        manifest: address of a CSV or Parquet table with the columns visible and infrared, of which one may be absent
            or empty, or radiometric, and perhaps id; relative files lie beside the table. Or a pattern with *.
        match: for a pattern, the two names of a pair's files, visible first, each with {id} once: '{id}_rgb'
            '{id}_th', or with folders 'vi/{id}' 'ir/{id}'.

    Returns:
        Pairs with unique ids. That of a row is its column id, or the stem of its first file, or where an earlier row
        has that, the last parts of its address. So rows that are added at the end leave those before them as they are.

    Raises:
        InputError: no such manifest, no pair in it, two pairs of one id.
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
        first = next(iter(files.values()), None)
        if first is None:
            raise InputError(f"{manifest}: row {number + 1} names neither visible nor infrared; fill in one of them")
        if "radiometric" in files and len(files) > 1:
            raise InputError(
                f"{manifest}: row {number + 1} names a radiometric file, which holds both pictures, and another; leave "
                "one out"
            )
        id = one_name(row.get("id") or PurePosixPath(file_name(first)).stem)
        if id in seen:
            id = one_name(row.get("id") or _long_id(first, folder))
        if id in seen:
            raise InputError(f"{manifest}: id {id!r} occurs more than once; list each pair once, or add a column id")
        _require_name(id, manifest)
        seen.add(id)
        found.append(Listed(id, files.get("visible"), files.get("infrared"), files.get("radiometric")))
    return found


def _long_id(file: str, folder: str) -> str:
    """The address below `folder` joined by __, or its last two parts."""
    below = file.removeprefix(f"{folder}/")
    parts = PurePosixPath(below).with_suffix("").parts
    return "__".join(parts if below != file and ".." not in parts else parts[-2:])


def _require_name(id: str, manifest: str) -> None:
    if Path(id).name != id or id in (".", ".."):
        raise InputError(f"{manifest}: id {id!r} is no file name; leave out / and ..")


def _matched(pattern: str, match: tuple[str, ...]) -> list[Listed]:
    if not match:
        raise InputError(f"{pattern}: is a pattern; name the two files of a pair by --match '{{id}}_rgb' '{{id}}_th'")
    names = dict(zip(("visible", "infrared"), _patterns(match), strict=True))
    root = fixed_part(pattern)
    pairs: dict[str, dict[str, str]] = {}
    files = [file for file in find(pattern) if file.lower().endswith(SUFFIXES)]
    for file in files:
        below = one_name(file.removeprefix(root).lstrip("/"))
        for camera, name in names.items():
            hit = name.fullmatch(str(PurePosixPath(below).with_suffix("")))
            if hit is not None:
                id = "__".join([*PurePosixPath(hit["folder"] or "").parts, hit["id"]])
                if camera in pairs.setdefault(id, {}):
                    raise InputError(f"{file} and {pairs[id][camera]}: have the same name; keep one of them")
                pairs[id][camera] = file
                break
    if not pairs:
        shown = f"the first of {len(files)} pictures is {files[0]}" if files else "there is no picture"
        raise InputError(f"{pattern}: no file fits --match {' '.join(match)} ({shown}); name the files as they are")
    return [Listed(id, found.get("visible"), found.get("infrared")) for id, found in sorted(pairs.items())]


def _patterns(match: tuple[str, ...]) -> list[re.Pattern[str]]:
    if len(match) != 2 or not all(name.count("{id}") == 1 for name in match) or match[0] == match[1]:
        raise InputError(
            f"--match {' '.join(match)}: expected two names, visible first, each with {{id}} once: '{{id}}_rgb' "
            "'{id}_th', or 'vi/{id}' 'ir/{id}'"
        )
    stems = [name[: -len(end)] if (end := PurePosixPath(name).suffix).lower() in SUFFIXES else name for name in match]
    return [
        re.compile("(?:(?P<folder>.*)/)?" + "(?P<id>[^/]+)".join(map(re.escape, stem.split("{id}")))) for stem in stems
    ]
