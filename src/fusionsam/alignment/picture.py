"""What a person looks at to judge an alignment: a checkerboard of the two cameras, and edges of one over the other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fusionsam.alignment.orientation import grey, resized
from fusionsam.alignment.warp import Warped

SIDE = 640
FIELDS = 8
"""Fields of the checkerboard along the longer side."""
EDGE = (255, 60, 0)
Rgb = NDArray[np.uint8]


def checkerboard(visible: Tensor, infrared: Warped) -> Rgb:
    """uint8 (H,W,3): fields of the visible picture and of infrared by turns; visible where infrared is not."""
    height, width = visible.shape[1:]
    field = max(1, max(height, width) // FIELDS)
    rows, columns = torch.arange(height)[:, None] // field, torch.arange(width)[None] // field
    take = ((rows + columns) % 2 == 1) & infrared.inside
    heat = infrared.image.expand(3, -1, -1)
    return torch.where(take, heat, visible).permute(1, 2, 0).numpy()


def edges_over(visible: Tensor, infrared: Warped) -> Rgb:
    """uint8 (H,W,3): the strongest edges of infrared in orange over the visible picture, darkened where infrared is
    not."""
    heat = grey(infrared.image)
    heat = torch.nn.functional.avg_pool2d(heat[None], 3, 1, 1)[0]
    x, y = torch.zeros_like(heat), torch.zeros_like(heat)
    x[:, 1:-1], y[1:-1] = heat[:, 2:] - heat[:, :-2], heat[2:] - heat[:-2]
    strength = (x.square() + y.square()).sqrt() * infrared.inside
    there = strength[infrared.inside]
    level = float(there.quantile(0.92)) if 0 < there.numel() <= 1 << 24 else 0.0
    drawn = (strength > max(level, 2.0)) & infrared.inside
    picture = torch.where(infrared.inside, visible, visible // 2).permute(1, 2, 0).clone()
    picture[drawn] = torch.tensor(EDGE, dtype=torch.uint8)
    return picture.numpy()


def sheet(visible: Tensor, before: Tensor, after: Warped) -> Image.Image:
    """Four panels: checkerboard and edges, with the infrared picture stretched over the visible frame (before) and as
    the rig puts it (after). All uint8: `visible` (3,H,W), `before` (1,h,w), `after` in the visible frame."""
    factor = min(1.0, SIDE / max(visible.shape[1:]))
    size = (max(1, round(visible.shape[1] * factor)), max(1, round(visible.shape[2] * factor)))
    small = _shrunk(visible, size)
    whole = torch.ones(size, dtype=torch.bool)
    first = Warped(_shrunk(before, size), whole)
    second = Warped(_shrunk(after.image, size), resized(after.inside[None].float(), size)[0] > 0.5)
    panels = [
        ("before: stretched over", checkerboard(small, first)),
        ("after: by the rig", checkerboard(small, second)),
        ("infrared edges, before", edges_over(small, first)),
        ("infrared edges, after", edges_over(small, second)),
    ]
    gap, text = 8, 20
    paper = Image.new("RGB", (2 * size[1] + 3 * gap, 2 * (size[0] + text) + 3 * gap), (255, 255, 255))
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(size=14)
    for number, (title, panel) in enumerate(panels):
        x, y = gap + (number % 2) * (size[1] + gap), gap + (number // 2) * (size[0] + text + gap)
        draw.text((x, y), title, fill=(20, 20, 20), font=font)
        paper.paste(Image.fromarray(np.ascontiguousarray(panel)), (x, y + text))
    return paper


def _shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    return resized(image.float(), size).round().clamp(0, 255).to(torch.uint8)
