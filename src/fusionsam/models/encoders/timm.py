"""A convolutional backbone of timm as SAM's image encoder, with a second one for infrared beside it."""

from __future__ import annotations

from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import BatchNormAct2d, LayerNorm2d
from timm.models import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusionsam.config.schema import EncoderConfig
from fusionsam.models.encoders.base import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder
from fusionsam.types import InputError

LITE_MEAN = (127 / 255,) * 3  # EfficientNet-Lite was trained on (x - 127) / 128; timm lists 0.5 and 0.5
LITE_STD = (128 / 255,) * 3


def _require_any_size(backbone: nn.Module, info: FeatureInfo, picked: list[int], source: str) -> None:
    """InputError for a timm model of one input size (swin), or whose features are not (B,C,H,W)."""
    height, width = 64, 96
    found: object
    wanted = [(info.channels()[i], height // info.reduction()[i], width // info.reduction()[i]) for i in picked]
    try:
        with torch.no_grad():
            levels = backbone.eval()(torch.zeros(1, 3, height, width))
        backbone.train()
        found = [tuple(levels[i].shape[1:]) for i in picked]
    except (AssertionError, RuntimeError, ValueError) as error:
        found = str(error)[:120]
    if found != wanted:
        raise InputError(
            f"model.encoder.source: {source} gives {found} for a picture of {height}x{width}, expected {wanted} "
            "(C,H,W); choose a convolutional backbone, for example tf_efficientnet_lite0"
        )


def fold_batch_norms(backbone: nn.Module) -> None:
    """Take every BatchNorm of one of timm's EfficientNets, in eval mode, into the convolution before it, for inference
    alone: a third of the backbone's time on one thread. Other backbones are left as they are, since the order of their
    children may not be that of their forward."""
    if not isinstance(backbone, EfficientNetFeatures):
        return
    for module in list(backbone.modules()):
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in pairwise(children):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d) and norm.running_var is not None):
                continue
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Sequential(norm.drop, norm.act))


class TimmEncoder(ImageEncoder):
    """A convolutional backbone of timm with features at strides 4, 8, 16 and 32, and a new neck: stride 16 plus
    upsampled stride 32, then SAM's conv-LN-conv-LN form."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        lite = config.source.startswith("tf_efficientnet_lite")
        try:
            backbone = timm.create_model(config.source, pretrained=False, features_only=True)
        except (RuntimeError, AttributeError) as error:
            raise InputError(
                f"model.encoder.source: {config.source!r} is not a timm model with feature levels ({error}); "
                "choose one, for example tf_efficientnet_lite0"
            ) from None
        known = timm.get_pretrained_cfg(config.source)
        mean, std = (tuple(known.mean), tuple(known.std)) if known else (IMAGENET_MEAN, IMAGENET_STD)
        super().__init__(*((LITE_MEAN, LITE_STD) if lite else (mean, std)))
        info = backbone.feature_info
        assert isinstance(info, FeatureInfo)
        strides = list(info.reduction())
        if not {4, 8, 16, 32} <= set(strides):
            raise InputError(
                f"model.encoder.source: {config.source} has features at strides {strides}, 4, 8, 16 and 32 are "
                "needed; choose a backbone with these"
            )
        self.backbone = backbone
        self.picked = [strides.index(s) for s in (4, 8, 16, 32)]
        if not isinstance(backbone, EfficientNetFeatures):
            _require_any_size(backbone, info, self.picked, config.source)
        self.stride = 32
        self.level_strides = [4, 8, 16, 32]
        self.level_channels = [info.channels()[i] for i in self.picked]
        self.lateral16 = nn.Conv2d(self.level_channels[2], embed_dim, 1, bias=False)
        self.lateral32 = nn.Conv2d(self.level_channels[3], embed_dim, 1, bias=False)
        self.neck = nn.Sequential(
            LayerNorm2d(embed_dim),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False),
            LayerNorm2d(embed_dim),
        )
        for name in ("guided", "thermal"):
            if getattr(config, name) and not isinstance(backbone, EfficientNetFeatures):
                raise InputError(
                    f"model.encoder.{name}: {config.source} is no EfficientNet of timm; set it to false, or take "
                    "tf_efficientnet_lite0"
                )
        # both begin as the encoder that sees the picture alone
        self.guide = _zero(nn.Conv2d(latent_dim, self.level_channels[0], 3, padding=1)) if config.guided else None
        self.thermal: nn.Module | None = None
        self.standardized = config.thermal_input == "standardized"
        if config.thermal:
            self.thermal = timm.create_model(config.source, pretrained=False, features_only=True)
            self.inject = nn.ModuleList(_zero(nn.Conv2d(channels, channels, 1)) for channels in self.level_channels)

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised frame -> embedding and levels at strides 4, 8, 16, 32."""
        guidance = None if self.guide is None or z_f is None else self.guide(z_f)
        injected: list[Tensor] = []
        if self.thermal is not None and heat is not None:
            heat = standardized(heat) if self.standardized else heat
            features = self.thermal(self.place(heat.expand(-1, 3, -1, -1), self.frame(*heat.shape[-2:])))
            injected = [layer(features[i]) for layer, i in zip(self.inject, self.picked, strict=True)]
        if guidance is None and not injected:
            features = self.backbone(placed)
            levels = [features[i] for i in self.picked]
        else:
            levels = self._joined(placed, guidance, injected)
        coarse = F.interpolate(self.lateral32(levels[3]), levels[2].shape[-2:], mode="bilinear", align_corners=False)
        return self.neck(self.lateral16(levels[2]) + coarse), levels

    def _joined(self, placed: Tensor, guidance: Tensor | None, injected: list[Tensor]) -> list[Tensor]:
        """timm's EfficientNetFeatures.forward with `guidance` (B,C,h,w) added after the first stage of stride 4 and
        `injected`, if there is any, after the last of each stride."""
        backbone = self.backbone
        assert isinstance(backbone, EfficientNetFeatures)
        stages = [info["stage"] for info in backbone.feature_info.get_dicts()]
        wanted = [stages[i] for i in self.picked]
        x = backbone.bn1(backbone.conv_stem(placed))
        levels: list[Tensor] = []
        for stage, block in enumerate(backbone.blocks, 1):
            x = block(x)
            if stage == wanted[0] and guidance is not None:
                x = x + guidance
            if stage in wanted:
                if injected:
                    x = x + injected[len(levels)]
                levels.append(x)
        return levels


def standardized(heat: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Infrared (B,1,H,W) -> each picture with mean 0.45 and deviation 0.22, clipped to [0,1]: what a camera adds or
    scales on the way to grey values is gone. The deviation is taken as at least 0.02, so a flat frame stays flat."""
    mean = heat.mean((2, 3), keepdim=True)
    deviation = (heat - mean).square().mean((2, 3), keepdim=True).sqrt().clamp(min=0.02)
    return ((heat - mean) * (0.22 / deviation) + 0.45).clamp(0, 1)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
