"""Tables that list pairs (manifests): CSV as spreadsheets of any country write it, and Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from fusionsam.types import InputError, NoSplit

COLUMNS = ("visible", "infrared", "radiometric", "label", "split", "id", "sequence")
ALIASES = {
    **dict.fromkeys(("vis", "vi", "rgb", "color", "colour", "v", "visible_path", "rgb_path"), "visible"),
    **dict.fromkeys(("ir", "thermal", "tir", "lwir", "th", "t", "infrared_path", "thermal_path"), "infrared"),
    **dict.fromkeys(("rjpeg", "r_jpeg", "r-jpeg", "radiometric_path"), "radiometric"),
    **dict.fromkeys(("labels", "mask", "masks", "gt", "segmentation", "label_path", "mask_path"), "label"),
    **dict.fromkeys(("name", "pair"), "id"),
    **{name: name for name in COLUMNS},  # in capitals
}
"""Other words for a column, in small letters."""
SHOWN = 30
"""Names, and letters of a name, in a message."""
_BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_table(path: Path) -> tuple[set[str], list[dict[str, str]]]:
    """The columns under our names, and the rows.

    Raises:
        NoSplit: no such file.
        InputError: neither CSV nor Parquet, two columns that mean the same.
    """
    if not path.is_file():
        raise NoSplit(f"{path}: no such manifest; expected a CSV or Parquet file")
    columns, rows = _parquet(path) if path.suffix.lower() in (".parquet", ".pq") else read_csv(path)
    names = _named(path, columns)
    return set(names.values()), [{names[key]: value for key, value in row.items() if key in names} for row in rows]


def shown(columns: Iterable[str]) -> str:
    """Names of columns in a message: of a file that is no table the first line may be of any length."""
    names = [name if len(name) <= SHOWN else f"{name[:SHOWN]}..." for name in sorted(columns)]
    return f"{names[:SHOWN]}" if len(names) <= SHOWN else f"{names[:SHOWN]} and {len(names) - SHOWN} more"


def _named(path: Path, columns: list[str]) -> dict[str, str]:
    """Column as written -> our name for it."""
    names: dict[str, str] = {column: column for column in columns if column in COLUMNS}
    for column in columns:
        meant = ALIASES.get(column.lower())
        if column in names or meant is None:
            continue
        if meant in names.values():
            first = next(key for key, value in names.items() if value == meant)
            raise InputError(f"{path}: columns {first!r} and {column!r} both mean {meant!r}; keep one of them")
        names[column] = meant
    return names or {column: column for column in columns}


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns as they are written, and the rows. InputError for what is no CSV."""
    try:
        data = path.read_bytes()
        text = data.decode(_BOMS.get(data[:2], "utf-8-sig"))
        head = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=head.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in reader]
        return [name.strip() for name in reader.fieldnames or ()], rows
    except (csv.Error, UnicodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as CSV ({reason}); save it as CSV in UTF-8") from error


def _parquet(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as Parquet ({reason}); write it anew, or give a CSV") from error
    known = {name for name in table.column_names if name.strip().lower() in ALIASES}
    foreign = (pyarrow.types.is_nested, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    for name in known:
        kind = table.schema.field(name).type
        if any(is_a(kind) for is_a in foreign):
            raise InputError(f"{path}: column {name!r} holds {kind}; expected text, with the paths of files")
    rows = [
        {key.strip(): "" if value is None else str(value) for key, value in row.items() if key in known}
        for row in table.to_pylist()
    ]
    return [name.strip() for name in table.column_names], rows
