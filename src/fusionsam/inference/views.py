"""Copies of a pair, resized and mirrored, over which class probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from fusionsam.types import SMALLEST, Array, InputError

Scales = float | Sequence[float] | Array
"""One factor or several."""


def size_of(pair: Sequence[Tensor | None]) -> tuple[int, int]:
    """(H, W) of whichever image is there."""
    shape = next((image.shape for image in pair if image is not None), (0, 0))
    return int(shape[-2]), int(shape[-1])


def require_scales(scales: Scales) -> tuple[float, ...]:
    """The factors as they are meant. InputError unless every one of at least one is above 0 and up to 4."""
    try:
        found = np.atleast_1d(np.asarray(scales, dtype=float))
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.ndim != 1 or not len(found) or not ((found > 0) & (found <= 4)).all():  # NaN fails, too
        raise InputError(f"scales {scales}: expected factors above 0 and up to 4, as in (1, 1.25)")
    return tuple(found.tolist())


def require_one_as_it_is(scales: Sequence[float]) -> None:
    """InputError unless 1 is among the `scales`: the fused picture and the prompts are of that view."""
    if 1 not in scales:
        raise InputError(
            f"scales {' '.join(f'{scale:g}' for scale in scales)}: the picture that is kept is that of scale 1; give 1 "
            "with them"
        )


def require_one_view(scales: Sequence[float], flip: bool) -> None:
    """InputError unless there is one view alone, the pair as it is: prompts are pixels of it."""
    if flip or list(scales) != [1]:
        raise InputError("prompts: yours are pixels of one view; leave out scales and flip")


def view(image: Tensor, scale: float, mirrored: bool) -> Tensor:
    """(1,C,H,W) resized by `scale`, or by what brings its shorter side to the least that the network takes."""
    if scale != 1:
        scale = max(scale, SMALLEST / min(image.shape[2:]))  # of both sides alike, or a long pair would be distorted
        size = tuple(round(side * scale) for side in image.shape[2:])
        image = interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    return image.flip(-1) if mirrored else image
