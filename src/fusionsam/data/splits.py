"""The only file that knows splits: which pairs belong to which, for every row of the catalogue."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fusionsam.config.datasets import CATALOG, DatasetRow, find
from fusionsam.data.image_files import SUFFIXES
from fusionsam.data.layouts import Tree, one_name, read_tree, require_utf8
from fusionsam.data.tables import read_table, shown
from fusionsam.types import InputError, NoSplit

HELD_OUT = 10
"""Where no official validation split exists, one id in this many is held out of train."""
FLIP = "_flip"
LONGEST = 255 - len("_confidence.png")
"""Bytes of an id: file systems take names of 255."""


@dataclass(frozen=True)
class Entry:
    """Where one pair lies. Either modality may be None; `rgbt` is MFNet's 4-channel file and stands for both."""

    id: str
    visible: Path | None = None
    infrared: Path | None = None
    label: Path | None = None
    rgbt: Path | None = None
    radiometric: Path | None = None
    """A FLIR or DJI radiometric JPEG, which stands for both: counts, and the visible picture where it is inside."""
    mirrored: bool = False
    """Read the files and mirror them left-right (an ID_flip of a list without a file of its own)."""
    extra: bool = False
    """Of data.extra_pairs: drawn by its share, counted nowhere."""
    sequence: str | None = None
    """The recording it is a frame of, where a manifest says so."""
    taught: Path | None = None
    """Label map of a teacher's classes (data.teacher_labels)."""


def held_out(id: str) -> bool:
    """Whether an id of an official train folder belongs to our val: its SHA-256 modulo HELD_OUT is 0."""
    return int(hashlib.sha256(id.encode()).hexdigest(), 16) % HELD_OUT == 0


def entries(
    dataset: str,
    root: str | Path,
    split: str,
    class_file: str | Path | None = None,
    absent: list[str] | None = None,
) -> list[Entry]:
    """The pairs of a split, in the order of its list (or by name where folders make the split).

    `split` is an official one, or NAME where NAME.txt with one id a line lies beside the data. Raises InputError for a
    missing folder, list, partner or column, and for a split without pairs (NoSplit where nothing of it is there). With
    `absent`, ids without an image are added to it and left out, be it all, and labels may be missing: enough to compare
    pictures."""
    row, root = find(dataset, class_file), Path(root)
    if row.layout == "manifest":
        found = _from_manifest(root, split, absent)
    else:
        if not root.is_dir():
            raise NoSplit(f"{root}: no such folder; expected the root of the data set {dataset!r}")
        found = _from_folders(row, root, split, absent)
    if not found and not absent:
        raise InputError(f"{root}: split {split!r} of {dataset!r} is empty; expected at least one pair")
    return found


def pair_entries(
    visible: Path | None, infrared: Path | None, label: Path | None = None, require_labels: bool = True
) -> list[Entry]:
    """Files of two folders (and of labels) paired by stem, sorted. One modality may be None: the other stands alone.

    Raises InputError if a file lacks its partner in another folder, naming it; without `require_labels` not for a
    label."""
    given = {name: folder for name, folder in (("visible", visible), ("infrared", infrared)) if folder is not None}
    if not given:
        raise InputError("neither a visible nor an infrared folder was given; give at least one")
    parts = {name: by_stem(folder) for name, folder in given.items()}
    labels = {} if label is None else by_stem(label)
    if label is not None and require_labels:
        parts["label"] = labels
    folders = {**given, **({"label": label} if label is not None else {})}
    stems = sorted(set.union(*(set(part) for part in parts.values())))
    for name, part in parts.items():
        missing = [stem for stem in stems if stem not in part]
        if missing:
            raise InputError(
                f"{folders[name]}: no {name} file for {missing[0]!r} ({len(missing)} of {len(stems)} lack it); "
                "files are paired by name, add the partner or remove the rest"
            )
    visible_files, infrared_files = (parts.get(name, {}) for name in ("visible", "infrared"))
    return [Entry(stem, visible_files.get(stem), infrared_files.get(stem), labels.get(stem)) for stem in stems]


def by_stem(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Stem -> file of a folder, of those that end in `suffixes` in any case; hidden ones are left out. InputError for
    two files of one stem, a name that is not UTF-8, and where there is no such folder."""
    files: dict[str, Path] = {}
    for path in pictures(folder, suffixes):
        stem = one_name(path.stem)
        if stem in files:
            raise InputError(f"{path}: has the same stem as {files[stem].name}; keep one of them")
        files[stem] = path
    return files


def pictures(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Files of a folder that end in `suffixes` in any case, sorted; hidden ones are left out. InputError for a name
    that is not UTF-8, and where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected images in it")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes and path.name[0] != "."]
    for path in found:
        require_utf8(path.name, folder)
    return found


def require_id(id: str, row: str) -> None:
    """InputError where an id of a table cannot be what files are named after: ID_confidence.png is the longest. `row`
    says whose it is."""
    if Path(id).name != id or id == ".." or "\0" in id:
        raise InputError(f"{row}: id {id!r} is no file name; leave out /, .. and NUL")
    require_utf8(id, row)
    if (length := len(id.encode())) > LONGEST:
        raise InputError(
            f"{row}: id {id[:30]!r}... has {length} bytes, expected at most {LONGEST}, since results are named after "
            "it; shorten the file's name, or give a shorter one in the column id of a table"
        )


def _subfolders(row: DatasetRow, root: Path) -> dict[str, Path] | None:
    """visible, infrared, label (or rgbt) -> folder, as far as they exist below `root`."""
    found: dict[str, Path] = {}
    there = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}
    for part, names in row.folders.items():
        for name in names:
            if (folder := root / name).is_dir() or (folder := there.get(name.lower(), folder)).is_dir():
                found[part] = folder
                break
    return found if {"visible", "infrared", "rgbt"} & set(found) else None


def _part_entries(row: DatasetRow, root: Path, require_labels: bool = True) -> dict[str, Entry]:
    """Every pair that lies directly below `root`."""
    found = _subfolders(row, root)
    expected = ", ".join("/".join(names[:2]) for names in row.folders.values())
    if not root.is_dir():
        raise NoSplit(f"{root}: no such folder; expected one with {expected}")
    if found is None:
        raise InputError(f"{root}: holds none of the folders of {row.name!r} ({expected}); check the root")
    optional = set() if require_labels else {"label"}
    missing = sorted(set(row.folders) - set(found) - optional) if row.layout != "pairs" else []
    if missing:
        raise InputError(f"{root}: no folder for {', '.join(missing)}; expected {expected}")
    if "rgbt" not in found:
        pairs = pair_entries(found.get("visible"), found.get("infrared"), found.get("label"), require_labels)
        return {entry.id: entry for entry in pairs}
    images = by_stem(found["rgbt"])
    labels = by_stem(found["label"]) if "label" in found else {}
    return {stem: Entry(stem, rgbt=path, label=labels.get(stem)) for stem, path in images.items()}


def _from_folders(row: DatasetRow, root: Path, split: str, absent: list[str] | None = None) -> list[Entry]:
    listing = root / f"{split}.txt"
    if row.layout == "split_folders":
        if not listing.is_file() and split in ("train", "val", "trainval", "test"):
            folder = root / ("test" if split == "test" else "train")
            everything = list(_part_entries(row, folder, absent is None).values())
            if split in ("train", "val"):
                return [entry for entry in everything if held_out(entry.id) == (split == "val")]
            return everything
        parts = [root / name for name in ("train", "test") if (root / name).is_dir()]
    elif row.layout == "pairs" and not listing.is_file():
        if _subfolders(row, root / split):
            return list(_part_entries(row, root / split, absent is None).values())
        if (tree := nested(root)) is not None:
            if found := _of_tree(tree, split):
                return found
        elif split == "all":
            return list(_part_entries(row, root, absent is None).values())
        parts = []
    else:
        parts = [root]
    if not listing.is_file():
        lists = sorted(path.stem for path in root.glob("*.txt"))
        tree = nested(root) if row.layout == "pairs" else None
        told = sorted({name for name in tree.splits.values() if name}) if tree is not None else []
        offered = [*(name for name in row.splits if row.layout != "lists"), *told, *lists]
        raise NoSplit(
            f"{listing}: no such list for split {split!r}; available here: {', '.join(offered) or 'none'}; "
            "expected a text file with one id a line"
        )
    tree = nested(root) if row.layout == "pairs" else None
    if tree is not None:
        available = {entry.id: entry for entry in _of_tree(tree, "all")}
    else:
        available = {id: entry for part in parts for id, entry in _part_entries(row, part, absent is None).items()}
    ids = _ids(listing)
    if absent is None:
        return [_with_label(_listed(id, available, listing), listing) for id in ids]
    absent += [id for id in ids if id not in available and id.removesuffix(FLIP) not in available]
    return [_listed(id, available, listing) for id in ids if id not in absent]


def nested(root: Path) -> Tree | None:
    """The tree below `root` where pictures lie deeper than in its folders of cameras; None for the flat form, whose
    folders are read as `pair_entries` does."""
    folders = _subfolders(CATALOG["pairs"], root) or {}
    if any(path.suffix.lower() in SUFFIXES for folder in folders.values() for path in folder.iterdir()):
        return None
    return read_tree(root)


def layout_line(dataset: str, root: str | Path) -> str:
    """What to say of a root whose folders were recognised as a data set's; empty for the forms of the documentation."""
    if find(dataset).layout != "pairs" or not Path(root).is_dir():
        return ""
    if any(_subfolders(CATALOG["pairs"], folder) for folder in Path(root).iterdir() if folder.is_dir()):
        return ""
    tree = nested(Path(root))
    return "" if tree is None else tree.line()


def tell_layout(dataset: str, root: str | Path) -> None:
    """On the terminal: `layout_line`, or what is not read of the flat form."""
    line = layout_line(dataset, root)
    for told in [line] if line else deeper(dataset, Path(root)):
        tqdm.write(told, file=sys.stderr)


def deeper(dataset: str, root: Path) -> list[str]:
    """What is not read of the flat form, `root/visible`, `root/train/visible` and so on: pictures in folders that lie
    beside pictures. Empty for data sets of other forms."""
    if find(dataset).layout != "pairs" or not root.is_dir():
        return []
    parts = [root, *(path for path in root.iterdir() if path.is_dir())]
    cameras = {folder for part in parts for folder in (_subfolders(CATALOG["pairs"], part) or {}).values()}
    told = []
    for folder in sorted(cameras):
        inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        count = sum(path.suffix.lower() in SUFFIXES for each in inner for path in each.rglob("*"))
        if count and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            told.append(
                f"{folder}: {count} pictures in folders of it are not read, because others lie directly in it; put all "
                "of them into folders, or none"
            )
    return told


def _of_tree(tree: Tree, split: str) -> list[Entry]:
    """Its pairs of a split. InputError where one lacks a camera that others have."""
    ids = tree.ids()
    chosen = {key: files for key, files in tree.files.items() if split in ("all", tree.splits[key])}
    cameras = {camera for files in chosen.values() for camera in files}
    found = []
    for key, files in sorted(chosen.items(), key=lambda item: ids[item[0]]):  # by name
        if lacking := sorted(cameras - set(files)):
            count = sum(not cameras <= set(other) for other in chosen.values())
            raise InputError(
                f"{tree.root}: no {lacking[0]} file for {ids[key]!r} ({count} of {len(chosen)} lack one); paths are "
                "alike but for the camera's name; add the partner or remove the rest"
            )
        found.append(Entry(ids[key], files.get("visible"), files.get("infrared"), files.get("label")))
    return found


def _ids(listing: Path) -> list[str]:
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listing}: not readable as text; save it as UTF-8, one id a line") from error
    names = [one_name(line.strip()) for line in lines if line.strip()]
    ids = [name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name for name in names]
    twice = sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) != len(ids) else []
    if twice:
        raise InputError(f"{listing}: lists {twice[0]!r} more than once ({len(twice)} such ids); list each id once")
    return ids


def _listed(id: str, available: dict[str, Entry], listing: Path) -> Entry:
    entry = available.get(id)
    if entry is None and id.endswith(FLIP) and (source := available.get(id.removesuffix(FLIP))):
        entry = Entry(id, source.visible, source.infrared, source.label, source.rgbt, mirrored=True)
    if entry is None:
        raise InputError(f"{listing}: lists {id!r}, but there is no image of that name; fetch it or mend the list")
    return entry


def _with_label(entry: Entry, listing: Path) -> Entry:
    if entry.rgbt is not None and entry.label is None:
        raise InputError(f"{listing}: {entry.id!r} has no label file beside {entry.rgbt}; fetch it or mend the list")
    return entry


def _from_manifest(path: Path, split: str, absent: list[str] | None = None) -> list[Entry]:
    """Rows of a CSV or Parquet table; paths are relative to the table's folder."""
    columns, rows = read_table(path)
    if not {"visible", "infrared", "radiometric"} & columns:
        raise InputError(
            f"{path}: columns {shown(columns)}; expected visible, infrared (or radiometric), label (optional), split"
        )
    if "split" not in columns and split != "all":
        raise NoSplit(f"{path}: has no column split, but split {split!r} was asked for; add it, or ask for 'all'")
    if split != "all":
        names = sorted({row.get("split", "") for row in rows})
        if odd := [name for name in names if name != split and name.strip().lower() == split.lower()]:
            raise InputError(f"{path}: split is {odd[0]!r} in some rows and {split!r} was asked for; write it one way")
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise NoSplit(f"{path}: split {split!r} is empty; the column split holds {', '.join(names) or 'nothing'}")
    found, seen = [], set()
    for number, row in enumerate(rows):
        paths = {
            part: path.parent / os.path.expanduser(row[part])
            for part in ("visible", "infrared", "radiometric", "label")
            if row.get(part)
        }
        there = {part for part, file in paths.items() if os.path.isfile(file)}  # false, too, for what cannot be a name
        for part, file in paths.items():
            if part not in there and absent is None:
                raise InputError(
                    f"{path}: {part} file {str(file)[:300]} does not exist; mend the manifest or fetch the file"
                )
        first = paths.get("visible") or paths.get("infrared") or paths.get("radiometric")
        if first is None:
            raise InputError(f"{path}: row {number + 1} of split {split!r} names neither visible nor infrared")
        if "radiometric" in paths and {"visible", "infrared"} & set(paths):
            raise InputError(
                f"{path}: row {number + 1} of split {split!r} names a radiometric file, which holds both pictures, and "
                "another; leave one out"
            )
        id = one_name(row.get("id") or first.stem)
        if id in seen:  # equal stems in different folders
            id = one_name(row.get("id") or _long_id(first, path.parent))
        if id in seen:
            raise InputError(
                f"{path}: id {id!r} occurs more than once in split {split!r}; list each pair once, "
                "or tell them apart by a column id"
            )
        require_id(id, f"{path}: row {number + 1} of split {split!r}")
        seen.add(id)
        if not set(paths) - {"label"} <= there:
            assert absent is not None
            absent.append(id)
            continue
        label = paths.get("label") if "label" in there else None
        sequence = row.get("sequence") or None
        pictures = paths.get("visible"), paths.get("infrared")
        found.append(Entry(id, *pictures, label, radiometric=paths.get("radiometric"), sequence=sequence))
    return found


def _long_id(file: Path, folder: Path) -> str:
    """The path below `folder` joined by __, or the last two parts of a path that leads elsewhere."""
    parts = file.with_suffix("").parts
    if file.is_relative_to(folder) and ".." not in file.relative_to(folder).parts:
        parts = file.relative_to(folder).with_suffix("").parts
    else:
        parts = tuple(part for part in parts if part not in (file.anchor, ".."))[-2:]
    return "__".join(parts)
