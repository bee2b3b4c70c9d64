"""One rig's homography from pairs of pictures that its two cameras took at the same moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusionsam.alignment.geometry import Matrix, Size, centre, rescaling
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.orientation import compressed, grey, resized
from fusionsam.alignment.refine import Level, Refined, refine
from fusionsam.alignment.search import coarse_search

WORKING = 640
"""Pixels of the longer side beyond which pictures are reduced before anything else."""
SEARCHED = 5
"""Pairs that the coarse search looks at."""
STIFFNESS = 0.01


@dataclass
class Estimate:
    """What was found."""

    matrix: Matrix  # visible -> infrared, pixels of the pictures as given
    score: float  # normalised orientation correlation over all pairs: 0 unrelated, above 0.2 related
    scores: list[float]  # of each pair
    shuffled: float  # mean score of pictures that do not belong together under the same matrix; nan for one pair
    covered: float  # share of the visible frame that infrared covers, 0 to 1
    lens: Lens | None = None  # of the infrared camera


def working(image: Tensor, visible: bool) -> Tensor:
    """uint8 (C,H,W) -> grey float (h,w), the longer side at most WORKING: all that `estimate` needs of a picture."""
    factor = min(1.0, WORKING / max(image.shape[1:]))
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[2] * factor)))
    return resized((compressed(grey(image)) if visible else grey(image))[None], size)[0]


def estimate(
    visible: Sequence[Tensor],
    infrared: Sequence[Tensor],
    visible_size: Size,
    infrared_size: Size,
    lens: bool = False,
) -> Estimate:
    """From N pairs as `working` makes them, all visible pictures of one size and all infrared ones of one; the sizes
    (H, W) are those of the pictures as they are.

    With `lens` two radial terms of the infrared lens (or of the visible one, turned round) are found, too. The result
    is a guess until `judge.judge` has looked at it. Deterministic.

    >>> found = estimate([working(v, True)], [working(t, False)], (480, 640), (256, 320))  # doctest: +SKIP
    """
    one, two = torch.stack(list(visible)), torch.stack(list(infrared))
    size: Size = (one.shape[1], one.shape[2])
    found = _search(one, two, size)
    level = Level(one, two, found[0].matrix, 256 if len(one) < 10 else 192)
    steps = (24 if len(one) < 10 else 16) * (1 + lens)
    best = refine(level, size, found[0].matrix, steps, 8, 1.0, STIFFNESS, lens)
    bend = torch.tensor(best.bend) if lens else None
    with torch.no_grad():
        scores = level.scores(torch.from_numpy(best.matrix), bend).tolist()
        shuffled = _shuffled(level, torch.from_numpy(best.matrix), bend)
    frames = rescaling(visible_size, size), rescaling(infrared_size, (two.shape[1], two.shape[2]))
    matrix = np.linalg.inv(frames[1]) @ best.matrix @ frames[0]
    glass = None
    if lens:
        x, y = centre(infrared_size)
        half = float(np.hypot(x, y))
        glass = Lens(half, half, x, y, (*best.bend, 0.0, 0.0, 0.0))
    return Estimate(matrix / matrix[2, 2], best.score, scores, shuffled, best.covered, glass)


def _search(visible: Tensor, infrared: Tensor, size: Size) -> list[Refined]:
    """The best hypotheses, refined as similarities, best first."""
    found = []
    for hypothesis in coarse_search(visible[:SEARCHED], infrared[:SEARCHED]):
        level = Level(visible[:SEARCHED], infrared[:SEARCHED], hypothesis.matrix, 160)
        found.append(refine(level, size, hypothesis.matrix, 24, 4, 2.0))
    # a small overlap fits well by chance
    return sorted(found, key=lambda each: -each.score * np.sqrt(each.covered))


def _shuffled(level: Level, matrix: Tensor, bend: Tensor | None) -> float:
    """Mean score of each visible picture with the next pair's infrared one."""
    if len(level.heat) < 2:
        return float("nan")
    kept = level.heat
    level.heat = kept.roll(1, 0)
    scores = level.scores(matrix, bend)
    level.heat = kept
    return float(scores.mean())
