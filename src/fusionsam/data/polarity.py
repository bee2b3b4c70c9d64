"""Is hot white? A guess from the scene alone, for pictures whose file does not say.

In white-hot pictures of streets, warm things are small, bright and low, and the sky is dark. Five such features, each
of which changes its sign when the picture is inverted, are weighed by a logistic regression that was fitted on 663
public infrared pictures of three data sets and their inversions (fitted without the set that is scored: 88 to 96 of 100
right, benchmarks/polarity.py). That is too few to turn a picture round unasked: it is told, and `--polarity` decides.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Polarity = Literal["white", "black", "auto"]
DOUBTFUL = -0.6
"""Scores below this look like black-hot: 4 of 100 white-hot pictures, 9 of 10 black-hot ones."""
_WEIGHTS = (1.0, 2.5, 1.8, -2.9, -6.9)


def white_hot_score(grey: NDArray[np.uint8]) -> float:
    """Above 0 where hot seems to be white, below 0 where it seems to be black; uint8 (H,W). The inverted picture has
    the opposite score; a picture of one value has 0."""
    return float(sum(weight * feature for weight, feature in zip(_WEIGHTS, features(grey), strict=True)))


def features(grey: NDArray[np.uint8]) -> tuple[float, ...]:
    """What is weighed, of uint8 (H,W): skewness below the sky, small things of two sizes, brightness, sky against the
    rest. The inverted picture has the opposite ones."""
    small = np.asarray(Image.fromarray(grey).resize((160, 120), Image.Resampling.BOX)).astype(np.float64)
    low, high = np.percentile(small, (0.5, 99.5))
    if high <= low:
        return (0.0,) * len(_WEIGHTS)
    small = ((small - low) / (high - low)).clip(0, 1)
    return (
        _skewness(small[30:]),
        _blobs(small, 1),
        _blobs(small, 2),
        float(small.mean() - 0.5),
        float(np.median(small[:24]) - np.median(small[24:])),
    )


def _skewness(values: NDArray[np.float64]) -> float:
    centred = values - values.mean()
    return float(np.clip((centred**3).mean() / (centred.std() + 1e-9) ** 3, -5, 5))


def _blobs(values: NDArray[np.float64], size: int) -> float:
    """Brightest against darkest small things of a size, -1..1."""
    found = ndimage.gaussian_filter(values, size) - ndimage.gaussian_filter(values, 2 * size)
    dark, bright = np.percentile(found[8:-8, 8:-8], (0.2, 99.8))
    return float((bright + dark) / (bright - dark + 1e-6))
