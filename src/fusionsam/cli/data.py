"""The command `fusionsam data check`: a data set's counts and problems as a table."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionsam.cli.options import add_flags
from fusionsam.cli.parser import Parser
from fusionsam.config.datasets import CATALOG
from fusionsam.config.options import LabelOptions
from fusionsam.io import write_json

_SHOWN = 20  # problems of a kind; the rest is counted, and all are in --json


@dataclass(frozen=True, kw_only=True)
class Options(LabelOptions):
    """Counts, sizes, class pixels, unreadable files, pairs whose sizes differ, labels out of range, and images shared
    between splits (also mirrored). Exit code 1 if there is a problem."""

    dataset: str = field(metadata={"one_of": CATALOG})
    """row of the catalogue"""
    root: Path
    """folder of the data set, or the manifest file"""
    splits: Sequence[str] | None = field(default=None, metadata={"metavar": "NAME"})
    """splits to look at (left out: all that can be found)"""
    class_file: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """YAML with classes and palette, for pairs and manifest"""
    json: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """also write everything that was found to FILE"""


def parse(prog: str, argv: list[str], command: str = "") -> Options:
    """`check` and its flags; more actions may come."""
    parser = Parser(prog=prog, description="Look at a data set before hours are spent on it.")
    action = parser.add_subparsers(dest="action", required=True, metavar="check")
    told = inspect.cleandoc(Options.__doc__ or "")
    check = action.add_parser(
        "check",
        help="counts, sizes, class pixels, unreadable files, leaks between the splits",
        description=told,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(check, Options)
    typed = vars(parser.parse_args(argv))
    return Options(**{name: value for name, value in typed.items() if name != "action"})


def main(options: Options) -> int:
    """Check, print, and answer 1 if there is a problem."""
    from fusionsam.data.check import check

    report = check(options.dataset, options.root, options.splits, options.class_file, labels_map=options.mapped_ids)
    print(table(report))
    if options.json:
        write_json(options.json, report, "choose another --json")
    return 0 if report["ok"] else 1


def table(report: dict[str, Any]) -> str:
    """The report of data.check.check as text: a column a split, a row a class, then every kind of problem."""
    splits = report["splits"]
    rows = [["", *splits]]
    rows += [[key, *(str(s[key]) for s in splits.values())] for key in ("pairs", "visible", "infrared", "labelled")]
    rows.append(["shift px, median / p90", *(_shift(s["shift_pixels"]) for s in splits.values())])
    rows.append(["sizes", *(_sizes(s["sizes"]) for s in splits.values())])
    classes = next(iter(splits.values()))["class_percent"]
    rows += [[f"% {name}", *(f"{s['class_percent'][name]:.3f}" for s in splits.values())] for name in classes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{report['dataset']} in {report['root']}", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    layout = [report["layout"], ""] if report["layout"] else []
    return "\n".join([*lines, "", *layout, *_problems(report)])


def _shift(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.1f} / {found['p90']:.1f}"


def _sizes(sizes: dict[str, int]) -> str:
    shown = [size if len(sizes) == 1 else f"{size}: {count}" for size, count in list(sizes.items())[:3]]
    return ", ".join(shown) + (", ..." if len(sizes) > 3 else "") or "-"


def _problems(report: dict[str, Any]) -> list[str]:
    found = {
        "splits that cannot be listed": [f"{e['split']}: {e['reason']}" for e in report["errors"]],
        "unreadable files": [f"{e['split']} {e['id']}: {e['reason']}" for e in report["unreadable"]],
        "pairs whose sizes differ": [
            f"{e['split']} {e['id']}: " + ", ".join(f"{p} {h}x{w}" for p, (h, w) in e["sizes"].items())
            for e in report["size_mismatches"]
        ],
        "unusable labels": [f"{e['split']} {e['id']}: {e['reason']}" for e in report["bad_labels"]],
        "labels that would teach the wrong thing": [f"{e['split']}: {e['reason']}" for e in report["label_faults"]],
        "folders that are not read, and a camera is missing": [e["reason"] for e in report["unread"] if e["problem"]],
        "shared between splits": [_pair(e) for e in report["shared"]],
    }
    notes = {
        "classes without a pixel (a note)": [f"{e['split']}: {e['class']}" for e in report["absent_classes"]],
        "folders that are not read (a note)": [e["reason"] for e in report["unread"] if not e["problem"]],
        "look-alikes across splits (a note, no problem)": [_pair(e) for e in report["look_alikes"]],
        "infrared lies off, pixels to move it right and down (a note; --align takes such shifts off)": [
            f"{e['split']} {e['id']}: {e['x']:+.1f} {e['y']:+.1f}" for e in report["misaligned"]
        ],
    }
    return [*(_listed(found) or ["no problems found"]), *_listed(notes)]


def _pair(entry: dict[str, Any]) -> str:
    (first, second), (one, two) = entry["splits"], entry["ids"]
    return f"{first} {one} = {second} {two} ({entry['kind']})"


def _listed(found: dict[str, list[str]]) -> list[str]:
    lines = []
    for title, items in found.items():
        if items:
            lines += [f"{title}: {len(items)}", *(f"  {item}" for item in items[:_SHOWN])]
            if len(items) > _SHOWN:
                lines.append(f"  and {len(items) - _SHOWN} more; --json FILE holds all")
    return lines
