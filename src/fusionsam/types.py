"""The nouns that travel between the parts. No part imports another to speak of these.

Legend of axis letters, used in every docstring:
B batch, H W input height and width in pixels, s = 4 the latent stride, h = H/s, w = W/s,
d latent width, N = h*w latent tokens, K classes, E the embedding width of SAM (256),
P points, M boxes. Images are float in [0, 1] unless a docstring says uint8.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fusionsam.errors import InputError

if TYPE_CHECKING:  # `--help` of a command needs the bounds below, and not torch
    import torch
    from torch import Tensor

IGNORE = 255
"""Label id of pixels that neither teach nor count."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma Y of ITU-R BT.601: the one place where they stand."""

SMALLEST, LARGEST = 64, 4096
"""Pixels a side of a pair that the network takes."""

PromptMode = Literal["self", "none", "user", "oracle"]


@dataclass
class Sample:
    """One pair as read from disk: uint8 images, ids as stored. Either image may be None, and so may the label."""

    id: str
    visible: Tensor | None  # uint8 (3,H,W)
    infrared: Tensor | None  # uint8 (1,H,W)
    label: Tensor | None = None  # int64 (H,W), ids of the data set's classes
    covered: Tensor | None = (
        None  # bool (2,H,W): where the visible, where the infrared camera reaches; None: everywhere
    )
    alignment: dict[str, Any] = field(default_factory=dict)  # what was done to bring the two into one frame; plain JSON
    input: dict[str, Any] = field(default_factory=dict)  # how the files were read, every guess named; plain JSON
    notices: list[tuple[str, str]] = field(default_factory=list)  # kind and sentence of what a person should know

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of whatever is there."""
        for array in (self.visible, self.infrared, self.label):
            if array is not None:
                return int(array.shape[-2]), int(array.shape[-1])
        raise InputError(f"sample {self.id}: holds neither an image nor a label; give at least one image")


@dataclass
class LabelledSample(Sample):
    """A pair that has a label, as evaluation needs it."""

    label: Tensor  # type: ignore[misc] # int64 (H,W), always there


@dataclass
class Batch:
    """What the network and the losses see."""

    visible: Tensor  # (B,3,H,W) in [0,1]; zeros where absent
    infrared: Tensor  # (B,1,H,W) in [0,1]; zeros where absent
    label: Tensor | None  # int64 (B,H,W); 255 = ignore (outside of the source image)
    present: Tensor  # bool (B,2): visible there, infrared there
    ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        label = None if self.label is None else self.label.to(device)
        return replace(
            self,
            visible=self.visible.to(device),
            infrared=self.infrared.to(device),
            label=label,
            present=self.present.to(device),
        )


@dataclass
class Latents:
    """LSTG's product (eq. 2, 3)."""

    visible: Tensor  # I_1^q (B,d,h,w), quantised with straight-through gradient (or continuous, by configuration)
    infrared: Tensor  # I_2^q (B,d,h,w)
    visible_codes: Tensor | None = None  # int64 (B,h,w,codebooks); None without a codebook
    infrared_codes: Tensor | None = None
    commitment: Tensor | None = None  # scalar, eq. 6 summed over the modalities, before its weight


@dataclass
class Prompts:
    """Points, boxes and a mask prompt, in pixels of the input image (x right, y down, pixel centres at +0)."""

    points: Tensor | None = None  # (B,P,2) x, y
    point_labels: Tensor | None = None  # int64 (B,P): 1 on the object, 0 off it, -1 padding
    boxes: Tensor | None = None  # (B,M,4) x0, y0, x1, y1
    mask: Tensor | None = None
    """(B,1,h,w) logits over the picture, of any h, w; or over the padded grid, as Output.mask_prompt is; None = the
    model's own mask prompt."""
    source: PromptMode = "user"  # where they came from; every report repeats it

    def as_tensors(self) -> Prompts:
        """The same prompts, arrays (numpy) made tensors. Raises InputError for what is neither array nor tensor."""
        import numpy as np
        import torch

        found: dict[str, Tensor | None] = {}
        for name in ("points", "point_labels", "boxes", "mask"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(np.ascontiguousarray(value))
            if value is not None and not isinstance(value, torch.Tensor):
                raise InputError(f"prompts.{name}: found {type(value).__name__}, expected a tensor or an array")
            found[name] = value
        return Prompts(**found, source=self.source)

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        kept = (self.points, self.point_labels, self.boxes, self.mask)
        moved = [None if value is None else value.to(device) for value in kept]
        return Prompts(moved[0], moved[1], moved[2], moved[3], self.source)


@dataclass
class Frame:
    """Where a picture of H x W lies inside the frame an image encoder works on: resized to `content`, placed at the
    top left, padded at right and bottom up to `size` (both height, width in pixels)."""

    size: tuple[int, int]
    content: tuple[int, int]


@dataclass
class ImageFeatures:
    """What every image encoder returns, all of it covering the whole frame."""

    embedding: Tensor  # (B,E,H_e,W_e), SAM's image embedding, stride 16
    levels: list[Tensor]  # finer to coarser maps (B,C_i,H_i,W_i), first at stride 4; may be empty (plain ViT)
    frame: Frame


@dataclass
class Encoded:
    """All that a pair gives before the first prompt: what `decode` needs again at every click."""

    features: ImageFeatures  # of the fused picture at the network's size
    fused: Tensor  # I_f (B,3,H,W) in [0,1], at the input's own size
    latents: Latents
    z_f: Tensor  # (B,d,h,w)
    mask_prompt: Tensor  # (B,1,h,w) logits, from z_f
    size: tuple[int, int]  # (H, W) of the input
    small: tuple[int, int]  # (height, width) it was segmented at, the same unless it exceeds max_side
    padded: tuple[int, int]  # `small` after padding to the network's multiple


@dataclass
class Output:
    """One forward pass, no label used."""

    fused: Tensor  # I_f (B,3,H,W) in [0,1]
    logits: Tensor  # (B,K,H,W), the head's
    fot_logits: Tensor  # (B,K,H,W), the full-fledged output tokens' own
    prompts: Prompts  # what steered SAM, with its source
    latents: Latents
    mask_prompt: Tensor  # (B,1,h,w) logits, from z_f
    features: Tensor  # z_f (B,d,h,w)


class Pixels(NamedTuple):
    """What calibration keeps of one pair: n labelled pixels."""

    logits: Tensor  # (n,K) float16 or float32
    label: Tensor  # int64 (n), none of them IGNORE
