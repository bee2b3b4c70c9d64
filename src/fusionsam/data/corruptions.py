"""What happens to a camera: noise, blur, fog, exposure, a dead frame, night, a narrower view. Training draws them
(`DataConfig`), the table of `fusionsam robustness` measures some of them at fixed strengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from fusionsam.types import LUMA


def noise(image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of `deviation` (of the range 1) on every value, clipped to [0, 1]."""
    return (image + deviation * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def blur(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur, `deviation` in pixels, kernel of 6 deviations."""
    size = 2 * round(3 * deviation) + 1
    return V.gaussian_blur_image(image, [size, size], [deviation, deviation]).clamp(0, 1)


def fog(image: Tensor, depth: float, generator: torch.Generator) -> Tensor:
    """Koschmieder's law, I t + A (1 - t) with t = exp(-d): d falls from `depth` at the top, which is far away in a
    street, to a tenth at the bottom, in drifts (a random field of 5 x 7 values between 0.6 and 1.4 as factor); the
    airlight A is the image's own 95 % luma, so that fog is dark at night, but not below 0.15."""
    height, width = image.shape[-2:]
    drifts = 0.6 + 0.8 * torch.rand(1, 1, 5, 7, generator=generator)
    field = F.interpolate(drifts, (height, width), mode="bilinear", align_corners=True)[0]
    distance = torch.linspace(1, 0.1, height)[None, :, None]
    kept = torch.exp(-depth * distance * field)
    light = torch.tensordot(torch.tensor(LUMA), image, dims=1).flatten().quantile(0.95).clamp(min=0.15)
    return image * kept + light * (1 - kept)


def harsh(image: Tensor, generator: torch.Generator) -> Tensor:
    """One strong disturbance of (3,H,W) visible or (1,H,W) infrared in [0,1], all four equally likely: exposure (x 0.2
    to 4, clipped), noise (deviation 0.03 to 0.12), blur (1.4 to 3.5 pixels), and fog (depth 0.5 to 3) over visible or a
    dead frame (one value everywhere, black half the time) in place of infrared."""
    draw, strength = torch.rand(2, generator=generator).tolist()
    if draw < 0.25:
        return (image * math.exp(math.log(0.2) + strength * math.log(20))).clamp(0, 1)
    if draw < 0.5:
        return noise(image, 0.03 + 0.09 * strength, generator)
    if draw < 0.75:
        return blur(image, 1.4 + 2.1 * strength)
    if len(image) == 3:
        return fog(image, 0.5 + 2.5 * strength, generator)
    return torch.full_like(image, max(0.0, 2 * strength - 1))


def night(image: Tensor, generator: torch.Generator) -> Tensor:
    """Visible (3,H,W) in [0,1] as a camera sees it after dark: gamma 1.5 to 3, gain 0.15 to 0.5, noise of deviation up
    to 0.04. A picture that is dark already (mean luma below 0.25) stays as it is."""
    if float(torch.tensordot(torch.tensor(LUMA), image, dims=1).mean()) < 0.25:
        return image
    gamma, gain, deviation = torch.rand(3, generator=generator).tolist()
    return noise(image.pow(1.5 + 1.5 * gamma) * (0.15 + 0.35 * gain), 0.005 + 0.035 * deviation, generator)


def reach(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """bool (H,W): where a camera of a narrower view still sees, as after an alignment. A rectangle with sides of 0.3 to
    1.4 of the picture's, its centre anywhere in it, turned by up to 5 degrees; one draw in four is the reverse, a hole
    (a lens cap's edge, a masked region). One draw in three hundred is everything or nothing."""
    height, width = size
    y, x, tall, wide, turn, reverse = torch.rand(6, generator=generator).tolist()
    angle = math.radians(10 * turn - 5)
    down = (torch.arange(height)[:, None] + 0.5) / height - y
    right = ((torch.arange(width)[None, :] + 0.5) / width - x) * (width / height)
    along, across = right * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - right * math.sin(angle)
    inside = (across.abs() <= 0.15 + 0.55 * tall) & (along.abs() <= (0.15 + 0.55 * wide) * width / height)
    return ~inside if reverse < 0.25 else inside
