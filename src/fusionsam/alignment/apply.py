"""A rig put to use: unaligned pictures in, one frame and a mask of what is there out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from fusionsam.alignment.geometry import Size
from fusionsam.alignment.residual import LEAST, residual
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp, Warped
from fusionsam.types import LUMA, InputError, JsonObject

Frame = Literal["visible", "infrared"]
LITTLE_COVERED = 0.25
REMEMBERED = 9
"""Frames of a film over whose shifts the median is taken."""


@dataclass
class Aligned:
    """A pair in one frame, H x W."""

    visible: Tensor | None  # uint8 (3,H,W)
    infrared: Tensor | None  # (1,H,W), of the dtype that was given
    covered: Tensor  # bool (2,H,W): where the visible, and where the infrared picture is
    told: dict[str, object] = field(default_factory=dict)  # plain JSON: rig, covered, score, shift, warnings


class Aligner:
    """Brings every pair of a rig into the frame of one camera.

    >>> aligned = Aligner(read_rig("rig.json"), "rig.json")(visible, infrared)  # doctest: +SKIP
    """

    def __init__(
        self,
        rig: Rig,
        name: str = "the rig",
        frame: Frame = "visible",
        refine: bool = True,
        film: bool = False,
    ) -> None:
        """`frame` is the camera whose pixels stay as they are. With `refine` each pair is shifted by a little where its
        edges then agree better by a set margin (parallax, jitter); of a `film` the shift is smoothed over time."""
        self.rig, self.name, self.frame, self.refine = rig, name, frame, refine
        self._recent: deque[tuple[float, float]] | None = deque(maxlen=REMEMBERED) if film else None
        self._warps: dict[tuple[Size, Size], Warp] = {}

    def _warp(self, visible: Size, infrared: Size, shift: tuple[float, float] = (0.0, 0.0)) -> Warp:
        rig = self.rig.at(visible, infrared, self.name)
        if shift != (0.0, 0.0):
            return Warp(rig, self.frame, shift)
        key = (visible, infrared)
        warp = self._warps.get(key)
        if warp is None:  # threads of a server may both make it: the last one stays
            warp = Warp(rig, self.frame)
            self._warps = {key: warp}
        return warp

    def __call__(self, visible: Tensor | None, infrared: Tensor | None) -> Aligned:
        """`visible` uint8 (3,H,W) and `infrared` (1,H',W'); a picture that stands alone stays as it is. InputError for
        sizes that are not the rig's."""
        if visible is None or infrared is None:
            return alone(visible, infrared)
        sizes: tuple[Size, Size] = ((visible.shape[1], visible.shape[2]), (infrared.shape[1], infrared.shape[2]))
        warp = self._warp(*sizes)
        moved, still = (infrared, visible) if self.frame == "visible" else (visible, infrared)
        warped = warp(moved)
        told: dict[str, object] = {"rig": self.rig.digest, "frame": self.frame, "covered": round(warp.covered, 4)}
        if warp.covered <= 0:
            raise InputError(f"{self.name}: the two pictures do not overlap at all; fit the rig anew")
        if self.refine:
            shift = self._shift(still, warped, told)
            if shift != (0.0, 0.0):
                warped = self._warp(*sizes, shift)(moved)
        if warp.covered < LITTLE_COVERED:
            other = {"visible": "infrared", "infrared": "visible"}[self.frame]
            told["warning"] = f"{other} covers {warp.covered:.0%} of the frame; the rest is without it"
        whole = torch.ones_like(warped.inside)
        if self.frame == "visible":
            return Aligned(visible, warped.image, torch.stack([whole, warped.inside]), told)
        return Aligned(warped.image, infrared, torch.stack([warped.inside, whole]), told)

    def moved(self, infrared: Tensor, visible: Size, told: JsonObject) -> Warped:
        """Other values (C,H',W') of the infrared camera's pixels, such as temperatures, as the pair `told` of was moved
        into a `visible` frame of (H, W)."""
        x, y = told.get("shift", (0.0, 0.0))
        return self._warp(visible, (infrared.shape[1], infrared.shape[2]), (x, y))(infrared)

    def _shift(self, still: Tensor, warped: Warped, told: dict[str, object]) -> tuple[float, float]:
        """How far the warped picture is moved, in pixels of the frame; what was found goes into `told`."""
        visible, infrared = (still, warped.image) if self.frame == "visible" else (warped.image, still)
        found = residual(visible, infrared, warped.inside)
        sign = 1 if self.frame == "visible" else -1
        shift = (sign * found.x, sign * found.y) if found.believed else (0.0, 0.0)
        if self._recent is not None:
            if found.after >= LEAST:  # a frame that shows nothing keeps what was
                self._recent.append((sign * found.x, sign * found.y))
            shift = (median(x for x, _ in self._recent), median(y for _, y in self._recent)) if self._recent else shift
            shift = shift if max(map(abs, shift)) >= 0.5 else (0.0, 0.0)
        told["score"] = round(found.after if shift != (0.0, 0.0) else found.before, 4)
        told["shift"] = [round(shift[0], 2), round(shift[1], 2)]
        return shift


def alone(visible: Tensor | None, infrared: Tensor | None) -> Aligned:
    """One picture, as it is."""
    image = visible if visible is not None else infrared
    assert image is not None
    there = torch.ones(image.shape[1:], dtype=torch.bool)
    absent = torch.zeros_like(there)
    covered = torch.stack([there if visible is not None else absent, there if infrared is not None else absent])
    return Aligned(visible, infrared, covered, {})


def filled(visible: Tensor | None, infrared: Tensor | None, covered: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The pictures of a pair with what is absent taken from the other camera: for readers that take no mask."""
    there, warm = covered
    if visible is None or infrared is None:
        return visible, infrared
    luma = (visible.float() * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True).round().to(infrared.dtype)
    heat = torch.where(warm, infrared, luma)
    return torch.where(there, visible, infrared.to(visible.dtype).expand(3, -1, -1)), heat
