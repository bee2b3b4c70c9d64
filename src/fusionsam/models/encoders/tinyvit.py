"""TinyViT (Wu et al. 2022, arXiv 2207.10666) as MobileSAM (Zhang et al. 2023, arXiv 2306.14289) uses it: four stages,
total stride 16 (the last merge keeps the size), no absolute position table, so any size divisible by 16 runs.

Every Conv+BatchNorm pair is one convolution with bias (`c`), under the names of MobileSAM's checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fusionsam.config.schema import EncoderConfig
from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.types import InputError

DIMS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
WINDOWS = (7, 7, 14, 7)  # the first is unused: stage 0 is convolutional
HEAD_DIM = 32
EXPANSION = 4  # of the inverted bottlenecks and of the MLPs


class FoldedConv(nn.Module):
    """A convolution that already contains its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        # Without a BatchNorm behind it, PyTorch's default would let the signal die out over the stages.
        nn.init.kaiming_normal_(self.c.weight, nonlinearity="relu")
        if self.c.bias is not None:
            nn.init.zeros_(self.c.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,H,W) -> (B,outputs,H/stride,W/stride)."""
        return self.c(x)


class PatchEmbed(nn.Module):
    """Two stride-2 convolutions: (B,3,H,W) -> (B,dim,H/4,W/4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(FoldedConv(3, dim // 2, 3, 2), nn.GELU(), FoldedConv(dim // 2, dim, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,dim,H/4,W/4)."""
        return self.seq(x)


class Bottleneck(nn.Module):
    """1x1, depthwise 3x3, 1x1: stage 0's residual block (`residual`), and what lies between two stages."""

    def __init__(self, dim: int, hidden: int, out: int, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.conv1 = FoldedConv(dim, hidden)
        self.conv2 = FoldedConv(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = FoldedConv(hidden, out)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B,dim,H,W) -> (B,out,H/stride,W/stride)."""
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.residual else y


class WindowAttention(nn.Module):
    """Self-attention in a window x window square with a learned bias for each distance (|dy|, |dx|) and head."""

    bias_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        place = torch.arange(window * window)
        row, column = place // window, place % window
        distance = (row[:, None] - row).abs() * window + (column[:, None] - column).abs()
        self.register_buffer("bias_index", distance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, window^2, dim) -> the same shape."""
        count, length, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(count, length, self.heads, 3, dim // self.heads)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.attention_biases[:, self.bias_index])
        return self.proj(mixed.transpose(1, 2).reshape(count, length, dim))


class Mlp(nn.Module):
    """Pre-normalised two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * EXPANSION)
        self.fc2 = nn.Linear(dim * EXPANSION, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    """Window attention, depthwise 3x3, MLP. The map is padded with zeros at right and bottom to whole windows;
    the padding takes part in the attention unmasked, as it did when the published weights were trained."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = FoldedConv(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B,dim,H,W) -> the same shape."""
        batch, dim, height, width = x.shape
        window = self.window
        rows, columns = ((side + window - 1) // window for side in (height, width))
        padded = F.pad(x, (0, columns * window - width, 0, rows * window - height))
        tiles = padded.view(batch, dim, rows, window, columns, window).permute(0, 2, 4, 3, 5, 1)
        mixed = self.attn(tiles.reshape(batch * rows * columns, window * window, dim))
        mixed = mixed.view(batch, rows, columns, window, window, dim).permute(0, 5, 1, 3, 2, 4)
        x = x + mixed.reshape(batch, dim, rows * window, columns * window)[..., :height, :width]
        x = self.local_conv(x).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks at one size, then (all but the last) the merge into the next stage's width."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B,dim,H,W) -> the blocks' output and what the next stage starts from."""
        x = self.blocks(x)
        return x, x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """MobileSAM's image encoder: `dims` and `depths` of the four stages, `embed_dim` of the neck (SAM: 256).
    InputError if there are not four of each or a width does not divide into its heads (dim // 32, at least 1)."""

    def __init__(self, dims: tuple[int, ...] = DIMS, depths: tuple[int, ...] = DEPTHS, embed_dim: int = 256) -> None:
        super().__init__()
        if len(dims) != 4 or len(depths) != 4 or min(*dims, *depths) < 1:
            raise InputError(
                f"model.encoder.dims, depths: {tuple(dims)} and {tuple(depths)}; four positive numbers each are needed"
            )
        heads = [max(1, dim // HEAD_DIM) for dim in dims]
        odd = [dim for dim, count in zip(dims, heads, strict=True) if dim % count or dim % 2]
        if odd:
            raise InputError(f"model.encoder.dims: {odd} cannot be divided into heads of about 32; use multiples of 32")
        self.patch_embed = PatchEmbed(dims[0])
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = [
                Bottleneck(dim, dim * EXPANSION, dim, residual=True)
                if i == 0
                else AttentionBlock(dim, heads[i], WINDOWS[i])
                for _ in range(depth)
            ]
            merge = None if i == 3 else Bottleneck(dim, dims[i + 1], dims[i + 1], stride=1 if i == 2 else 2)
            self.layers.append(Stage(blocks, merge))
        self.neck = nn.Sequential(
            nn.Conv2d(dims[3], embed_dim, 1, bias=False),
            LayerNorm2d(embed_dim),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False),
            LayerNorm2d(embed_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised (B,3,H,W), H and W multiples of 16 -> embedding (B,embed_dim,H/16,W/16) and the outputs of
        stages 0, 1 and 3 at strides 4, 8 and 16."""
        x = self.patch_embed(x)
        outputs = []
        for layer in self.layers:
            output, x = layer(x)
            outputs.append(output)
        return self.neck(x), [outputs[0], outputs[1], outputs[3]]


class TinyVitEncoder(ImageEncoder):
    """MobileSAM's TinyViT at native size, padded to a multiple of 16."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        super().__init__()
        dims = tuple(config.dims or DIMS)
        self.backbone = TinyViT(dims, tuple(config.depths or DEPTHS), embed_dim)
        self.stride = 16
        self.level_strides = [4, 8, 16]
        self.level_channels = [dims[0], dims[1], dims[3]]

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised frame -> embedding and the stages' outputs at strides 4, 8, 16."""
        return self.backbone(placed)
