"""Radiometric one-file pairs: what their maker wrote of how the two pictures lie, refined from each pair itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusionsam.alignment.apply import Aligned, Aligner, alone
from fusionsam.alignment.estimate import working
from fusionsam.alignment.geometry import Size, apply, corners, rescaling
from fusionsam.alignment.refine import Level, refine
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.types import InputError, JsonObject

MAKER, MATRIX = "maker", "infrared_to_visible"
LEAST, RISE = 0.2, 0.05
"""Score that the refined pair must reach, and by how much it must rise, before the maker's word is changed."""
REACH = 0.08
"""Largest mean move of the corners that is believed, as a share of the longer side."""
SIDE, STEPS = 160, 24


class MakerAligner(Aligner):
    """Refines pairs that already lie in one frame, each by a shift, a scale and a turn of its own: the maker's numbers
    hold for one distance, and the cameras of one kind differ."""

    def __init__(self) -> None:
        super().__init__(Rig((1, 1), (1, 1), np.eye(3)), "--align maker")

    def __call__(self, visible: Tensor | None, infrared: Tensor | None) -> Aligned:
        """`visible` uint8 (3,H,W) and `infrared` (1,H,W) as the maker lays them. InputError for two sizes."""
        if visible is None or infrared is None:
            return alone(visible, infrared)
        size: Size = (visible.shape[1], visible.shape[2])
        if tuple(infrared.shape[1:]) != size:
            raise InputError(f"{self.name}: the pair has two sizes; expected a radiometric file with both")
        whole = torch.ones(2, *size, dtype=torch.bool)
        one, two = working(visible, True)[None], working(infrared, False)[None]
        small: Size = (one.shape[1], one.shape[2])
        level = Level(one, two, np.eye(3), SIDE)
        with torch.no_grad():
            before = float(level.scores(torch.eye(3).double())[0])
        found = refine(level, small, np.eye(3), STEPS, 4, 1.0)
        moves = np.linalg.norm(apply(found.matrix, corners(small)) - corners(small), axis=1)
        told: JsonObject = {"rig": MAKER, "frame": "visible", "refined": False, "score": round(before, 4)}
        rises = found.score >= LEAST and found.score - before >= RISE
        if not rises or moves.mean() > REACH * max(small):
            return Aligned(visible, infrared, whole, {**told, "covered": 1.0})
        scale = rescaling(size, small)
        matrix = np.linalg.inv(np.linalg.inv(scale) @ found.matrix @ scale)
        warp = Warp(Rig(size, size, matrix))
        warped = warp(infrared)
        told |= {
            "refined": True,
            "maker_score": told["score"],
            "score": round(found.score, 4),
            MATRIX: matrix.tolist(),
            "corners_moved": [round(float(move / scale[0, 0]), 1) for move in moves],
            "covered": round(warp.covered, 4),
        }
        return Aligned(visible, warped.image, torch.stack([whole[0], warped.inside]), told)
