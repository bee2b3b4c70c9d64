"""`python -m fusionsam.evaluation.tables.results results`: every report in a folder, one row each, as FOLDER/tables.md.

Unlike `fusionsam report` it compares nothing with the paper: it is the index of a folder of reports, each row with its
path. Reports on one list of images share a table; those whose prompts the labels drew have one of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionsam.errors import InputError
from fusionsam.evaluation.robustness import read_table
from fusionsam.evaluation.tables.formats import Row, Table, to_markdown
from fusionsam.evaluation.tables.sources import Scored, collect, collect_fusion
from fusionsam.evaluation.tables.tables import fusion_quality
from fusionsam.io import write_text

NONE = "-"
HEAD = """# Tables

Made from the JSON reports in this folder by `python -m fusionsam.evaluation.tables.results results` (`make tables`). Do
not edit it; run the command again.

The command, commit and settings of each row stand in its JSON file. mIoU and IoU are in percent, mIoU over the classes
that occur (`present`), with its 95 % bootstrap interval over images. `difference` is to the report that the JSON names
(`against`); it is *real* where its interval leaves zero out. What the figures mean: docs/findings.md.
"""


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _conditions(values: Mapping[str, Any]) -> str:
    """What was different from one view of both images as trained: in words, or '-'."""
    modality, scales = values.get("modality"), list(values.get("scales") or [1.0])
    found = [f"{modality} only"] if modality in ("visible", "infrared") else []
    found += [f"prompts {values['prompts']}"] if values.get("prompts") in ("none", "oracle") else []
    found += ["flip"] if values.get("flip") else []
    found += ["scales " + " ".join(f"{scale:g}" for scale in scales)] if scales != [1.0] else []
    found += ["class offsets fitted on these pairs"] if (values.get("fitted") or {}).get("class_offsets") else []
    return ", ".join(found) or NONE


def _difference(values: Mapping[str, Any]) -> str:
    """Difference to another report, its interval, and whether it is real."""
    against = values.get("against")
    if not isinstance(against, Mapping) or against.get("difference") is None:
        return NONE
    low, high = against.get("interval") or (None, None)
    spread = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f}{', real' if against['real'] else ''})"
    return f"{against['difference']:+.2f}{spread}"


def evaluations(found: Sequence[Scored], folder: Path) -> list[Table]:
    """A table for each list of images, in order of its first report; upper bounds last."""
    groups: dict[tuple[bool, str, str, str], list[Scored]] = {}
    for one in sorted(found, key=lambda one: one.path):
        v = one.values
        groups.setdefault((one.oracle, v["dataset"], str(v.get("split")), v["split_ids_sha256"]), []).append(one)
    tables = []
    for number, ((oracle, dataset, split, _), members) in enumerate(
        sorted(groups.items(), key=lambda item: item[0][0])
    ):
        classes = list(dict.fromkeys(name for one in members for name in one.values["per_class_iou"]))
        columns = ("report", "what differs", "mIoU", "interval", "difference", "day", "night", *classes)
        rows = []
        for one in members:
            v, times = one.values, one.values.get("by_time") or {}
            low, high = v.get("interval") or (None, None)
            cells = (
                str(one.path.parent.relative_to(folder)),
                _conditions(v),
                _number(v["miou"]),
                NONE if low is None else f"{low:.1f} to {high:.1f}",
                _difference(v),
                *(_number((times.get(time) or {}).get("miou"), 1) for time in ("day", "night")),
                *(_number(v["per_class_iou"].get(name), 1) for name in classes),
            )
            rows.append(Row(one.group, cells))
        title = f"{dataset}/{split}, {members[0].values['n_images']} images"
        title = f"Upper bound, prompts drawn from the labels: {title}" if oracle else title
        tables.append(Table(f"evaluations_{number}", title, columns, rows))
    return tables


def robustness(folder: Path) -> list[Table]:
    """mIoU of every robustness.json, a column for each corruption."""
    found = {path: read_table(path) for path in sorted(folder.rglob("robustness.json"))}
    conditions = list(dict.fromkeys(name for values in found.values() for name in values["conditions"]))
    rows = [
        Row(
            f"{values['dataset']}/{values.get('split')}, {values['n_images']} images",
            (
                str(path.parent.relative_to(folder)),
                *(_number((values["conditions"].get(name) or {}).get("miou"), 1) for name in conditions),
            ),
        )
        for path, values in found.items()
    ]
    return [Table("robustness", "Corrupted pairs, mIoU", ("report", *conditions), rows)] if rows else []


def listing(folder: Path) -> str:
    """The text of tables.md; InputError for a missing folder or a file that is no report."""
    fusion = collect_fusion([folder])
    tables = evaluations(collect([folder]), folder) + robustness(folder)
    tables += [fusion_quality(fusion)] if fusion else []
    return "\n".join([HEAD, *map(to_markdown, tables)])


def main(argv: Sequence[str]) -> int:
    """Write FOLDER/tables.md; 2 and one line for bad input."""
    if len(argv) != 1:
        print("usage: python -m fusionsam.evaluation.tables.results FOLDER", file=sys.stderr)
        return 2
    try:
        print(write_text(Path(argv[0]) / "tables.md", listing(Path(argv[0]))))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
