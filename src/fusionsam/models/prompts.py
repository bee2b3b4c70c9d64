"""Where SAM's prompts come from, and SAM's prompt encoder on frames of any size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fusionsam.config.schema import DecoderConfig, PromptConfig
from fusionsam.models.layers import resize, rounded, same_size, size_tensor
from fusionsam.models.sam import SIDE, SamPromptEncoder
from fusionsam.types import ClassClicks, Frame, Prompts

CELL = 4  # pixels a latent cell covers


def self_prompts(mask_prompt: Float[Tensor, "B 1 h w"], config: PromptConfig) -> Prompts:
    """The prompts a model gives itself: separated peaks of its mask prompt, and the box around what is above threshold.

    mask_prompt (B,1,h,w) logits. Peaks are taken greedily, each suppressing all within `separation` cells of it;
    a peak below the threshold is padding (label -1, SAM's "not a point"). Without any cell above the threshold the
    box is the whole image. Coordinates are pixels at the centre of a cell, at least float32: bfloat16 rounds them
    from 256 on.
    """
    height, width = mask_prompt.shape[2:]
    precision = torch.promote_types(mask_prompt.dtype, torch.float32)
    logits = mask_prompt.detach()[:, 0].flatten(1)
    ys = torch.arange(height, device=logits.device)[:, None].expand(height, width).reshape(-1)
    xs = torch.arange(width, device=logits.device)[None].expand(height, width).reshape(-1)
    limit = torch.logit(torch.tensor(config.threshold)).item()
    points, labels = [], []
    left = logits
    for _ in range(config.points):
        best, index = left.max(dim=1)
        x, y = xs[index], ys[index]
        points.append(torch.stack([x, y], dim=1))
        labels.append(torch.where(best > limit, 1, -1))
        near = (xs - x[:, None]).square() + (ys - y[:, None]).square() <= config.separation**2
        left = left.masked_fill(near, -torch.inf)
    boxes = None
    if config.box:
        above = logits > limit
        some = above.any(dim=1)

        def bounds(along: Tensor, last: int) -> tuple[Tensor, Tensor]:
            low = torch.where(above, along, last).amin(dim=1)
            high = torch.where(above, along, 0).amax(dim=1)
            return torch.where(some, low, 0), torch.where(some, high, last)

        x0, x1 = bounds(xs, width - 1)
        y0, y1 = bounds(ys, height - 1)
        box = torch.stack([x0 * CELL, y0 * CELL, (x1 + 1) * CELL - 1, (y1 + 1) * CELL - 1], dim=1)
        boxes = box[:, None].to(precision)
    has_points = config.points > 0
    return Prompts(
        points=(torch.stack(points, dim=1) * CELL + (CELL - 1) / 2).to(precision) if has_points else None,
        point_labels=torch.stack(labels, dim=1) if has_points else None,
        boxes=boxes,
        mask=mask_prompt,
        source="self",
    )


def oracle_prompts(
    label: Int[Tensor, "B H W"],
    classes: int,
    foreground: list[int],
    points: int = 10,
    seed: int = 0,
    named: bool = False,
) -> Prompts:
    """Prompts drawn from the ground truth: `points` a foreground class that occurs, and one box around them all; with
    `named` each point names its class, and the padding does not.

    An upper bound for evaluation, never for training or a headline figure. label int64 (B,H,W); drawn with `seed`.
    """
    batch, height, width = label.shape
    total = points * len(foreground)
    xy = torch.zeros(batch, total, 2)
    on = torch.full((batch, total), -1, dtype=torch.long)
    boxes = torch.tensor([0.0, 0.0, width - 1.0, height - 1.0]).repeat(batch, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    for row in range(batch):
        found = []
        for order, class_id in enumerate(i for i in foreground if i < classes):
            places = (label[row] == class_id).nonzero()
            if len(places) == 0:
                continue
            drawn = places[torch.randint(len(places), (points,), generator=generator)]
            xy[row, order * points : (order + 1) * points] = drawn.flip(1).float()
            on[row, order * points : (order + 1) * points] = 1
            found.append(places)
        if found:
            every = torch.cat(found)
            (y0, x0), (y1, x1) = every.amin(0).tolist(), every.amax(0).tolist()
            boxes[row, 0] = torch.tensor([x0, y0, x1, y1], dtype=torch.float32)
    ids = torch.tensor(foreground, dtype=torch.long).repeat_interleave(points).expand(batch, -1)
    point_classes = torch.where(on == 1, ids, -1) if named else None
    return Prompts(points=xy, point_labels=on, boxes=boxes, mask=None, source="oracle", point_classes=point_classes)


class PromptEncoder(nn.Module):
    """SAM's prompt encoder, fed with coordinates of a frame of any size and shape.

    SAM divides coordinates by one square image size; they are rescaled here so that its own code sees that square.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.sam = SamPromptEncoder(config.hidden)
        self.sam.shared_embedding.requires_grad_(False)  # SAM's random Fourier table is fixed
        self.sam.point_embed[0].requires_grad_(False)  # points off the object: only a person gives them

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 E H_e W_e"]:
        """SAM's positional encoding of every cell of the embedding grid, (1,E,H_e,W_e)."""
        height, width = grid
        table = self.sam.shared_embedding.positional_embedding
        y = (torch.arange(height, device=table.device, dtype=table.dtype) + 0.5) / height
        x = (torch.arange(width, device=table.device, dtype=table.dtype) + 0.5) / width
        coordinates = torch.stack([x[None, :].expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self.sam.shared_embedding(coordinates).permute(2, 0, 1)[None]

    def to_square(self, xy: Tensor, image_size: tuple[int, int], frame: Frame) -> Tensor:
        """Pixel centres (..., 2) of the image -> what SamPromptEncoder divides by its square size."""
        content = size_tensor(frame.content[::-1], xy) / size_tensor(image_size[::-1], xy)
        size = size_tensor(frame.size[::-1], xy)
        return (xy + 0.5) * content / size * SIDE - 0.5

    def forward(
        self, prompts: Prompts, image_size: tuple[int, int], frame: Frame, grid: tuple[int, int], use_mask: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Prompts in pixels of an (H,W) image -> sparse (B,1,T,E) or None, dense (B,E,H_e,W_e) on `grid`."""
        tokens = []
        if prompts.points is not None and prompts.point_labels is not None:
            points = self.to_square(prompts.points, image_size, frame)[:, None]
            labels = prompts.point_labels[:, None]
            if torch.compiler.is_exporting() and prompts.source == "user":
                tokens.append(self._embed_sam_points(points, labels))
            else:
                tokens.append(self.sam.embed_points(points, labels, pad=prompts.boxes is None))
        if prompts.boxes is not None:
            corners = prompts.boxes.reshape(*prompts.boxes.shape[:2], 2, 2)
            corners = self.to_square(corners, image_size, frame).flatten(2)
            tokens.append(self.sam.embed_boxes(corners).flatten(1, 2)[:, None])
        sparse = torch.cat(tokens, dim=2) if tokens else None
        if use_mask and prompts.mask is not None:
            placed = place(prompts.mask, frame, (4 * grid[0], 4 * grid[1]))
            dense = self.sam.mask_embed(placed)
        else:
            dense = self.sam.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *grid)
        return sparse, dense

    def class_clicks(self, given: Prompts, image_size: tuple[int, int], frame: Frame) -> ClassClicks:
        """Points and boxes that name a class, in pixels of an (H,W) image -> in latent cells, with SAM's own tokens."""
        like = self.sam.no_mask_embed.weight
        batch = len(given.points if given.points is not None else given.boxes)  # type: ignore[arg-type]
        none = like.new_zeros(batch, 0, dtype=torch.long)
        points, boxes = like.new_zeros(batch, 0, 2), like.new_zeros(batch, 0, 4)
        point_classes, box_classes, tokens = none, none, []
        if given.points is not None and given.point_classes is not None and given.points.shape[1]:
            points, point_classes = given.points, given.point_classes
            square = self.to_square(points, image_size, frame)[:, None]
            on = torch.ones_like(point_classes)[:, None]
            tokens.append(self.sam.embed_points(square, on, pad=False)[:, 0])
        if given.boxes is not None and given.box_classes is not None and given.boxes.shape[1]:
            boxes, box_classes = given.boxes, given.box_classes
            corners = self.to_square(boxes.unflatten(2, (2, 2)), image_size, frame).flatten(2)
            tokens.append(self.sam.embed_boxes(corners).unflatten(1, boxes.shape[1:2]).flatten(3).sum(2))
        cells = [(xy + 0.5) / CELL - 0.5 for xy in (points, boxes)]
        return ClassClicks(cells[0], point_classes, cells[1], box_classes, torch.cat(tokens, dim=1))

    def _embed_sam_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """An exported decoder's prompts: labels 2 and 3 are a box's corners, padding is the caller's, as in SAM's."""
        tokens = self.sam.embed_points(points, labels, pad=False)
        for corner in (2, 3):
            moved = tokens + self.sam.point_embed[corner].weight  # type: ignore[operator]
            tokens = torch.where((labels == corner)[..., None], moved, tokens)
        return tokens


def place(grid: Float[Tensor, "B C h w"], frame: Frame, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """A map over the image (B,C,h,w) placed into a map over the whole frame of `size`, zero outside the content."""
    if same_size(frame.content, frame.size):
        return resize(grid, size)
    height, width = (rounded(size[i] * frame.content[i], frame.size[i]) for i in (0, 1))
    inner = resize(grid, (height, width))
    if same_size((height, width), size):
        return inner
    return nn.functional.pad(inner, (0, size[1] - width, 0, size[0] - height))


def cut(grid: Float[Tensor, "B C h w"], frame: Frame, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """The inverse of `place`: a map over the frame (B,C,h,w) -> its content resized to `size`."""
    if same_size(frame.content, frame.size):
        return resize(grid, size)
    height, width = (rounded(grid.shape[i + 2] * frame.content[i], frame.size[i]) for i in (0, 1))
    return resize(grid[:, :, :height, :width], size)
