"""Bare building blocks shared by the stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest of 8, 4, 2, 1 groups that divides `channels`."""
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the block of VQ-GAN (arXiv 2012.09841) without attention.

    Keeps (B,C,H,W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            group_norm(channels),
            nn.SiLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels),
            nn.SiLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """(B,C,H,W) -> (B,C,H,W)."""
        return x + self.body(x)


class SeparableBlock(nn.Module):
    """x + pointwise(act(depthwise(x))): a depthwise separable convolution (arXiv 1704.04861) of 5x5, which sees as far
    as a ResidualBlock's two of 3x3, for a thirteenth of their work at 64 channels.

    Keeps (B,C,H,W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.act = nn.SiLU(inplace=True)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """(B,C,H,W) -> (B,C,H,W)."""
        return self.pointwise(self.act(self.depthwise(x))).add_(x)  # type: ignore[no-any-return]


def sincos_positions(height: int, width: int, dim: int, like: Tensor) -> Float[Tensor, "1 d h w"]:
    """2-D sine-cosine positions (1,dim,height,width): half the channels for y, half for x (arXiv 2111.06377).

    `dim` must be a multiple of 4; dtype and device follow `like`.
    """
    quarter = dim // 4
    rates = 1e4 ** (-torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter)
    y = torch.arange(height, device=like.device, dtype=torch.float32)[:, None] * rates
    x = torch.arange(width, device=like.device, dtype=torch.float32)[:, None] * rates
    y_part = torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(-1, width, -1)
    x_part = torch.cat([x.sin(), x.cos()], dim=1)[None].expand(height, -1, -1)
    # channels_last, as what they are added to
    return torch.cat([y_part, x_part], dim=-1).permute(2, 0, 1)[None].to(like.dtype)


def attend(
    query: Float[Tensor, "B d h w"],
    key: Float[Tensor, "B d h_kv w_kv"],
    value: Float[Tensor, "B d h_kv w_kv"],
    heads: int,
) -> Float[Tensor, "B d h w"]:
    """softmax(Q K^T / sqrt(d_k)) V on grids: query (B,d,h,w), key and value (B,d,h',w') -> (B,d,h,w).

    Runs through `scaled_dot_product_attention`, so no N x N matrix stays in memory.
    """
    batch, dim, height, width = query.shape

    def split(grid: Tensor) -> Tensor:
        # in channels_last memory these are views, no copies
        return grid.permute(0, 2, 3, 1).reshape(batch, -1, heads, dim // heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value))
    return out.transpose(1, 2).reshape(batch, height, width, dim).permute(0, 3, 1, 2)


def beside(maps: Sequence[Float[Tensor, "B _ H W"]]) -> Float[Tensor, "B C H W"]:
    """Maps beside one another as channels, in channels_last memory: torch.cat falls back to the other layout as soon as
    one map is in it, as those of one channel are, and the next convolution would turn the whole round."""
    if torch.compiler.is_compiling():  # a graph has no layout to keep, only transposes to do
        return torch.cat([*maps], dim=1)
    return torch.cat([grid.permute(0, 2, 3, 1) for grid in maps], dim=-1).permute(0, 3, 1, 2)


def same_size(one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether two sizes agree. Where sizes are symbols (torch.export), only if they agree whatever the input is."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(a == b) for a, b in zip(one, two, strict=True))
    return tuple(one) == tuple(two)


def rounded(number: int, divisor: int) -> int:
    """round(number / divisor), halves to even, at least 1, in whole numbers alone: holds for symbols too."""
    whole, rest = number // divisor, number % divisor
    nearest = whole + (2 * rest + whole % 2 + divisor + 1) // (2 * divisor + 2)
    return torch.sym_max(1, nearest)  # type: ignore[return-value]


def size_tensor(values: Sequence[int], like: Tensor) -> Tensor:
    """Whole numbers as a tensor (len(values),) with dtype and device of `like`, also where they are symbols."""
    if torch.compiler.is_exporting():
        return torch.stack([torch.full((), value, dtype=like.dtype, device=like.device) for value in values])
    return like.new_tensor(values)


def resize(grid: Float[Tensor, "B C h w"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """Bilinear resize of (B,C,H,W) to `size`; returned untouched when it has that size already."""
    if same_size(grid.shape[-2:], size):
        return grid
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
