"""The figures of `fusionsam fusion-metrics`: means, places and contrast of objects, for the terminal and as files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusionsam.io import whole, write_json
from fusionsam.metrics.contrast import SMALLEST_OBJECT
from fusionsam.metrics.fusion import LOWER_IS_BETTER, METRICS
from fusionsam.types import JsonObject

MEANS, ROWS = "fusion_metrics.json", "fusion_metrics.csv"
OBJECTS = ("objects", "contrast_fused", "contrast_infrared")
"""What is measured of labelled objects beside METRICS: their number, and the mean contrast of each in both pictures."""

Scores = dict[str, float]  # metric -> value
Table = dict[str, dict[str, Scores]]  # method -> image -> metrics


def means(table: Table) -> dict[str, Scores]:
    """Method -> metric -> mean over its images."""
    return {
        method: {metric: float(np.mean([row[metric] for row in rows.values()])) for metric in METRICS}
        for method, rows in table.items()
    }


def ranks(values: Mapping[str, Scores], metric: str) -> dict[str, int]:
    """Method -> its place by `metric`, 1 = best; equal values share a place (1, 2, 2, 4)."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return {
        method: 1 + sum(sign * other[metric] > sign * scores[metric] for other in values.values())
        for method, scores in values.items()
    }


def object_contrast(table: Table) -> dict[str, Scores]:
    """Method -> objects, fused and infrared contrast (grey levels, means over all objects) and `ratio`, fused to
    infrared; empty where no object was measured."""
    found = {}
    for method, rows in table.items():
        measured = [row for row in rows.values() if OBJECTS[0] in row]
        objects = sum(row[OBJECTS[0]] for row in measured)
        if objects:
            fused, infrared = (sum(row[OBJECTS[0]] * row[key] for row in measured) / objects for key in OBJECTS[1:])
            ratio = fused / infrared if infrared else math.inf
            found[method] = {"objects": objects, "fused": fused, "infrared": infrared, "ratio": ratio}
    return found


def contrast_lines(found: Mapping[str, Scores], label_id: int) -> list[str]:
    """`object_contrast` for the terminal, of objects of this id."""
    lines = [f"contrast of objects of id {label_id} against their surroundings, grey levels, and to that in infrared:"]
    for method, row in found.items():
        lines.append(
            f"{method}: {row['fused']:.1f} of {row['infrared']:.1f}, {row['ratio']:.2f} ({row['objects']:.0f} objects)"
        )
    return lines if found else [f"no object of id {label_id} of at least {SMALLEST_OBJECT} pixels in the labels"]


def as_text(values: Mapping[str, Scores], counts: Mapping[str, int], ours: Sequence[str]) -> str:
    """The table for the terminal: best marked *, second +, then the places of `ours`."""
    places = {metric: ranks(values, metric) for metric in METRICS}
    width = max(len("method"), *map(len, values)) + 2
    heads = [metric + ("(low)" if metric in LOWER_IS_BETTER else "") for metric in METRICS]
    lines = ["method".ljust(width) + f"{'n':>5}" + "".join(f"{head:>11}" for head in heads)]
    for method, scores in values.items():
        cells = []
        for metric in METRICS:
            mark = {1: "*", 2: "+"}.get(places[metric][method], " ")
            cells.append(f"{scores[metric]:.4f}{mark}".rjust(11))
        lines.append(method.ljust(width) + f"{counts[method]:>5}" + "".join(cells))
    lines.append("* best, + second; higher is better except (low). n images each; means over them.")
    for method in ours:
        lines.append(f"rank of {method} among {len(values)}: " + ", ".join(f"{m} {places[m][method]}" for m in METRICS))
    return "\n".join(lines)


def write(out: Path, table: Table) -> dict[str, Scores]:
    """Write fusion_metrics.csv (method, image, metrics; every digit) and fusion_metrics.json (method -> metric ->
    mean, null where it is not finite, and the number of `images`) into `out`; returns the means. InputError if it
    cannot."""
    found = means(table)
    plain: dict[str, JsonObject] = {
        method: {"images": len(table[method]), **{m: v if math.isfinite(v) else None for m, v in scores.items()}}
        for method, scores in found.items()
    }
    for method, row in object_contrast(table).items():
        plain[method]["object_contrast"] = {
            key: round(value, 4) if math.isfinite(value) else None for key, value in row.items()
        }
    with whole(out / ROWS) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", *METRICS])
        for method, rows in table.items():
            writer.writerows([method, id, *(row[metric] for metric in METRICS)] for id, row in rows.items())
    write_json(out / MEANS, plain, allow_nan=False)
    return found
