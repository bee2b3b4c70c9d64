"""Prediction in named stages: preprocess, infer, postprocess. Python, the command line, evaluation, export and the
server all go through here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor

from fusionsam.config.options import DEFAULT_WEIGHTS, DeviceOption, PrecisionOption
from fusionsam.config.schema import ModelConfig
from fusionsam.data.infrared import DEFAULT, InfraredOptions
from fusionsam.inference import onnx as backends
from fusionsam.inference.device import choose_device, computing, out_of_memory, require_precision
from fusionsam.inference.inputs import ImageLike, listed_pairs, read_covered, read_inputs
from fusionsam.inference.memory import FreeMemory
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.prompts import Mode, given_prompts
from fusionsam.inference.session import Session
from fusionsam.inference.views import Scales, require_one_as_it_is, require_one_view, require_scales, size_of, view
from fusionsam.models.encoders.create import prepare_for_inference
from fusionsam.models.geometry import scale_prompts, split_classes, to_input
from fusionsam.models.layers import resize
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import PROMPT_TENSORS, Array, InputError, Output, Prompts, told_of
from fusionsam.weights.checkpoint import Card, load_network, locate
from fusionsam.weights.hub import LICENSE, at_revision

OneT = TypeVar("OneT", bound=ImageLike | None)
OtherT = TypeVar("OtherT", bound=ImageLike | None)


class FusionSAM:
    """A trained network, ready to use.

    >>> model = FusionSAM.from_pretrained("tiny")  # doctest: +SKIP
    >>> out = model.predict("visible.png", "infrared.png")  # doctest: +SKIP
    """

    def __init__(
        self, network: FusionSAMNetwork, name: str, card: Card, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        self.network = network.eval().to(device)
        self.config: ModelConfig = network.config
        self.name, self.card, self.device = name, card, torch.device(device)
        require_precision(precision, self.device)
        self.precision = precision
        self._free_memory = FreeMemory()
        self.folder: Path | None = None  # of the checkpoint; what is in memory was made ready to predict only
        # of `fusionsam calibrate`; of one view confidences alone depend on it, of several their mean does, too
        self.temperature = float((card.get("calibration") or {}).get("temperature", 1.0))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = DEFAULT_WEIGHTS,
        device: str = DeviceOption.device,
        backend: str = "torch",
        calibrated: bool = True,
        revision: str | None = None,
        precision: str = PrecisionOption.precision,
    ) -> FusionSAM:
        """A checkpoint, ready to predict.

        Args:
            source: A name that ships with the package, a checkpoint folder, or owner/name of the Hugging Face hub; with
                `backend` onnx a folder of `fusionsam export`.
            device: auto takes CUDA, Apple's MPS or the CPU.
            backend: torch or onnx.
            calibrated: Without it, class offsets and temperature of `fusionsam calibrate` are left out (not of an
                export).
            revision: Branch, tag or commit of a hub's repository.
            precision: What the network computes with: fp32, bf16 (less time where the device has instructions for it,
                `inference.device.knows_bfloat16`), or fp16 (GPUs alone). With `backend` onnx fp32.

        Raises:
            InputError: it cannot be used.

        >>> FusionSAM.from_pretrained("owner/name", revision="v1")  # doctest: +SKIP
        """
        if backend not in ("torch", "onnx"):
            raise InputError(f"backend {backend!r}: expected torch or onnx")
        if revision is not None:
            source = at_revision(source, revision)
        if backend == "onnx":
            if precision != "fp32":
                raise InputError(f"precision {precision}: is torch's; an export computes with what it was exported in")
            return cls(*backends.load(source, device))
        network, card = load_network(source, calibrated)
        prepare_for_inference(network.image_encoder)
        model = cls(network, str(card["name"]), card, choose_device(device), precision)
        model.folder = locate(source)
        return model

    def save_pretrained(
        self, folder: str | Path, name: str = "owner/name", reports: Sequence[str | Path] = (), license: str = LICENSE
    ) -> Path:
        """The checkpoint in the hub's format into an empty `folder` (`weights.publish.write_repository`): what
        `push_to_hub` uploads, to be looked at first. InputError for a model that came from no checkpoint."""
        from fusionsam.weights.publish import write_repository

        return write_repository(self._checkpoint(), folder, name, reports, license)

    def push_to_hub(
        self,
        repository: str,
        *,
        reports: Sequence[str | Path] = (),
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a FusionSAM checkpoint",
        license: str = LICENSE,
    ) -> str:
        """Upload the checkpoint to the Hugging Face hub, from where `from_pretrained(repository)` takes it.

        Args:
            repository: owner/name, made where it is not there.
            reports: report.json files of `fusionsam evaluate` of these weights; their figures go into the model card.
            private: For a new repository.
            token: Unless given, that of `hf auth login` or `HF_TOKEN`.
            message: Of the commit.
            license: As the hub abbreviates it.

        Returns:
            The repository's address.

        Raises:
            InputError: the hub refuses it, a report is of other weights, or the model came from no checkpoint.

        >>> model.push_to_hub("owner/name", reports=["out/test/report.json"])  # doctest: +SKIP
        """
        from fusionsam.weights.publish import push

        return push(
            self._checkpoint(),
            repository,
            reports=reports,
            private=private,
            token=token,
            message=message,
            license=license,
        )

    def _checkpoint(self) -> Path:
        if self.folder is None:
            raise InputError(
                f"model {self.name}: came from no checkpoint folder (an export, or a network in memory); save it with "
                "weights.checkpoint.save_checkpoint, and load that folder"
            )
        return self.folder

    # -- stages --------------------------------------------------------------------------------------------------

    @staticmethod
    def preprocess(
        visible: ImageLike | None, infrared: ImageLike | None, reading: InfraredOptions = DEFAULT
    ) -> tuple[Tensor | None, Tensor | None]:
        """Paths, files in memory, PIL images, arrays or tensors -> (1,3,H,W) and (1,1,H,W) float in [0,1].

        Arrays are (H,W,3) or (H,W), tensors (3,H,W), (1,H,W) or (H,W): uint8, float in [0,1], or deeper (counts,
        degrees Celsius), which are stretched as those of files are. InputError names what does not fit.
        """
        found = read_inputs(visible, infrared, reading)
        return found.visible, found.infrared

    @torch.inference_mode()
    def infer(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        mode: Mode | None = None,
        covered: Tensor | None = None,
    ) -> Output:
        """The network's one forward pass without gradients: (B,3,H,W), (B,1,H,W) in [0,1] -> Output on the device;
        `covered` bool (B,2,H,W) is false at pixels that a camera does not reach."""
        given = None if prompts is None else prompts.to(self.device)
        images, there = self._placed(visible, infrared, covered)
        self._free_memory()
        with self.computing():
            return self.network(images[0], images[1], given, mode=mode, covered=there)

    @torch.inference_mode()
    def infer_named(
        self, visible: Tensor | None, infrared: Tensor | None, prompts: Prompts, covered: Tensor | None = None
    ) -> tuple[Output, Tensor]:
        """`infer` with prompts of which some name a class, and the logits (B,K,H,W) of `infer` without these: the pair
        is encoded once for both."""
        given = prompts.to(self.device)
        images, there = self._placed(visible, infrared, covered)
        self._free_memory()
        with self.computing():
            encoded = self.network.encode(images[0], images[1], covered=there)
            first = self.network.first_pass(encoded, split_classes(given)[1])
            return self.network.decode(encoded, given, first=first), to_input(first.logits, encoded)

    def _placed(
        self, visible: Tensor | None, infrared: Tensor | None, covered: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """The images, and `covered`, on the model's device."""
        images = [None if image is None else image.to(self.device) for image in (visible, infrared)]
        return images, None if covered is None else covered.to(self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it the network computes in the model's precision. InputError where the memory does not suffice."""
        try:
            with computing(self.precision, self.device):
                yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"the pictures do not fit into the memory of {self.device}; give smaller ones, or fewer at a time"
            ) from None

    def infer_views(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        mode: Mode | None = None,
        scales: Scales = (1.0,),
        flip: bool = False,
        covered: Tensor | None = None,
    ) -> Output:
        """`infer` on resized and, with `flip`, mirrored copies of (B,3,H,W) and (B,1,H,W): logits (B,K,H,W) whose
        softmax at the stored temperature is the mean of the copies' probabilities. All else in the Output is of one
        view: the pair as it is where 1 is among the `scales` (factors above 0 and up to 4), else the first of them,
        with picture and prompts brought to the pair's own size. `covered` as in `infer`.

        InputError for other scales, for prompts that would be pixels of another view, and as `infer` raises it."""
        scales = require_scales(scales)
        if prompts is not None:
            require_one_view(scales, flip)
        images = (visible, infrared)
        size = size_of(images)
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
            one, two = (None if image is None else view(image, scale, mirrored) for image in images)
            there = None if covered is None else view(covered.float(), scale, mirrored) >= 0.5
            try:
                output = self.infer(one, two, prompts, mode, there)
            except InputError as error:
                raise InputError(f"{error}" if scale == 1 else f"at scale {scale:g}: {error}") from None
            logits = resize(output.logits.float().flip(-1) if mirrored else output.logits.float(), size)
            if first is None:
                prompts_there = scale_prompts(output.prompts, size_of([output.fused]), size)
                first = replace(output, fused=resize(output.fused, size), prompts=prompts_there)
            if len(views) == 1:
                return replace(first, logits=logits)
            share = (logits / self.temperature).softmax(1)
            total = share if total is None else total + share
        assert first is not None
        assert total is not None
        return replace(first, logits=(total / len(views)).clamp(min=1e-12).log() * self.temperature)

    def postprocess(self, output: Output, seconds: float = 0.0, row: int = 0) -> Prediction:
        """One image of an Output as plain arrays."""
        logits = output.logits[row].float()
        labels = logits.argmax(0)
        # exp(top - logsumexp) spares the K x H x W array of probabilities
        scaled = logits / self.temperature
        confidence = torch.exp(scaled.gather(0, labels[None])[0] - scaled.logsumexp(0))
        fused = (output.fused[row].float() * 255).round().to(torch.uint8).permute(1, 2, 0)
        return Prediction(
            fused=fused.cpu().numpy(),
            labels=labels.to(torch.uint8).cpu().numpy(),
            confidence=confidence.float().cpu().numpy(),
            prompts=_row(output.prompts, row),
            classes=list(self.config.classes),
            palette=list(self.config.palette),
            seconds=seconds,
        )

    @torch.inference_mode()
    def encode(
        self, visible: ImageLike | None, infrared: ImageLike | None, covered: Tensor | Array | None = None
    ) -> Session:
        """A pair (either may be None), encoded once for any number of prompts: `Session.predict` takes the time of the
        decoder alone. Images and `covered` as in `predict`. Raises InputError for images that do not fit."""
        ready = self.preprocess(visible, infrared)
        images, there = self._placed(*ready, read_covered(covered, ready))
        self._free_memory()
        with self.computing():
            return Session(self, self.network.encode(images[0], images[1], covered=there), *images)

    @overload  # of None and None, which is refused, the first holds
    def predict(  # type: ignore[overload-overlap]
        self,
        visible: ImageLike | None,
        infrared: ImageLike | None,
        prompts: Prompts | Mapping[str, object] | Mode | None = None,
        scales: Scales = (1.0,),
        flip: bool = False,
        covered: Tensor | Array | None = None,
        reading: InfraredOptions = DEFAULT,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        visible: list[OneT] | None,
        infrared: list[OtherT] | None,
        prompts: Prompts | Mapping[str, object] | Mode | None = None,
        scales: Scales = (1.0,),
        flip: bool = False,
        covered: Tensor | Array | None = None,
        reading: InfraredOptions = DEFAULT,
    ) -> list[Prediction]: ...

    def predict(
        self,
        visible: ImageLike | list[OneT] | None,
        infrared: ImageLike | list[OtherT] | None,
        prompts: Prompts | Mapping[str, object] | Mode | None = None,
        scales: Scales = (1.0,),
        flip: bool = False,
        covered: Tensor | Array | None = None,
        reading: InfraredOptions = DEFAULT,
    ) -> Prediction | list[Prediction]:
        """A pair (either may be None) -> fused picture, class ids, confidence; two lists -> a list of these.

        Args:
            visible: A path, the content of an image file (bytes, io.BytesIO), a PIL image, an array (H,W,3) or (H,W),
                or a tensor (3,H,W); or a list of such, one for each pair.
            infrared: The same.
            prompts: "self" or "none", or points and boxes of your own in pixels: a `Prompts` of tensors or arrays, or
                the object of a prompt file, {"points": [[x, y]], "labels": [1], "boxes": [[x0, y0, x1, y1]]}, lists or
                arrays; with "classes": ["car"] (and "box_classes") they steer the class map, as far as the weights
                learned that. They hold for every pair of a list.
            scales: Class probabilities are means over copies resized by these factors, 1 among them, or by one.
            flip: And over mirrored copies (`infer_views`).
            covered: bool (2,H,W), tensor or array, false at pixels that the visible, or the infrared camera does not
                reach, as `alignment.apply.Aligner` tells it.
            reading: How the infrared picture becomes heat (range, polarity, palette); what was found and guessed is in
                `Prediction.input`.

        Raises:
            InputError: A picture cannot be read or does not fit; of a list it is named by its number.

        >>> model.predict(["a_rgb.png", "b_rgb.png"], ["a_th.png", "b_th.png"])[1].labels  # doctest: +SKIP
        """
        scales = require_scales(scales)
        require_one_as_it_is(scales)
        pairs = listed_pairs(visible, infrared)
        if pairs is None:
            return self._predict(visible, infrared, prompts, scales, flip, covered, reading)  # type: ignore[arg-type]
        found = []
        for number, pair in enumerate(pairs, 1):
            try:
                found.append(self._predict(*pair, prompts, scales, flip, covered, reading))
            except InputError as error:
                raise InputError(f"pair {number} of {len(pairs)}: {error}") from None
        return found

    def _predict(
        self,
        visible: ImageLike | None,
        infrared: ImageLike | None,
        prompts: Prompts | Mapping[str, object] | Mode | None,
        scales: Sequence[float],
        flip: bool,
        covered: Tensor | Array | None,
        reading: InfraredOptions,
    ) -> Prediction:
        found = read_inputs(visible, infrared, reading)
        ready = (found.visible, found.infrared)
        own, mode = given_prompts(prompts, size_of(ready), self.config.classes)
        started = time.perf_counter()
        result = self.postprocess(self.infer_views(*ready, own, mode, scales, flip, read_covered(covered, ready)))
        # with the arrays on the CPU an accelerator has really finished
        told = told_of(found.facts, found.notices)
        return replace(result, seconds=time.perf_counter() - started, input=told)


def _row(prompts: Prompts, row: int) -> Prompts:
    found = {name: getattr(prompts, name) for name in PROMPT_TENSORS}
    rows = {name: value[row : row + 1].detach().cpu() for name, value in found.items() if value is not None}
    if rows["mask"].is_floating_point():
        rows["mask"] = rows["mask"].float()  # NumPy has no bfloat16
    return replace(prompts, **rows)
