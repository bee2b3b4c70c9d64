"""One resampling from one camera's frame into the other's, with the mask of what is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fusionsam.alignment.geometry import Size
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.rig import Rig

Points = NDArray[np.float64]
"""(n,2) x, y."""
BLOCK = 1 << 20
"""Points that are looked up at once."""
MOST_SAMPLES = 4
"""Samples a side of an output pixel where the source is finer."""


class Warped(NamedTuple):
    """A picture in the other camera's frame."""

    image: Tensor  # (C,H,W), of the dtype that was given; outside of the source its border goes on
    inside: Tensor  # bool (H,W): the source reaches there


class Warp:
    """The way from every pixel of a target frame to a source picture, ready for any number of pictures."""

    def __init__(self, rig: Rig, frame: str = "visible", shift: tuple[float, float] = (0.0, 0.0)) -> None:
        """`frame` visible: infrared pictures come into the visible frame; infrared: the other way round. `shift` (x, y)
        in target pixels is where the picture is moved to besides."""
        to_source = rig.visible_to_infrared if frame == "visible" else rig.infrared_to_visible_points
        target, source = (rig.visible_size, rig.infrared_size)[:: 1 if frame == "visible" else -1]
        self.source, self.target = source, target
        self.samples = _samples(to_source, target)
        self.inside = torch.zeros(target, dtype=torch.bool)
        self.grid = torch.empty(target[0] * self.samples, target[1] * self.samples, 2)
        limits = np.array([source[1], source[0]], dtype=np.float64)
        for first in range(0, target[0], step := max(1, BLOCK // (target[1] * self.samples**2))):
            part = slice(first, min(first + step, target[0]))
            places = to_source(_points(part, target[1], 1, shift))
            with np.errstate(invalid="ignore"):
                inside = ((places >= -0.5) & (places <= limits - 0.5)).all(1)
            self.inside[part] = torch.from_numpy(inside.reshape(-1, target[1]))
            if self.samples > 1:
                places = to_source(_points(part, target[1], self.samples, shift))
            # grid_sample's -1 and 1 are the outer edges of the outer pixels
            grid = np.nan_to_num(2 * (places + 0.5) / limits - 1, nan=1e6).clip(-1e6, 1e6)
            rows = slice(part.start * self.samples, part.stop * self.samples)
            self.grid[rows] = torch.from_numpy(grid).float().reshape(-1, target[1] * self.samples, 2)

    @property
    def covered(self) -> float:
        """Share of the target frame that the source reaches, 0 to 1."""
        return float(self.inside.float().mean())

    def __call__(self, image: Tensor) -> Warped:
        """`image` (C,H,W) of the source's size, of any dtype: deep counts stay counts."""
        # double where float cannot hold every count
        wide = torch.float64 if image.dtype in (torch.float64, torch.int32, torch.int64) else torch.float32
        values = F.grid_sample(
            image.to(wide)[None], self.grid.to(wide)[None], padding_mode="border", align_corners=False
        )
        if self.samples > 1:
            values = F.avg_pool2d(values, self.samples)
        if not image.dtype.is_floating_point:
            values = values.round()
        return Warped(values[0].to(image.dtype), self.inside)


def undistorted(image: Tensor, lens: Lens | None) -> Tensor:
    """(C,H,W) as an ideal lens of the same focal length would have taken it; as it is without `lens`."""
    if lens is None:
        return image
    size: Size = (image.shape[1], image.shape[2])
    return Warp(Rig(size, size, np.eye(3), None, lens))(image).image


def _points(rows: slice, width: int, samples: int, shift: tuple[float, float]) -> NDArray[np.float64]:
    """(N,2) x, y of the samples of some rows, `samples` a side of a pixel, moved back by `shift`."""
    across = (np.arange(width * samples) + 0.5) / samples - 0.5 - shift[0]
    down = (np.arange(rows.start * samples, rows.stop * samples) + 0.5) / samples - 0.5 - shift[1]
    x, y = np.meshgrid(across, down)
    return np.stack([x.ravel(), y.ravel()], 1)


def _samples(to_source: Callable[[Points], Points], target: Size) -> int:
    """How many source pixels an output pixel spans in the middle of the frame, so that nothing is skipped over."""
    y, x = (target[0] - 1) / 2, (target[1] - 1) / 2
    ends = to_source(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
    step = max(float(np.linalg.norm(ends[1] - ends[0])), float(np.linalg.norm(ends[3] - ends[2])))
    return min(MOST_SAMPLES, max(1, math.ceil(step - 0.25))) if math.isfinite(step) else 1
