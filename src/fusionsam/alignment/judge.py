"""Whether an estimate is believed, in words."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fusionsam.alignment.estimate import Estimate
from fusionsam.alignment.geometry import Size, apply, corners

ACCEPTED = {1: 0.35, 2: 0.28, 3: 0.24, 4: 0.22, 5: 0.20}
"""Least score by the number of pairs; more pairs are as five. Pictures that do not belong together reach less."""
LEAST_COVERED = 0.05
LITTLE_COVERED = 0.25
RATIOS = (0.4, 2.0)
"""Width of the infrared frame as a share of the visible one."""
FEW = 3


@dataclass
class Verdict:
    """What is thought of an estimate."""

    accepted: bool
    text: str  # one sentence
    warnings: list[str] = field(default_factory=list)


def judge(found: Estimate, visible_size: Size, infrared_size: Size) -> Verdict:
    """By its score, the share that is covered and the shape of what comes out."""
    count = len(found.scores)
    needed = ACCEPTED[min(count, max(ACCEPTED))]
    told = f"score {found.score:.2f} of {count} pair{'s' * (count != 1)}, {needed:.2f} is needed"
    if problem := _out_of_range(found, visible_size, infrared_size):
        return Verdict(False, f"refused: {problem} ({told})")
    if found.covered < LEAST_COVERED:
        problem = f"infrared would cover {found.covered:.0%} of the visible picture, the overlap is too small"
        return Verdict(False, f"refused: {problem} ({told})")
    if found.score < needed:
        more = "; one pair alone needs more than five do, give more" if count < 5 else ""
        return Verdict(
            False,
            f"refused: the pictures show no common edges; are they of the same moments and places? ({told}{more})",
        )
    warnings = []
    if count < FEW:
        warnings.append(f"found from {count} pair{'s' * (count != 1)} alone: look at the picture; give five or more")
    if found.covered < LITTLE_COVERED:
        warnings.append(f"infrared covers {found.covered:.0%} of the visible picture; the rest is without infrared")
    if count > 1 and found.shuffled > 0.5 * found.score:
        warnings.append(
            f"pictures of different pairs fit nearly as well ({found.shuffled:.2f}): all show one scene; give "
            "more varied pairs"
        )
    word = "clear" if found.score >= needed + 0.1 else "fair"
    return Verdict(True, f"accepted, a {word} fit: {told}", warnings)


def _out_of_range(found: Estimate, visible_size: Size, infrared_size: Size) -> str:
    moved = apply(np.linalg.inv(found.matrix), corners(infrared_size))
    sides = np.roll(moved, -1, 0) - moved
    after = np.roll(sides, -1, 0)
    turns = sides[:, 0] * after[:, 1] - sides[:, 1] * after[:, 0]
    if not np.isfinite(moved).all() or not (turns > 0).all():
        return "the infrared frame would come out folded or mirrored"
    width = float(np.linalg.norm(sides[[0, 2]], axis=1).mean()) / visible_size[1]
    if not RATIOS[0] <= width <= RATIOS[1]:
        low, high = RATIOS
        return f"the infrared frame would be {width:.2f} times as wide as the visible one, expected {low} to {high}"
    return ""
