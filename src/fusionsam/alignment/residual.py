"""How far the infrared picture of a pair still lies off, by correlation of the orientation fields."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionsam.alignment.orientation import compressed, grey, local_contrast, orientation, resized

SIDE = 320
"""Pixels of the longer side at which pairs are compared."""
REACH = 0.03
"""Largest shift that is looked for, as a share of the longer side."""
MARGIN = 0.02
"""By how much the score must rise before a shift is believed."""
LEAST = 0.15
"""Score that a shifted pair must reach before it is believed."""


@dataclass(frozen=True)
class Residual:
    """The best shift of an infrared picture against its visible one, of the same frame."""

    x: float  # pixels to move the infrared picture to the right
    y: float  # and down
    before: float  # score as it lies, -1 to 1
    after: float  # score after the shift

    @property
    def believed(self) -> bool:
        """Whether the score rises by enough to move the picture."""
        return self.after >= LEAST and self.after - self.before >= MARGIN

    @property
    def length(self) -> float:
        """Pixels."""
        return float((self.x**2 + self.y**2) ** 0.5)


def residual(visible: Tensor, infrared: Tensor, inside: Tensor | None = None, reach: float = REACH) -> Residual:
    """`visible` uint8 (3,H,W) and `infrared` (1,H,W) of one frame; `inside` bool (H,W) is where infrared is."""
    height, width = visible.shape[1:]
    factor = min(1.0, SIDE / max(height, width))
    size = (max(8, round(height * factor)), max(8, round(width * factor)))
    one = local_contrast(resized(compressed(grey(visible))[None], size))
    two = local_contrast(resized(grey(infrared)[None], size))
    mask = torch.ones(1, *size) if inside is None else (resized(inside[None].float(), size) > 0.99).float()
    first = torch.view_as_complex(orientation(one).movedim(1, -1).contiguous())[0]
    second = torch.view_as_complex(orientation(two, mask).movedim(1, -1).contiguous())[0] * mask[0]
    limit = max(2, round(reach * max(size)))
    shape = (size[0] + limit + 1, size[1] + limit + 1)

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        product = torch.fft.fft2(a, s=shape) * torch.fft.fft2(b, s=shape).conj()
        whole = torch.roll(torch.fft.ifft2(product).real, (limit, limit), (0, 1))
        return whole[: 2 * limit + 1, : 2 * limit + 1]

    together = correlation(first, second)
    # of the visible picture only what infrared covers counts
    energy = correlation(first.abs().square(), mask[0]).clamp(min=0) * second.abs().square().sum()
    score = together / (energy + 1e-6).sqrt()
    best = int(score.argmax())
    y, x = divmod(best, 2 * limit + 1)
    dy, dx = _peak(score[:, x], y), _peak(score[y], x)
    return Residual((dx - limit) / factor, (dy - limit) / factor, float(score[limit, limit]), float(score[y, x]))


def _peak(values: Tensor, at: int) -> float:
    """The top of the parabola through the highest value and its neighbours."""
    if not 0 < at < len(values) - 1:
        return float(at)
    low, high, top = float(values[at - 1]), float(values[at + 1]), float(values[at])
    bend = low - 2 * top + high
    return at if bend >= 0 else at + max(-0.5, min(0.5, 0.5 * (low - high) / bend))
