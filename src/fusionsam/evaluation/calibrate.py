"""One temperature that makes confidences mean something (Guo et al., arXiv
1706.04599, section 4.2).

Probabilities become softmax(logits / T); the class that is chosen from one view stays the same. T minimises the
negative log likelihood on labelled pairs that were not trained on. The error it promises is measured by cross-fitting:
blocks of consecutive pairs take turns (neighbouring frames look alike), each is scored with the T, and with `--class-
offsets` the offsets, of the others. What is stored are those of all pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.image_files import image_size
from fusionsam.data.notices import CHECK_TELLS, NoticeBook
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation import logit_adjustment as class_offsets
from fusionsam.evaluation.logit_adjustment import blocks, but
from fusionsam.evaluation.options import CalibrateOptions, EvaluateConfig
from fusionsam.evaluation.run import check_classes, leak_guard, open_labelled
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import progress_bar, write_json
from fusionsam.metrics.segmentation import CalibrationError
from fusionsam.types import IGNORE, InputError, JsonObject, Pixels
from fusionsam.weights import checkpoint

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the search for T."""
PIXELS = 6_000_000
"""Pixels kept of a split; of more, every n-th row and column."""


def negative_log_likelihood(pixels: Sequence[Pixels], temperature: float) -> float:
    """Mean of -log softmax(logits / T)[label] over all pixels, every pixel alike."""
    total = count = 0.0
    for logits, label in pixels:
        total += float(F.cross_entropy(logits.float() / temperature, label, reduction="sum"))
        count += len(label)
    return total / count


def fit_temperature(pixels: Sequence[Pixels]) -> float:
    """The T in [0.05, 20] of the smallest negative log likelihood, which is convex in 1/T (to 0.1 % in T).

    InputError without any pixel."""
    if not sum(len(part.label) for part in pixels):
        raise InputError("calibrate: no labelled pixel in these pairs; give a split with labels")
    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(pixels, math.exp(log_t)),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return math.exp(float(found.x))


def count_error(pixels: Sequence[Pixels], temperature: float, into: CalibrationError) -> None:
    """Add the pixels, at this temperature, to the counts of an expected calibration error."""
    for logits, label in pixels:
        confidence, ids = (logits.float() / temperature).softmax(1).max(1)
        # the metric takes pictures: one row of pixels is one
        into.update(confidence.clamp(max=1)[None].numpy(), ids[None].numpy(), label[None].numpy())


def moved(pixels: Sequence[Pixels], offsets: Tensor) -> list[Pixels]:
    """The pairs with offsets (K) on their logits."""
    return [Pixels(logits.float() + offsets, label) for logits, label in pixels]


def calibration(pixels: Sequence[Pixels], offsets: Tensor | None = None, without: Sequence[Tensor] = ()) -> JsonObject:
    """Temperature of all pairs; ECE in percent and mean negative log likelihood at T = 1 and at the temperature of the
    other blocks, each block used on those it was not fitted on. `offsets` (K) of all pairs, and `without`, those of all
    but each block, are on the logits. InputError for fewer than two pairs."""
    before, after = CalibrationError(), CalibrationError()
    crossed, likelihood, n = [], [0.0, 0.0], 0
    none = torch.zeros(pixels[0].logits.shape[1]) if pixels else torch.zeros(0)
    for number, block in enumerate(blocks(len(pixels))):
        own = without[number] if without else none
        crossed.append(fit_temperature(moved(but(pixels, block), own)))
        scored = moved([pixels[place] for place in block], own)
        count = sum(len(part.label) for part in scored)
        if not count:  # a block without a label tells nothing
            continue
        n += count
        for index, (temperature, error) in enumerate(((1.0, before), (crossed[-1], after))):
            count_error(scored, temperature, error)
            likelihood[index] += count * negative_log_likelihood(scored, temperature)
    return {
        "temperature": fit_temperature(moved(pixels, none if offsets is None else offsets)),
        "temperatures_without_block": crossed,
        "unit": "percent",
        "ece_before": 100 * before.value(),
        "ece_after": 100 * after.value(),
        "nll_before": likelihood[0] / n,
        "nll_after": likelihood[1] / n,
        "pixels": n,
    }


def stride(sizes: Sequence[tuple[int, int]], limit: int = PIXELS) -> int:
    """The smallest n for which every n-th row and column of all pictures (H,W) stay within `limit` pixels."""
    total = sum(height * width for height, width in sizes)
    return max(1, math.ceil(math.sqrt(total / limit)))


@torch.inference_mode()
def collect(model: FusionSAM, data: LabelledPairs) -> list[Pixels]:
    """The network's logits (as they are, no temperature) and labels of each pair, in float16, thinned to PIXELS."""
    found: list[Pixels] = []
    notices = NoticeBook()
    sizes = [image_size(entry.label) for entry in data.entries if entry.label is not None]  # of the headers
    step = stride(sizes)
    for index in progress_bar(range(len(data)), desc="calibrate", unit="pair"):
        sample = data[index]
        notices.add(sample)
        visible, infrared = (
            None if image is None else to_unit(image)[None] for image in (sample.visible, sample.infrared)
        )
        logits = model.infer(visible, infrared).logits[0, :, ::step, ::step].flatten(1).T.half().cpu()
        label = sample.label[::step, ::step].flatten()
        found.append(Pixels(logits[label != IGNORE], label[label != IGNORE]))
    notices.close(CHECK_TELLS)
    return found


def store(source: str | Path, **values: object) -> Path:
    """Put `values` into the card of a checkpoint by their names, None takes a name out of it; returns the card's path.
    InputError if it cannot be read or written."""
    path = checkpoint.locate(source) / checkpoint.CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the checkpoint again") from None
    told = {name: value for name, value in {**card, **values}.items() if value is not None}
    return write_json(path, told, "copy the checkpoint to a folder of your own")


def _tensor(by_class: dict[str, float]) -> Tensor:
    return torch.tensor(list(by_class.values()))


def run(options: CalibrateOptions) -> list[str]:
    """Fit the temperature (and the offsets) of a checkpoint and store them in its training.json; returns what is to be
    told, a line each. Raises InputError as its parts do."""
    told: list[str] = []
    model = FusionSAM.from_pretrained(options.weights, options.device, calibrated=False)
    config = EvaluateConfig(
        options.dataset,
        options.root,
        options.split,
        weights=[options.weights],
        class_file=options.class_file,
        labels_map=options.labels_map,
        ignore=options.ignore,
        align=options.align,
        no_refine=options.no_refine,
    )
    data = open_labelled(config)
    check_classes(model.config.classes, options.weights, data.row)
    guard = leak_guard(config, data.entries, [model.card])  # confidence is well placed on what was learnt by heart
    told += guard.notes
    pixels = collect(model, data)
    if len({int(id) for each in pixels for id in each.label.unique()}) < 2:
        raise InputError(
            f"{options.root}: the labels of {options.split} know one class alone, which tells nothing of confidence; "
            "check their ids (--labels-map, --ignore)"
        )
    pairs = {
        "dataset": options.dataset, "split": options.split, "pairs": len(data), "command": options.command,
        "content": guard.content,
    }  # fmt: skip
    stored: JsonObject = {}
    offsets, without = None, list[Tensor]()
    if not options.class_offsets and (before := checkpoint.read_checkpoint(options.weights)[2].get("class_offsets")):
        offsets = _tensor(before["offsets"])
        if [tuple(pair) for pair in before.get("content", ())] == guard.content:
            without = [_tensor(each) for each in before["offsets_without_block"]]
        else:
            without = [offsets] * len(blocks(len(pixels)))
    if options.class_offsets:
        found = class_offsets.class_offsets(pixels, data.row.classes)
        told.append("offsets " + ", ".join(f"{name} {offset:+.2f}" for name, offset in found["offsets"].items()))
        told.append(f"mIoU {found['miou_before']:.2f} -> {found['miou_after']:.2f} on pairs they were not fitted on")
        stored["class_offsets"] = None
        if found["miou_after"] > found["miou_before"]:
            stored["class_offsets"] = found | pairs
            offsets = _tensor(found["offsets"])
            without = [_tensor(each) for each in found["offsets_without_block"]]
        else:
            told.append("that is no gain: no offset is used")
    values = calibration(pixels, offsets, without)
    stored["calibration"] = values | pairs
    others = ", ".join(f"{value:.3f}" for value in values["temperatures_without_block"])
    told.append(f"temperature {values['temperature']:.3f} (without one block each: {others})")
    told.append(f"ECE {values['ece_before']:.2f} % -> {values['ece_after']:.2f} % on pairs it was not fitted on")
    told.append(f"negative log likelihood {values['nll_before']:.4f} -> {values['nll_after']:.4f}")
    if not options.dry_run:
        told.append(f"stored in {store(options.weights, **stored)}")
    return told
