"""What is left of the mIoU when a camera is missing, displaced or disturbed.

Each disturbance is a pure function of the pair and a seed, so every model is shown the same pictures. `measure` takes
any predictor, so that other networks can be put through the same table.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fusionsam.alignment.residual import residual
from fusionsam.config.options import BootstrapOptions
from fusionsam.data.corruptions import blur, fog, noise
from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation.leak_guard import fitted_notes, fitted_on
from fusionsam.evaluation.options import CONDITION_NAMES, EvaluateConfig, RobustnessOptions
from fusionsam.evaluation.report_files import split_digest
from fusionsam.evaluation.run import check_classes, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import Row, Table, write_table
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode
from fusionsam.io import Made, OutputFolder, digest, progress_bar, require_writable, write_json
from fusionsam.metrics.segmentation import (
    PROTOCOLS,
    ConfusionMatrix,
    ImageMatrices,
    bootstrap_miou,
    headline,
    iou,
    plain,
)
from fusionsam.types import SMALLEST, InputError
from fusionsam.weights import checkpoint

Pair = tuple[Tensor | None, Tensor | None]
Change = Callable[[Tensor, Tensor, torch.Generator], Pair]


class Predict(Protocol):
    """Who is measured."""

    def __call__(
        self, visible: Tensor | None, infrared: Tensor | None, /, covered: Tensor | None = None
    ) -> NDArray[np.integer] | None:
        """(1,3,H,W) and (1,1,H,W) in [0,1], either may be None, and bool (1,2,H,W) where the two cameras of a rig reach
        -> class ids (H,W); None if it cannot do without that image."""


NAME = "robustness"
NOISE, BLUR, EXPOSURE, FOG = 0.08, 2.5, (3.0, 0.2), 2.0
"""Deviation of the noise (of 1), of the blur (pixels), factors on the light, optical depth of the fog at the top."""
MIDDLE = 0.6
"""Share of the visible frame's sides that a narrower infrared camera covers."""


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


class Condition(NamedTuple):
    """A disturbance: visible (3,H,W), infrared (1,H,W) in [0,1] and a generator -> the pair as the model sees it."""

    change: Change
    note: str
    reach: float = 1.0  # share of both sides, round the middle, that infrared covers; the model is told where


def shift(image: Tensor, down: int, right: int) -> Tensor:
    """(C,H,W) moved by whole pixels, down and to the right, negative the other way; the border is repeated."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return image[:, rows][:, :, columns]


def _moved(infrared: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    down, right = ((1, 0), (-1, 0), (0, 1), (0, -1))[int(torch.randint(4, (), generator=generator))]
    return shift(infrared, pixels * down, pixels * right)


def _shifted(pixels: int) -> Condition:
    def change(visible: Tensor, infrared: Tensor, generator: torch.Generator) -> Pair:
        return visible, _moved(infrared, pixels, generator)

    return Condition(change, "up, down, left or right, drawn for each pair")


def _realigned(pixels: int) -> Condition:
    def change(visible: Tensor, infrared: Tensor, generator: torch.Generator) -> Pair:
        heat = _moved(infrared, pixels, generator)
        found = residual(visible * 255, heat * 255)
        return visible, shift(heat, round(found.y), round(found.x)) if found.believed else heat

    return Condition(change, "the same, then moved back as --align does where the edges agree better")


def _middle(size: tuple[int, int], share: float) -> Tensor:
    """bool (H,W): the middle of a picture, `share` of both sides."""
    there = torch.zeros(size, dtype=torch.bool)
    rows, columns = (slice(round(side * (1 - share) / 2), round(side * (1 + share) / 2)) for side in size)
    there[rows, columns] = True
    return there


def _reduced(image: Tensor, part: float) -> Tensor:
    size = tuple(max(1, round(side * part)) for side in image.shape[1:])
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


CONDITIONS: dict[str, Condition] = {
    "full": Condition(lambda v, i, g: (v, i), "the pair as it is"),
    "visible only": Condition(lambda v, i, g: (v, None), "no infrared image, and the model knows it"),
    "infrared only": Condition(lambda v, i, g: (None, i), "no visible image, and the model knows it"),
    **{f"infrared shifted {pixels} px": _shifted(pixels) for pixels in (2, 4, 8, 16)},
    **{f"infrared shifted {pixels} px, realigned": _realigned(pixels) for pixels in (8, 16)},
    "noise": Condition(
        lambda v, i, g: (noise(v, NOISE, g), noise(i, NOISE, g)), f"Gaussian, deviation {NOISE:g} of the range, on both"
    ),
    "blur": Condition(lambda v, i, g: (blur(v, BLUR), blur(i, BLUR)), f"Gaussian, {BLUR:g} pixels, on both"),
    "fog": Condition(lambda v, i, g: (fog(v, FOG, g), i), f"visible only, optical depth {FOG:g} at the top"),
    "over-exposure": Condition(
        lambda v, i, g: ((v * EXPOSURE[0]).clamp(0, 1), i), f"visible x {EXPOSURE[0]:g}, clipped"
    ),
    "under-exposure": Condition(lambda v, i, g: (v * EXPOSURE[1], i), f"visible x {EXPOSURE[1]:g}, in 8 bits"),
    "dead infrared frame": Condition(
        lambda v, i, g: (v, torch.zeros_like(i)), "infrared all zero, and nobody tells the model"
    ),
    **{
        f"objects {name} as large": Condition(
            lambda v, i, g, part=part: (_reduced(v, part), _reduced(i, part)),  # type: ignore[misc]
            "the whole pair reduced, as of a camera farther away; the class map is enlarged again",
        )
        for name, part in (("half", 1 / 2), ("a third", 1 / 3))
    },
    "coarse infrared": Condition(
        lambda v, i, g: (v, F.interpolate(_reduced(i, 1 / 4)[None], i.shape[1:], mode="bilinear")[0]),
        "infrared reduced to a quarter of its sides and enlarged again: 160x120 pixels of 640x480",
    ),
    "black-hot infrared": Condition(lambda v, i, g: (v, 1 - i), "infrared inverted, and nobody tells the model"),
    "infrared in the middle": Condition(
        lambda v, i, g: (v, i * _middle((i.shape[1], i.shape[2]), MIDDLE)),
        f"infrared covers {MIDDLE:.0%} of both sides, as of a narrower lens, and the model is told where",
        MIDDLE,
    ),
}
"""Name -> disturbance, in the order of the table; the first is the reference."""


def disturb(name: str, visible: Tensor, infrared: Tensor, image_id: str, seed: int = 0) -> Pair:
    """One condition on one pair, (3,H,W) and (1,H,W) in [0,1]; a pure function of its arguments. The result is rounded
    to 8 bits, as a camera's. InputError for an unknown condition."""
    if name not in CONDITIONS:
        raise InputError(f"condition {name!r} is not known; choose from {', '.join(CONDITIONS)}")
    drawn = hashlib.sha256(f"{seed}/{name}/{image_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
    changed = CONDITIONS[name].change(visible, infrared, generator)
    first, second = (None if image is None else (image * 255).round() / 255 for image in changed)
    return first, second


def require_usable(
    out: Path,
    others: Sequence[Measured],
    data: LabelledPairs,
    seed: int = BootstrapOptions.seed,
    bootstrap: int = BootstrapOptions.bootstrap,
    conditions: Sequence[str] = CONDITION_NAMES,
) -> None:
    """What could spoil the table after everything has been measured, asked before. InputError for a negative seed or
    number of resamples, tables of other images or another seed, and an `out` that cannot be written or holds rows that
    would be lost: of other images, or of conditions that are not among `conditions`."""
    if seed < 0 or bootstrap < 0:
        raise InputError(f"--seed {seed}, --bootstrap {bootstrap}: expected at least 0")
    require_same(others, {**_images(data), "seed": seed})
    require_writable(out)
    folder, record = OutputFolder(out, NAME), f"{NAME}.json"
    if folder.read(record) is None:
        return
    there, pairs = read_table(out), _images(data)["split_ids_sha256"]
    was = Made({"pairs": f"other pairs ({there['title']})" if there.get("split_ids_sha256") != pairs else "these"})
    folder.state(record, was, Made({"pairs": "these"}), [record])
    folder.require_none_lost(record, "rows of", there["conditions"], ["full", *conditions])


def require_same(others: Sequence[Measured], values: Measured) -> None:
    """InputError for a table of `others` that differs from `values` in what makes it comparable."""
    ours: Mapping[str, object] = values
    for other in others:
        theirs: Mapping[str, object] = other
        for key in ("dataset", "split_ids_sha256", "protocol", "seed"):
            if key in ours and theirs.get(key) != ours[key]:
                raise InputError(
                    f"--against {other['title']}: its {key} is {theirs.get(key)}, here it is {ours[key]}; "
                    "measure it on this split with this seed"
                )


def _images(data: LabelledPairs) -> Measured:
    ids_digest = split_digest([entry.id for entry in data.entries])
    return {"dataset": data.row.name, "split_ids_sha256": ids_digest, "n_images": len(data)}


def measure(
    predict: Predict,
    data: LabelledPairs,
    conditions: Sequence[str] = CONDITION_NAMES,
    seed: int = BootstrapOptions.seed,
    bootstrap: int = BootstrapOptions.bootstrap,
) -> Measured:
    """mIoU in percent of every condition on a labelled split, with its 95 % bootstrap interval, the difference from
    `full` in points and the share of `full` in percent; plain JSON types, None where the predictor gave nothing.

    InputError for an unknown condition, and for a pair that lacks an image or the label.
    """
    for entry in data.entries:
        both = entry.rgbt or entry.radiometric
        parts = {"visible": entry.visible or both, "infrared": entry.infrared or both, "label": entry.label}
        if absent := [part for part, path in parts.items() if path is None]:
            raise InputError(
                f"{entry.id}: has no {absent[0]}, and robustness needs both images and a label; leave it off the list"
            )
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown:
        raise InputError(f"--conditions {unknown[0]!r}: not known; choose from {', '.join(CONDITIONS)}")
    counted = _count(predict, data, list(dict.fromkeys(["full", *conditions])), seed)
    full = counted["full"]
    occurs = np.zeros(data.num_classes, bool) if full is None else full.dense().sum((0, 2), dtype=np.int64) > 0
    protocol = headline(data.row.name, occurs)
    rows = {
        name: _score(CONDITIONS[name].note, images, data.row.classes, protocol, seed, bootstrap)
        for name, images in counted.items()
    }
    whole = rows["full"]["miou"]
    for row in rows.values():
        if (miou := row["miou"]) is not None and whole:
            row["difference"], row["share"] = miou - whole, 100 * miou / whole
    return {**_images(data), "protocol": protocol, "unit": "percent", "seed": seed, "conditions": rows}


def _count(predict: Predict, data: LabelledPairs, names: Sequence[str], seed: int) -> dict[str, ImageMatrices | None]:
    """Condition -> the matrices of each image; None where the predictor cannot do with it."""
    found = {name: ImageMatrices(data.num_classes) for name in names}
    impossible: set[str] = set()
    with progress_bar(range(len(names) * len(data)), desc=NAME, unit="image") as progress:
        for index in range(len(data)):
            sample = data[index]
            assert sample.visible is not None
            assert sample.infrared is not None
            visible, infrared = to_unit(sample.visible), to_unit(sample.infrared)
            for name in names:
                seen = disturb(name, visible, infrared, sample.id, seed)
                one, two = (None if image is None else image[None] for image in seen)
                reached = _reached(name, sample.covered, sample.size)
                there = {} if reached is None else {"covered": _covering(reached, one, two)}
                small = any(image is not None and min(image.shape[1:]) < SMALLEST for image in seen)
                ids = None if small else predict(one, two, **there)
                if ids is None:
                    impossible.add(name)
                else:
                    ids = _at_size(ids, sample.size)
                    found[name].add(sample.id, ConfusionMatrix(data.num_classes).update(ids, sample.label))
                progress.update()
    return {name: None if name in impossible else images for name, images in found.items()}


def _reached(name: str, covered: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """bool (2,H,W): where the cameras reach under a condition; None where that is everywhere."""
    if CONDITIONS[name].reach == 1:
        return covered
    middle = torch.stack([torch.ones(size, dtype=torch.bool), _middle(size, CONDITIONS[name].reach)])
    return middle if covered is None else covered & middle


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
        row["interval"] = plain(bootstrap_miou(stack, protocol, bootstrap, seed)) if bootstrap else None
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
    return Table(NAME, title, columns, rows, list(values.get("notes", ())))


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
    title = f"{options.weights} as trained" if options.as_trained else str(options.weights)
    fitted = {**fitted_on(model.card, guard.content), "calibration": 0}  # there is no confidence in the table
    aligned = None
    if data.align is not None:
        aligned = {"rig": data.align.rig.digest, "by": options.align, "refine": not options.no_refine}
    values = {
        "title": title, **values, "split": options.split, "weights": str(options.weights),
        "weights_sha256": digest(checkpoint.locate(options.weights) / checkpoint.WEIGHTS),
        "align": aligned,
        "prompts": options.prompts or model.config.prompts.mode, "as_trained": options.as_trained,
        "notes": guard.notes + fitted_notes(fitted, len(data)),
        "commit": checkpoint.commit(), "command": options.command, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return write(values, options.out, others)
