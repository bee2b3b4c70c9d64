"""The coarse search: scale, turn and shift of one camera against the other, by Fourier correlation over all pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor

from fusionsam.alignment.geometry import Matrix, Size, apply, centre, corners, rescaling, similarity
from fusionsam.alignment.orientation import local_contrast, orientation, resized, sampled

COARSE = 160
"""Pixels of the visible picture's longer side."""
FIELDS_OF_VIEW = (0.46, 1.75)
"""Widths of the infrared frame that are tried, as a share of the visible one."""
STEPS = 23
TURNS = (-3.0, 0.0, 3.0)
REACH = 0.25
"""How far the centres may lie apart, as a share of the visible picture's longer side."""


class Hypothesis(NamedTuple):
    """A similarity that may be right."""

    score: float
    """Correlation over its standard deviation by chance, roughly: comparable among hypotheses alone."""
    matrix: Matrix
    """Visible pixels -> infrared pixels, both of the pictures that were searched."""


def coarse_search(visible: Tensor, infrared: Tensor, keep: int = 3) -> list[Hypothesis]:
    """The best `keep` similarities, best first, no two alike. `visible` (N,H,W) and `infrared` (N,H',W') grey of the
    same moments, local contrast not yet normalised."""
    size: Size = (visible.shape[-2], visible.shape[-1])
    other: Size = (infrared.shape[-2], infrared.shape[-1])
    factor = COARSE / max(size)
    small = (round(size[0] * factor), round(size[1] * factor))
    spectra = _Spectra(_complex(orientation(local_contrast(resized(visible, small)))))
    found = []
    for ratio in np.geomspace(*FIELDS_OF_VIEW, STEPS):
        width = round(ratio * small[1])
        frame = (max(8, round(width * other[0] / other[1])), width)
        heat = local_contrast(resized(infrared, frame))
        for turn in TURNS:
            score, matrix = _best_shift(spectra, heat, turn, int(REACH * COARSE))
            full = np.linalg.inv(rescaling(other, frame)) @ matrix @ rescaling(size, small)
            found.append(Hypothesis(score, full))
    return _apart(sorted(found, key=lambda each: -each.score), size, keep)


class _Spectra:
    """Fourier transforms of the visible pictures' fields, one for each size of the canvas."""

    def __init__(self, field: Tensor) -> None:
        self.field, self.energy = field, field.abs().square()
        self.size: Size = (field.shape[-2], field.shape[-1])
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def at(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of the field and of its energy."""
        if shape not in self._known:
            self._known = {shape: (torch.fft.fft2(self.field, s=shape), torch.fft.rfft2(self.energy, s=shape))}
        return self._known[shape]


def _best_shift(spectra: _Spectra, heat: Tensor, turn: float, reach: int) -> tuple[float, Matrix]:
    """`heat` (N,h,w) at the scale of the visible fields -> score and the matrix visible to infrared of the best shift
    of the centres by up to `reach` pixels."""
    size, frame = spectra.size, (heat.shape[-2], heat.shape[-1])
    # the turned infrared is laid on a canvas that holds both frames, all three with the same middle
    canvas: Size = (max(size[0], frame[0]), max(size[1], frame[1]))
    turned = similarity(1, turn, centre(canvas), centre(frame))
    image, mask = sampled(heat, torch.from_numpy(turned), canvas)
    other = _complex(orientation(image, mask))
    # room for the shifts alone: what wraps round farther out is not looked at
    lengths = [max(one, (one + two) // 2 + reach + 2) for one, two in zip(canvas, size, strict=True)]
    shape = (next_fast_len(lengths[0]), next_fast_len(lengths[1]))
    first, energy = spectra.at(shape)
    together = torch.fft.ifft2((first * torch.fft.fft2(other, s=shape).conj()).sum(0)).real
    chance = torch.fft.irfft2((energy * torch.fft.rfft2(other.abs().square(), s=shape).conj()).sum(0), s=shape)
    score = together / (chance.clamp(min=0) + 0.02 * chance.max()).sqrt()
    # shift (dy, dx): visible pixel p looks at the canvas at p - shift; 0 is where the middles coincide
    y0, x0 = (size[0] - canvas[0]) // 2, (size[1] - canvas[1]) // 2
    window = torch.roll(score, (reach - y0, reach - x0), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    best = int(window.argmax())
    dy, dx = best // window.shape[1] - reach + y0, best % window.shape[1] - reach + x0
    shift = np.array([[1, 0, -dx], [0, 1, -dy], [0, 0, 1.0]])
    return float(window.max()), turned @ shift


def _complex(field: Tensor) -> Tensor:
    """(N,2,H,W) -> complex (N,H,W)."""
    return torch.view_as_complex(field.movedim(1, -1).contiguous())


def _apart(found: list[Hypothesis], size: Size, keep: int) -> list[Hypothesis]:
    kept: list[Hypothesis] = []
    least = 0.04 * max(size)
    for each in found:
        moved = [apply(np.linalg.inv(other.matrix) @ each.matrix, corners(size)) - corners(size) for other in kept]
        if all(np.linalg.norm(move, axis=1).mean() > least for move in moved):
            kept.append(each)
        if len(kept) == keep:
            break
    return kept
