"""The paper's tables and figures from folders of evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusionsam.config.datasets import CATALOG, Color, DatasetRow, find
from fusionsam.config.options import DataOptions
from fusionsam.data.dataset import PairDataset, open_split, read_sample
from fusionsam.data.images import read_visible
from fusionsam.data.predictions import PredictionFolder
from fusionsam.evaluation.tables import figures as report_figures
from fusionsam.evaluation.tables import tables as report_tables
from fusionsam.evaluation.tables.figures import PanelRow
from fusionsam.evaluation.tables.formats import to_markdown, write_table
from fusionsam.evaluation.tables.sources import Scored, collect, collect_fusion
from fusionsam.io import Made, OutputFolder, require_writable, scratch, write_json, write_text
from fusionsam.types import InputError

DEFAULT_ROWS = 4
"""Pairs in the panels when no ids are named, spread evenly over the split."""
RECORD = "report_files.json"
"""The names of all files that this command wrote into a folder."""


@dataclass(frozen=True, kw_only=True)
class PanelConfig(DataOptions):
    """What the qualitative panels show: runs (name -> folder of predictions) on some pairs of a split."""

    runs: Mapping[str, Path]
    ids: Sequence[str] = ()


def panel_rows(config: PanelConfig) -> tuple[list[PanelRow], DatasetRow]:
    """Pictures and label maps for `report_figures.panels`, and the data set's classes and colours.

    The fused picture is the first run's that has ID_fused.png for every id. InputError for an unknown id, a pair
    without a label, and a run without a prediction of one of the ids or of another size."""
    data = open_split(config.dataset, config.root, config.split, config.class_file)
    assert data.row is not None
    if not data.row.classes:
        raise InputError(f"dataset {config.dataset!r} has no classes of its own; give --class-file")
    chosen = _chosen(data, config)
    folders = {name: PredictionFolder(path, chosen, data.row.palette) for name, path in config.runs.items()}
    for name, folder in folders.items():
        if folder.missing:
            raise InputError(f"--panels {name}={folder.folder}: no prediction of {folder.missing[0]!r}; predict it too")
    fused = next((p for p in config.runs.values() if all((p / f"{i}_fused.png").is_file() for i in chosen)), None)
    entries = {entry.id: entry for entry in data.entries}
    rows = []
    for id in chosen:
        sample = read_sample(entries[id], data.row)
        if sample.label is None:
            raise InputError(f"--ids {id}: has no label, the panels show the ground truth; choose another")
        pictures = {}
        if sample.visible is not None:
            pictures["visible"] = sample.visible.permute(1, 2, 0).numpy()
        if sample.infrared is not None:
            pictures["infrared"] = sample.infrared[0].numpy()
        if fused is not None:
            pictures["fused"] = read_visible(fused / f"{id}_fused.png").permute(1, 2, 0).numpy()
        labels = {name: folder[id].numpy() for name, folder in folders.items()}
        labels["ground truth"] = sample.label.numpy()
        for name, array in (pictures | labels).items():
            if array.shape[:2] != sample.size:
                found = f"{array.shape[0]}x{array.shape[1]}"
                raise InputError(f"--panels: {name} of {id} is {found}, expected {sample.size[0]}x{sample.size[1]}")
        rows.append(PanelRow(id, pictures, labels))
    return rows, data.row


def _chosen(data: PairDataset, config: PanelConfig) -> list[str]:
    known = [entry.id for entry in data.entries]
    strange = [id for id in config.ids if id not in set(known)]
    if strange:
        raise InputError(f"--ids {strange[0]}: not in split {config.split!r} of {config.root}; its first is {known[0]}")
    if config.ids:
        return list(dict.fromkeys(config.ids))
    return [known[i] for i in np.unique(np.linspace(0, len(known) - 1, DEFAULT_ROWS).round().astype(int))]


def _palette(one: Scored, class_file: Path | None) -> dict[str, Color]:
    """Class -> colour of the report's data set; empty where nothing tells."""
    dataset, classes = one.report.dataset, one.report.classes
    if dataset not in CATALOG:
        return {}
    row = find(dataset, class_file if not CATALOG[dataset].classes else None)
    return dict(zip(row.classes, row.palette, strict=True)) if set(classes) <= set(row.classes) else {}


def _slug(text: str, taken: set[str]) -> str:
    """The text as a file name of its own."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")[:80] or "report"
    name, number = plain, 1
    while name in taken:
        number += 1
        name = f"{plain}_{number}"
    taken.add(name)
    return name


def _run_name(one: Scored) -> str:
    """Who was scored, with modality and prompts; a baseline's name says already what it saw."""
    report = one.report
    parts = [report.prompts] if report.baseline is not None else [report.modality, report.prompts]
    how = ", ".join(part for part in parts if part)
    return f"{one.label} ({how})" if how else one.label


def figures(found: Sequence[Scored], out: Path, class_file: Path | None = None) -> list[Path]:
    """A confusion matrix for each report and a bar chart for each split; reports with prompts from the ground truth
    have a bar chart of their own. Returns the files written."""
    written: list[Path] = []
    taken: set[str] = set()
    for one in found:
        mark = "oracle " if one.oracle else ""
        report = one.report
        name = _slug(f"confusion {mark}{report.dataset} {report.split} {_run_name(one)}", taken)
        figure = report_figures.confusion(report.title, report.confusion_matrix, report.classes)
        written += report_figures.save(figure, out / name)
    charts: dict[tuple[str, ...], list[Scored]] = {}
    for one in found:
        r = one.report
        key = (r.dataset, str(r.split), r.split_ids_sha256, one.group, "oracle" if one.oracle else "")
        charts.setdefault(key, []).append(one)
    for (dataset, split, _, group, mark), members in charts.items():
        title = f"{report_tables.NAMES.get(dataset, dataset)}, {group}"
        title = f"UPPER BOUND (prompts drawn from the ground truth): {title}" if mark else title
        series = {}
        for one in members:
            label = _run_name(one)
            series[label if label not in series else f"{label} {one.path.parent}"] = one.report.per_class_iou
        figure = report_figures.bars(title, series, _palette(members[0], class_file))
        written += report_figures.save(figure, out / _slug(f"bars {mark} {dataset} {split}", taken))
    return written


def run(
    folders: Sequence[Path],
    out: Path,
    panels: PanelConfig | None = None,
    draw: bool = True,
    class_file: Path | None = None,
) -> list[Path]:
    """Write tables, figures and report.md, which shows them all, into `out`; returns the files written. Raises
    InputError where nothing is found, for a file that would be replaced and that this command did not write, and as its
    parts do; `out` then is as it was."""
    if draw:
        report_figures.require()
    if panels is not None and not draw:
        raise InputError("--panels: are figures; leave out --no-figures")
    found, fusion = collect(folders), collect_fusion(folders)
    if not found and not fusion and panels is None:
        raise InputError(
            f"--reports {' '.join(map(str, folders))}: found no report.json, report_oracle.json, report_named.json or "
            "fusion_metrics.json; give folders that fusionsam evaluate or fusion-metrics wrote"
        )
    tables = report_tables.build(found, fusion)
    shown = None if panels is None else panel_rows(panels)
    require_writable(out)
    with scratch(out) as part:  # all of it is made before anything is replaced
        written = [path for table in tables for path in write_table(table, part)]
        pictures = figures(found, part, class_file) if draw else []
        if panels is not None and shown is not None:
            rows, row = shown
            figure = report_figures.panels(rows, row.classes, row.palette)
            pictures += report_figures.save(figure, part / f"panels_{panels.dataset}_{panels.split}")
        links = [f"![{path.stem}]({path.name})\n" for path in pictures if path.suffix == ".png"]
        whole = write_text(part / "report.md", "\n".join([*map(to_markdown, tables), *links]))
        made = [*written, *pictures, whole]
        _record(out, [path.name for path in made])
        return [path.replace(out / path.name) for path in made]


def _record(out: Path, names: Sequence[str]) -> None:
    """Note that these files of `out` are ours; InputError for one that is there and that somebody else wrote."""
    folder = OutputFolder(out, "report")
    stored = folder.read(RECORD)
    told = [] if stored is None else stored.get("files")
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        folder.foreign(RECORD)
    folder.state(RECORD, None, Made({}), [name for name in names if name not in told])
    write_json(folder / RECORD, {"files": sorted({*told, *names})})
