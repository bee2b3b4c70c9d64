"""From a configuration to an image encoder without weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fusionsam.config.schema import EncoderConfig
from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.models.encoders.timm import TimmEncoder, fold_batch_norms
from fusionsam.models.encoders.tinyvit import TinyVitEncoder
from fusionsam.types import InputError


# transformers is imported where it is needed: that takes longer than the prediction of a pair
def _sam(config: EncoderConfig, embed_dim: int, latent_dim: int) -> ImageEncoder:
    from fusionsam.models.encoders.sam import Sam2Encoder, SamEncoder

    return (SamEncoder if config.kind == "sam" else Sam2Encoder)(config, embed_dim, latent_dim)


KINDS: dict[str, Callable[[EncoderConfig, int, int], ImageEncoder]] = {
    "timm": TimmEncoder,
    "tinyvit": TinyVitEncoder,
    "sam": _sam,
    "sam2": _sam,
}


def create_image_encoder(config: EncoderConfig, embed_dim: int = 256, latent_dim: int = 64) -> ImageEncoder:
    """The encoder `config` asks for, random, in its training mode; `embed_dim` is E, `latent_dim` d.

    InputError for an unknown kind or source, and for an encoder that cannot be guided or see infrared."""
    if config.kind not in KINDS:
        raise InputError(f"model.encoder.kind: {config.kind!r} is not known; choose one of {', '.join(KINDS)}")
    for name in ("guided", "thermal"):
        if getattr(config, name) and config.kind != "timm":
            raise InputError(f"model.encoder.{name}: not for {config.kind}; set it to false, or kind to timm")
    if config.thermal and config.training != "full":
        raise InputError(
            f"model.encoder.training: {config.training} with model.encoder.thermal; set it to full, or thermal to false"
        )
    encoder = KINDS[config.kind](config, embed_dim, latent_dim)
    set_training(encoder, config)
    return encoder


def prepare_for_inference(encoder: ImageEncoder) -> None:
    """Fold what inference does not need apart; the encoder can no longer be trained or saved."""
    for backbone in (encoder.backbone, getattr(encoder, "thermal", None)):
        if backbone is not None:
            fold_batch_norms(backbone)


def set_training(encoder: ImageEncoder, config: EncoderConfig) -> None:
    """`frozen`: the backbone's parameters do not learn, gradients still flow through to the picture; `lora`: only
    adapters on its linear layers and 1x1 convolutions do; `full`: all. A neck without foreign weights always learns."""
    encoder.training_mode = config.training
    if config.training == "full":
        return
    encoder.backbone.requires_grad_(False)
    if config.training == "lora":
        # imported here: it takes more time than everything else that a prediction imports
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules=_lora_targets(encoder.backbone, config.kind),
        )
        inject_adapter_in_model(adapters, encoder.backbone)
    encoder.train(encoder.training)


def _lora_targets(backbone: nn.Module, kind: str) -> list[str]:
    attention = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("attn.qkv", "attn.proj"))
    ]
    pointwise = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    ]
    # A plain ViT's adapters belong to its attention alone; a mostly convolutional backbone needs the 1x1 layers too.
    return attention if kind in ("sam", "sam2") else attention + pointwise
