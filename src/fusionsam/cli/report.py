"""The command `fusionsam report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.config.datasets import CATALOG
from fusionsam.config.options import DataOptions, OutOption
from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class Options(OutOption):
    """Make tables (Markdown, LaTeX, CSV) and figures (PNG, PDF) of the reports that evaluate and fusion-metrics wrote;
    OUT/report.md shows them all."""

    reports: Sequence[Path]
    """folders with reports of evaluations, at any depth"""
    figures: bool = True
    """draw figures; needs matplotlib"""
    panels: Sequence[str] = field(default=(), metadata={"metavar": "RUN=FOLDER"})
    """runs and their predictions for the qualitative panels"""
    dataset: str | None = field(default=None, metadata={"one_of": CATALOG})
    """of the panels: row of the catalogue"""
    root: Path | None = None
    """of the panels: folder of the data set, or the manifest file"""
    split: str = DataOptions.split
    """of the panels: official split, or NAME of a list NAME.txt"""
    ids: Sequence[str] = ()
    """of the panels: their rows (left out: four of the split)"""
    class_file: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """YAML with classes and palette, for pairs and manifest"""

    def __post_init__(self) -> None:
        """InputError for options that do not go together."""
        if not self.panels and (self.dataset or self.root is not None or self.ids):
            raise InputError("--dataset, --root, --ids: are of the panels; give --panels, or leave them out")
        if self.runs and (not self.dataset or self.root is None):  # what is no RUN=FOLDER is told first
            raise InputError("--panels: needs --dataset and --root, for the pictures and the ground truth")

    @property
    def runs(self) -> dict[str, Path]:
        """Name -> folder of each of the panels' runs."""
        runs: dict[str, Path] = {}
        for given in self.panels:
            name, equals, folder = given.partition("=")
            if not (name and equals and folder) or name in runs or name in ("visible", "infrared", "fused"):
                raise InputError(f"--panels {given!r}: expected RUN=FOLDER, each RUN once and no picture's name")
            runs[name] = Path(folder)
        return runs


def main(options: Options) -> int:
    """Write, and say where."""
    runs = options.runs
    from fusionsam.evaluation.tables.run import PanelConfig, run

    panels = None
    if options.dataset is not None and options.root is not None:
        where = (options.dataset, options.root, options.split)
        panels = PanelConfig(*where, runs=runs, ids=options.ids, class_file=options.class_file)
    written = run(options.reports, options.out, panels, options.figures, options.class_file)
    print(f"{len(written)} files -> {options.out}; {options.out / 'report.md'} shows them all")
    return 0
