"""Simple fusions without learning, the rows that a learned fusion has to beat.

All take visible uint8 (3,H,W) and infrared uint8 (1,H,W), sides of at least 64, and return fused RGB uint8 (3,H,W):
the luma is fused, the visible chroma (BT.601 Cb, Cr) is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.metrics.fusion import luma
from fusionsam.types import InputError

Picture = NDArray[np.uint8]
Grey = NDArray[np.float64]

SMALLEST_SIDE = 64


def _fuse(visible: Picture, infrared: Picture, rule: Callable[[Grey, Grey], Grey]) -> Picture:
    """Apply `rule` to the two luma arrays (H,W) in 0-255 and give the result the visible chroma."""
    shapes = (tuple(visible.shape), tuple(infrared.shape))
    if visible.dtype != np.uint8 or infrared.dtype != np.uint8:
        raise InputError(
            f"pair: found {visible.dtype} and {infrared.dtype}, expected uint8; scale to 0-255 and convert"
        )
    if len(shapes[0]) != 3 or shapes[0][0] != 3 or shapes[1] != (1, *shapes[0][1:]):
        raise InputError(
            f"pair: found shapes {shapes[0]} and {shapes[1]}, expected (3,H,W), (1,H,W); give aligned images"
        )
    if min(shapes[0][1:]) < SMALLEST_SIDE:
        raise InputError(
            f"pair: size {shapes[0][1:]} is too small, expected sides of at least {SMALLEST_SIDE}; enlarge it"
        )
    color = visible.astype(np.float64)
    grey = luma(color)
    # With Cb and Cr fixed, R, G and B are luma plus constants: a new luma is the same shift of all three.
    shift = rule(grey, infrared[0].astype(np.float64)) - grey
    return np.clip(np.rint(color + shift), 0, 255).astype(np.uint8)


def average(visible: Picture, infrared: Picture) -> Picture:
    """Mean of the visible luma and infrared."""
    return _fuse(visible, infrared, lambda a, b: (a + b) / 2)


def maximum(visible: Picture, infrared: Picture) -> Picture:
    """The brighter of the visible luma and infrared, pixel by pixel."""
    return _fuse(visible, infrared, np.maximum)


def _binomial(image: Grey, gain: float = 1.0) -> Grey:
    kernel = np.array([1, 4, 6, 4, 1]) / 16 * gain
    return ndimage.correlate1d(ndimage.correlate1d(image, kernel, axis=0, mode="mirror"), kernel, axis=1, mode="mirror")


def _expand(image: Grey, shape: tuple[int, ...]) -> Grey:
    """Double the size to `shape` (odd sizes too): zeros between the samples, then the binomial filter."""
    larger = np.zeros(shape)
    larger[::2, ::2] = image
    return _binomial(larger, gain=2.0)


def _pyramid(image: Grey, levels: int) -> list[Grey]:
    """Laplacian pyramid: `levels` detail layers, fine to coarse, then the base."""
    layers = []
    for _ in range(levels):
        smaller = _binomial(image)[::2, ::2]
        layers.append(image - _expand(smaller, image.shape))
        image = smaller
    return [*layers, image]


def laplacian_pyramid(visible: Picture, infrared: Picture, levels: int = 4) -> Picture:
    """Larger magnitude wins in each detail layer, the base is the mean (Burt and Adelson 1983, Toet 1989)."""

    def rule(a: Grey, b: Grey) -> Grey:
        ours, theirs = _pyramid(a, levels), _pyramid(b, levels)
        result = (ours[-1] + theirs[-1]) / 2
        for one, two in zip(reversed(ours[:-1]), reversed(theirs[:-1]), strict=True):
            result = _expand(result, one.shape) + np.where(np.abs(one) >= np.abs(two), one, two)
        return result

    return _fuse(visible, infrared, rule)


def _guided(target: Grey, guide: Grey, radius: int, softness: float) -> Grey:
    """Guided filter (He et al. 2013) of `target` by `guide`, both in [0, 1]."""

    def box(image: Grey) -> Grey:
        return ndimage.uniform_filter(image, 2 * radius + 1)

    mean_guide, mean_target = box(guide), box(target)
    slope = (box(guide * target) - mean_guide * mean_target) / (box(guide**2) - mean_guide**2 + softness)
    return box(slope) * guide + box(mean_target - slope * mean_guide)


def guided_filter(visible: Picture, infrared: Picture) -> Picture:
    """Two-scale fusion with guided-filter weights (Li, Kang and Hu, IEEE TIP 22, 2013), the paper's parameters:
    31 x 31 mean for the base; saliency = |Laplacian| under a Gaussian of radius and sigma 5; weights refined with
    radius 45, 0.3 for the base and radius 7, 1e-6 for the detail."""

    def rule(a: Grey, b: Grey) -> Grey:
        images = [a / 255, b / 255]
        salience = [ndimage.gaussian_filter(np.abs(ndimage.laplace(i)), 5, radius=5) for i in images]
        first = (salience[0] >= salience[1]).astype(np.float64)
        bases = [ndimage.uniform_filter(i, 31) for i in images]
        result = np.zeros_like(a)
        for layers, radius, softness in (
            (bases, 45, 0.3),
            ([i - base for i, base in zip(images, bases, strict=True)], 7, 1e-6),
        ):
            weights: list[Grey] = [
                np.clip(_guided(mask, image, radius, softness), 1e-6, 1)
                for mask, image in zip((first, 1 - first), images, strict=True)
            ]
            result += (weights[0] * layers[0] + weights[1] * layers[1]) / (weights[0] + weights[1])
        return result * 255

    return _fuse(visible, infrared, rule)


FUSIONS: dict[str, Callable[[Picture, Picture], Picture]] = {
    "average": average,
    "maximum": maximum,
    "laplacian_pyramid": laplacian_pyramid,
    "guided_filter": guided_filter,
}
"""Built-in fusions by name."""
