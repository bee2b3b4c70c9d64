"""`python -m fusionsam.evaluation.tables.results results`: every report in a folder, one row each, as FOLDER/tables.md.

Unlike `fusionsam report` it compares nothing with the paper: it is the index of a folder of reports, each row with its
path. Reports on one list of images share a table; those whose prompts the labels drew have one of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fusionsam.evaluation.report import Report
from fusionsam.evaluation.robustness import read_table
from fusionsam.evaluation.tables.formats import Row, Table, to_markdown
from fusionsam.evaluation.tables.sources import Scored, collect, collect_fusion
from fusionsam.evaluation.tables.tables import fusion_quality
from fusionsam.io import write_text
from fusionsam.types import FROM_TRUTH, InputError

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


def _interval(ends: Sequence[float | None] | None, form: str = ".1f") -> str:
    low, high = ends or (None, None)
    return NONE if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _conditions(report: Report) -> str:
    """What was different from one view of both images: in words, or '-'."""
    found = [f"{report.modality} only"] if report.modality in ("visible", "infrared") else []
    found += [f"prompts {report.prompts}"] if report.prompts in FROM_TRUTH else []
    return ", ".join([*found, *report.conditions]) or NONE


def _difference(report: Report) -> str:
    """Difference to another report, its interval, and whether it is real."""
    against = report.against
    if against is None or against.difference is None:
        return NONE
    spread = _interval(against.interval, "+.1f")
    real = ", real" if against.real else ""
    return f"{against.difference:+.2f}" + (f" ({spread}{real})" if spread != NONE else "")


def evaluations(found: Sequence[Scored], folder: Path) -> list[Table]:
    """A table for each list of images, in order of its first report; upper bounds last."""
    groups: dict[tuple[bool, str, str, str], list[Scored]] = {}
    for one in sorted(found, key=lambda one: one.path):
        report = one.report
        key = (one.oracle, report.dataset, str(report.split), report.split_ids_sha256)
        groups.setdefault(key, []).append(one)
    tables = []
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    for number, ((oracle, dataset, split, _), members) in enumerate(ordered):
        classes = list(dict.fromkeys(name for one in members for name in one.report.per_class_iou))
        columns = ("report", "what differs", "mIoU", "interval", "difference", "day", "night", *classes)
        rows = []
        for one in members:
            report, times = one.report, one.report.by_time or {}
            cells = (
                str(one.path.parent.relative_to(folder)),
                _conditions(report),
                _number(report.miou),
                _interval(report.interval),
                _difference(report),
                *(_number(times[time].miou if time in times else None, 1) for time in ("day", "night")),
                *(_number(report.per_class_iou.get(name), 1) for name in classes),
            )
            rows.append(Row(one.group, cells))
        title = f"{dataset}/{split}, {members[0].report.n_images} images"
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
