"""The command `fusionsam data`: `check` shows a data set's counts and problems as a table, `import` makes one of other
tools' annotations."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusionsam.cli.options import add_flags
from fusionsam.cli.parser import Parser
from fusionsam.config.datasets import CATALOG
from fusionsam.config.options import LabelOptions, OutOption, OverwriteOption, PairOptions
from fusionsam.io import write_json
from fusionsam.types import InputError, JsonObject

if TYPE_CHECKING:
    from fusionsam.data.labelling.data_set import Imported

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


@dataclass(frozen=True, kw_only=True)
class ImportOptions(PairOptions, OutOption, OverwriteOption):
    """Draw the annotations of other tools as label maps: COCO (polygons and run-length codes), CVAT for images,
    labelme, Label Studio, Roboflow's semantic masks. Writes labels/, classes.yaml and manifest.csv into --out, which
    train reads; an import that was ended goes on with the same command."""

    annotations: Path
    """the file (.json, .xml), or the folder of labelme's files or Roboflow's masks"""
    format: Literal["auto", "coco", "cvat", "labelme", "label-studio", "roboflow"] = "auto"
    """what it is"""
    match: tuple[str, ...] = field(default=(), metadata={"metavar": "PATTERN"})
    """how the files of a pair are named, visible first: '{id}_rgb' '{id}_th'"""
    class_file: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """YAML with the classes (left out: background, and those of the annotations as they are met)"""
    drop: tuple[str, ...] = field(default=(), metadata={"metavar": "CLASS"})
    """classes whose objects are left out"""


ACTIONS = {
    "check": (Options, "counts, sizes, class pixels, unreadable files, leaks between the splits"),
    "import": (ImportOptions, "a data set of the annotations of COCO, CVAT, labelme, Label Studio or Roboflow"),
}


def parse(prog: str, argv: list[str], command: str = "") -> Options | ImportOptions:
    """The action and its flags."""
    parser = Parser(prog=prog, description="Look at a data set before hours are spent on it, or make one.")
    action = parser.add_subparsers(dest="action", required=True, metavar="{check,import}")
    for name, (kind, line) in ACTIONS.items():
        told = inspect.cleandoc(kind.__doc__ or "")
        add_flags(action.add_parser(name, help=line, description=told, argument_default=argparse.SUPPRESS), kind)
    typed = vars(parser.parse_args(argv))
    chosen = ACTIONS[typed.pop("action")][0]
    return chosen(**{name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()})


def main(options: Options | ImportOptions) -> int:
    """Check, print, and answer 1 if there is a problem; or import, and say what came of it."""
    if isinstance(options, ImportOptions):
        return _import(options)
    from fusionsam.data.check import check

    report = check(options.dataset, options.root, options.splits, options.class_file, labels_map=options.mapped_ids)
    print(table(report))
    if options.json:
        write_json(options.json, report, "choose another --json")
    return 0 if report["ok"] else 1


def _import(options: ImportOptions) -> int:
    from fusionsam.data.labelling.data_set import import_labels
    from fusionsam.data.pairing import pair_folders

    for path in (options.visible, options.infrared):
        if path is not None and not path.is_dir():
            raise InputError(f"{path}: no such folder; expected a folder of pictures")
    if options.visible is None and options.infrared is None:
        raise InputError("data import: neither --visible nor --infrared was given; give the folders of the pictures")
    pairs = pair_folders(options.visible, options.infrared, options.match)
    found = import_labels(
        options.annotations, pairs.entries, options.out, options.format, options.class_file, options.drop,
        options.overwrite,
    )  # fmt: skip
    aside = [*pairs.aside, *pairs.alone.values()]
    for line in [*aside[:_SHOWN], *([f"and {len(aside) - _SHOWN} more"] if len(aside) > _SHOWN else [])]:
        print(line, file=sys.stderr)
    if found.finished:
        print(f"{options.out}: was finished before; --overwrite makes it anew")
        return 0
    for line in _told(found):
        print(line)
    print(
        f"fusionsam train --data.dataset manifest --data.root {options.out / 'manifest.csv'} "
        f"--data.class_file {options.out / 'classes.yaml'} ..."
    )
    return 0


def _told(found: Imported) -> list[str]:
    kept = f", {found.kept} of them from before" if found.kept else ""
    lines = [f"{found.pairs} pairs labelled{kept}; classes: {', '.join(found.classes)}"]
    for names, what in (
        (found.unknown, "annotated pictures are of no pair"),
        (found.unlabelled, "pairs are not annotated and were left out"),
    ):
        if names:
            lines.append(f"{len(names)} {what}, the first: {', '.join(names[:3])}")
    if found.empty:
        lines.append(f"{found.empty} pairs without an object: {found.classes[0]} alone")
    if found.hidden:
        without = f"; classes without a pixel: {', '.join(found.unseen)}" if found.unseen else ""
        lines.append(f"{found.hidden} objects have no pixel: of no area, or under objects drawn after them{without}")
    if found.two_sizes:
        lines.append(
            f"{found.two_sizes} pairs of two sizes; labels are in the visible picture's; give train --data.align auto"
        )
    return lines


def table(report: JsonObject) -> str:
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


def _problems(report: JsonObject) -> list[str]:
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
        "what was guessed of the files, or is odd about them (a note)": [
            f"{e['split']} {e['id']}: {e['text']}" for e in report["notices"]
        ],
    }
    return [*(_listed(found) or ["no problems found"]), *_listed(notes)]


def _pair(entry: JsonObject) -> str:
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
