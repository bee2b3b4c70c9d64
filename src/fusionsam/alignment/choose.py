"""Which of many pairs tell most of a rig: those with edges in both pictures, of scenes that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionsam.alignment.orientation import compressed, grey, resized


@dataclass
class Candidate:
    """What is kept of a pair while others are looked at."""

    sharpness: float
    look: Tensor  # (n), of unit length


def candidate(visible: Tensor, infrared: Tensor) -> Candidate:
    """`visible` uint8 (3,H,W), `infrared` uint8 (1,H',W')."""
    small = torch.cat([resized(compressed(grey(visible))[None], (96, 128)), resized(grey(infrared)[None], (96, 128))])
    edges = [(image.diff(dim=0).abs().mean() + image.diff(dim=1).abs().mean()).item() for image in small]
    look = resized(small, (12, 16)).flatten(1)
    look = look - look.mean(1, keepdim=True)
    look = look / (look.norm(dim=1, keepdim=True) + 1e-6)
    # the flatter of the two pictures decides what can be found
    return Candidate(min(edges), look.flatten() / 2**0.5)


def choose(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Indices of at most `count` candidates: the sharpest first, then always the one that is sharp and least like those
    that were taken."""
    if len(candidates) <= count:
        return list(range(len(candidates)))
    sharp = torch.tensor([each.sharpness for each in candidates])
    sharp = sharp.argsort().argsort().float() / (len(candidates) - 1)  # ranks: a grey level is no unit
    looks = torch.stack([each.look for each in candidates])
    taken = [int(sharp.argmax())]
    while len(taken) < count:
        likeness = (looks @ looks[taken].T).amax(1)
        worth = sharp - likeness
        worth[taken] = -9
        taken.append(int(worth.argmax()))
    return sorted(taken)
