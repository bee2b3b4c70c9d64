"""Paired differences between two folders of `fusionsam clicks`, of the objects that both measured.

    python experiments/sam_clicks/compare.py --root ../shared/data/mfnet417 --before out/before --after out/after

Writes `compared.json` into the folder of --after: for each picture and group of objects NoC@80, share not reached and
IoU after clicks, before and after, with the difference and its 95 % interval over recordings.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusionsam.data.dataset import open_labelled_split
from fusionsam.data.sequences import recording_sequences
from fusionsam.evaluation.click_report import Measured, grouped_interval, selections
from fusionsam.evaluation.clicks import LINES, read_lines
from fusionsam.io import commit, write_json
from fusionsam.metrics.interaction import clicks_needed, iou_after
from fusionsam.types import InputError, JsonObject

FIGURES = ("NoC@80", "not at 80, %", "IoU after 1", "IoU after 3", "IoU after 5")
WEIGHTS = {"sam", "sam_sha256", "weights", "weights_sha256"}
"""All that the two measurements may differ in, and pictures that one of them has alone."""


def figures(ious: Sequence[float], most: int) -> list[float]:
    clicks, reached = clicks_needed(ious, 0.80, most)
    return [float(clicks), 100.0 * (not reached), *(100 * iou_after(ious, number) for number in (1, 3, 5))]


def measured(folder: Path) -> tuple[JsonObject, dict[str, list[Measured]]]:
    """The settings of a folder of `fusionsam clicks`, and the objects of each pair."""
    if not (folder / LINES).is_file():
        raise InputError(f"{folder / LINES}: no such file; give a folder of fusionsam clicks")
    read = read_lines(folder / LINES, lambda row: Measured(**row))
    return read.settings, read.objects


def require_classes(names: Sequence[str], classes: Sequence[str]) -> None:
    """InputError for a name that is no class."""
    if unknown := [name for name in names if name not in classes]:
        raise InputError(f"--leave-out {unknown[0]!r}: is no class; choose from {', '.join(classes[1:])}")


def compare(given: argparse.Namespace) -> None:
    """All, day, night, each class, classes left out of a training and the others."""
    (before, old), (after, new) = measured(given.before), measured(given.after)
    unlike = [name for name in {*before, *after} - WEIGHTS - {"images"} if before.get(name) != after.get(name)]
    if unlike:
        raise InputError(f"{given.after}: was measured with another {', '.join(sorted(unlike))} than {given.before}")
    data = open_labelled_split(str(before["dataset"]), given.root, str(before["split"]))
    require_classes(given.leave_out, data.row.classes)
    sequences = recording_sequences(data.entries)
    both = [id for id in old if id in new]
    pairs = [(one, two) for id in both for one, two in zip(old[id], new[id], strict=True)]
    if not pairs:
        raise InputError(f"{given.before}, {given.after}: measured no object of the same pair; give others")
    most = int(str(before["most"]))
    pictures = [on for on in pairs[0][0].ious if on in pairs[0][1].ious]
    ids, class_ids = [one.id for one, _ in pairs], [one.class_id for one, _ in pairs]
    groups = np.unique([sequences.get(id, id) for id in ids], return_inverse=True)[1]
    chosen = selections(ids, class_ids, data.row.classes)
    unseen = np.array([data.row.classes[one] in given.leave_out for one in class_ids])
    chosen |= {name: there for name, there in (("left out", unseen), ("trained", ~unseen)) if there.any()}
    rows: dict[str, dict[str, object]] = {}
    for on in pictures:
        two = [np.array([figures(side.ious[on], most) for side in sides]) for sides in zip(*pairs, strict=True)]
        for name, there in chosen.items():
            row: dict[str, object] = {"objects": int(there.sum()), "recordings": len(np.unique(groups[there]))}
            for column, title in enumerate(FIGURES):
                was, now = (side[there, column] for side in two)
                ends = grouped_interval(now - was, groups[there], 1000, given.seed)
                row[title] = {
                    "before": float(was.mean()), "after": float(now.mean()),
                    "difference": float((now - was).mean()), "interval": ends,
                }  # fmt: skip
            rows[f"{on}, {name}"] = row
            print(f"{on}, {name}: {row['objects']} objects, NoC@80 {row['NoC@80']}")
    told = {
        "command": shlex.join(["python", *sys.argv]), "commit": commit(), "pairs": len(both),
        "pairs_with_objects": len({*ids}), "rows": rows,
    }  # fmt: skip
    write_json(given.after / "compared.json", told)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--leave-out", nargs="*", default=[], help="classes left out of the training")
    parser.add_argument("--seed", type=int, default=0)
    compare(parser.parse_args())


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"error: {error}")
