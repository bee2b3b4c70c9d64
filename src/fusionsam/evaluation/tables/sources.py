"""What `fusionsam report` reads: reports of evaluations and fusion metrics, found in folders and checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionsam.errors import InputError
from fusionsam.evaluation import report as reports
from fusionsam.metrics.fusion import METRICS
from fusionsam.weights import checkpoint

OFFICIAL_TEST = {name: count for name, (count, _) in reports.PUBLISHED.items()}
"""Data set -> images of its official test split."""

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
    values: dict[str, Any]

    @property
    def oracle(self) -> bool:
        """Whether the ground truth drew any of its prompts."""
        parts = [self.values, *self.values.get("checkpoints", ())]
        return any(reports.is_oracle(part) for part in parts)

    @property
    def label(self) -> str:
        """Who was scored: the SAM and its image, the weights, or the folder of predictions; options that change the
        score behind it."""
        values = self.values
        if baseline := values.get("baseline"):
            name = f"{Path(str(baseline['sam'])).stem} on {baseline['image']}"
        elif isinstance(values.get("weights"), list):
            first = _name(values["weights"][0])
            name = f"{first} and {len(values['weights']) - 1} more"
        else:
            name = _name(values.get("weights") or values.get("predictions") or self.path.parent)
        scales = values.get("scales") or [1.0]
        marks = ["flip"] if values.get("flip") else []
        marks += ["scales " + " ".join(f"{scale:g}" for scale in scales)] if list(scales) != [1.0] else []
        marks += ["as trained"] if values.get("as_trained") else []
        marks += ["class offsets fitted on these pairs"] if (values.get("fitted") or {}).get("class_offsets") else []
        return ", ".join([name, *marks])

    @property
    def leaks(self) -> int:
        """Pictures of the split that the weights were trained on."""
        guard = self.values.get("leak_guard")
        return int(guard.get("leaks", 0)) if isinstance(guard, dict) else 0

    @property
    def official(self) -> bool:
        """Whether every picture of an official test split was scored, none of them trained on."""
        values = self.values
        count = OFFICIAL_TEST.get(values["dataset"])
        whole = values["n_images"] == count == values.get("split_images", count)
        unguarded = bool((values.get("leak_guard") or {}).get("off"))
        return values.get("split") == "test" and whole and not self.leaks and not unguarded

    @property
    def group(self) -> str:
        """Which rows of a table this may be compared with, in words."""
        values = self.values
        count, total = values["n_images"], values.get("split_images", values["n_images"])
        if self.official:
            return f"this evaluation: official test split, {count} images"
        images = f"{count} images" if count == total else f"{count} of {total} images"
        leak = f", {self.leaks} of them TRAINED ON" if self.leaks else ""
        behind = ": not comparable with published rows" if values["dataset"] in OFFICIAL_TEST else ""
        return f"our split: {values.get('split')}, {images}{leak}{behind}"

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The configuration its weights were trained by: of the report, or of the checkpoint while it is still the one
        that was scored; None if neither tells."""
        first = self.values.get("checkpoints") or [self.values]
        weights, card = first[0].get("weights"), first[0].get("weights_card")
        if isinstance(card, dict) and isinstance(card.get("config"), dict):
            return dict(card["config"])
        if not isinstance(weights, str) or self.values.get("baseline"):
            return None
        try:
            folder = checkpoint.locate(weights)
            with (folder / checkpoint.WEIGHTS).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != first[0].get("weights_sha256"):
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
    """Every report.json and report_oracle.json in the folders, at any depth, in order of path.

    Of a summary over checkpoints its single reports are left out. InputError for a missing folder or a file that is no
    report; an empty list where there is none."""
    found: dict[Path, Scored] = {}
    for folder in _folders(folders):
        for path in sorted([*folder.rglob("report.json"), *folder.rglob("report_oracle.json")]):
            found.setdefault(path.resolve(), Scored(path, checked(reports.read(path), path)))
    summaries = {path.parent for path, one in found.items() if "checkpoints" in one.values}
    return [
        one
        for path, one in found.items()
        if not (path.parent.parent in summaries and re.fullmatch(r"checkpoint_\d+", path.parent.name))
    ]


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
                or not all(map(_optional, scores.values()))
            ):
                raise InputError(
                    f"{path}: {method!r} lacks some of {', '.join(METRICS)}, or holds other than numbers; expected a "
                    "fusion_metrics.json of fusionsam fusion-metrics"
                )
        name = path.parent.name or str(path.parent)
        found[name if name not in found else str(path.parent)] = values
    return found


def _folders(folders: Sequence[str | Path]) -> list[Path]:
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected --reports with the --out folders of evaluations")
    return [Path(folder) for folder in folders]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); make it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected a mapping of methods; make it again")
    return values


def _optional(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(_optional, value.values()))


def _matrix(value: object, side: int) -> bool:
    rows = value if isinstance(value, list) else []
    numbers = [cell for row in rows if isinstance(row, list) and len(row) == side for cell in row]
    return len(rows) == side and len(numbers) == side**2 and all(type(n) is int and n >= 0 for n in numbers)


def checked(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values if all that tables and figures read has its form; InputError names the first key that has not."""
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "title": ("text", lambda v: isinstance(v, str)),
        "dataset": ("text", lambda v: isinstance(v, str)),
        "split_ids_sha256": ("text", lambda v: isinstance(v, str)),
        "n_images": ("a count", lambda v: type(v) is int and v >= 0),
        "miou": ("a number or null", _optional),
        "protocol": ("text", lambda v: isinstance(v, str)),
        "per_class_iou": ("class -> percent", _score_map),
        "classes": ("the classes of per_class_iou", lambda v: v == list(values["per_class_iou"])),
        "confusion_matrix": ("a square of counts", lambda v: _matrix(v, len(values["per_class_iou"]))),
        "protocols": (
            "protocol -> miou",
            lambda v: isinstance(v, dict) and all(isinstance(p, dict) and _optional(p.get("miou")) for p in v.values()),
        ),
    }
    optional: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "interval": ("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_optional, v))),
        "by_time": (
            "day, night -> miou",
            lambda v: isinstance(v, dict) and all(isinstance(p, dict) and _optional(p.get("miou")) for p in v.values()),
        ),
        "baseline": ("sam and image", lambda v: isinstance(v, dict) and {"sam", "image"} <= set(v)),
        "checkpoints": (
            "reports of checkpoints",
            lambda v: isinstance(v, list) and bool(v) and all(isinstance(c, dict) for c in v),
        ),
        "scales": ("numbers", lambda v: isinstance(v, list) and all(map(_optional, v)) and None not in v),
    }
    for name, (expected, fits) in (rules | optional).items():
        given = values.get(name)
        if not (given is None and name in optional) and not fits(given):
            raise InputError(f"{path}: {name}: found {str(given)[:60]!r}, expected {expected}; evaluate again")
    return values
