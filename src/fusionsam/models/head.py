"""The MLP classification head: mask features, FOT logits and z_f become class logits."""

from __future__ import annotations

from jaxtyping import Float
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import HeadConfig
from fusionsam.models.layers import beside, group_norm, resize
from fusionsam.types import InputError


class Pyramid(FPNDecoder):
    """segmentation_models_pytorch's FPN decoder, resized to the levels' own sizes: its factors of two would tie the
    sizes of the levels together, which are inputs of their own where the decoder is exported."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels (B,C_i,h_i,w_i), finest first, each half the size of the one before -> (B,width,h_0,w_0)."""
        down = levels[::-1]
        maps = [self.p5(down[0])]
        for block, level in zip((self.p4, self.p3, self.p2), down[1:], strict=True):
            maps.append(F.interpolate(maps[-1], level.shape[-2:], mode="nearest") + block.skip_conv(level))
        total = None
        for start, (x, segment) in enumerate(zip(maps, self.seg_blocks, strict=True)):
            for step, layer in enumerate(segment.block):
                x = layer.block(x)
                if layer.upsample:
                    size = down[start + step + 1].shape[-2:]
                    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
            total = x if total is None else total + x
        found: Tensor = self.dropout(total)
        return found


class ClassificationHead(nn.Module):
    """An MLP applied at every cell of the latent grid.

    Beside mask features, FOT logits and z_f it may see the image encoder's levels, summed top-down (FPN, arXiv
    1612.03144) or by the whole decoder of an FPN (HeadConfig.pyramid), whose own logits are added: the class tokens see
    the whole image, the levels tell thin objects apart. InputError for a pyramid on other than four levels, or of a
    width that does not divide.
    """

    def __init__(
        self, config: HeadConfig, classes: int, mask_channels: int, latent_dim: int, level_channels: list[int]
    ) -> None:
        super().__init__()
        width = config.width
        self.lateral = nn.ModuleList()
        self.pyramid: nn.Module | None = None
        if config.multi_level and config.pyramid:
            if len(level_channels) != 4:
                raise InputError(
                    f"model.head.pyramid: {config.pyramid}, but the image encoder has {len(level_channels)} levels, "
                    "strides 4, 8, 16 and 32 are needed; set it to 0, or take an encoder of timm"
                )
            if width % 32:
                raise InputError(
                    f"model.head.width: {width}, but model.head.pyramid normalises in 32 groups; give a multiple of 32"
                )
            self.pyramid = Pyramid(
                level_channels, 3, config.pyramid, segmentation_channels=width, dropout=config.dropout
            )
            self.direct = nn.Conv2d(width, classes, 1)
        elif config.multi_level and level_channels:
            self.lateral.extend(nn.Conv2d(channels, width, 1) for channels in level_channels)
            self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.GELU())
        self.feature_channels = width if self.lateral or self.pyramid else 0
        inputs = mask_channels + classes + latent_dim + self.feature_channels
        self.mlp = nn.Sequential(
            nn.Conv2d(inputs, width, 1),
            group_norm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
            nn.GELU(),
            nn.Dropout2d(config.dropout),
            nn.Conv2d(width, classes, 1),
        )

    def forward(
        self,
        mask_features: Float[Tensor, "B F h w"],
        fot_logits: Float[Tensor, "B K h w"],
        z_f: Float[Tensor, "B d h w"],
        features: Float[Tensor, "B width h w"] | None,
    ) -> Float[Tensor, "B K h w"]:
        """(B,E/8,h,w), (B,K,h,w), (B,d,h,w) and what `features` made of the levels -> logits (B,K,h,w)."""
        parts = [mask_features, fot_logits, z_f]
        if features is None:
            return self.mlp(beside(parts))
        logits: Tensor = self.mlp(beside([*parts, features]))
        return logits if self.pyramid is None else logits + self.direct(features)

    def features(self, levels: list[Tensor], size: tuple[int, int]) -> Float[Tensor, "B width h w"] | None:
        """The levels, cut to the image, as one map of `size` (h, w); None where the head sees none."""
        if self.pyramid is not None:
            return resize(self.pyramid(levels), size)
        if not self.lateral:
            return None
        total = self.lateral[-1](levels[-1])
        for conv, level in zip(reversed(self.lateral[:-1]), reversed(levels[:-1]), strict=True):
            total = resize(total, (level.shape[2], level.shape[3])) + conv(level)
        return resize(self.smooth(total), size)
