"""What is left of the mIoU when a camera is missing, displaced or disturbed.

Each disturbance is a pure function of the pair and a seed, so every model is shown the same pictures. `measure` takes
any predictor, so that other networks can be put through the same table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fusionsam.config.options import BootstrapOptions
from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.notices import CHECK_TELLS, NoticeBook
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation.conditions import CONDITIONS, disturb, reached
from fusionsam.evaluation.leak_guard import fitted_notes, fitted_on
from fusionsam.evaluation.options import CONDITION_NAMES, EvaluateConfig, RobustnessOptions
from fusionsam.evaluation.report import aligned_by
from fusionsam.evaluation.report_files import labels_digest, split_digest
from fusionsam.evaluation.run import check_classes, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import Row, Table, write_table
from fusionsam.evaluation.tally import interval_of
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode
from fusionsam.io import Made, OutputFolder, commit, digest, progress_bar, require_writable, write_json
from fusionsam.metrics.segmentation import (
    PROTOCOLS,
    ConfusionMatrix,
    ImageMatrices,
    headline,
    iou,
    plain,
)
from fusionsam.types import SMALLEST, InputError
from fusionsam.weights import checkpoint


class Predict(Protocol):
    """Who is measured."""

    def __call__(
        self, visible: Tensor | None, infrared: Tensor | None, /, covered: Tensor | None = None
    ) -> NDArray[np.integer] | None:
        """(1,3,H,W) and (1,1,H,W) in [0,1], either may be None, and bool (1,2,H,W) where the two cameras of a rig reach
        -> class ids (H,W); None if it cannot do without that image."""


NAME = "robustness"


class ConditionScore(TypedDict, total=False):
    """One row of robustness.json, in percent and points."""

    note: str
    miou: float | None
    interval: list[float | None] | None
    difference: float | None
    share: float | None
    per_class_iou: dict[str, float | None]


class Measured(TypedDict, total=False):
    """What robustness.json holds."""

    title: str
    dataset: str
    split_ids_sha256: str
    labels_sha256: str
    n_images: int
    protocol: str
    unit: str
    seed: int
    conditions: dict[str, ConditionScore]
    split: str
    weights: str
    weights_sha256: str
    prompts: str
    as_trained: bool
    align: dict[str, str | bool | None] | None
    notes: list[str]
    commit: str
    command: str
    seconds: float


def require_usable(
    out: Path,
    others: Sequence[Measured],
    data: LabelledPairs,
    seed: int = BootstrapOptions.seed,
    bootstrap: int = BootstrapOptions.bootstrap,
    conditions: Sequence[str] = CONDITION_NAMES,
) -> None:
    """What could spoil the table after everything has been measured, asked before. InputError for a negative seed or
    number of resamples, tables of other images, labels or another seed, and an `out` that cannot be written or holds
    rows that would be lost: of other images or labels, or of conditions that are not among `conditions`."""
    if seed < 0 or bootstrap < 0:
        raise InputError(f"--seed {seed}, --bootstrap {bootstrap}: expected at least 0")
    require_known(conditions)
    ours = _images(data)
    require_same(others, {**ours, "seed": seed})
    require_writable(out)
    folder, record = OutputFolder(out, NAME), f"{NAME}.json"
    if folder.read(record) is None:
        return
    there = read_table(out)
    same = there.get("split_ids_sha256") == ours["split_ids_sha256"]
    same = same and there.get("labels_sha256", ours["labels_sha256"]) == ours["labels_sha256"]
    was = Made({"pairs": "these" if same else f"other pairs ({there['title']})"})
    folder.state(record, was, Made({"pairs": "these"}), [record])
    folder.require_none_lost(record, "rows of", there["conditions"], ["full", *conditions])


def require_known(conditions: Sequence[str]) -> None:
    """InputError for a condition that there is not."""
    if unknown := [name for name in conditions if name not in CONDITIONS]:
        raise InputError(f"--conditions {unknown[0]!r}: not known; choose from {', '.join(CONDITIONS)}")


def require_same(others: Sequence[Measured], values: Measured) -> None:
    """InputError for a table of `others` that differs from `values` in what makes it comparable."""
    ours: Mapping[str, object] = values
    for other in others:
        theirs: Mapping[str, object] = other
        for key in ("dataset", "split_ids_sha256", "labels_sha256", "protocol", "seed"):
            if key == "labels_sha256" and key not in theirs:  # a table of an earlier version
                continue
            if key in ours and theirs.get(key) != ours[key]:
                unlike = f"its {key} is {theirs.get(key)}, here it is {ours[key]}"
                if key == "split_ids_sha256":
                    unlike = f"is of {other.get('n_images')} other pairs than the {ours.get('n_images')} here"
                if key == "labels_sha256":
                    unlike = "is of pairs with the ids of those here and other labels"
                raise InputError(
                    f"--against, the table of {other['title']}: {unlike}; measure it on this split with this seed"
                )


def _images(data: LabelledPairs) -> Measured:
    ids_digest = split_digest([entry.id for entry in data.entries])
    labels = labels_digest(data)
    return {
        "dataset": data.row.name, "split_ids_sha256": ids_digest, "labels_sha256": labels, "n_images": len(data),
    }  # fmt: skip


def measure(
    predict: Predict,
    data: LabelledPairs,
    conditions: Sequence[str] = CONDITION_NAMES,
    seed: int = BootstrapOptions.seed,
    bootstrap: int = BootstrapOptions.bootstrap,
) -> Measured:
    """mIoU in percent of every condition on a labelled split, with its 95 % bootstrap interval, the difference from
    `full` in points and the share of `full` in percent; plain JSON types, None where the predictor gave nothing.
    `notes` tell what was guessed of the files.

    InputError for an unknown condition, and for a pair that lacks an image or the label.
    """
    for entry in data.entries:
        both = entry.rgbt or entry.radiometric
        parts = {"visible": entry.visible or both, "infrared": entry.infrared or both, "label": entry.label}
        if absent := [part for part, path in parts.items() if path is None]:
            raise InputError(
                f"{entry.id}: has no {absent[0]}, and robustness needs both images and a label; leave it off the list"
            )
    require_known(conditions)
    told = _images(data)
    notices = NoticeBook()
    counted = _count(predict, data, list(dict.fromkeys(["full", *conditions])), seed, notices)
    full = counted["full"]
    occurs = np.zeros(data.num_classes, bool) if full is None else full.dense().sum((0, 2), dtype=np.int64) > 0
    protocol = headline(data.row.name, data.row.classes, occurs)
    rows = {
        name: _score(CONDITIONS[name].note, images, data.row.classes, protocol, seed, bootstrap)
        for name, images in counted.items()
    }
    whole = rows["full"]["miou"]
    for row in rows.values():
        if (miou := row["miou"]) is not None and whole:
            row["difference"], row["share"] = miou - whole, 100 * miou / whole
    notes = notices.lines()
    return {**told, "protocol": protocol, "unit": "percent", "seed": seed, "conditions": rows, "notes": notes}


def _count(
    predict: Predict, data: LabelledPairs, names: Sequence[str], seed: int, notices: NoticeBook
) -> dict[str, ImageMatrices | None]:
    """Condition -> the matrices of each image; None where the predictor cannot do with it. What was guessed of the
    files goes into `notices`."""
    found = {name: ImageMatrices(data.num_classes) for name in names}
    impossible: set[str] = set()
    with progress_bar(range(len(names) * len(data)), desc=NAME, unit="image") as progress:
        for index in range(len(data)):
            sample = data[index]
            assert sample.visible is not None
            assert sample.infrared is not None
            notices.add(sample)
            visible, infrared = to_unit(sample.visible), to_unit(sample.infrared)
            for name in names:
                seen = disturb(name, visible, infrared, sample.id, seed)
                one, two = (None if image is None else image[None] for image in seen)
                seen_by = reached(name, sample.covered, sample.size)
                there = {} if seen_by is None else {"covered": _covering(seen_by, one, two)}
                small = any(image is not None and min(image.shape[1:]) < SMALLEST for image in seen)
                ids = None if small else predict(one, two, **there)
                if ids is None:
                    impossible.add(name)
                else:
                    ids = _at_size(ids, sample.size)
                    found[name].add(sample.id, ConfusionMatrix(data.num_classes).update(ids, sample.label))
                progress.update()
    notices.close(CHECK_TELLS)
    return {name: None if name in impossible else images for name, images in found.items()}


def _covering(covered: Tensor, *images: Tensor | None) -> Tensor:
    """bool (2,H,W) -> (1,2,h,w) at the size of the images (1,C,h,w), which a condition may have reduced."""
    size = next(image.shape[2:] for image in images if image is not None)
    return F.interpolate(covered[None].float(), size).bool()


def _at_size(ids: NDArray[np.integer], size: tuple[int, int]) -> NDArray[np.integer]:
    """Class ids (h,w) at `size` (H, W), each pixel the nearest one's."""
    if ids.shape == size:
        return ids
    rows, columns = ((np.arange(to) + 0.5) * of // to for to, of in zip(size, ids.shape, strict=True))
    return ids[rows.astype(int)][:, columns.astype(int)]


def _score(
    note: str, images: ImageMatrices | None, names: Sequence[str], protocol: str, seed: int, bootstrap: int
) -> ConditionScore:
    row: ConditionScore = {"note": note, "miou": None, "interval": None, "difference": None, "share": None}
    if images is not None:
        stack = images.dense()
        matrix = stack.sum(0, dtype=np.int64)
        row["miou"] = plain([PROTOCOLS[protocol](matrix).miou])[0]
        row["interval"] = interval_of(stack, protocol, bootstrap, seed)
        row["per_class_iou"] = dict(zip(names, plain(100 * iou(matrix)), strict=True))
    return row


def read_table(path: str | Path) -> Measured:
    """A robustness.json, or of a folder the one in it; InputError for anything else."""
    path = Path(path) / f"{NAME}.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        scores = [row["miou"] for row in values["conditions"].values()]
        if all(score is None or isinstance(score, float | int) for score in scores) and values["title"]:
            found: Measured = values
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: no table of fusionsam robustness ({error}); give its folder") from None
    raise InputError(f"{path}: no table of fusionsam robustness; give its folder")


def table(values: Measured, others: Sequence[Measured] = ()) -> Table:
    """One row a condition, with a column for each of `others`. InputError if they are of other images or protocols."""
    require_same(others, values)
    rows, group = [], f"{values['dataset']}, {values['n_images']} pairs, protocol {values['protocol']}"
    for name, row in values["conditions"].items():
        rivals = [other["conditions"].get(name, ConditionScore()).get("miou") for other in others]
        shown = [_cell(row["miou"]), _cell(row["difference"], "+"), _cell(row["share"]), *map(_cell, rivals)]
        rows.append(Row(group, (name, *shown), (row["note"],)))
    columns = ("condition", "mIoU", "from full", "% of full", *(str(other["title"]) for other in others))
    title = f"Robustness of {values['title']}: mIoU in percent"
    notes = [*values.get("notes", ())]
    notes += [f"{other['title']}: {note}" for other in others for note in other.get("notes", ())]
    return Table(NAME, title, columns, rows, notes)


def _cell(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"


def write(values: Measured, out: Path, others: Sequence[Measured] = ()) -> Table:
    """robustness.json, .md, .tex and .csv in `out`, each whole or not at all; returns the table. InputError if they
    cannot be written."""
    made = table(values, others)
    write_json(out / f"{NAME}.json", values, allow_nan=False)
    write_table(made, out)
    return made


def network_predictor(model: FusionSAM, prompts: Mode | None = None) -> Predict:
    """A checkpoint as a predictor; `prompts` self or none, None = as configured."""

    def predict(visible: Tensor | None, infrared: Tensor | None, /, covered: Tensor | None = None) -> NDArray[np.int64]:
        logits = model.infer(visible, infrared, mode=prompts, covered=covered).logits[0]
        ids: NDArray[np.int64] = logits.argmax(0).cpu().numpy()
        return ids

    return predict


def run(options: RobustnessOptions) -> Table:
    """Measure the weights under every condition and write the table into `options.out`. Raises InputError as its parts
    do, before anything is measured where that can be told."""
    started = time.perf_counter()
    others = [read_table(path) for path in options.against]
    model = FusionSAM.from_pretrained(options.weights, options.device, calibrated=not options.as_trained)
    config = EvaluateConfig(
        options.dataset, options.root, options.split, weights=[options.weights], class_file=options.class_file,
        align=options.align, no_refine=options.no_refine,
    )  # fmt: skip
    data = open_labelled(config)
    check_classes(model.config.classes, options.weights, data.row)
    require_usable(options.out, others, data, options.seed, options.bootstrap, options.conditions)
    guard = leak_guard(config, data.entries, [model.card])
    predict = network_predictor(model, options.prompts)
    values = measure(predict, data, options.conditions, options.seed, options.bootstrap)
    fitted = {**fitted_on(model.card, guard.content), "calibration": 0}  # there is no confidence in the table
    aligned = None
    if data.align is not None:
        aligned = {"rig": data.align.rig.digest, "by": options.align, "refine": not options.no_refine}
    prompts = options.prompts or model.config.prompts.mode
    # the title stands above its column in the tables of others
    title = ", ".join(
        [str(options.weights)]
        + (["as trained"] if options.as_trained else [])
        + (["prompts none"] if prompts == "none" else [])
        + aligned_by(aligned)
    )
    values = {
        "title": title, **values, "split": options.split, "weights": str(options.weights),
        "weights_sha256": digest(checkpoint.locate(options.weights) / checkpoint.WEIGHTS),
        "align": aligned,
        "prompts": prompts, "as_trained": options.as_trained,
        "notes": guard.notes + fitted_notes(fitted, len(data)) + values["notes"],
        "commit": commit(), "command": options.command, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return write(values, options.out, others)
