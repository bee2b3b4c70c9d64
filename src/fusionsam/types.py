"""The nouns that travel between the parts, and what is raised for bad input. No part imports another to speak of these.

Legend of axis letters, used in every docstring:
B batch, H W input height and width in pixels, s = 4 the latent stride, h = H/s, w = W/s,
d latent width, N = h*w latent tokens, K classes, E the embedding width of SAM (256),
P points, M boxes. Images are float in [0, 1] unless a docstring says uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:  # `--help` of a command needs the bounds below, and not torch
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Array: TypeAlias = NDArray[Any]
    """A numpy array of any number type: a picture as its file stores it."""


def __getattr__(name: str) -> object:
    """Array, for those that import it: `import fusionsam` alone does without numpy."""
    if name == "Array":
        from numpy.typing import NDArray

        return NDArray[Any]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


VERSION = "0.1.0"
"""Of this package; what is written repeats it."""

IGNORE = 255
"""Label id of pixels that neither teach nor count."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma Y of ITU-R BT.601: the one place where they stand."""

SMALLEST, LARGEST = 64, 4096
"""Pixels a side of a pair that the network takes."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as read from a file, or on its way into one: its values are known by their keys alone."""

PromptMode = Literal["self", "none", "user", "oracle"]
FROM_TRUTH = ("oracle", "named")
"""What an evaluation calls prompts drawn from the ground truth: points and a box, or points that name their class."""


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a setting. The message is one line that names the input, what was
    found, what was expected and what to do; the command line prints it and exits with code 2."""


class NoSplit(InputError):
    """What was asked for is not there at all, which some may live without, unlike what is there and flawed."""


class Notice(NamedTuple):
    """Something that a person should know about a pair's files: its kind, by which batches count, and one sentence."""

    kind: str
    text: str
    option: str = ""
    """The option of `predict` that reads the file otherwise, and when to give it; empty where none does."""

    def sentence(self, options: bool = False) -> str:
        """The text with the option. `options`: whether who reads it has just called `predict`, on the command line."""
        if not self.option:
            return self.text
        return f"{self.text}; {self.option}" if options else f"{self.text} (fusionsam predict: {self.option})"


def told_of(facts: JsonObject, notices: Sequence[Notice], options: bool = False) -> JsonObject:
    """The key `input` of a result: how the files were read, and the sentences of the notices; empty where there is
    nothing."""
    if not facts and not notices:
        return {}
    return {**facts, "notices": [notice.sentence(options) for notice in notices]}


def native(array: Array) -> Array:
    """A numpy array of numbers as torch takes it, which knows neither another machine's byte order, nor long doubles,
    nor negative strides."""
    import numpy as np

    return np.ascontiguousarray(array, f"{array.dtype.kind}{min(array.dtype.itemsize, 8)}")


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
    alignment: JsonObject = field(default_factory=dict)  # what was done to bring the two into one frame; plain JSON
    input: JsonObject = field(default_factory=dict)  # how the files were read, every guess named; plain JSON
    notices: list[Notice] = field(default_factory=list)  # what a person should know
    taught: Tensor | None = None  # uint8 (H,W): ids of other classes by a teacher (data.teacher_labels), 255 = unsure

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
    covered: Tensor | None = None  # bool (B,2,H,W): where visible, where infrared reaches; None: everywhere
    taught: Tensor | None = None  # int64 (B,H,W): ids of a teacher's classes, 255 = unsure

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        label = None if self.label is None else self.label.to(device)
        covered = None if self.covered is None else self.covered.to(device)
        taught = None if self.taught is None else self.taught.to(device)
        return replace(
            self,
            covered=covered,
            taught=taught,
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
    point_classes: Tensor | None = None  # int64 (B,P): the class id that stands at the point, -1 = none named
    box_classes: Tensor | None = None  # int64 (B,M), likewise

    @staticmethod
    def naming(points: Sequence[tuple[float, float]], classes: Sequence[int]) -> Prompts:
        """Points (x, y) of one pair, each of which names the class id that stands there.

        >>> Prompts.naming([(320, 240)], [1]).point_classes
        tensor([[1]])
        """
        import torch

        labels = torch.ones(1, len(points), dtype=torch.long)
        places = torch.tensor([list(points)], dtype=torch.float32)
        return Prompts(points=places, point_labels=labels, point_classes=torch.tensor([list(classes)]))

    def as_tensors(self) -> Prompts:
        """The same prompts, arrays (numpy) made tensors. Raises InputError for what is neither tensor nor array of
        numbers."""
        import numpy as np
        import torch

        found: dict[str, Tensor | None] = {}
        for name in PROMPT_TENSORS:
            value = getattr(self, name)
            if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
                value = torch.from_numpy(native(value))
            if value is not None and not isinstance(value, torch.Tensor):
                found_type = getattr(value, "dtype", type(value).__name__)
                raise InputError(f"prompts.{name}: found {found_type}, expected a tensor or an array of numbers")
            found[name] = value
        return Prompts(**found, source=self.source)

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        kept = {name: getattr(self, name) for name in PROMPT_TENSORS}
        return replace(self, **{name: value.to(device) for name, value in kept.items() if value is not None})


PROMPT_TENSORS = ("points", "point_labels", "boxes", "mask", "point_classes", "box_classes")
"""The fields of `Prompts` that hold tensors."""


@dataclass
class ClassClicks:
    """Points and boxes that name a class, as steering takes them: in latent cells, -1 = padding."""

    points: Tensor  # (B,P,2) x, y
    point_classes: Tensor  # int64 (B,P)
    boxes: Tensor  # (B,M,4) x0, y0, x1, y1
    box_classes: Tensor  # int64 (B,M)
    tokens: Tensor  # (B,P+M,E), SAM's sparse embeddings of them, a box's two corners summed

    @property
    def classes(self) -> Tensor:
        """int64 (B,P+M): points, then boxes."""
        import torch

        return torch.cat([self.point_classes, self.box_classes], dim=1)


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


class FirstPass(NamedTuple):
    """What the network gives on the latent grid before any click names a class."""

    logits: Tensor  # (B,K,h,w)
    fot: Tensor  # (B,K,h,w), the full-fledged output tokens' own
    mask_features: Tensor  # (B,E/8,h,w)
    features: Tensor | None  # (B,width,h,w), what the head sees of the encoder's levels
    prompts: Prompts  # what steered SAM, in pixels of the size at which the pair is segmented


class Pixels(NamedTuple):
    """What calibration keeps of one pair: n labelled pixels."""

    logits: Tensor  # (n,K) float16 or float32
    label: Tensor  # int64 (n), none of them IGNORE
