"""SAM's ViT (Kirillov et al. 2023) and SAM2's Hiera (Ravi et al. 2024) from transformers, built without a download:
the official sizes are literal here, any other comes from a folder's (or hub repository's) config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Sam2VisionConfig, Sam2VisionModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from fusionsam.config.schema import EncoderConfig
from fusionsam.io import fetch
from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.types import InputError, JsonObject

ConfigT = TypeVar("ConfigT", SamVisionConfig, Sam2VisionConfig)

_VIT: dict[str, JsonObject] = {
    "facebook/sam-vit-base": {},
    "facebook/sam-vit-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "facebook/sam-vit-huge": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip


def _hiera(
    width: int, heads: int, blocks: list[int], whole: list[int], background: int, windows: list[int]
) -> JsonObject:
    widths = [width << stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads,
        "blocks_per_stage": blocks, "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads << stage for stage in range(4)],
        "window_size_per_stage": windows, "global_attention_blocks": whole,
        "window_positional_embedding_background_size": [background, background],
    }  # fmt: skip
    return {"backbone_config": backbone, "backbone_channel_list": widths[::-1]}


# sam2/configs/sam2.1/sam2.1_hiera_{t,s,b+,l}.yaml of facebookresearch/sam2
_HIERA: dict[str, JsonObject] = {
    "tiny": _hiera(96, 1, [1, 2, 7, 2], [5, 7, 9], 7, [8, 4, 14, 7]),
    "small": _hiera(96, 1, [1, 2, 11, 2], [7, 10, 13], 7, [8, 4, 14, 7]),
    "base-plus": _hiera(112, 2, [2, 3, 16, 3], [12, 16, 20], 14, [8, 4, 14, 7]),
    "large": _hiera(144, 2, [2, 6, 36, 4], [23, 33, 43], 7, [8, 4, 16, 8]),
}


def _vision_section(source: str, model_type: str) -> JsonObject:
    path = Path(source) / "config.json" if Path(source).is_dir() else fetch(source, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        section = config["vision_config"] if config.get("model_type") == model_type else None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"model.encoder.source: {path} is not a model's config.json ({error!r})") from None
    if section is None:
        raise InputError(
            f"model.encoder.source: {path} describes a {config.get('model_type')!r} model, {model_type!r} is needed; "
            "make model.encoder.kind and source agree"
        )
    return section


def _from_section(kind: type[ConfigT], source: str, model_type: str) -> ConfigT:
    section = _vision_section(source, model_type)
    try:
        return kind(**section)
    except Exception as error:  # transformers' strict configurations raise their own types
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"model.encoder.source: {source}: config.json has an impossible vision part ({reason})"
        ) from None


def vit_config(source: str) -> SamVisionConfig:
    """The ViT's configuration for an official hub name (no download) or a folder with config.json."""
    if source in _VIT:
        # 0.02 in place of transformers' 1e-10, with which a random ViT would pass nothing on
        return SamVisionConfig(initializer_range=0.02, **_VIT[source])
    return _from_section(SamVisionConfig, source, "sam")


def hiera_config(source: str) -> Sam2VisionConfig:
    """Hiera's and its FPN neck's configuration for an official hub name (no download) or a folder with config.json."""
    for prefix in ("facebook/sam2.1-hiera-", "facebook/sam2-hiera-"):
        if source.startswith(prefix) and source.removeprefix(prefix) in _HIERA:
            return Sam2VisionConfig(**_HIERA[source.removeprefix(prefix)])
    return _from_section(Sam2VisionConfig, source, "sam2")


def build_vit(source: str, embed_dim: int) -> SamVisionEncoder:
    """SAM's ViT with its neck, random weights. InputError if its neck's width is not `embed_dim`."""
    config = vit_config(source)
    _check_width(source, config.output_channels, embed_dim)
    return SamVisionEncoder(config)


class HieraVision(nn.Module):
    """SAM2's Hiera and FPN with the learned no-memory embedding, which single images get in place of memories of
    earlier frames (Sam2Model.get_image_embeddings)."""

    def __init__(self, source: str, embed_dim: int) -> None:
        super().__init__()
        config = hiera_config(source)
        _check_width(source, config.fpn_hidden_size, embed_dim)
        if config.num_feature_levels != 3:
            raise InputError(f"model.encoder.source: {source} has {config.num_feature_levels} feature levels, not 3")
        backbone: Any = config.backbone_config
        self.image_size = square_side(source, backbone.image_size)
        self.vision_encoder = Sam2VisionModel(config)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, embed_dim))

    def forward(self, placed: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised square (B,3,S,S) -> embedding (B,E,S/16,S/16) and FPN maps (B,E,.,.) at strides 4, 8 and 16."""
        levels = list(self.vision_encoder(placed).fpn_hidden_states)
        return levels[-1] + self.no_memory_embedding.view(1, -1, 1, 1), levels


def square_side(source: str, size: int | list[int] | tuple[int, ...]) -> int:
    """The side of the square frame that a configuration's `image_size` means. InputError if it is not a square."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise InputError(f"model.encoder.source: {source} works on {size} pixels; a square frame is needed")
    return int(sides.pop())


def _check_width(source: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise InputError(
            f"model.decoder.hidden: {wanted}, but the image encoder {source} puts out {found} channels; set it to that"
        )


class SamEncoder(ImageEncoder):
    """SAM's plain ViT on a letterboxed square; it has no finer levels."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        super().__init__()
        self.backbone = build_vit(config.source, embed_dim)
        self.image_size = square_side(config.source, self.backbone.config.image_size)
        self.stride = 16
        self.level_strides = []
        self.level_channels = []

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised square -> embedding and no levels."""
        return self.backbone(placed).last_hidden_state, []


class Sam2Encoder(ImageEncoder):
    """SAM2's Hiera with FPN on a letterboxed square; its high-resolution features are the levels."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        super().__init__()
        self.backbone = HieraVision(config.source, embed_dim)
        self.image_size = self.backbone.image_size
        self.stride = 16
        self.level_strides = [4, 8, 16]
        self.level_channels = [embed_dim] * 3

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised square -> embedding and FPN maps at strides 4, 8, 16."""
        return self.backbone(placed)
