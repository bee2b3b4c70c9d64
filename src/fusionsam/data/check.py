"""A look at a data set before hours are spent on it: every problem is reported, not the first alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fusionsam.alignment.residual import LEAST, residual
from fusionsam.config.datasets import DatasetRow, find
from fusionsam.data.dataset import IGNORE, read_sample
from fusionsam.data.fingerprints import Fingerprints
from fusionsam.data.image_files import image_size
from fusionsam.data.label_faults import absent_classes, label_faults, lossy_labels, unread_folders
from fusionsam.data.leaks import compare, weigh
from fusionsam.data.splits import Entry, deeper, entries, layout_line
from fusionsam.io import progress_bar
from fusionsam.types import InputError, JsonObject, Sample


def check(
    dataset: str,
    root: str | Path,
    splits: Sequence[str] | None = None,
    class_file: str | Path | None = None,
    progress: bool = True,
    labels_map: Mapping[int, int] | None = None,
) -> JsonObject:
    """Read every pair of the splits and report what is there and what is wrong.

    `labels_map` is that of DatasetRow.with_labels_map. Without `splits`: those of the row that can be found (of a
    user's own pairs train, val and test, or else all). Keys: dataset, root, layout (a line on folders that were
    recognised, or nothing), splits (per split: pairs, visible,
    infrared, labelled, sizes {HxW: count}, class_percent {name: percent of label pixels}, shift_pixels {median, p90}:
    by how much infrared lies off), errors (splits that cannot be listed), unreadable (path and reason),
    size_mismatches, bad_labels, label_faults (labels that would teach the wrong thing; in train a class without a
    pixel, too), absent_classes (in other splits: a note), unread (folders of pictures whose name is not known, or
    that lie beside pictures),
    misaligned (pairs of all splits whose edges agree clearly better after a shift: x and y in pixels to move infrared
    by, the largest first: a note, no problem), shared (leaks, each with kind, splits, ids), look_alikes (the same of
    what `leaks.weigh` only mentions: a note, no problem), notices (what was guessed of a pair's files, or is odd about
    them: a note), ok. Raises InputError only for an unknown data set, a bad class file, or if no split can be
    listed."""
    row = find(dataset, class_file).with_labels_map(labels_map or {})
    report: JsonObject = {"dataset": dataset, "root": str(root), "splits": {}}
    report |= {"unreadable": [], "size_mismatches": [], "bad_labels": [], "shared": [], "look_alikes": []}
    report |= {"misaligned": [], "label_faults": [], "absent_classes": [], "unread": [], "notices": []}
    own = splits is None and row.splits == ("all",)
    # a user's own pairs may have splits, by folders, lists or a column; only then can they be compared
    found, report["errors"] = _listed(
        splits or (("train", "val", "test") if own else row.splits), dataset, root, class_file
    )
    if own and not found:
        found, report["errors"] = _listed(row.splits, dataset, root, class_file)
    if not found:
        raise InputError(report["errors"][0]["reason"])
    if splits is None:  # a split nobody asked for by name may simply not be there
        report["errors"] = []
    prints: dict[str, Fingerprints] = {}
    ids: dict[str, list[str]] = {}
    for split, members in found.items():
        report["splits"][split], prints[split], ids[split] = _counted(split, members, row, report, progress)
    report["misaligned"].sort(key=lambda each: -each["pixels"])
    across = [leak for leak in compare(prints, ids) if not _part_of(leak.first, leak.second)]
    for key, leaks in zip(("shared", "look_alikes"), weigh(across, found), strict=True):
        report[key] = [
            {"kind": leak.kind, "splits": [leak.first, leak.second], "ids": [leak.first_id, leak.second_id]}
            for leak in leaks
        ]
    report["layout"] = layout_line(dataset, root)
    flat = row.layout == "pairs" and not report["layout"]
    unread = [*unread_folders(Path(root), row), *deeper(dataset, Path(root))] if flat else []
    one_camera = any(not part["visible"] or not part["infrared"] for part in report["splits"].values())
    report["unread"] = [{"reason": line, "problem": one_camera} for line in unread]
    problems = ("errors", "unreadable", "size_mismatches", "bad_labels", "label_faults", "shared")
    report["ok"] = not any(report[key] for key in problems) and not (one_camera and unread)
    return report


def _misaligned(entry: Entry, split: str, sample: Sample, report: JsonObject) -> float | None:
    """Pixels by which infrared would have to be moved, 0 where nothing speaks for it; None for one camera alone and for
    pictures without common edges, of which nothing can be said."""
    if sample.visible is None or sample.infrared is None:
        return None
    found = residual(sample.visible, sample.infrared)
    if found.after < LEAST:
        return None
    if not found.believed:
        return 0.0
    where = {"split": split, "id": entry.id, "x": round(found.x, 1), "y": round(found.y, 1)}
    report["misaligned"].append({**where, "pixels": round(found.length, 1), "score": round(found.after, 3)})
    return found.length


def _quantiles(shifts: Sequence[float]) -> dict[str, float] | None:
    if not shifts:
        return None
    ordered = sorted(shifts)
    return {name: round(ordered[int(q * (len(ordered) - 1))], 1) for name, q in (("median", 0.5), ("p90", 0.9))}


def _counted(
    split: str, members: Sequence[Entry], row: DatasetRow, report: JsonObject, progress: bool
) -> tuple[JsonObject, Fingerprints, list[str]]:
    """What a split holds, and the fingerprints and ids of the pairs that could be read; `report` is told of others."""
    prints, ids = Fingerprints(), list[str]()
    sizes, there = Counter[str](), Counter[str]()
    shifts, pixels = list[float](), torch.zeros(256, dtype=torch.long)
    for entry in progress_bar(members, desc=f"checking {split}", disable=not progress):
        sample = _examined(entry, split, row, report)
        if sample is None:
            continue
        sizes["x".join(map(str, sample.size))] += 1
        if (shift := _misaligned(entry, split, sample, report)) is not None:
            shifts.append(shift)
        report["notices"] += [
            {"split": split, "id": entry.id, "kind": n.kind, "text": n.sentence()} for n in sample.notices
        ]
        there.update(name for name in ("visible", "infrared", "label") if getattr(sample, name) is not None)
        if sample.label is not None:
            pixels += torch.bincount(sample.label.clamp(0, 255).flatten(), minlength=256)
        prints.add(entry, sample)
        ids.append(entry.id)
    counted = max(int(pixels.sum() - pixels[IGNORE]), 1)
    lossy = [f"{path}: a lossy file does not keep ids; save labels as PNG" for path in lossy_labels(members)]
    faults = label_faults(pixels, row, every_class=split == "train")
    report["label_faults"] += [{"split": split, "reason": reason} for reason in [*faults, *lossy]]
    if there["label"] and split != "train":
        report["absent_classes"] += [{"split": split, "class": name} for name in absent_classes(pixels, row)]
    return (
        {
            "pairs": len(members),
            "visible": there["visible"],
            "infrared": there["infrared"],
            "labelled": there["label"],
            "sizes": dict(sizes.most_common()),
            "shift_pixels": _quantiles(shifts),
            "class_percent": {name: round(100 * int(pixels[i]) / counted, 4) for i, name in enumerate(row.classes)},
        },
        prints,
        ids,
    )


def _part_of(first: str, second: str) -> bool:
    """test_day lies within test, train within trainval: sharing images is their purpose."""
    short, long = sorted((first, second), key=len)
    return long.startswith(f"{short}_") or (long == "trainval" and short in ("train", "val"))


def _listed(
    splits: Sequence[str], dataset: str, root: str | Path, class_file: str | Path | None
) -> tuple[dict[str, list[Entry]], list[dict[str, str]]]:
    """The entries of every split that can be listed, and why the others cannot."""
    found: dict[str, list[Entry]] = {}
    errors = []
    for split in splits:
        try:
            found[split] = entries(dataset, root, split, class_file)
        except InputError as error:
            errors.append({"split": split, "reason": str(error)})
    return found, errors


def _examined(entry: Entry, split: str, row: DatasetRow, report: JsonObject) -> Sample | None:
    """The sample, or None after the report was told what is wrong with it. Problems of one pair are all found."""
    sizes: dict[str, tuple[int, int]] = {}
    broken = False
    for path in dict.fromkeys((entry.rgbt, entry.visible, entry.infrared, entry.label)):
        if path is not None:
            try:
                sizes[str(path)] = image_size(path, as_infrared=path == entry.infrared)
            except InputError as error:
                report["unreadable"].append({"split": split, "id": entry.id, "path": str(path), "reason": str(error)})
                broken = True
    if len(set(sizes.values())) > 1:
        listed = {path: list(size) for path, size in sizes.items()}
        report["size_mismatches"].append({"split": split, "id": entry.id, "sizes": listed})
        broken = True
    if broken:
        return None
    try:
        return read_sample(entry, row)
    except InputError as error:
        key = "bad_labels" if entry.label is not None and str(error).startswith(str(entry.label)) else "unreadable"
        report[key].append({"split": split, "id": entry.id, "reason": str(error)})
        return None
