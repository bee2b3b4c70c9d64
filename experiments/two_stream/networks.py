"""The obvious alternatives to FusionSAM on a small machine: its own backbone, from the same weights, with an FPN.

`early`: one stream of four channels. `two_stream`: two streams, the infrared features added to the visible stream after
every stage, the sums going on (RTFNet, Sun et al., RA-L 2019). `two_stream_turned`: the same, infrared standardized
picture by picture and turned round, warm is dark, as networks of visible pictures know it. `two_stream_late`: both
streams run to their end, the four levels are added for the decoder only. `visible`, `infrared`: one image alone.
"""

from __future__ import annotations

from typing import Any

import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import EncoderConfig
from fusionsam.models.encoders.timm import TimmEncoder, standardized
from fusionsam.types import InputError
from fusionsam.weights.build import build_image_encoder

PEERS = ("early", "two_stream", "two_stream_turned", "two_stream_late", "visible", "infrared")
LITE0 = "tf_efficientnet_lite0"
PYRAMID, SEGMENTATION, DROPOUT = 128, 96, 0.1
"""Widths of the FPN, below the library's defaults 256 and 128, so that the same minutes hold more steps."""


class PeerNetwork(nn.Module):
    """Pair -> logits (B,K,H,W) of any size; absent images are zeros. `source` and `weights` as config.EncoderConfig's;
    InputError for a source that is no EfficientNet of timm (MobileNetV2 counts as one)."""

    def __init__(self, peer: str, classes: int, source: str = LITE0, weights: str | None = None) -> None:
        super().__init__()
        if peer not in PEERS:
            raise InputError(f"--peer {peer!r}: not known; choose one of {', '.join(PEERS)}")
        self.peer = peer
        encoder = _encoder(source, weights)
        self.register_buffer("mean", encoder.mean, persistent=False)
        self.register_buffer("std", encoder.std, persistent=False)
        self.backbone = encoder.backbone
        self.infrared_backbone: Any = None
        if peer.startswith("two_stream"):
            self.infrared_backbone = one_channel(_encoder(source, weights).backbone)
        elif peer == "infrared":
            one_channel(self.backbone)
        elif peer == "early":
            fourth_channel(self.backbone)
        channels = [info["num_chs"] for info in _infos(self.backbone)]
        self.decoder = FPNDecoder([3, *channels], 5, PYRAMID, SEGMENTATION, DROPOUT)
        self.head = SegmentationHead(SEGMENTATION, classes, kernel_size=1, upsampling=4)

    def forward(self, visible: Tensor | None, infrared: Tensor | None) -> Tensor:
        """visible (B,3,H,W), infrared (B,1,H,W) in [0,1], the same size; None = zeros (not both)."""
        given = visible if visible is not None else infrared
        assert given is not None
        height, width = given.shape[-2:]
        light, heat = (
            given.new_zeros(len(given), channels, height, width) if image is None else image
            for image, channels in ((visible, 3), (infrared, 1))
        )
        if self.peer == "two_stream_turned":
            heat = 1 - standardized(heat)
        features = self._features(self._place(light), self._place(heat))
        logits: Tensor = self.head(self.decoder(features))
        return logits[:, :, :height, :width]

    def _place(self, image: Tensor) -> Tensor:
        """Normalised as the backbone was trained, then zeros at right and bottom up to a multiple of 32."""
        mean, std = (self.mean, self.std) if image.shape[1] == 3 else (self.mean[:1], self.std[:1])
        return F.pad((image - mean) / std, (0, -image.shape[3] % 32, 0, -image.shape[2] % 32))

    def _features(self, visible: Tensor, infrared: Tensor) -> list[Tensor]:
        """Levels of strides 2, 4, 8, 16, 32."""
        if self.peer == "early":
            return list(self.backbone(torch.cat([visible, infrared], 1)))
        if self.peer in ("visible", "infrared"):
            return list(self.backbone(visible if self.peer == "visible" else infrared))
        if self.peer == "two_stream_late":
            streams = zip(self.backbone(visible), self.infrared_backbone(infrared), strict=True)
            return [light + heat for light, heat in streams]
        wanted = {info["stage"] for info in _infos(self.backbone)}
        light = self.backbone.bn1(self.backbone.conv_stem(visible))
        heat = self.infrared_backbone.bn1(self.infrared_backbone.conv_stem(infrared))
        features = []
        blocks = zip(self.backbone.blocks, self.infrared_backbone.blocks, strict=True)
        for stage, pair in enumerate([None, *blocks]):
            if pair is not None:
                light, heat = pair[0](light), pair[1](heat)
            if stage in wanted:  # 0, the stem, where no stage has stride 2
                light = light + heat
                features.append(light)
        return features

    def parts(self) -> dict[str, nn.Module]:
        """The stages by the names that learning rates go by."""
        streams = [self.backbone] if self.infrared_backbone is None else [self.backbone, self.infrared_backbone]
        return {"image_encoder": nn.ModuleList(streams), "head": nn.ModuleList([self.decoder, self.head])}

    def parameters_learned(self) -> int:
        """Number of trained scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _encoder(source: str, weights: str | None) -> TimmEncoder:
    encoder = build_image_encoder(EncoderConfig(kind="timm", source=source, weights=weights))
    assert isinstance(encoder, TimmEncoder)
    if not isinstance(encoder.backbone, EfficientNetFeatures):
        raise InputError(f"model.encoder.source: {source} is no EfficientNet of timm; take {LITE0}")
    return encoder


def _infos(backbone: Any) -> list[dict[str, Any]]:
    return list(backbone.feature_info.get_dicts())


def one_channel(backbone: Any) -> Any:
    """The stem takes one channel: its filters summed over RGB, so that grey gives what it gave as three channels."""
    return _restem(backbone, backbone.conv_stem.weight.sum(1, keepdim=True))


def fourth_channel(backbone: Any) -> Any:
    """The stem takes RGB and infrared: the colour filters three quarters as strong, their mean for the fourth, so that
    grey in all four gives what it gave in three."""
    weight = backbone.conv_stem.weight
    return _restem(backbone, 0.75 * torch.cat([weight, weight.mean(1, keepdim=True)], 1))


def _restem(backbone: Any, weight: Tensor) -> Any:
    with torch.no_grad():
        backbone.conv_stem.weight = nn.Parameter(weight.detach().clone())
    backbone.conv_stem.in_channels = weight.shape[1]
    return backbone
