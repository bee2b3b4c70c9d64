"""The figures of `fusionsam clicks`: clicks needed and IoU reached, by picture, time of day, class and recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionsam.evaluation.tables.formats import Row, Table
from fusionsam.metrics.interaction import clicks_needed, iou_after
from fusionsam.types import JsonObject

NAME = "clicks"
TARGETS = (0.80, 0.85)
AFTER = (1, 3, 5)
FEW_OBJECTS = 20
"""With fewer, a row is marked: its figures say little."""


@dataclass(frozen=True)
class Measured:
    """One object, and the IoU after every click on each picture."""

    id: str
    class_id: int
    pixels: int
    ious: Mapping[str, Sequence[float]]


def scores(
    measured: Sequence[Measured],
    classes: Sequence[str],
    most: int,
    sequences: Mapping[str, str],
    draws: int = 1000,
    seed: int = 0,
) -> JsonObject:
    """Everything that the report says of the objects; plain JSON types.

    For every picture and group of objects (all, day, night, each class): NoC@80, NoC@85 (an object that never gets
    there counts `most`), share not reached in percent, mean IoU in percent after 1, 3 and 5 clicks, and 95 % intervals
    of `draws` bootstrap resamples of whole recordings. `difference`: NoC@80 on the fused picture less that on each
    other one, paired. `recordings`: NoC@80 of each recording, which `sequences` tells by the pair's id; a pair that is
    not in it is a recording of its own.
    """
    names = [sequences.get(one.id, f"pair {one.id}") for one in measured]
    groups = np.unique(names, return_inverse=True)[1]
    pictures = list(measured[0].ious)
    figures = {name: _figures(measured, name, most) for name in pictures}
    rows: JsonObject = {}
    for name, chosen in selections([one.id for one in measured], [one.class_id for one in measured], classes).items():
        rows[name] = {"objects": int(chosen.sum()), "recordings": len(np.unique(groups[chosen])), "pictures": {}}
        for picture, columns in figures.items():
            rows[name]["pictures"][picture] = _row(columns, chosen, groups, draws, seed)
        if "fused" in pictures:
            rows[name]["difference"] = {
                f"fused - {other}": _difference(figures, other, chosen, groups, draws, seed)
                for other in pictures
                if other != "fused"
            }
    return {"n_objects": len(measured), "groups": rows, "recordings": _by_recording(measured, groups, figures)}


def _figures(measured: Sequence[Measured], picture: str, most: int) -> dict[str, NDArray[np.float64]]:
    ious = [one.ious[picture] for one in measured]
    columns: dict[str, list[float]] = {}
    for target in TARGETS:
        needed = [clicks_needed(one, target, most) for one in ious]
        columns[f"noc{100 * target:.0f}"] = [float(clicks) for clicks, _ in needed]
        columns[f"not_reached{100 * target:.0f}"] = [100.0 * (not reached) for _, reached in needed]
    for clicks in AFTER:
        if clicks <= most:
            columns[f"iou{clicks}"] = [100 * iou_after(one, clicks) for one in ious]
    return {name: np.array(values) for name, values in columns.items()}


def selections(ids: Sequence[str], class_ids: Sequence[int], classes: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which objects, of these pairs and classes, belong to which group. MFNet's ids end in D by day and N at night;
    others have no such group."""
    ids = [id.removesuffix("_flip") for id in ids]
    found = {"all": np.ones(len(ids), bool)}
    if all(id[-1:] in ("D", "N") for id in ids):
        for name, letter in (("day", "D"), ("night", "N")):
            found[name] = np.array([id.endswith(letter) for id in ids])
    for class_id in sorted(set(class_ids)):
        found[classes[class_id]] = np.array([other == class_id for other in class_ids])
    return {name: chosen for name, chosen in found.items() if chosen.any()}


def _row(
    columns: Mapping[str, NDArray[np.float64]],
    chosen: NDArray[np.bool_],
    groups: NDArray[np.integer],
    draws: int,
    seed: int,
) -> JsonObject:
    row: JsonObject = {}
    for name, values in columns.items():
        row[name] = float(values[chosen].mean())
        if draws:
            row[f"{name}_interval"] = grouped_interval(values[chosen], groups[chosen], draws, seed)
    return row


def grouped_interval(
    values: NDArray[np.float64], groups: NDArray[np.integer], draws: int, seed: int
) -> list[float] | None:
    """95 % interval of the mean of `values` (n) over `draws` bootstrap resamples of whole groups (n numbers); None for
    a single group, which tells nothing of others."""
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    if count < 2:
        return None
    sums, sizes = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(seed).integers(0, count, (draws, count))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return [float(end) for end in np.percentile(means, (2.5, 97.5))]


def _difference(
    figures: Mapping[str, Mapping[str, NDArray[np.float64]]],
    other: str,
    chosen: NDArray[np.bool_],
    groups: NDArray[np.integer],
    draws: int,
    seed: int,
) -> JsonObject:
    gap = (figures["fused"]["noc80"] - figures[other]["noc80"])[chosen]
    interval = grouped_interval(gap, groups[chosen], draws, seed) if draws else None
    return {"noc80": float(gap.mean()), "interval": interval}


def _by_recording(
    measured: Sequence[Measured],
    groups: NDArray[np.integer],
    figures: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> list[JsonObject]:
    found = []
    for group in np.unique(groups):
        inside = groups == group
        ids = sorted({one.id for one, member in zip(measured, inside, strict=True) if member})
        needed = {picture: float(columns["noc80"][inside].mean()) for picture, columns in figures.items()}
        found.append({"ids": ids, "objects": int(inside.sum()), "noc80": needed})
    return found


def table(values: JsonObject) -> Table:
    """One line for every group of objects and picture."""
    rows = []
    for name, group in values["groups"].items():
        heading = f"{name}: {group['objects']} objects of {group['recordings']} recordings"
        few = (f"fewer than {FEW_OBJECTS} objects",) if group["objects"] < FEW_OBJECTS else ()
        for picture, row in group["pictures"].items():
            cells = [picture]
            for target in TARGETS:
                key = f"noc{100 * target:.0f}"
                cells.append(f"{row[key]:.2f}{_ends(row.get(f'{key}_interval'))}")
            cells += [f"{row[f'not_reached{100 * target:.0f}']:.0f}" for target in TARGETS]
            cells += [f"{row[f'iou{clicks}']:.1f}" for clicks in AFTER if f"iou{clicks}" in row]
            rows.append(Row(heading, tuple(cells), few))
    after = [f"IoU after {clicks}" for clicks in AFTER if clicks <= values["most"]]
    missed = [f"not at {100 * target:.0f}, %" for target in TARGETS]
    columns = ("picture", *(f"NoC@{100 * target:.0f} (95 %)" for target in TARGETS), *missed, *after)
    return Table(NAME, values["title"], columns, rows, list(values.get("notes", ())))


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
