"""Phi of eq. 7 and the distance between its features: VGG16, or the early levels of a frozen image encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.types import InputError

PerceptualInput = Literal["auto", "imagenet", "caffe"]
CONVENTIONS: dict[str, tuple[bool, float, tuple[float, ...], tuple[float, ...]]] = {
    # name: (channels turned to BGR, scale of [0,1], mean, std)
    "imagenet": (False, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe": (True, 255.0, (104.007, 116.669, 122.679), (1.0, 1.0, 1.0)),
}
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Output channels of VGG16's convolutions in order; 0 is a pooling layer (torchvision's configuration D)."""


class Vgg16(nn.Module):
    """VGG16 (arXiv 1409.1556) as far as its weights go; the output of the last convolution of each block is a level.

    `tensors`: features.N.weight and features.N.bias, torchvision's names. `convention`: see CONVENTIONS.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tensors: dict[str, Tensor], convention: Literal["imagenet", "caffe"], what: str = "") -> None:
        super().__init__()
        self.bgr, self.scale, mean, std = CONVENTIONS[convention]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        blocks: list[list[nn.Module]] = [[]]
        index, channels = 0, 3
        for width in _VGG16:
            if width == 0:
                blocks.append([nn.MaxPool2d(2)])
                index += 1
                continue
            weight, bias = (tensors.get(f"features.{index}.{part}") for part in ("weight", "bias"))
            if weight is None or bias is None:
                break
            if tuple(weight.shape) != (width, channels, 3, 3):
                raise InputError(
                    f"{what}: features.{index}.weight is {tuple(weight.shape)}, VGG16 has {(width, channels, 3, 3)}; "
                    "give VGG16 features under torchvision's names"
                )
            layer = nn.Conv2d(channels, width, 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            blocks[-1] += [layer, nn.ReLU()]
            index, channels = index + 2, width
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks if len(block) > 1)
        if not len(self.blocks):
            raise InputError(f"{what}: holds no features.0.weight; give VGG16 features under torchvision's names")
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B,3,H,W) in [0,1] -> relu1_2, relu2_2, ... (B,C_l,H/2^l,W/2^l)."""
        x = (image.flip(1) if self.bgr else image) * self.scale
        x = (x - self.mean) / self.std
        levels = []
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        return levels


def load_vgg16(
    path: str | Path | None, convention: PerceptualInput = "auto", told: str = "train.perceptual_weights"
) -> Vgg16:
    """VGG16 from a safetensors file, or with None from torchvision (a download).

    `auto` believes the file's metadata (`input`: imagenet or caffe), and takes imagenet where there is none. Raises
    InputError, which names `told`, for a file that cannot be read or does not hold VGG16.
    """
    if path is None:
        from torchvision.models import VGG16_Weights, vgg16

        try:
            tensors = dict(vgg16(weights=VGG16_Weights.IMAGENET1K_V1).state_dict())
        except Exception as error:  # network and cache errors share no type
            raise InputError(
                f"{told}: torchvision's VGG16 is not within reach ({str(error)[:100]}); give a file"
            ) from None
        return Vgg16(tensors, "imagenet" if convention == "auto" else convention, "torchvision's VGG16")
    what = f"{told} {path}"
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
            declared = (file.metadata() or {}).get("input", "imagenet")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what}: cannot be read ({str(error)[:100]}); give a safetensors file") from None
    chosen = declared if convention == "auto" else convention
    if chosen == "caffe":
        return Vgg16(tensors, "caffe", what)
    if chosen == "imagenet":
        return Vgg16(tensors, "imagenet", what)
    raise InputError(f"{what}: its metadata says input {chosen!r}; expected {' or '.join(CONVENTIONS)}")


class EncoderLevels(nn.Module):
    """The first `count` levels (strides 4, 8) of a frozen image encoder, or its embedding where it has no levels.

    `forward` of `encoder`: (B,3,H,W) in [0,1] -> object with `levels` and `embedding`.
    """

    def __init__(self, encoder: nn.Module, count: int = 2) -> None:
        super().__init__()
        self.encoder, self.count = encoder.requires_grad_(False).eval(), count

    def train(self, mode: bool = True) -> EncoderLevels:
        """Always eval: batch norms of a frozen network do not move."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B,3,H,W) in [0,1] -> levels, finest first."""
        features = self.encoder(image)
        return features.levels[: self.count] or [features.embedding]


def perceptual_distance(phi: Callable[[Tensor], list[Tensor]], image: Tensor, rebuilt: Tensor) -> Tensor:
    """L_perc, eq. 7: |Phi(I) - Phi(I^)|^2 summed over channels, mean over places, images and levels.

    image, rebuilt (B,1 or 3,H,W) in [0,1]; one channel stands for three. The feature vector at each place has unit
    length first (LPIPS, arXiv 1801.03924), so the value lies in [0,4] whatever Phi is. Gradient only to `rebuilt`.
    """
    with torch.no_grad():
        goal = phi(image.expand(-1, 3, -1, -1))
    found = phi(rebuilt.expand(-1, 3, -1, -1))
    parts = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in zip(found, goal, strict=True)
    ]
    return torch.stack(parts).mean()
