"""Prediction in named stages: preprocess, infer, postprocess. Python, the command line, evaluation, export and the
server all go through here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from fusionsam.config.schema import ModelConfig
from fusionsam.data.images import read_infrared, read_visible, require_no_thermal
from fusionsam.errors import InputError
from fusionsam.inference import onnx as backends
from fusionsam.inference.prompts import prompts_from, prompts_to_json
from fusionsam.inference.render import overlay
from fusionsam.models.layers import resize
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import LUMA, SMALLEST, Output, Prompts
from fusionsam.weights.checkpoint import Card, load_network

ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor
Mode = Literal["self", "none"]


@dataclass
class Prediction:
    """What one pair gives, as plain arrays at the input's own size."""

    fused: NDArray[np.uint8]  # (H,W,3) RGB
    labels: NDArray[np.uint8]  # (H,W) class ids
    confidence: NDArray[np.float32]  # (H,W) probability of the class that was chosen, 0..1
    prompts: Prompts  # what steered SAM, in pixels of the input; batch of one
    classes: list[str]
    palette: list[tuple[int, int, int]]
    seconds: float  # the network's own time, copies from the device included

    def overlay(self, legend: bool = True, show_prompts: bool = False) -> Image.Image:
        """The fused picture with the class colours, and a legend of the classes that occur."""
        shown = self.prompts if show_prompts else None
        return overlay(self.fused, self.labels, self.classes, self.palette, legend=legend, prompts=shown)

    def summary(self) -> dict[str, Any]:
        """Pixel share (percent) and mean confidence (0..1) of each class that occurs, prompts, seconds: JSON types."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        sums = np.bincount(self.labels.ravel(), weights=self.confidence.ravel(), minlength=len(self.classes))
        return {
            "size": list(self.labels.shape),
            "classes": {
                name: {
                    "id": index,
                    "share": round(100 * float(counts[index]) / self.labels.size, 4),
                    "mean_confidence": round(float(sums[index] / counts[index]), 4),
                }
                for index, name in enumerate(self.classes)
                if counts[index]
            },
            "prompts": prompts_to_json(self.prompts),
            "seconds": round(self.seconds, 4),
        }


class FusionSAM:
    """A trained network, ready to use.

    >>> model = FusionSAM.from_pretrained("tiny")  # doctest: +SKIP
    >>> out = model.predict("visible.png", "infrared.png")  # doctest: +SKIP
    """

    def __init__(self, network: FusionSAMNetwork, name: str, card: Card, device: str = "cpu") -> None:
        self.network = network.eval().to(device)
        self.config: ModelConfig = network.config
        self.name, self.card, self.device = name, card, torch.device(device)
        # of `fusionsam calibrate`; confidences alone depend on it, the largest logit stays the largest
        self.temperature = float((card.get("calibration") or {}).get("temperature", 1.0))

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "tiny", device: str = "auto", backend: str = "torch", calibrated: bool = True
    ) -> FusionSAM:
        """A checkpoint that ships with the package (by name) or a checkpoint folder; with `backend` onnx a folder of
        `fusionsam export`. `device` auto takes CUDA, Apple's MPS or the CPU; without `calibrated` class offsets and
        temperature of `fusionsam calibrate` are left out (not of an export). InputError if it cannot be used."""
        if backend not in ("torch", "onnx"):
            raise InputError(f"backend {backend!r}: expected torch or onnx")
        if backend == "onnx":
            return cls(*backends.load(source, device))
        network, card = load_network(source, calibrated)
        return cls(network, str(card["name"]), card, choose_device(device))

    # -- stages --------------------------------------------------------------------------------------------------

    @staticmethod
    def preprocess(visible: ImageLike | None, infrared: ImageLike | None) -> tuple[Tensor | None, Tensor | None]:
        """Paths, PIL images, arrays or tensors -> (1,3,H,W) and (1,1,H,W) float in [0,1].

        Arrays are (H,W,3) or (H,W), tensors (3,H,W), (1,H,W) or (H,W); uint8 or float in [0,1]. InputError names what
        does not fit.
        """
        return _as_tensor(visible, "visible"), _as_tensor(infrared, "infrared")

    @torch.inference_mode()
    def infer(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        mode: Mode | None = None,
    ) -> Output:
        """The network's one forward pass without gradients: (B,3,H,W), (B,1,H,W) in [0,1] -> Output on the device."""
        images = [None if image is None else image.to(self.device) for image in (visible, infrared)]
        given = None if prompts is None else prompts.to(self.device)
        return self.network(images[0], images[1], given, mode=mode)

    def infer_views(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        mode: Mode | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Output:
        """`infer` on resized and, with `flip`, mirrored copies of (B,3,H,W) and (B,1,H,W): logits (B,K,H,W) whose
        softmax at the stored temperature is the mean of the copies' probabilities. All else in the Output is of one
        view, the pair as it is where 1 is among the `scales` (factors above 0 and up to 4).

        InputError for other scales, for prompts that would be pixels of another view, and as `infer` raises it."""
        require_scales(scales)
        if prompts is not None and (flip or list(scales) != [1]):
            raise InputError("prompts: yours are pixels of one view; leave out scales and flip")
        images = (visible, infrared)
        size = next((image.shape[2:] for image in images if image is not None), (0, 0))
        side, limit = max(size), self.config.max_side
        if larger := [scale for scale in scales if scale > 1 and scale * side > limit]:
            raise InputError(
                f"scales {larger[0]:g}: enlarges {size[0]}x{size[1]} pixels beyond the {limit} a side that these "
                f"weights look at, to which it would be reduced again; expected at most {max(1.0, limit / side):.3g}"
            )
        views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
        views.sort(key=lambda view: view[0] != 1)
        first, total = None, None
        for scale, mirrored in views:
            one, two = (None if image is None else _view(image, scale, mirrored) for image in images)
            try:
                output = self.infer(one, two, prompts, mode)
            except InputError as error:
                raise InputError(f"{error}" if scale == 1 else f"at scale {scale:g}: {error}") from None
            logits = resize(output.logits.float().flip(-1) if mirrored else output.logits.float(), (size[0], size[1]))
            if len(views) == 1:
                return replace(output, logits=logits)
            share = (logits / self.temperature).softmax(1)
            first, total = first or output, share if total is None else total + share
        assert first is not None
        assert total is not None
        return replace(first, logits=(total / len(views)).clamp(min=1e-12).log() * self.temperature)

    def postprocess(self, output: Output, seconds: float = 0.0, row: int = 0) -> Prediction:
        """One image of an Output as plain arrays."""
        logits = output.logits[row]
        labels = logits.argmax(0)
        # exp(top - logsumexp) spares the K x H x W array of probabilities
        scaled = logits / self.temperature
        confidence = torch.exp(scaled.gather(0, labels[None])[0] - scaled.logsumexp(0))
        fused = (output.fused[row] * 255).round().to(torch.uint8).permute(1, 2, 0)
        return Prediction(
            fused=fused.cpu().numpy(),
            labels=labels.to(torch.uint8).cpu().numpy(),
            confidence=confidence.float().cpu().numpy(),
            prompts=_row(output.prompts, row),
            classes=list(self.config.classes),
            palette=list(self.config.palette),
            seconds=seconds,
        )

    def predict(
        self,
        visible: ImageLike | None,
        infrared: ImageLike | None,
        prompts: Prompts | Mapping[str, Any] | Mode | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Prediction:
        """A pair (either may be None) -> fused picture, class ids, confidence.

        `prompts`: "self" or "none", or points and boxes of your own in pixels: a structures.Prompts, or the object of a
        prompt file, {"points": [[x, y]], "labels": [1], "boxes": [[x0, y0, x1, y1]]}. Class probabilities are means
        over copies resized by `scales`, 1 among them, and with `flip` over mirrored ones (`infer_views`).
        """
        require_one_as_it_is(scales)
        ready = self.preprocess(visible, infrared)
        if isinstance(prompts, Mapping):
            size = next((image.shape[-2:] for image in ready if image is not None), (0, 0))
            prompts = prompts_from(dict(prompts), "prompts", "this pair", (size[0], size[1]))
        if prompts is not None and not isinstance(prompts, Prompts | str):
            raise InputError(f"prompts: found {type(prompts).__name__}; expected self, none, a Prompts or a dictionary")
        if isinstance(prompts, Prompts):
            _require_one(prompts)
        started = time.perf_counter()
        own = prompts if isinstance(prompts, Prompts) else None
        mode = prompts if isinstance(prompts, str) else None
        result = self.postprocess(self.infer_views(*ready, own, mode, scales, flip))
        # with the arrays on the CPU an accelerator has really finished
        return replace(result, seconds=time.perf_counter() - started)


def require_scales(scales: Sequence[float]) -> None:
    """InputError unless every one of at least one factor is above 0 and up to 4."""
    if not scales or not all(0 < scale <= 4 for scale in scales):  # NaN fails, too
        raise InputError(f"scales {list(scales)}: expected factors above 0 and up to 4")


def require_one_as_it_is(scales: Sequence[float]) -> None:
    """InputError unless 1 is among the `scales`: the fused picture and the prompts are of that view."""
    if 1 not in scales:
        raise InputError(
            f"scales {' '.join(f'{scale:g}' for scale in scales)}: the picture that is kept is that of scale 1; give 1 "
            "with them"
        )


def _view(image: Tensor, scale: float, mirrored: bool) -> Tensor:
    """(1,C,H,W) resized by `scale`, to no less than what the network takes."""
    if scale != 1:
        size = tuple(max(SMALLEST, round(side * scale)) for side in image.shape[2:])
        image = interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    return image.flip(-1) if mirrored else image


def _require_one(prompts: Prompts) -> None:
    """InputError for what is no tensor, prompts of more than one image, and labels that mean nothing."""
    for name in ("points", "point_labels", "boxes", "mask"):
        value = getattr(prompts, name)
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"prompts.{name}: found {type(value).__name__}, expected a tensor")
        if value is not None and len(value) != 1:
            raise InputError(f"prompts.{name}: found {len(value)} rows of prompts for 1 image; give one (batch of 1)")
    labels = prompts.point_labels
    if isinstance(labels, Tensor) and (strange := [x for x in labels.flatten().tolist() if x not in (-1, 0, 1)]):
        raise InputError(f"prompts.point_labels: found {strange[0]}, expected 1 (on the object), 0 (off it) or -1")


def choose_device(device: str) -> str:
    """auto -> cuda, mps or cpu, whichever is there first; anything else is checked (InputError)."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()  # of the device meta nothing comes back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"device {device!r}: not usable here ({reason}); use auto or cpu") from None
    return device


def _as_tensor(image: ImageLike | None, name: Literal["visible", "infrared"]) -> Tensor | None:
    if image is None:
        return None
    channels = 3 if name == "visible" else 1
    if isinstance(image, str | Path):
        tensor = (read_visible if name == "visible" else read_infrared)(image)
    elif isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # convert() would clip them; the file readers know such depths
            raise InputError(f"{name}: PIL mode {image.mode} is not 8 bits a channel; give the path, or a uint8 array")
        image = ImageOps.exif_transpose(image)  # as the file readers do
        require_no_thermal(name, image)
        array = np.array(image.convert("RGB" if name == "visible" else "L"))
        tensor = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        tensor = image[None] if image.ndim == 2 else image
    else:
        array = np.ascontiguousarray(image)  # torch takes no negative strides, as of a BGR picture reversed
        tensor = torch.from_numpy(array[..., None] if array.ndim == 2 else array)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        found = f"found shape {tuple(tensor.shape)} (channels first)"
        raise InputError(f"{name}: {found}, expected one image of 1 or 3 channels")
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point() or not bool(((tensor >= 0) & (tensor <= 1)).all()):  # NaN fails too
        raise InputError(f"{name}: found {tensor.dtype} outside of [0, 1]; give uint8, or float in [0, 1]")
    if tensor.shape[0] != channels:
        weights = tensor.new_tensor(LUMA)[:, None, None]
        tensor = tensor.expand(3, -1, -1) if channels == 3 else (tensor * weights).sum(0, keepdim=True)
    return tensor.float()[None]


def _row(prompts: Prompts, row: int) -> Prompts:
    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[row : row + 1].detach().cpu()

    return Prompts(
        pick(prompts.points), pick(prompts.point_labels), pick(prompts.boxes), pick(prompts.mask), prompts.source
    )
