"""Clicks that name a class: what a person's points and boxes with a class add to the class logits.

A part of its own behind the network: it changes the logits of the classes that were asked for around the clicks, and
without such a click it does not run. A click is SAM's sparse token plus the embedding of its class. Attention of that
token to every cell tells what it points at; a small U-Net turns this, the first pass' probabilities and the places of
the clicks into a change of the logits of the one class.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import SteeringConfig
from fusionsam.models.layers import resize
from fusionsam.types import ClassClicks

NEAR, FAR = 1.5, 8.0  # cells: how far the two maps of a click reach
MARGIN = 1.0  # logits by which the class asked for leads in the cells of a click


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GELU(),
        )


class Steering(nn.Module):
    """First-pass logits and clicks that name a class -> new logits. `channels` is the width of the context."""

    MAPS = 12

    def __init__(self, config: SteeringConfig, classes: int, channels: int, embed: int) -> None:
        super().__init__()
        width = config.width
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.class_embedding = nn.Embedding(classes, embed)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        widths = [width, 2 * width, 4 * width, 6 * width]
        # every level of the U-Net sees the context by itself: a stem of the finest width alone would hold little of it
        self.stems = nn.ModuleList([nn.Conv2d(channels, each, 1) for each in widths])
        self.key = nn.Conv2d(channels, 2 * width, 1)
        self.token = nn.Sequential(nn.Linear(embed + 2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, 2 * width))
        self.named = nn.Linear(embed, width)
        self.down = nn.ModuleList([_Block(width + self.MAPS, width), *(_Block(a + b, b) for a, b in pairwise(widths))])
        self.up = nn.ModuleList([_Block(a + b, a) for a, b in pairwise(widths)])
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def normalise(self, mean: Float[Tensor, " C"], scale: Float[Tensor, " C"]) -> None:
        """Take mean and deviation of the context's channels for usual."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(
        self, context: Float[Tensor, "B C h w"], logits: Float[Tensor, "B K h w"], clicks: ClassClicks
    ) -> Float[Tensor, "B K h w"]:
        """Context (B,C,h,w) and logits (B,K,h,w) of the first pass -> logits (B,K,h,w), the same without clicks."""
        asked = [(b, k) for b, row in enumerate(clicks.classes.tolist()) for k in sorted(set(row) - {-1})]
        if not asked:
            return logits
        rows = torch.tensor([b for b, _ in asked], device=logits.device)
        kinds = torch.tensor([k for _, k in asked], device=logits.device)
        seen = (context - self.mean[:, None, None]) / self.scale[:, None, None]
        maps = self._maps(self.key(seen), logits, clicks, rows, kinds)
        names = self.named(self.class_embedding(kinds))[:, :, None, None]
        change = self._unet(seen, maps, rows, names)
        # under autocast the change may be of another type than the logits
        steered = logits.index_put((rows, kinds), change[:, 0].to(logits.dtype), accumulate=True)
        return self._obeyed(steered, clicks)

    def _maps(self, keys: Tensor, logits: Tensor, clicks: ClassClicks, rows: Tensor, kinds: Tensor) -> Tensor:
        height, width = keys.shape[2:]
        ys = torch.arange(height, device=keys.device, dtype=keys.dtype)[None, None, :, None]
        xs = torch.arange(width, device=keys.device, dtype=keys.dtype)[None, None, None, :]
        px, py = (clicks.points[..., i, None, None] for i in (0, 1))
        distance = (xs - px).square() + (ys - py).square()  # (B,P,h,w)
        near, far = (torch.exp(-distance / (2 * reach**2)) for reach in (NEAR, FAR))
        x0, y0, x1, y1 = (clicks.boxes[..., i, None, None] for i in range(4))
        inside = ((xs >= x0 - 0.5) & (xs <= x1 + 0.5) & (ys >= y0 - 0.5) & (ys <= y1 + 0.5)).to(keys.dtype)
        # what a click points at: its place's features, a box's middle
        middle = (clicks.boxes[..., :2] + clicks.boxes[..., 2:]) / 2
        places = torch.cat([clicks.points, middle], dim=1)
        grid = (places + 0.5) / places.new_tensor([width, height]) * 2 - 1
        seen = F.grid_sample(keys, grid[:, :, None], align_corners=False, padding_mode="border")[..., 0].transpose(1, 2)
        named = clicks.tokens + self.class_embedding(clicks.classes.clamp(min=0))
        query = self.token(torch.cat([named, seen], dim=2))
        match = torch.einsum("btd,bdhw->bthw", query, keys) / query.shape[2] ** 0.5

        def largest(values: Tensor, classes: Tensor, same: bool) -> Tensor:
            """(P,1,h,w): the largest of the clicks of the pass' class, or of the others'; 0 without one."""
            if values.shape[1] == 0:
                return values.new_zeros(len(rows), 1, height, width)
            wanted = (classes[rows] == kinds[:, None]) if same else (classes[rows] != kinds[:, None])
            wanted = wanted & (classes[rows] >= 0)
            found = values[rows].masked_fill(~wanted[..., None, None], -torch.inf).amax(1, keepdim=True)
            return torch.where(wanted.any(1)[:, None, None, None], found, 0.0)

        total = clicks.classes
        parts = []
        for same in (True, False):
            parts += [largest(v, clicks.point_classes, same) for v in (near, far)]
            parts.append(largest(inside, clicks.box_classes, same))
            parts.append(largest(match, total, same))
        probabilities = logits.softmax(1)[rows]
        own = probabilities.gather(1, kinds[:, None, None, None].expand(-1, 1, height, width))
        mine = logits[rows].gather(1, kinds[:, None, None, None].expand(-1, 1, height, width))
        others = logits[rows].scatter(1, kinds[:, None, None, None].expand(-1, 1, height, width), -torch.inf)
        lead = mine - others.amax(1, keepdim=True)
        entropy = -(probabilities * probabilities.clamp(min=1e-6).log()).sum(1, keepdim=True)
        parts += [own, (lead / 4).clamp(-3, 3), entropy, probabilities[:, :1]]
        return torch.cat(parts, dim=1)

    def _unet(self, seen: Tensor, maps: Tensor, rows: Tensor, names: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for stem, block in zip(self.stems, self.down, strict=True):
            if kept:
                seen = F.avg_pool2d(seen, 2, ceil_mode=True)
                beside = F.avg_pool2d(kept[-1], 2, ceil_mode=True)
                kept.append(block(torch.cat([F.gelu(stem(seen))[rows], beside], dim=1)))
            else:
                kept.append(block(torch.cat([F.gelu(stem(seen))[rows] + names, maps], dim=1)))
        x = kept[-1]
        for level in reversed(range(len(self.up))):
            size = (kept[level].shape[2], kept[level].shape[3])
            x = self.up[level](torch.cat([kept[level], resize(x, size)], dim=1))
        change: Tensor = self.out(x)
        return change

    def _obeyed(self, logits: Tensor, clicks: ClassClicks) -> Tensor:
        """The cells around a point have its class, by MARGIN: bilinear resizing gives the pixel what all four have."""
        height, width = logits.shape[2:]
        told = torch.zeros(logits.shape, dtype=torch.bool)
        corner = clicks.points.floor().long()
        for b, row in enumerate(clicks.point_classes.tolist()):
            for (x, y), index in zip(corner[b].tolist(), row, strict=True):
                if index >= 0:
                    cells = told[b, :, max(y, 0) : min(y + 2, height), max(x, 0) : min(x + 2, width)]
                    cells[:] = False  # of two clicks at a cell the later one counts
                    cells[index] = True
        told = told.to(logits.device)
        others = logits.masked_fill(told, -torch.inf).amax(1, keepdim=True)
        return torch.where(told, torch.maximum(logits, others + MARGIN), logits)
