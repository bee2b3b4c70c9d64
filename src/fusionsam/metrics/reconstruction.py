"""What LSTG keeps of an image: PSNR and SSIM of the rebuilt picture, and the health of the codebook."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fusionsam.types import LUMA

MODALITIES = ("visible", "infrared")
BEST_PSNR = 100.0
"""dB given to an image rebuilt without any error, so that means stay finite."""


def psnr(image: Float[Tensor, "B C H W"], rebuilt: Float[Tensor, "B C H W"]) -> float:
    """10 log10(1 / MSE) in dB over all channels and pixels, images in [0,1]; at most BEST_PSNR."""
    error = float((image - rebuilt).cpu().double().square().mean())  # Apple's devices know no float64
    return min(BEST_PSNR, -10 * math.log10(error)) if error > 0 else BEST_PSNR


def structural_similarity(image: Float[Tensor, "B C H W"], rebuilt: Float[Tensor, "B C H W"]) -> float:
    """SSIM of luma (of the one channel where there is one), window 7 x 7, (B,C,H,W) in [0,1]."""
    weights = image.new_tensor(LUMA)[None, :, None, None]
    grey = [(x * weights).sum(1, keepdim=True) if x.shape[1] == 3 else x for x in (image, rebuilt)]
    return float(ssim(grey[0].cpu().double(), grey[1].cpu().double()))


class CodeUsage:
    """Counts how often each entry of a modality's codebooks was chosen."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = torch.zeros(0, size, dtype=torch.long)

    def update(self, codes: Tensor) -> None:
        """Add codes int64 (..., codebooks) in 0..size-1."""
        books = codes.shape[-1]
        if len(self.counts) == 0:
            self.counts = torch.zeros(books, self.size, dtype=torch.long)
        for book in range(books):
            self.counts[book] += torch.bincount(codes[..., book].flatten().cpu(), minlength=self.size)

    @property
    def usage(self) -> float:
        """Percent of the entries that were chosen at least once, over all codebooks; 0 before the first update."""
        return 100 * float((self.counts > 0).float().mean()) if len(self.counts) else 0.0

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the choices, mean over the codebooks: size if all are equally frequent, 1 if one."""
        if not len(self.counts):
            return 0.0
        share = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        return float(torch.exp(torch.special.entr(share).sum(1)).mean())

    def as_dict(self) -> dict[str, float]:
        """Usage in percent and perplexity, rounded."""
        return {"codebook_usage": round(self.usage, 3), "perplexity": round(self.perplexity, 3)}


def ssim(one: Float[Tensor, "B 1 H W"], two: Float[Tensor, "B 1 H W"], window: int = 7) -> Float[Tensor, ""]:
    """Mean structural similarity of (B,1,H,W) images in [0,1], uniform window (Wang et al. 2004)."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    a, b = mean(one), mean(two)
    var_a, var_b = mean(one * one) - a * a, mean(two * two) - b * b
    covariance = mean(one * two) - a * b
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * a * b + c1) * (2 * covariance + c2)) / ((a * a + b * b + c1) * (var_a + var_b + c2))
    return value.mean()
