"""The fine search: the homography that makes the orientation fields agree best, by gradient over corner moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusionsam.alignment.geometry import Matrix, Size, corner_modes, moved_corners, rescaling
from fusionsam.alignment.orientation import local_contrast, orientation, resized, sampled

UNIT = 640
"""Corner moves are counted in pixels of a visible picture whose longer side has this many."""
PRIOR = 8.0
"""Moves of aspect, shear and perspective of this many pixels cost `stiffness`."""


BEND = 100.0
"""The lens's terms are counted in hundredths, which weigh as pixels of the corners do."""


@dataclass
class Refined:
    """A homography, and how well it fits."""

    matrix: Matrix  # visible -> infrared pixels of the pictures that were given
    score: float  # normalised correlation of the orientation fields over all pairs, -1 to 1
    covered: float  # share of the visible frame on which infrared lies
    bend: tuple[float, float] = (0.0, 0.0)  # radial terms of the infrared lens, of the radius over half the diagonal


class Level:
    """The pairs at one working size, ready to be compared under any homography."""

    def __init__(self, visible: Tensor, infrared: Tensor, start: Matrix, side: int) -> None:
        size: Size = (visible.shape[-2], visible.shape[-1])
        other: Size = (infrared.shape[-2], infrared.shape[-1])
        factor = side / max(size)
        self.size: Size = (round(size[0] * factor), round(size[1] * factor))
        # infrared at about the same number of pixels a degree, never enlarged
        scale = np.sqrt(abs(np.linalg.det(start[:2, :2])))
        reduce = min(1.0, factor / scale)
        frame: Size = (max(24, round(other[0] * reduce)), max(24, round(other[1] * reduce)))
        self.field = orientation(local_contrast(resized(visible, self.size)))
        self.energy = self.field.square().sum(1)
        self.heat = local_contrast(resized(infrared, frame))
        self.before = torch.from_numpy(rescaling(other, frame))
        self.after = torch.from_numpy(np.linalg.inv(rescaling(size, self.size)))

    def compared(self, matrix: Tensor, bend: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Under visible -> infrared `matrix` (3,3): agreement of each pair (N), energies (N) to divide it by, and the
        share of the visible frame that is covered."""
        image, mask = sampled(self.heat, self.before @ matrix @ self.after, self.size, bend)
        field = orientation(image, mask)
        agreement = ((self.field * field).sum(1) * mask).sum((1, 2))
        energies = (self.energy * mask).sum((1, 2)), (field.square().sum(1) * mask).sum((1, 2))
        return agreement, torch.stack(energies), mask.mean()

    def score(self, matrix: Tensor, bend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normalised correlation over all pairs, and the share that is covered."""
        agreement, energies, covered = self.compared(matrix, bend)
        return agreement.sum() / (energies.sum(1).prod() + 1e-6).sqrt(), covered

    def scores(self, matrix: Tensor, bend: Tensor | None = None) -> Tensor:
        """The normalised correlation of each pair (N)."""
        agreement, energies, _ = self.compared(matrix, bend)
        return agreement / (energies.prod(0) + 1e-6).sqrt()


def refine(
    level: Level,
    size: Size,
    start: Matrix,
    steps: int,
    modes: int = 8,
    rate: float = 1.0,
    stiffness: float = 0.0,
    lens: bool = False,
) -> Refined:
    """Improve `start` (visible -> infrared) by `steps` of Adam over the first `modes` of eight corner moves (4: scale,
    turn and shift), with `lens` over two radial terms of the infrared lens besides; `rate` is in pixels of a visible
    picture of UNIT, `size` the visible picture's own."""
    if lens and modes < 8:
        raise ValueError("a lens is fitted with all eight movements")
    basis = corner_modes(size) * (max(size) / UNIT)
    begin = torch.from_numpy(start)
    moves = torch.zeros(modes + 2 * lens).double().requires_grad_(True)
    # Adam (arXiv 1412.6980) in four lines: torch.optim takes seconds to import
    mean, square = torch.zeros_like(moves), torch.zeros_like(moves)
    best, result = -np.inf, Refined(start, -1.0, 0.0)
    for step in range(steps + 1):
        matrix = begin @ moved_corners(size, (moves[:modes, None, None] * basis[:modes]).sum(0))
        bend = moves[modes:] / BEND if lens else None
        score, covered = level.score(matrix, bend)
        goal = score - stiffness * (moves[4:] / PRIOR).square().sum()
        if goal.item() > best:
            best = goal.item()
            found = matrix.detach().numpy()
            bent = (0.0, 0.0) if bend is None else (bend[0].item(), bend[1].item())
            result = Refined(found / found[2, 2], score.item(), covered.item(), bent)
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(goal, moves)
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient.square()
        usual, spread = mean / (1 - 0.8 ** (step + 1)), (square / (1 - 0.95 ** (step + 1))).sqrt()
        with torch.no_grad():
            moves += rate * (1 - 0.9 * step / steps) * usual / (spread + 1e-8)
    return result
