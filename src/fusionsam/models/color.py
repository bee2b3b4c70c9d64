"""Luma and chroma of ITU-R BT.601, as tensors with gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fusionsam.types import LUMA


def luma(rgb: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    """BT.601 luma (B,1,H,W) of an RGB image (B,3,H,W); same range."""
    red, green, blue = rgb.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def chroma(rgb: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2 H W"]:
    """BT.601 Cb and Cr, zero-centred, (B,2,H,W) of an RGB image (B,3,H,W) in [0,1]."""
    y = luma(rgb)[:, 0]
    return torch.stack([(rgb[:, 2] - y) / 1.772, (rgb[:, 0] - y) / 1.402], dim=1)


def from_luma_chroma(y: Float[Tensor, "B 1 H W"], cbcr: Float[Tensor, "B 2 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The inverse of `luma` and `chroma`: (B,1,H,W) and (B,2,H,W) -> RGB (B,3,H,W), not clamped."""
    cb, cr = cbcr[:, :1], cbcr[:, 1:]
    return torch.cat([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], dim=1)
