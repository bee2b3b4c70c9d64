"""Reports on disk: report.json with the matrices of each image beside it, written whole and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from fusionsam.data.dataset import LabelledPairs
from fusionsam.evaluation.report import Report
from fusionsam.io import Made, OutputFolder, write_text
from fusionsam.metrics.segmentation import ImageMatrices
from fusionsam.types import IGNORE, InputError, JsonObject

REPORTS = ("report.json", "report_oracle.json", "report_named.json")
"""Names that a report has, by what prompted."""


def split_digest(ids: Sequence[str]) -> str:
    """SHA-256 of the sorted ids, one a line: two reports are of one split if it is equal."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def labels_digest(data: LabelledPairs) -> str:
    """SHA-256 of how many pixels of each class every label has, in the order of ids: the same ids may name other
    pictures. InputError for a label that cannot be read."""
    counts = {}
    for index, entry in enumerate(data.entries):
        label = data.label(index).numpy()
        counts[entry.id] = np.bincount(label[label != IGNORE], minlength=data.num_classes).tolist()
    return hashlib.sha256("".join(f"{i} {counts[i]}\n" for i in sorted(counts)).encode()).hexdigest()


def file_mark(report: Report) -> str:
    """What the names of a report's files end in: `_oracle` where the ground truth prompted, `_named` where its points
    named their class."""
    return ("_named" if report.prompts == "named" else "_oracle") if report.oracle else ""


def write(out: Path, report: Report, images: ImageMatrices | None) -> Path:
    """Write report.json (with the `file_mark` of its prompts) and the per-image matrices beside it; each
    appears whole or not at all. Returns the report's path; InputError if the folder cannot be written."""
    mark = file_mark(report)
    report = replace(report, per_image=None if images is None else f"per_image{mark}.json")
    path = out / f"report{mark}.json"
    # both are spelt before either is written: what cannot be spelt leaves an older pair as it was
    texts = {path: json.dumps(report.to_dict(), indent=1, allow_nan=False)}
    if images is not None:
        matrices = {"split_ids_sha256": report.split_ids_sha256, **images.as_dict()}
        texts = {out / f"per_image{mark}.json": json.dumps(matrices, allow_nan=False), **texts}
    for file, text in texts.items():
        write_text(file, text)
    return path


def require_split(out: Path, dataset: str, split: str, labels: str | None = None) -> None:
    """InputError if `out` holds a report of another data set, split (its `split_digest`) or labels (`labels_digest`,
    where both tell it), or none of ours: it would be lost."""
    folder = OutputFolder(out, "evaluate")
    for name in REPORTS:
        stored = folder.read(name)
        if stored is None:
            continue
        if not {"dataset", "split_ids_sha256"} <= set(stored):
            folder.foreign(name)
        was = Made({"pairs": f"{stored['dataset']}/{stored.get('split')} ({str(stored['split_ids_sha256'])[:8]})"})
        same = (stored["dataset"], stored["split_ids_sha256"]) == (dataset, split)
        now = was if same else Made({"pairs": f"{dataset} ({split[:8]})"})
        if same and labels and (theirs := stored.get("labels_sha256")):
            was, now = (Made({"labels": f"pairs with the labels {str(each)[:8]}"}) for each in (theirs, labels))
        folder.state(name, was, now, [name])


def read(path: str | Path) -> Report:
    """A report; a folder stands for its report.json. InputError for whatever is not a report of ours."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    return Report.from_dict(_read_json(path), str(path))


def _read_json(path: Path) -> JsonObject:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as JSON ({detail}); expected a report.json with its files") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected a report.json of fusionsam evaluate")
    return values


def read_comparable(
    path: str | Path, dataset: str, digest: str, classes: Sequence[str] | None = None
) -> tuple[Report, ImageMatrices]:
    """A report and its per-image matrices, if it may be held against one of `dataset` with the split `digest` and, if
    given, the same `classes` in the same order.

    Raises InputError for oracle reports, other data sets, splits or classes, and missing or foreign per-image
    matrices."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    report = read(path)
    if report.oracle:
        raise InputError(
            f"{path}: its prompts were drawn from the ground truth (oracle); it is compared with no report"
        )
    if report.dataset != dataset or report.split_ids_sha256 != digest:
        raise InputError(
            f"{path}: is of {report.dataset}/{report.split} with other images than the split evaluated here; "
            "compare reports of one split"
        )
    if classes is not None and list(report.classes) != list(classes):
        pairs = zip_longest(report.classes, classes, fillvalue="none")
        index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise InputError(
            f"{path}: its class {index} is {theirs!r}, here it is {ours!r}; compare reports of the same classes in one "
            "order"
        )
    if not report.per_image:
        raise InputError(f"{path}: a summary over checkpoints has no per-image matrices; compare one of its reports")
    return report, read_images(path, report)


def read_images(path: Path, report: Report) -> ImageMatrices:
    """The per-image matrices beside `report`, read from `path`; InputError if they are missing or not its own."""
    beside = path.parent / Path(str(report.per_image)).name
    if not beside.is_file():
        raise InputError(f"{beside}: no such file; keep it beside {path.name}, the paired bootstrap needs it")
    images = ImageMatrices.from_dict(_read_json(beside))
    if not images.ids or images.dense().sum(0, dtype=np.int64).tolist() != report.confusion_matrix:
        raise InputError(f"{beside}: does not add up to the matrix of {path.name}; evaluate again")
    return images
