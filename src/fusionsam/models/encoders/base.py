"""SAM's image encoder behind one small interface.

Every encoder places the picture in its own frame, normalises it as its weights were trained, and returns SAM's image
embedding with whatever finer levels it has. `backbone` holds what foreign weights may fill; a neck that no foreign
weights exist for (timm) stays trainable in every training mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fusionsam.models.layers import same_size
from fusionsam.types import Frame, ImageFeatures

IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


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

    def place(self, image: Float[Tensor, "B 3 H W"], frame: Frame) -> Float[Tensor, "B 3 H_f W_f"]:
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
