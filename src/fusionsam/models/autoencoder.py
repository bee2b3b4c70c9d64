"""E_i and G_i of eq. 2 and 4: the convolutional halves of a VQ-GAN with s = 4."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from fusionsam.models.layers import ResidualBlock, SeparableBlock, group_norm


class Encoder(nn.Module):
    """E_i: image (B,C_i,H,W) in [0,1] -> latents z_i (B,d,H/4,W/4), two stride-2 stages (eq. 2). With `separable`, that
    many depthwise separable blocks stand in the place of VQ-GAN's `blocks`."""

    def __init__(self, channels: int, width: int, dim: int, blocks: int, separable: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.act = nn.SiLU(inplace=True)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        if separable:
            self.blocks = nn.Sequential(self.act, *(SeparableBlock(2 * width) for _ in range(separable)))
        else:
            self.blocks = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.norm = group_norm(2 * width)
        self.out = nn.Conv2d(2 * width, dim, 1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B d h w"]:
        """(B,C_i,H,W) -> (B,d,H/4,W/4)."""
        x = self.blocks(self.down(self.act(self.stem(2 * image - 1))))
        return self.out(self.act(self.norm(x)))


class Decoder(nn.Module):
    """G_i: quantised latents (B,d,h,w) -> image (B,C_i,4h,4w) (eq. 4).

    Sub-pixel convolutions (arXiv 1609.05158) instead of transposed ones: no checkerboard, and the full-resolution
    work is one small convolution.
    """

    def __init__(self, channels: int, width: int, dim: int, blocks: int) -> None:
        super().__init__()
        self.inp = nn.Conv2d(dim, 2 * width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.up1 = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.refine = ResidualBlock(width)
        self.up2 = nn.Sequential(nn.SiLU(), nn.Conv2d(width, 4 * (width // 2), 3, padding=1), nn.PixelShuffle(2))
        self.out = nn.Sequential(nn.SiLU(), nn.Conv2d(width // 2, channels, 3, padding=1))

    def forward(self, latents: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C 4*h 4*w"]:
        """(B,d,h,w) -> (B,C_i,4h,4w), in [0,1] up to reconstruction error (not clamped)."""
        x = self.blocks(self.inp(latents))
        return 0.5 + 0.5 * self.out(self.up2(self.refine(self.up1(x))))


class PixelPatches(nn.Module):
    """Ablation (A): no LSTG. Raw 4x4 patches embedded linearly to the same grid (B,d,H/4,W/4), no quantisation."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, 4, stride=4)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B d h w"]:
        """(B,C_i,H,W) -> (B,d,H/4,W/4)."""
        return self.embed(2 * image - 1)
