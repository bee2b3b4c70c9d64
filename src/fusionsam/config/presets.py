"""Networks by name: the settings in which each differs from the defaults."""

from __future__ import annotations

from collections.abc import Callable

from fusionsam.config.model import (
    DecoderConfig,
    EncoderConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    TokenizerConfig,
)
from fusionsam.types import InputError


def _debug() -> ModelConfig:
    return ModelConfig(
        preset="debug",
        tokenizer=TokenizerConfig(dim=16, width=8, blocks=1, codebook_size=32, codebook_dim=8),
        fusion=FusionConfig(heads=2, kv_stride=4, query_stride=2, picture_width=4, picture_stride=2),
        encoder=EncoderConfig(kind="tinyvit", source="mobilesam", dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
        decoder=DecoderConfig(hidden=32, mlp_dim=32, heads=2),
        head=HeadConfig(width=16),
        max_side=512,
    )


def _tiny() -> ModelConfig:
    return ModelConfig(
        preset="tiny",
        # separable encoders and a picture head on cells of 2 x 2 pixels: each a third of the time of what they replaced
        tokenizer=TokenizerConfig(
            blocks=1, codebook_size=256, codebook_dim=32, codebooks=4, encoder_width=24, separable=3
        ),
        fusion=FusionConfig(
            heads=2, kv_stride=16, query_stride=4, picture_width=24, picture_stride=2, picture_dilations=(2,)
        ),
        # a detector's backbone, which has seen cars, people and bicycles: 2 points ahead of ImageNet's Lite0
        encoder=EncoderConfig(source="mobilenetv2_100", guided=True, thermal=True, thermal_input="standardized"),
        head=HeadConfig(pyramid=128),
    )


def _sam(preset: str, source: str) -> Callable[[], ModelConfig]:
    def build() -> ModelConfig:
        return ModelConfig(
            preset=preset,
            tokenizer=TokenizerConfig(dim=128, width=64),
            encoder=EncoderConfig(kind="sam2" if "sam2" in source else "sam", source=source, training="frozen"),
            head=HeadConfig(width=128),
        )

    return build


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "debug": _debug,
    "tiny": _tiny,
    "vit_b": _sam("vit_b", "facebook/sam-vit-base"),
    "vit_l": _sam("vit_l", "facebook/sam-vit-large"),
    "vit_h": _sam("vit_h", "facebook/sam-vit-huge"),
    "sam2_t": _sam("sam2_t", "facebook/sam2.1-hiera-tiny"),
    "sam2_s": _sam("sam2_s", "facebook/sam2.1-hiera-small"),
    "sam2_bp": _sam("sam2_bp", "facebook/sam2.1-hiera-base-plus"),
    "sam2_l": _sam("sam2_l", "facebook/sam2.1-hiera-large"),
}


def preset(name: str) -> ModelConfig:
    """The model configuration called `name`; InputError lists the choices."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
