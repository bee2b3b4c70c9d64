"""What `fusionsam report` reads: reports of evaluations and fusion metrics, found in folders and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fusionsam.evaluation.published import TEST_IMAGES
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_files import REPORTS, read
from fusionsam.evaluation.report_form import optional_number
from fusionsam.io import digest
from fusionsam.metrics.fusion import METRICS
from fusionsam.types import InputError, JsonObject
from fusionsam.weights import checkpoint

VARIANTS = {
    "A": "(A) without LSTG",
    "B": "(B) without FMP",
    "C": "(C) FusionSAM",
    "continuous": "LSTG-continuous",
    "other": "several parts changed",
}


@dataclass(frozen=True)
class Scored:
    """One report of an evaluation, and where it lay."""

    path: Path
    report: Report

    @property
    def oracle(self) -> bool:
        """Whether the ground truth drew any of its prompts."""
        return self.report.from_truth

    @property
    def label(self) -> str:
        """Who was scored: the SAM and its image, the weights, or the folder of predictions; options that change the
        score behind it."""
        report = self.report
        if (baseline := report.baseline) is not None:
            name = f"{Path(baseline.sam).stem} on {baseline.image}"
        elif isinstance(report.weights, list):
            name = f"{_name(report.weights[0])} and {len(report.weights) - 1} more"
        else:
            name = _name(report.weights or report.predictions or self.path.parent)
        return ", ".join([name, *report.conditions])

    @property
    def official(self) -> bool:
        """Whether every picture of an official test split was scored, with its own labels, none of them trained on."""
        report, guard = self.report, self.report.leak_guard
        count = TEST_IMAGES.get(report.dataset)
        whole = report.n_images == count and report.split_images in (count, None)
        return report.split == "test" and whole and not (guard.leaks or guard.off or report.relabelled)

    @property
    def group(self) -> str:
        """Which rows of a table this may be compared with, in words."""
        report, leaks = self.report, self.report.leak_guard.leaks
        count = report.n_images
        total = count if report.split_images is None else report.split_images
        if self.official:
            return f"this evaluation: official test split, {count} images"
        images = f"{count} images" if count == total else f"{count} of {total} images"
        leak = f", {leaks} of them TRAINED ON" if leaks else ""
        truth = "".join(f", {words}" for words in report.relabelled)
        behind = ": not comparable with published rows" if report.dataset in TEST_IMAGES else ""
        return f"our split: {report.split}, {images}{leak}{truth}{behind}"

    @cached_property
    def config(self) -> JsonObject | None:
        """The configuration its weights were trained by: of the report, or of the checkpoint while it is still the one
        that was scored; None if neither tells."""
        first = self.report.checkpoints[0] if self.report.checkpoints else self.report
        weights, card = first.weights, first.weights_card
        told = None if card is None else card.get("config")
        if isinstance(told, dict):
            return told
        if not isinstance(weights, str) or self.report.baseline is not None:
            return None
        try:
            folder = checkpoint.locate(weights)
            if digest(folder / checkpoint.WEIGHTS) != first.weights_sha256:
                return None
            card = json.loads((folder / checkpoint.CARD).read_text(encoding="utf-8"))
        except (InputError, OSError, ValueError):
            return None
        found = card.get("config") if isinstance(card, dict) else None
        return found if isinstance(found, dict) else None

    @property
    def variant(self) -> str | None:
        """Key of VARIANTS; None where the configuration is not known."""
        if self.config is None:
            return None
        model = self.config.get("model") or {}
        tokens = (model.get("tokenizer") or {}).get("tokens", "quantized")
        fusion = (model.get("fusion") or {}).get("kind", "fmp")
        known = {
            ("quantized", "fmp"): "C", ("pixels", "fmp"): "A", ("quantized", "concat"): "B",
            ("continuous", "fmp"): "continuous",
        }  # fmt: skip
        return known.get((tokens, fusion), "other")


def _name(source: object) -> str:
    """Last part of a path; of a run's best or final weights the run's name too."""
    path = Path(str(source))
    return f"{path.parent.name}/{path.name}" if path.name in ("best", "final") and path.parent.name else path.name


def collect(folders: Sequence[str | Path]) -> list[Scored]:
    """Every report.json, report_oracle.json and report_named.json in the folders, at any depth, in order of path.

    Of a summary over checkpoints its single reports are left out. InputError for a missing folder, a file that is no
    report, and reports of the same ids with other labels; an empty list where there is none."""
    found: dict[Path, Scored] = {}
    for folder in _folders(folders):
        for path in sorted(path for name in REPORTS for path in folder.rglob(name)):
            found.setdefault(path.resolve(), Scored(path, read(path)))
    _require_same_labels(list(found.values()))
    summaries = {path.parent for path, one in found.items() if one.report.checkpoints}
    return [
        one
        for path, one in found.items()
        if not (path.parent.parent in summaries and re.fullmatch(r"checkpoint_\d+", path.parent.name))
    ]


def _require_same_labels(found: Sequence[Scored]) -> None:
    """InputError for two reports of the same ids and other labels, whose rows would stand side by side."""
    first: dict[tuple[object, ...], Scored] = {}
    for one in found:
        r = one.report
        if r.labels_sha256 is None:  # of an earlier version
            continue
        before = first.setdefault((r.dataset, r.split_ids_sha256, *r.relabelled), one)
        if before.report.labels_sha256 != r.labels_sha256:
            raise InputError(
                f"{one.path}: is of pairs with the ids of those in {before.path} and other labels; expected one set of "
                "pairs, give each --reports of its own"
            )


def collect_fusion(folders: Sequence[str | Path]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Folder of each fusion_metrics.json -> method -> images and metric -> mean (None = infinite). InputError for a
    file that holds something else."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for path in sorted({p.resolve(): p for d in _folders(folders) for p in d.rglob("fusion_metrics.json")}.values()):
        values = _json(path)
        for method, scores in values.items():
            if (
                not isinstance(scores, dict)
                or not set(METRICS) <= set(scores)
                or not all(optional_number(value) for key, value in scores.items() if key != "object_contrast")
            ):
                raise InputError(
                    f"{path}: {method!r} lacks some of {', '.join(METRICS)}, or holds other than numbers; expected a "
                    "fusion_metrics.json of fusionsam fusion-metrics"
                )
        name = path.parent.name or str(path.parent)
        measured = {method: {k: v for k, v in row.items() if k != "object_contrast"} for method, row in values.items()}
        found[name if name not in found else str(path.parent)] = measured
    return found


def _folders(folders: Sequence[str | Path]) -> list[Path]:
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected --reports with the --out folders of evaluations")
    return [Path(folder) for folder in folders]


def _json(path: Path) -> JsonObject:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); make it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected a mapping of methods; make it again")
    return values
