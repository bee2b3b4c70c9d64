"""Styles of an infrared picture: what cameras and data sets do between heat and the stored grey value.

MFNet stores its camera's own grey values; MSRS stores the same pictures with haze removed by the dark channel (mean 24
of 255 in the place of 74); other cameras stretch, equalise or curve theirs. Every style here is monotone in heat, but
for haze removal, which is nearly so within a neighbourhood. Training draws one (`DataConfig.infrared_style`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _box_mean(image: Tensor, radius: int) -> Tensor:
    """Mean over a window of 2 radius + 1 pixels (1,H,W) -> (1,H,W), border pixels left out of the count."""
    size = 2 * radius + 1
    padded = image[None]
    for kernel, padding in (((1, size), (0, radius)), ((size, 1), (radius, 0))):
        padded = F.avg_pool2d(padded, kernel, 1, padding, count_include_pad=False)
    return padded[0]


def remove_haze(
    infrared: Tensor, window: int = 15, omega: float = 0.95, radius: int = 30, floor: float = 0.1
) -> Tensor:
    """Dark-channel haze removal (He et al., CVPR 2009) with a guided filter (He et al., ECCV 2010), as MSRS's infrared
    was made: (1,H,W) in [0,1] -> (1,H,W) in [0,1].

    `window` is the side of the minimum filter, `omega` the share of haze removed, `radius` the guided filter's (eps
    1e-3), `floor` the smallest transmission.
    """
    airlight = _airlight(infrared, window)
    scaled = infrared / airlight
    transmission = 1 - omega * _minimum(scaled, window)
    mean_i, mean_t = _box_mean(infrared, radius), _box_mean(transmission, radius)
    variance = _box_mean(infrared * infrared, radius) - mean_i * mean_i
    covariance = _box_mean(infrared * transmission, radius) - mean_i * mean_t
    a = covariance / (variance + 1e-3)
    b = mean_t - a * mean_i
    smooth = _box_mean(a, radius) * infrared + _box_mean(b, radius)
    return ((infrared - airlight) / smooth.clamp(min=floor) + airlight).clamp(0, 1)


def _minimum(image: Tensor, window: int) -> Tensor:
    """Minimum over a square window, (1,H,W) -> (1,H,W)."""
    negative = F.max_pool2d(-image[None], (1, window), 1, (0, window // 2))
    return -F.max_pool2d(negative, (window, 1), 1, (window // 2, 0))[0]


def _airlight(infrared: Tensor, window: int) -> Tensor:
    """Mean of the image over the brightest 0.1 % of its dark channel, at least 0.05 (a black picture has none)."""
    dark = _minimum(infrared, window).flatten()
    top = dark.topk(max(1, dark.numel() // 1000)).indices
    return infrared.flatten()[top].mean().clamp(min=0.05)


def draw_style(infrared: Tensor, generator: torch.Generator) -> Tensor:
    """(1,H,W) in [0,1] -> the same heat in another style, in [0,1].

    Haze removed (0.4 of the draws, blended 0.3 to 1), a monotone tone curve of four pieces (0.3), gamma exp(+-0.7)
    (0.6), and in half of the draws a gain to a mean between 12 and 120 of 255.
    """
    draws = torch.rand(4, generator=generator).tolist()
    if draws[0] < 0.4:
        blend = 0.3 + 0.7 * float(torch.rand((), generator=generator))
        infrared = torch.lerp(infrared, remove_haze(infrared), blend)
    if draws[1] < 0.3:
        steps = torch.rand(4, generator=generator) + 0.25
        knots = F.pad(steps.cumsum(0) / steps.sum(), (1, 0))
        place = (infrared * 4).clamp(0, 4 - 1e-4)
        low = place.long()
        infrared = torch.lerp(knots[low], knots[low + 1], place - low)
    if draws[2] < 0.6:
        gamma = math.exp(1.4 * float(torch.rand((), generator=generator)) - 0.7)
        infrared = infrared.clamp(min=0).pow(gamma)
    if draws[3] < 0.5:
        target = math.exp(math.log(12) + float(torch.rand((), generator=generator)) * math.log(10)) / 255
        infrared = infrared * (target / infrared.mean().clamp(min=1e-3)).clamp(0.1, 8)
    return infrared.clamp(0, 1)
