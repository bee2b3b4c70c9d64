"""What a visible and an infrared picture of one scene have in common: where edges lie and which way they run.

Grey is normalised by its local contrast; the gradient's direction is doubled, so that an edge from dark to bright and
one from bright to dark are the same (normalised gradient fields, Haber and Modersitzki, MICCAI 2006).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionsam.alignment.geometry import Size
from fusionsam.types import LUMA

NEIGHBOURHOOD = 12
"""The local mean and deviation are taken over a Gaussian of the longer side divided by this."""


def grey(image: Tensor) -> Tensor:
    """uint8 or float (3,H,W) or (1,H,W), 0-255 -> float (H,W), 0-255."""
    if image.shape[0] == 1:
        return image[0].float()
    return (image.float() * torch.tensor(LUMA)[:, None, None]).sum(0)


def compressed(visible: Tensor) -> Tensor:
    """The square root lifts the edges in the shade, 0-255."""
    return (visible + 4).sqrt() * 16


def resized(images: Tensor, size: Size) -> Tensor:
    """(N,H,W) -> (N,h,w), averaged where it is reduced."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images[:, None], size, mode="bilinear", align_corners=False, antialias=True)[:, 0]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N,H,W); the border is continued."""
    # beyond a picture's own size the continued border alone would be seen
    reach = min(math.ceil(2.5 * sigma), 3 * max(images.shape[-2:]))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).to(images)
    padded = F.pad(images[None], (reach, reach, reach, reach), mode="replicate")
    # a group a picture: several times as fast on a CPU as pictures in a batch
    count = len(images)
    across = F.conv2d(padded, kernel.expand(count, 1, 1, -1), groups=count)
    return F.conv2d(across, kernel[:, None].expand(count, 1, -1, 1), groups=count)[0]


def broad_blur(images: Tensor, sigma: float) -> Tensor:
    """`blurred` by a large sigma at the price of a small one: on a reduced copy."""
    factor = max(1, int(sigma / 3))
    if factor == 1:
        return blurred(images, sigma)
    height, width = images.shape[-2:]
    small = F.interpolate(
        images[:, None], (max(2, height // factor), max(2, width // factor)), mode="bilinear", antialias=True
    )
    small = blurred(small[:, 0], sigma / factor)
    return F.interpolate(small[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def local_contrast(images: Tensor) -> Tensor:
    """(N,H,W) grey -> less the local mean, over the local deviation: flat regions stay flat, faint edges count."""
    sigma = max(images.shape[-2:]) / NEIGHBOURHOOD
    detail = images - broad_blur(images, sigma)
    deviation = broad_blur(detail * detail, sigma).clamp(min=0).sqrt()
    return detail / (deviation + 0.25 * deviation.mean((1, 2), keepdim=True) + 1)


def orientation(images: Tensor, mask: Tensor | None = None, sigma: float = 1.0, blur: float = 1.0) -> Tensor:
    """(N,H,W) -> (N,2,H,W): cosine and sine of the doubled direction of the gradient, of length 0 (flat) to 1 (edge),
    the mean direction of each picture taken off. `mask` (N or 1,H,W) is 1 where a picture has pixels."""
    smooth = blurred(images, sigma)
    padded = F.pad(smooth[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    x = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    y = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    square = x * x + y * y
    if mask is None:
        usual = square.mean((1, 2), keepdim=True)
    else:
        usual = (square * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True).clamp(min=1)
    scale = square + usual + 1e-8
    field = torch.stack([(x * x - y * y) / scale, 2 * x * y / scale], 1)
    weight = (square / scale)[:, None]
    if mask is not None:
        field, weight = field * mask[:, None], weight * mask[:, None]
    field = field - weight * field.sum((2, 3), keepdim=True) / (weight.sum((2, 3), keepdim=True) + 1e-6)
    return blurred(field.flatten(0, 1), blur).reshape(field.shape)


def sampled(images: Tensor, matrix: Tensor, size: Size, bend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`images` (N,h,w) at the places to which `matrix` (3,3) sends the pixels of a frame of `size`: (N,H,W), and the
    mask (1,H,W) of places that lie inside. The gradient reaches the matrix, and `bend` (2): radial terms of the lens
    that took the images, of the radius over half their diagonal."""
    height, width = size
    rows = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.float32)[None].expand(height, width)
    places = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ matrix.T.float()
    depth = places[..., 2:]
    places = places[..., :2] / torch.where(depth.abs() < 1e-6, 1e-6, depth)
    if bend is not None:
        middle = torch.tensor([(images.shape[2] - 1) / 2, (images.shape[1] - 1) / 2])
        out = places - middle
        # beyond the picture the polynomial would run away
        square = (out.square().sum(-1, keepdim=True) / middle.square().sum()).clamp(max=2)
        places = middle + out * (1 + square * (bend[0].float() + square * bend[1].float()))
    limits = torch.tensor([images.shape[2] - 1.0, images.shape[1] - 1.0]).clamp(min=1)
    grid = 2 * places / limits - 1
    # edges of the border itself are nobody's
    inside = ((grid.detach().abs() < 0.985).all(-1) & (depth[..., 0].detach() > 0)).float()
    warped = F.grid_sample(
        images[:, None], grid[None].expand(len(images), -1, -1, -1), padding_mode="border", align_corners=True
    )
    return warped[:, 0], inside[None]
