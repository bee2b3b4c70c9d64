"""FMP, fusion mask prompting (eq. 10-13), and the two heads on z_f: the fused picture and the mask prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import FusionConfig
from fusionsam.models.color import chroma, from_luma_chroma, luma
from fusionsam.models.layers import ResidualBlock, attend, beside, group_norm, resize, sincos_positions


def pool(grid: Float[Tensor, "B d h w"], stride: int) -> Float[Tensor, "B d h_r w_r"]:
    """(B,d,h,w) -> its means (B,d,ceil(h/r),ceil(w/r)) over cells of r = `stride`; those at the lower and right border
    may be smaller."""
    return grid if stride == 1 else F.avg_pool2d(grid, stride, ceil_mode=True, count_include_pad=False)


class Scales(NamedTuple):
    """A grid at full size, pooled for queries, and pooled further for keys and values: both units share it."""

    full: Float[Tensor, "B d h w"]
    query: Float[Tensor, "B d h_q w_q"]
    small: Float[Tensor, "B d h_kv w_kv"]

    @classmethod
    def of(cls, grid: Float[Tensor, "B d h w"], config: FusionConfig) -> Scales:
        """(B,d,h,w) at the scales of `config`."""
        query = pool(grid, config.query_stride)
        return cls(grid, query, pool(query, config.kv_stride // config.query_stride))


def enlarge(grid: Float[Tensor, "B d h_q w_q"], like: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
    """What pooled queries were answered, at the size of `like`."""
    return resize(grid, (like.shape[2], like.shape[3]))


class Projections(nn.Module):
    """Q, K, V of one source (eq. 10, 12), with positions added to Q and K, and K, V of the pooled source."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(dim, dim, 1)
        self.key = nn.Conv2d(dim, dim, 1)
        self.value = nn.Conv2d(dim, dim, 1)

    def q(self, tokens: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
        """Content of Q (B,d,h,w), before positions: it is also the residual of eq. 11."""
        return self.query(tokens)

    def kv(
        self, pooled: Float[Tensor, "B d h_kv w_kv"], positions: Float[Tensor, "1 d h_kv w_kv"]
    ) -> tuple[Float[Tensor, "B d h_kv w_kv"], Float[Tensor, "B d h_kv w_kv"]]:
        """K with positions and V of tokens and positions that were pooled before they are projected, which for means is
        the same and costs 1 / kv_stride^2 of it."""
        return self.key(pooled) + positions, self.value(pooled)


class FeedForward(nn.Module):
    """LN(FFN(.)) of eq. 11 and 13, per token of (B,d,h,w).

    LN's gain begins at zero: z_f begins as convolutions of both latents, as in ablation (B), and attention comes in as
    it is learned. At a gain of one a random FFN of an attention that is still nearly the same everywhere drowns the
    tokens it is added to (docs/log/ablations.md has both).
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, grid: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
        """(B,d,h,w) -> (B,d,h,w)."""
        tokens = grid.permute(0, 2, 3, 1)
        return self.norm(self.down(F.gelu(self.up(tokens)))).permute(0, 3, 1, 2)


class CrossDomainUnit(nn.Module):
    """Eq. 10-11: each modality queries the other; z_c = conv([z1', z2']) is the initial fusion mask."""

    def __init__(self, dim: int, config: FusionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.first = Projections(dim)
        self.second = Projections(dim)
        self.feed_first = FeedForward(dim, config.ffn_ratio)
        self.feed_second = FeedForward(dim, config.ffn_ratio)
        self.merge = nn.Conv2d(2 * dim, dim, 3, padding=1)

    def forward(self, one: Scales, two: Scales, positions: Scales) -> Float[Tensor, "B d h w"]:
        """I_1^q, I_2^q (B,d,h,w) -> z_c (B,d,h,w)."""
        k1, v1 = self.first.kv(one.small, positions.small)
        k2, v2 = self.second.kv(two.small, positions.small)
        z1 = self._ask(one, self.first, self.feed_first, positions.query, k2, v2)
        z2 = self._ask(two, self.second, self.feed_second, positions.query, k1, v1)
        return self.merge(torch.cat([z1, z2], dim=1))

    def _ask(
        self,
        own: Scales,
        own_projections: Projections,
        feed: FeedForward,
        positions: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Float[Tensor, "B d h w"]:
        q = own_projections.q(own.full)
        pooled = q if own.query is own.full else own_projections.q(own.query)
        return enlarge(feed(attend(pooled + positions, key, value, self.heads)), q) + q


class ComplementaryUnit(nn.Module):
    """Eq. 12-13. z_0 keeps what is distinct in each modality: its tokens less what the other one can tell of them.

    The paper leaves z_0 at "a cross-attention"; the subtraction is how distinct parts survive it. z_0 gives keys and
    values alone, so it is made where these are, pooled: means and the projections between are linear.
    """

    def __init__(self, dim: int, config: FusionConfig) -> None:
        super().__init__()
        self.heads, self.stride = config.heads, config.query_stride
        self.further = config.kv_stride // config.query_stride
        self.first = Projections(dim)
        self.second = Projections(dim)
        self.distinct = nn.Conv2d(2 * dim, dim, 1)
        self.common = Projections(dim)  # Q from z_c, K and V from z_0
        self.feed = FeedForward(dim, config.ffn_ratio)

    def forward(
        self, one: Scales, two: Scales, z_c: Float[Tensor, "B d h w"], positions: Scales
    ) -> Float[Tensor, "B d h w"]:
        """I_1^q, I_2^q and z_c (B,d,h,w) -> z_f (B,d,h,w)."""
        k1, v1 = self.first.kv(one.small, positions.small)
        k2, v2 = self.second.kv(two.small, positions.small)
        shared_one = attend(self.first.q(one.query) + positions.query, k2, v2, self.heads)
        shared_two = attend(self.second.q(two.query) + positions.query, k1, v1, self.heads)
        distinct = [one.small - pool(shared_one, self.further), two.small - pool(shared_two, self.further)]
        k0, v0 = self.common.kv(self.distinct(torch.cat(distinct, dim=1)), positions.small)
        asked = self.common.q(pool(z_c, self.stride)) + positions.query
        return enlarge(self.feed(attend(asked, k0, v0, self.heads)), z_c) + z_c


class FusionMaskPrompting(nn.Module):
    """z_f from the two latents: both units of eq. 10-13, or (ablation B) concatenation and a convolution."""

    def __init__(self, dim: int, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind == "fmp":
            self.cross_domain = CrossDomainUnit(dim, config)
            self.complementary = ComplementaryUnit(dim, config)
        else:
            self.concat = nn.Conv2d(2 * dim, dim, 3, padding=1)
        self.mask_head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1), group_norm(dim // 2), nn.GELU(), nn.Conv2d(dim // 2, 1, 1)
        )

    def forward(
        self, one: Float[Tensor, "B d h w"], two: Float[Tensor, "B d h w"]
    ) -> tuple[Float[Tensor, "B d h w"], Float[Tensor, "B 1 h w"]]:
        """I_1^q, I_2^q (B,d,h,w) -> z_f (B,d,h,w), mask prompt logits (B,1,h,w)."""
        if self.config.kind == "fmp":
            positions = sincos_positions(one.shape[2], one.shape[3], one.shape[1], one)
            first, second, places = (Scales.of(grid, self.config) for grid in (one, two, positions))
            z_c = self.cross_domain(first, second, places)
            z_f = self.complementary(first, second, z_c, places)
        else:
            z_f = self.concat(torch.cat([one, two], dim=1))
        return z_f, self.mask_head(z_f)


class BlendHead(nn.Module):
    """The picture: luma = m Y1 + (1 - m) I2 + r with a mask m and a residual r predicted per pixel from z_f and both
    sources; chroma is the visible image's. Sharp where convolutions on 4x-downsampled codes alone would blur.

    At `picture_stride` s its convolutions see s x s pixels of the sources as channels of one cell (sub-pixel
    convolutions, arXiv 1609.05158) and give m and r for each of them: a fraction of the work, with a mask as sharp.
    """

    RESIDUAL = 0.25  # largest |r|: enough to lift contrast, too little to paint

    def __init__(self, dim: int, config: FusionConfig) -> None:
        super().__init__()
        width, self.stride = config.picture_width, config.picture_stride
        finer, pixels = 4 // self.stride, self.stride**2
        self.expand = nn.Sequential(nn.Conv2d(dim, finer**2 * (width // 2), 1), nn.PixelShuffle(finer))
        self.mix = nn.Conv2d(width // 2 + 2 * pixels, width, 3, padding=1)
        self.context: nn.Sequential | None = None
        if config.picture_dilations:
            convolutions = [nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in config.picture_dilations]
            layers = [(nn.SiLU(inplace=place > 0), conv) for place, conv in enumerate(convolutions)]
            self.context = nn.Sequential(*(layer for pair in layers for layer in pair))
            nn.init.zeros_(convolutions[-1].weight)
            nn.init.zeros_(convolutions[-1].bias)  # type: ignore[arg-type]
        self.out = nn.Conv2d(width, 2 * pixels, 3, padding=1)
        nn.init.zeros_(self.out.weight)  # begins as the plain average, a picture SAM's encoder already understands
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self,
        z_f: Float[Tensor, "B d h w"],
        visible: Float[Tensor, "B 3 4*h 4*w"],
        infrared: Float[Tensor, "B 1 4*h 4*w"],
    ) -> Float[Tensor, "B 2 4*h 4*w"]:
        """z_f (B,d,h,w) and the sources (B,3,4h,4w), (B,1,4h,4w) -> controls (B,2,4h,4w): m in (0,1) and r."""
        sources = [F.pixel_unshuffle(image, self.stride) for image in (luma(visible), infrared)]
        x = self.mix(beside([self.expand(z_f), *sources]))
        if self.context is not None:
            x = self.context(x).add_(x)  # in place: these are the largest maps of the whole network
        m, r = F.pixel_shuffle(self.out(F.silu(x, inplace=True)), self.stride).split(1, dim=1)
        return torch.cat([m.sigmoid(), self.RESIDUAL * r.tanh()], dim=1)

    @staticmethod
    def compose(
        controls: Float[Tensor, "B 2 h w"], visible: Float[Tensor, "B 3 H W"], infrared: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """I_f (B,3,H,W) in [0,1] from controls of any size and the sources at the size wanted."""
        m, r = resize(controls, (visible.shape[2], visible.shape[3])).split(1, dim=1)
        y = m * luma(visible) + (1 - m) * infrared + r
        return from_luma_chroma(y, chroma(visible)).clamp(0, 1)


class DecodeHead(nn.Module):
    """The literal reading: I_f by convolutions on z_f alone."""

    def __init__(self, dim: int, config: FusionConfig) -> None:
        super().__init__()
        width = config.picture_width
        self.body = nn.Sequential(
            ResidualBlock(dim),
            nn.Conv2d(dim, 16 * width, 3, padding=1),
            nn.PixelShuffle(4),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(
        self,
        z_f: Float[Tensor, "B d h w"],
        visible: Float[Tensor, "B 3 4*h 4*w"],
        infrared: Float[Tensor, "B 1 4*h 4*w"],
    ) -> Float[Tensor, "B 3 4*h 4*w"]:
        """z_f (B,d,h,w) -> the picture itself as controls (B,3,4h,4w)."""
        return self.body(z_f).sigmoid()

    @staticmethod
    def compose(
        controls: Float[Tensor, "B 3 h w"], visible: Float[Tensor, "B 3 H W"], infrared: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """I_f (B,3,H,W) in [0,1], resized to the sources' size."""
        return resize(controls, (visible.shape[2], visible.shape[3]))


PICTURE_HEADS: dict[str, type[BlendHead] | type[DecodeHead]] = {"blend": BlendHead, "decode": DecodeHead}
PICTURE_SETTINGS = ("picture_head", "picture_width", "picture_stride", "picture_dilations")
"""Settings of model.fusion that a picture head is built by."""
