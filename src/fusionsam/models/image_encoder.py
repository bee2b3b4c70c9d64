"""SAM's image encoder behind one small interface: a convolutional backbone, TinyViT, SAM's ViT or SAM2's Hiera.

Every encoder places the picture in its own frame, normalises it as its weights were trained, and returns SAM's image
embedding with whatever finer levels it has. `backbone` holds what foreign weights may fill; a neck that no foreign
weights exist for (timm) stays trainable in every training mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from timm.layers import LayerNorm2d
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from fusionsam import foreign
from fusionsam.config import EncoderConfig
from fusionsam.models import sam_encoder, tinyvit
from fusionsam.models.layers import same_size
from fusionsam.structures import Frame, ImageFeatures, InputError

IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
LITE_MEAN = (127 / 255,) * 3  # EfficientNet-Lite was trained on (x - 127) / 128; timm lists 0.5 and 0.5
LITE_STD = (128 / 255,) * 3


class ImageEncoder(nn.Module):
    """What every image encoder offers. `stride`: a native-size input is padded to a multiple of it;
    `level_channels`, `level_strides`: of `ImageFeatures.levels`, finest first; `image_size`: side of the square frame
    of a ViT encoder, None for encoders that work at native size."""

    stride: int
    level_channels: list[int]
    level_strides: list[int]
    image_size: int | None = None
    backbone: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> None:
        super().__init__()
        self.training_mode = "full"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def frame(self, height: int, width: int) -> Frame:
        """Where a picture of height x width pixels lies: native size padded up to `stride`, or, with `image_size`,
        its long side scaled to that (SAM's rounding: half up) inside the square."""
        if self.image_size is None:
            size = (height + -height % self.stride, width + -width % self.stride)  # holds for symbolic sizes too
            return Frame(size=size, content=(height, width))
        if torch.compiler.is_exporting():  # the same in whole numbers, for a graph has no float64 to spare for sizes
            side, longest = self.image_size, torch.sym_max(height, width)
            rows, columns = (torch.sym_max(1, (2 * n * side + longest) // (2 * longest)) for n in (height, width))
            return Frame(size=(side, side), content=(rows, columns))  # type: ignore[arg-type]
        scale = self.image_size / max(height, width)
        content = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        return Frame(size=(self.image_size, self.image_size), content=content)

    def place(self, image: Tensor, frame: Frame) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,3,*frame.size): resized to the content, normalised, zeros at right and bottom."""
        if self.image_size is not None and not same_size(image.shape[-2:], frame.content):
            image = F.interpolate(image, frame.content, mode="bilinear", antialias=True)
        image = (image - self.mean) / self.std
        return F.pad(image, (0, frame.size[1] - frame.content[1], 0, frame.size[0] - frame.content[0]))

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised frame (B,3,H_f,W_f), z_f (B,d,h,w) and infrared (B,1,H_f,W_f) in [0,1] -> embedding
        (B,E,H_f/16,W_f/16) and levels; only an encoder with `EncoderConfig.guided` looks at z_f, only one with
        `EncoderConfig.thermal` at the infrared image."""
        raise NotImplementedError

    def forward(self, image: Tensor, z_f: Tensor | None = None, heat: Tensor | None = None) -> ImageFeatures:
        """Picture (B,3,H,W) in [0,1], z_f (B,d,H/4,W/4), infrared (B,1,H,W) in [0,1] -> SAM's embedding and finer
        levels over the whole frame."""
        frame = self.frame(image.shape[-2], image.shape[-1])
        embedding, levels = self.encode(self.place(image, frame), z_f, heat)
        return ImageFeatures(embedding=embedding, levels=levels, frame=frame)

    def train(self, mode: bool = True) -> ImageEncoder:
        """As nn.Module, but a backbone that is not fully trained stays in eval mode (its BatchNorm is fixed)."""
        super().train(mode)
        if self.training_mode != "full":
            self.backbone.eval()
        return self


def _require_any_size(backbone: nn.Module, info: Any, picked: list[int], source: str) -> None:
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
        info: Any = backbone.feature_info
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
        # without a thermal_share both begin as the encoder that sees the picture alone
        self.guide = _zero(nn.Conv2d(latent_dim, self.level_channels[0], 3, padding=1)) if config.guided else None
        self.thermal: nn.Module | None = None
        if config.thermal:
            self.thermal = timm.create_model(config.source, pretrained=False, features_only=True)
            added = [_zero(nn.Conv2d(channels, channels, 1)) for channels in self.level_channels]
            for layer in added:
                layer.weight.data[:, :, 0, 0].fill_diagonal_(config.thermal_share)
            self.inject = nn.ModuleList(added)
        self.sam: nn.Module | None = None
        if config.sam:
            dims = tuple(config.dims or tinyvit.DIMS)
            self.sam = tinyvit.TinyViT(dims, tuple(config.depths or tinyvit.DEPTHS), embed_dim).requires_grad_(False)
            pairs = zip((dims[0], dims[1], dims[3]), self.level_channels[:3], strict=True)
            self.sam_levels = nn.ModuleList([_zero(nn.Conv2d(sam, own, 1)) for sam, own in pairs])
            self.sam_embedding = _zero(nn.Conv2d(embed_dim, embed_dim, 1))

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised frame -> embedding and levels at strides 4, 8, 16, 32."""
        guidance = None if self.guide is None or z_f is None else self.guide(z_f)
        injected: list[Tensor] = []
        if self.thermal is not None and heat is not None:
            features = self.thermal(self.place(heat.expand(-1, 3, -1, -1), self.frame(*heat.shape[-2:])))
            injected = [layer(features[i]) for layer, i in zip(self.inject, self.picked, strict=True)]
        if guidance is None and not injected:
            features = self.backbone(placed)
            levels = [features[i] for i in self.picked]
        else:
            levels = self._joined(placed, guidance, injected)
        boundaries, sam_levels = self._boundaries(placed)
        levels = [level + more for level, more in zip(levels, sam_levels, strict=False)] + levels[len(sam_levels) :]
        coarse = F.interpolate(self.lateral32(levels[3]), levels[2].shape[-2:], mode="bilinear", align_corners=False)
        embedding = self.neck(self.lateral16(levels[2]) + coarse)
        return embedding if boundaries is None else embedding + boundaries, levels

    def _boundaries(self, placed: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """What frozen TinyViT adds to the embedding and to the levels of strides 4, 8 and 16; nothing without it."""
        if self.sam is None:
            return None, []
        mean, std = (placed.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        # it does not learn and the picture learns from the backbone: no gradient spares half of its time
        with torch.no_grad():
            embedding, levels = self.sam((placed * self.std + self.mean - mean) / std)
        return self.sam_embedding(embedding), [layer(x) for layer, x in zip(self.sam_levels, levels, strict=True)]

    def _joined(self, placed: Tensor, guidance: Tensor | None, injected: list[Tensor]) -> list[Tensor]:
        """timm's EfficientNetFeatures.forward with `guidance` (B,C,h,w) added after the first stage of stride 4 and
        `injected`, if there is any, after the last of each stride."""
        backbone: Any = self.backbone
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


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class TinyVitEncoder(ImageEncoder):
    """MobileSAM's TinyViT at native size, padded to a multiple of 16."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        super().__init__()
        dims = tuple(config.dims or tinyvit.DIMS)
        self.backbone = tinyvit.TinyViT(dims, tuple(config.depths or tinyvit.DEPTHS), embed_dim)
        self.stride = 16
        self.level_strides = [4, 8, 16]
        self.level_channels = [dims[0], dims[1], dims[3]]

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised frame -> embedding and the stages' outputs at strides 4, 8, 16."""
        return self.backbone(placed)


class SamEncoder(ImageEncoder):
    """SAM's plain ViT on a letterboxed square; it has no finer levels."""

    def __init__(self, config: EncoderConfig, embed_dim: int, latent_dim: int = 64) -> None:
        super().__init__()
        self.backbone = sam_encoder.build_vit(config.source, embed_dim)
        self.image_size = sam_encoder.square_side(config.source, self.backbone.config.image_size)
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
        self.backbone = sam_encoder.HieraVision(config.source, embed_dim)
        self.image_size = self.backbone.image_size
        self.stride = 16
        self.level_strides = [4, 8, 16]
        self.level_channels = [embed_dim] * 3

    def encode(self, placed: Tensor, z_f: Tensor | None, heat: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised square -> embedding and FPN maps at strides 4, 8, 16."""
        return self.backbone(placed)


KINDS: dict[str, Callable[[EncoderConfig, int, int], ImageEncoder]] = {
    "timm": TimmEncoder,
    "tinyvit": TinyVitEncoder,
    "sam": SamEncoder,
    "sam2": Sam2Encoder,
}


def build_image_encoder(config: EncoderConfig, embed_dim: int = 256, latent_dim: int = 64) -> ImageEncoder:
    """The encoder `config` asks for, with its foreign weights and its training mode; `embed_dim` is E, `latent_dim` d.
    InputError for an unknown kind, source or weights, and for an encoder that cannot be guided or see infrared."""
    if config.kind not in KINDS:
        raise InputError(f"model.encoder.kind: {config.kind!r} is not known; choose one of {', '.join(KINDS)}")
    for name in ("guided", "thermal", "sam"):
        if getattr(config, name) and config.kind != "timm":
            raise InputError(f"model.encoder.{name}: not for {config.kind}; set it to false, or kind to timm")
    if config.thermal and config.training != "full":
        raise InputError(
            f"model.encoder.training: {config.training} with model.encoder.thermal; set it to full, or thermal to false"
        )
    encoder = KINDS[config.kind](config, embed_dim, latent_dim)
    load_image_encoder(encoder, config)
    set_training(encoder, config)
    return encoder


def load_image_encoder(encoder: ImageEncoder, config: EncoderConfig) -> None:
    """Fill `encoder.backbone`, and `thermal` beside it, as `config.weights` says: None = leave it random, 'hub' =
    download by `config.source`, otherwise a file or folder. InputError if it does not fit exactly."""
    if config.weights is None:
        return
    if config.kind == "timm":
        tensors = _timm_tensors(encoder.backbone, config)
    else:
        if config.kind == "tinyvit" and config.weights == "hub":
            raise InputError(
                "model.encoder.weights: 'hub' does not exist for tinyvit; download mobile_sam.pt from "
                "github.com/ChaoningZhang/MobileSAM and give its path"
            )
        parts = foreign.sam_parts(config.source if config.weights == "hub" else config.weights)
        if parts.encoder_kind != config.kind:
            raise InputError(
                f"model.encoder.weights: {config.weights} holds a {parts.encoder_kind} encoder, model.encoder.kind is "
                f"{config.kind}; make them agree"
            )
        tensors = parts.image_encoder
    for backbone in (encoder.backbone, getattr(encoder, "thermal", None)):
        if backbone is not None:
            foreign.load_exactly(backbone, tensors, f"model.encoder.weights {config.weights}")


def _timm_tensors(backbone: nn.Module, config: EncoderConfig) -> foreign.Tensors:
    if config.weights == "hub":
        try:
            return timm.create_model(config.source, pretrained=True, features_only=True).state_dict()
        except Exception as error:  # network, cache and naming errors share no type
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise InputError(
                f"model.encoder.weights: hub has no {config.source} within reach ({reason}); give a file"
            ) from None
    path = Path(str(config.weights))
    tensors = foreign.read_tensors(path)
    with torch.device("meta"):
        whole = timm.create_model(config.source, pretrained=False).state_dict()
    # timm's feature extractors write stages.0 as stages_0
    original = {name: re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name) for name in backbone.state_dict()}
    original = {name: old if old in whole else name for name, old in original.items()}
    if not any(old in tensors for old in original.values()):
        tensors = foreign.read_ordered(path, list(whole), [t.shape for t in whole.values()])
    picked = {name: tensors[old] for name, old in original.items() if old in tensors}
    unknown = {name: t for name, t in tensors.items() if name not in whole and name not in original}
    return {**picked, **unknown}  # unknown ones go on to be refused by name


def set_training(encoder: ImageEncoder, config: EncoderConfig) -> None:
    """`frozen`: the backbone's parameters do not learn, gradients still flow through to the picture; `lora`: only
    adapters on its linear layers and 1x1 convolutions do; `full`: all. A neck without foreign weights always learns."""
    encoder.training_mode = config.training
    if config.training == "full":
        return
    encoder.backbone.requires_grad_(False)
    if config.training == "lora":
        adapters = LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=_lora_targets(encoder.backbone)
        )
        inject_adapter_in_model(adapters, encoder.backbone)
    encoder.train(encoder.training)


def _lora_targets(backbone: nn.Module) -> list[str]:
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
    return (
        attention
        if isinstance(backbone, (sam_encoder.SamVisionEncoder, sam_encoder.HieraVision))
        else attention + pointwise
    )
