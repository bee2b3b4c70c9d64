"""Offsets on the classes' logits (logit adjustment, Menon et al., arXiv 2007.07314), fitted after training.

Training that weights classes and pastes rare objects teaches other shares of the classes than the world has, and cross
entropy is not the IoU. An offset a class, fitted on labelled pairs that were not trained on, mends both. What it gains
is measured on pairs it was not fitted on: blocks of consecutive pairs take turns, for neighbouring frames look alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusionsam.metrics.segmentation import PROTOCOLS, ConfusionMatrix
from fusionsam.types import InputError, JsonObject, Pixels

PRESENT = PROTOCOLS["present"]
GRID = torch.linspace(-2, 2, 17)
"""Offsets that are tried, in the unit of logits."""
ROUNDS = 2
"""Times that every class is visited."""
CAUTION = 0.1
"""Points of mIoU that a class must gain for an offset of 1 (four times as many for 2)."""
FOLDS = 5
"""Blocks of consecutive pairs, each scored with what was fitted on the others."""


def blocks(count: int) -> list[list[int]]:
    """The places 0..count-1 in FOLDS consecutive blocks (or fewer), as equal as they can be. InputError for fewer than
    two places."""
    if count < 2:
        raise InputError(f"calibrate: {count} pairs; expected at least 2, one to fit and one to score")
    return [block.tolist() for block in np.array_split(np.arange(count), min(FOLDS, count))]


def but(pixels: Sequence[Pixels], block: Sequence[int]) -> list[Pixels]:
    """The pairs that are not of `block`."""
    return [part for place, part in enumerate(pixels) if place not in block]


def confusion(pixels: Sequence[Pixels], offsets: Tensor) -> Tensor:
    """Counts (K,K), rows the truth, of the class with the greatest logits + offsets; float64."""
    counts = ConfusionMatrix(len(offsets))
    for logits, label in pixels:
        # the matrix takes pictures: one row of pixels is one
        counts.update((logits.float() + offsets).argmax(1)[None], label[None])
    return torch.from_numpy(counts.matrix).double()


def fit_offsets(pixels: Sequence[Pixels]) -> Tensor:
    """Offsets (K) in -2..2 of the greatest mIoU less CAUTION times their squares, class after class. The first class
    has 0 (only differences matter), and so has a class that these pairs do not show. InputError without any pixel."""
    if not sum(len(part.label) for part in pixels):
        raise InputError("calibrate: no labelled pixel in these pairs; give a split with labels")
    k = pixels[0].logits.shape[1]
    offsets = torch.zeros(k)
    shown = confusion(pixels, offsets).sum(1) > 0
    for _ in range(ROUNDS):
        for which in range(1, k):
            if shown[which]:
                counts = _counts_by_offset(pixels, offsets, which)
                best = (torch.from_numpy(PRESENT.many(counts)) - CAUTION * GRID**2).argmax()
                offsets[which] = GRID[best]
    return offsets


def _counts_by_offset(pixels: Sequence[Pixels], offsets: Tensor, which: int) -> Tensor:
    """Confusion counts (len(GRID),K,K) with each offset of GRID on class `which`, the others as they are: a pixel takes
    the class from the offset on that covers what it lacks."""
    k, steps = len(offsets), len(GRID)
    counts = torch.zeros((steps + 1) * k * k, dtype=torch.float64)
    for logits, label in pixels:
        others = logits.float() + offsets
        own = logits[:, which].float()
        others[:, which] = -torch.inf
        most, rival = others.max(1)
        enough = torch.bucketize(most - own, GRID)  # the place of the first offset that covers it
        counts += torch.bincount((enough * k + label) * k + rival, minlength=len(counts))
    by_place = counts.view(steps + 1, k, k)
    taken = by_place[:steps].cumsum(0)
    left = by_place.sum(0) - taken
    left[:, :, which] += taken.sum(-1)
    return left


def class_offsets(pixels: Sequence[Pixels], names: Sequence[str]) -> JsonObject:
    """Offsets of all pairs by class name; mIoU in percent without them and, cross-fitted, with those of the other
    blocks; which offsets each block's others gave. InputError for fewer than two pairs."""
    found, counts = [], torch.zeros(len(names), len(names), dtype=torch.float64)
    for block in blocks(len(pixels)):
        found.append(fit_offsets(but(pixels, block)))
        counts += confusion([pixels[place] for place in block], found[-1])
    return {
        "offsets": dict(zip(names, fit_offsets(pixels).tolist(), strict=True)),
        "offsets_without_block": [dict(zip(names, offsets.tolist(), strict=True)) for offsets in found],
        "unit": "percent",
        "miou_before": PRESENT(confusion(pixels, torch.zeros(len(names)))).miou,
        "miou_after": PRESENT(counts).miou,
    }
