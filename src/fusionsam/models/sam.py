"""The two parts of Segment Anything that are steered here: its prompt encoder and its two-way mask decoder.

After Kirillov et al. 2023 (arXiv 2304.02643, appendix A). Parameters have the names of transformers' `SamPromptEncoder`
and `SamMaskDecoder`, and tests compare the results. They are ours because transformers has them only as parts of whole
models, with private methods, and importing it takes longer than the prediction of a pair (docs/performance.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 1024
"""Pixels a side of SAM's own square, by which coordinates are divided."""
NO_POINT = -1
"""Label of padding among points."""


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B,C,H,W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RandomFourier(nn.Module):
    """Positions in the unit square as sines and cosines of random frequencies (Tancik et al. 2020)."""

    def __init__(self, width: int, scale: float = 4.0) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(scale * torch.randn(2, width // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """(...,2) in [0,1] -> (...,E)."""
        angles = 2 * math.pi * ((2 * xy - 1).to(self.positional_embedding.dtype) @ self.positional_embedding)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MaskEmbedding(nn.Module):
    """A mask of four times the embedding's side -> a dense prompt."""

    def __init__(self, width: int, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels // 4, 2, 2)
        self.conv2 = nn.Conv2d(channels // 4, channels, 2, 2)
        self.conv3 = nn.Conv2d(channels, width, 1)
        self.layer_norm1 = LayerNorm2d(channels // 4, eps=1e-6)
        self.layer_norm2 = LayerNorm2d(channels, eps=1e-6)

    def forward(self, mask: Tensor) -> Tensor:
        """Logits (B,1,4h,4w) -> (B,E,h,w)."""
        x = F.gelu(self.layer_norm1(self.conv1(mask)))
        return self.conv3(F.gelu(self.layer_norm2(self.conv2(x))))


class SamPromptEncoder(nn.Module):
    """Points, boxes and masks as tokens of width E. Coordinates are pixels of a square of SIDE."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.shared_embedding = RandomFourier(width)
        self.mask_embed = MaskEmbedding(width)
        self.no_mask_embed = nn.Embedding(1, width)
        self.point_embed = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))  # off, on, two corners of a box
        self.not_a_point_embed = nn.Embedding(1, width)

    def embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """points (B,P,N,2), labels (B,P,N) 1 on the object, 0 off it, -1 padding -> (B,P,N,E); with `pad` SAM's own
        padding token follows, as where there is no box."""
        if pad:
            points = torch.cat([points + 0.5, points.new_zeros(*points.shape[:2], 1, 2)], dim=2)
            labels = torch.cat([labels, labels.new_full((*labels.shape[:2], 1), NO_POINT)], dim=2)
        else:
            points = points + 0.5
        tokens = self.shared_embedding(points / SIDE)
        tokens = torch.where(labels[..., None] == NO_POINT, self.not_a_point_embed.weight, tokens)
        for label, kind in enumerate(self.point_embed[:2]):
            tokens = torch.where((labels == label)[..., None], tokens + kind.weight, tokens)  # type: ignore[operator]
        return tokens

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """(B,M,4) as x0, y0, x1, y1 -> a token a corner, (B,M,2,E), in float32 under autocast, too."""
        tokens = self.shared_embedding((boxes + 0.5).unflatten(2, (2, 2)) / SIDE)
        corners = torch.cat([self.point_embed[2].weight, self.point_embed[3].weight])  # type: ignore[list-item]
        return tokens + corners


class Attention(nn.Module):
    """Multi-head attention whose inner width is E / `reduction`."""

    def __init__(self, width: int, heads: int, reduction: int = 1) -> None:
        super().__init__()
        inner = width // reduction
        if inner % heads:
            raise ValueError(f"width {inner} inside of the attention is no multiple of {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B,Q,E), key and value (B,N,E) -> (B,Q,E)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(...,E) -> (...,E)."""
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens look at one another, at the image, go through an MLP, and the image looks at them."""

    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.first = first  # there the tokens serve as their own positions
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn_token_to_image = Attention(width, heads, 2)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden)
        self.layer_norm3 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm4 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn_image_to_token = Attention(width, heads, 2)

    def forward(self, queries: Tensor, keys: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """queries and their start `tokens` (B,T,E), image keys and their `positions` (B,N,E) -> queries, keys."""
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            query = queries + tokens
            queries = queries + self.self_attn(query, query, queries)
        queries = self.layer_norm1(queries)
        key = keys + positions
        queries = self.layer_norm2(queries + self.cross_attn_token_to_image(queries + tokens, key, keys))
        queries = self.layer_norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(key, queries + tokens, queries)
        return queries, self.layer_norm4(keys)


class TwoWayTransformer(nn.Module):
    """The blocks, and a last look of the tokens at the image."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, hidden, index == 0) for index in range(depth))
        self.final_attn_token_to_image = Attention(width, heads, 2)
        self.layer_norm_final_attn = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B,T,E), image and positions (B,E,h,w) -> tokens (B,T,E), image (B,h*w,E)."""
        keys, where = image.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, where)
        queries = queries + self.final_attn_token_to_image(queries + tokens, keys + where, keys)
        return self.layer_norm_final_attn(queries), keys


class FeedForward(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, hidden)
        self.proj_out = nn.Linear(hidden, out)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden)])

    def forward(self, x: Tensor) -> Tensor:
        """(...,E) -> (...,out)."""
        return self.proj_out(F.relu(self.layers[0](F.relu(self.proj_in(x)))))


class SamMaskDecoder(nn.Module):
    """SAM's parts from tokens and an image embedding to `masks` masks; `FullFledgedMaskDecoder` runs them."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int, masks: int) -> None:
        super().__init__()
        self.hidden_size, self.num_mask_tokens = width, masks
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.transformer = TwoWayTransformer(width, heads, hidden, depth)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, 2, 2)
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, 2, 2)
        self.upscale_layer_norm = LayerNorm2d(width // 4, eps=1e-6)
        self.activation = nn.GELU()
        self.output_hypernetworks_mlps = nn.ModuleList(FeedForward(width, width, width // 8) for _ in range(masks))
        self.iou_prediction_head = FeedForward(width, width, masks)
