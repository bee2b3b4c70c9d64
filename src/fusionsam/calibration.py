"""The command `fusionsam calibrate`: one temperature that makes confidences mean something (Guo et al., arXiv
1706.04599, section 4.2).

Probabilities become softmax(logits / T); the class that is chosen stays the same. T minimises the negative log
likelihood on labelled pairs that were not trained on. The error it promises is measured by cross-fitting: the pairs
are halved, each half is scored with the T of the other one. What is stored is the T of all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from tqdm import tqdm

from fusionsam import checkpoint, class_offsets, reports
from fusionsam.data.catalog import CATALOG
from fusionsam.data.dataset import PairDataset
from fusionsam.data.transforms import to_unit
from fusionsam.evaluate import EvaluateConfig, check_classes, leak_guard, open_labelled
from fusionsam.metrics import CalibrationError
from fusionsam.predict import FusionSAM
from fusionsam.structures import IGNORE, InputError, Pixels

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


def halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """The places 0..count-1 in two disjoint halves, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def calibration(pixels: Sequence[Pixels], seed: int = 0) -> dict[str, Any]:
    """Temperature of all pairs; ECE in percent at T = 1 and, cross-fitted, at the temperatures of the two halves, each
    used on the half it was not fitted on; negative log likelihoods likewise. InputError for fewer than two pairs."""
    if len(pixels) < 2:
        raise InputError(f"calibrate: {len(pixels)} pairs; expected at least 2, one to fit and one to score")
    before, after = CalibrationError(), CalibrationError()
    count_error(pixels, 1.0, before)
    first, second = ([pixels[i] for i in half] for half in halves(len(pixels), seed))
    crossed, likelihood, n = [], 0.0, 0
    for fitted, scored in ((first, second), (second, first)):
        crossed.append(fit_temperature(fitted))
        count_error(scored, crossed[-1], after)
        count = sum(len(part.label) for part in scored)
        likelihood, n = likelihood + count * negative_log_likelihood(scored, crossed[-1]), n + count
    return {
        "temperature": fit_temperature(pixels),
        "temperatures_of_halves": crossed,
        "unit": "percent",
        "ece_before": 100 * before.value(),
        "ece_after": 100 * after.value(),
        "nll_before": negative_log_likelihood(pixels, 1.0),
        "nll_after": likelihood / n,
        "pixels": n,
        "seed": seed,
    }


def stride(sizes: Sequence[tuple[int, int]], limit: int = PIXELS) -> int:
    """The smallest n for which every n-th row and column of all pictures (H,W) stay within `limit` pixels."""
    total = sum(height * width for height, width in sizes)
    return max(1, math.ceil(math.sqrt(total / limit)))


@torch.inference_mode()
def collect(model: FusionSAM, data: PairDataset) -> list[Pixels]:
    """The network's logits (as they are, no temperature) and labels of each pair, in float16, thinned to PIXELS."""
    found: list[Pixels] = []
    step = 1
    for index in tqdm(range(len(data)), desc="calibrate", unit="pair"):
        sample = data[index]
        assert sample.label is not None
        if index == 0:
            step = stride([sample.size] * len(data))
        visible, infrared = (
            None if image is None else to_unit(image)[None] for image in (sample.visible, sample.infrared)
        )
        logits = model.infer(visible, infrared).logits[0, :, ::step, ::step].flatten(1).T.half().cpu()
        label = sample.label[::step, ::step].flatten()
        found.append(Pixels(logits[label != IGNORE], label[label != IGNORE]))
    return found


def store(source: str | Path, **values: Any) -> Path:
    """Put `values` into the card of a checkpoint by their names; returns the card's path. InputError if it cannot be
    read or written."""
    path = checkpoint.locate(source) / checkpoint.CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps({**card, **values}, indent=1), encoding="utf-8")
        os.replace(part, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); copy the checkpoint to a folder of your own") from None
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fusionsam calibrate`."""
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint folder; its training.json receives the temperature")
    add("--dataset", required=True, help=f"one of {', '.join(CATALOG)}")
    add("--root", required=True, help="folder of the data set (or the manifest file)")
    add("--split", default="val", help="pairs that were not trained on, and will not be reported on (%(default)s)")
    add(
        "--class-offsets", action="store_true",
        help="before that, add to each class's logits what gains mIoU on pairs it was not fitted on; changes the "
        "weights and with them the class maps; nothing is changed if that gains nothing",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the halves (%(default)s)")
    add("--class-file", help="YAML with classes and palette, for pairs and manifest")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dry-run", action="store_true", help="print, and leave the checkpoint as it is")


def main(args: argparse.Namespace) -> int:
    """`fusionsam calibrate`."""
    if args.seed < 0:
        raise InputError(f"--seed: {args.seed}; expected at least 0")
    model = FusionSAM.from_pretrained(args.weights, args.device)
    config = EvaluateConfig(args.dataset, args.root, args.split, [args.weights], class_file=args.class_file)
    if args.class_offsets and "class_offsets" in model.card:
        raise InputError(
            f"--class-offsets: {args.weights} has offsets already (training.json), so what more would gain cannot be "
            "told from pairs they were fitted on; give a copy without them (fusionsam.checkpoint.as_trained)"
        )
    data = open_labelled(config)
    assert data.row is not None
    check_classes(model, args.weights, data.row)
    leak_guard(config, data.entries, [model.card])  # confidence is always well placed on what was learnt by heart
    pixels = collect(model, data)
    pairs = {
        "dataset": args.dataset, "split": args.split, "pairs": len(data), "command": args.command_line,
        "split_ids_sha256": reports.split_digest([entry.id for entry in data.entries]),
    }  # fmt: skip
    stored: dict[str, Any] = {}
    if args.class_offsets:
        found = class_offsets.class_offsets(pixels, data.row.classes)
        print("offsets " + ", ".join(f"{name} {offset:+.2f}" for name, offset in found["offsets"].items()))
        print(f"mIoU {found['miou_before']:.2f} -> {found['miou_after']:.2f} on pairs they were not fitted on")
        if found["miou_after"] > found["miou_before"]:
            stored["class_offsets"] = found | pairs
            offsets = torch.tensor(list(found["offsets"].values()))
            pixels = [Pixels(logits.float() + offsets, label) for logits, label in pixels]
        else:
            print("that is no gain: no offset is used")
    values = calibration(pixels, args.seed)
    stored["calibration"] = values | pairs
    first, second = values["temperatures_of_halves"]
    print(f"temperature {values['temperature']:.3f} (of the halves: {first:.3f}, {second:.3f})")
    print(f"ECE {values['ece_before']:.2f} % -> {values['ece_after']:.2f} % on pairs it was not fitted on")
    print(f"negative log likelihood {values['nll_before']:.4f} -> {values['nll_after']:.4f}")
    if not args.dry_run:
        if "class_offsets" in stored:
            checkpoint.shift_classes(args.weights, offsets)
        print(f"stored in {store(args.weights, **stored)}")
    return 0
