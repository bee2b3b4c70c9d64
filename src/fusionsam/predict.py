"""Prediction in named stages: preprocess, infer, postprocess. Python, the command line, evaluation, export and the
server all go through here."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from fusionsam import backends
from fusionsam.checkpoint import CONFIG, WEIGHTS, calibrated_digest, load_network, locate
from fusionsam.config import ModelConfig
from fusionsam.data.dataset import read_sample
from fusionsam.data.images import read_infrared, read_visible, require_no_thermal, write_png
from fusionsam.data.splits import SUFFIXES, Entry, pair_entries
from fusionsam.models.fusionsam import FusionSAMNetwork
from fusionsam.prompt_files import prompts_from, prompts_to_json, read_prompts
from fusionsam.render import confidence_map, overlay
from fusionsam.structures import IGNORE, InputError, Output, Prompts

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

    def __init__(self, network: FusionSAMNetwork, name: str, card: dict[str, Any], device: str = "cpu") -> None:
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
    ) -> Prediction:
        """A pair (either may be None) -> fused picture, class ids, confidence.

        `prompts`: "self" or "none", or points and boxes of your own in pixels: a structures.Prompts, or the object of a
        prompt file, {"points": [[x, y]], "labels": [1], "boxes": [[x0, y0, x1, y1]]}.
        """
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
        result = self.postprocess(self.infer(*ready, prompts=own, mode=prompts if isinstance(prompts, str) else None))
        # with the arrays on the CPU an accelerator has really finished
        return replace(result, seconds=time.perf_counter() - started)


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
        weights = tensor.new_tensor([0.299, 0.587, 0.114])[:, None, None]
        tensor = tensor.expand(3, -1, -1) if channels == 3 else (tensor * weights).sum(0, keepdim=True)
    return tensor.float()[None]


def _row(prompts: Prompts, row: int) -> Prompts:
    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[row : row + 1].detach().cpu()

    return Prompts(
        pick(prompts.points), pick(prompts.point_labels), pick(prompts.boxes), pick(prompts.mask), prompts.source
    )


# -- files and folders -------------------------------------------------------------------------------------------


RESULTS = ("fused.png", "labels.png", "overlay.png", "confidence.png")


def pairs_to_predict(visible: Path | None, infrared: Path | None, rgbt: Path | None = None) -> list[Entry]:
    """One entry for two files, or all of two folders paired by name; either side may be None. `rgbt` is one file or a
    folder of files with four channels, RGB and thermal, as MFNet has them, instead. InputError if a file has no
    partner, a file is given with a folder, or nothing is there."""
    if rgbt is not None and (visible is not None or infrared is not None):
        raise InputError(f"--rgbt {rgbt}: holds both images; leave --visible and --infrared out")
    given = [path for path in (visible, infrared, rgbt) if path is not None]
    if not given:
        raise InputError("predict: neither --visible nor --infrared nor --rgbt was given; give at least one")
    for path in given:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
    if len({path.is_dir() for path in given}) > 1:
        raise InputError(f"{given[0]} and {given[1]}: one is a folder and one a file; give two of a kind")
    if rgbt is not None:
        found = pair_entries(rgbt, None) if rgbt.is_dir() else [Entry(rgbt.stem, visible=rgbt)]
        found = [Entry(entry.id, rgbt=entry.visible) for entry in found]
    elif given[0].is_dir():
        found = pair_entries(visible, infrared)
    else:
        found = [Entry(given[0].stem, visible=visible, infrared=infrared)]
    if not found:
        raise InputError(f"{given[0]}: holds no image ({', '.join(SUFFIXES)}); give a folder of pictures, or one file")
    return found


def require_apart(entries: Sequence[Entry], out: Path, endings: Sequence[str], folders: bool) -> None:
    """InputError if a result `out`/ID + ending would replace one of the inputs, or, with `folders`, if `out` is where
    inputs are listed from: the next run would take the results for pictures."""
    inputs = {path.resolve(): path for e in entries for path in (e.visible, e.infrared, e.rgbt) if path is not None}
    if folders and out.resolve() in {path.parent for path in inputs}:
        raise InputError(
            f"{out}: is the folder of the inputs, whose next run would find the results; choose another --out"
        )
    for entry in entries:
        for ending in endings:
            if (target := (out / f"{entry.id}{ending}").resolve()) in inputs:
                raise InputError(
                    f"{inputs[target]}: would be overwritten by a result of that name; choose another --out"
                )


def _todo(entries: Sequence[Entry], out: Path, asked: dict[str, Any], with_confidence: bool) -> list[Entry]:
    """Entries whose results are not there yet. InputError where files of their names are of another pair, or were
    written by somebody else."""
    expected = [*RESULTS[: 3 + with_confidence]]
    found = []
    for entry in entries:
        there = [path for name in RESULTS if (path := out / f"{entry.id}_{name}").exists()]
        stored, this = _stored(out / f"{entry.id}.json"), {**asked, **_sources(entry)}
        if stored is None and there:
            raise InputError(
                f"{there[0]}: is there, and no {entry.id}.json of ours; choose another --out, or --overwrite"
            )
        if stored is not None and "run" not in stored:
            raise InputError(f"{out / entry.id}.json: was not written by predict; choose another --out, or --overwrite")
        run = (stored or {}).get("run") or {}
        for key in ("visible", "infrared", "rgbt"):
            if run.get(key) and this[key] and run[key][0] != this[key][0]:
                raise InputError(
                    f"{out / entry.id}.json: is of {run[key][0]}, not of {this[key][0]}; choose another --out, or "
                    "--overwrite"
                )
        if run != this or not all((out / f"{entry.id}_{name}").exists() for name in expected):
            found.append(entry)
    return found


def _stored(path: Path) -> dict[str, Any] | None:
    """What a NAME.json holds; None if there is none, {"run": None} if it is damaged, as an older version left it."""
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {"run": None}
    return stored if isinstance(stored, dict) else {}


def run(
    visible: Path | None,
    infrared: Path | None,
    out: Path,
    weights: str = "tiny",
    prompts: str = "self",
    device: str = "auto",
    overwrite: bool = False,
    with_confidence: bool = False,
    rgbt: Path | None = None,
    backend: str = "torch",
    as_trained: bool = False,
    min_confidence: float = 0.0,
) -> int:
    """Predict files or folders into `out`; returns the number of pairs predicted (finished ones are skipped).

    For each pair NAME_fused.png, NAME_labels.png (class ids; 255 where the model is less certain than
    `min_confidence`), NAME_overlay.png and NAME.json. `as_trained` leaves out what `fusionsam calibrate` fitted. Every
    file is complete or absent, and a NAME.json is only there with the pictures it describes. Raises InputError as its
    parts do, for an `out` where a result would replace an input, and, without `overwrite`, for one that holds results
    of other pairs or files of these names that predict did not write.
    """
    entries = pairs_to_predict(visible, infrared, rgbt)
    folders = any(path is not None and path.is_dir() for path in (visible, infrared, rgbt))
    require_apart(entries, out, [*(f"_{name}" for name in RESULTS), ".json"], folders)
    prompts_file = None if prompts in ("self", "none") else Path(prompts)
    if prompts_file is not None and not prompts_file.is_file():
        raise InputError(f"prompts {prompts}: neither self nor none nor a JSON file; see the README for its form")
    if not 0 <= min_confidence <= 1:
        raise InputError(f"--min-confidence {min_confidence}: expected a probability from 0 to 1")
    model = FusionSAM.from_pretrained(weights, device, backend, calibrated=not as_trained)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    described = {"weights": model.name, "commit": model.card.get("commit", ""), "step": model.card.get("step")}
    files = backends.files(weights) if backend == "onnx" else [locate(weights) / name for name in (WEIGHTS, CONFIG)]
    fingerprint = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()  # names and steps may agree
    steered = prompts if prompts_file is None else hashlib.sha256(prompts_file.read_bytes()).hexdigest()
    asked = {
        "weights": fingerprint,
        "calibrated": calibrated_digest(model.card),
        "prompts": steered + "+confidence" * with_confidence,
        **({"min_confidence": min_confidence} if min_confidence else {}),
    }
    todo = entries if overwrite else _todo(entries, out, asked, with_confidence)
    for entry in tqdm(todo, desc="predict", unit="pair", disable=len(entries) == 1):
        sources = _sources(entry)
        sample = read_sample(entry)
        own = None if prompts_file is None else read_prompts(prompts_file, entry.id, sample.size)
        try:
            prediction = model.predict(sample.visible, sample.infrared, own if own is not None else prompts)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{entry.id}: {error}") from None
        head = {"name": entry.id, **described, "run": {**asked, **sources}}
        _write(out, entry.id, prediction, with_confidence, min_confidence, head)
    skipped = len(entries) - len(todo)
    if skipped:
        tqdm.write(f"{skipped} of {len(entries)} pairs were already done in {out}; --overwrite does them again")
    return len(todo)


def _sources(entry: Entry) -> dict[str, list[Any] | None]:
    """Path, size and time of each file: a replaced input is predicted again, an unchanged one is not read twice."""

    def identity(path: Path | None) -> list[Any] | None:
        if path is None:
            return None
        try:
            facts = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]

    return {key: identity(getattr(entry, key)) for key in ("visible", "infrared", "rgbt")}


def _write(
    out: Path, name: str, prediction: Prediction, with_confidence: bool, min_confidence: float, head: dict[str, Any]
) -> None:
    # a person's own clicks belong in the picture; the model's own would only cover it (they are in the JSON)
    with_prompts = prediction.prompts.source == "user"
    pictures = {
        "fused.png": prediction.fused,
        "labels.png": np.where(prediction.confidence < min_confidence, np.uint8(IGNORE), prediction.labels),
        "overlay.png": np.asarray(prediction.overlay(show_prompts=with_prompts)),
    }
    if with_confidence:
        pictures["confidence.png"] = confidence_map(prediction.confidence)
    try:
        with tempfile.TemporaryDirectory(prefix=".predict-", dir=out) as scratch:
            for ending, picture in pictures.items():
                write_png(Path(scratch) / ending, picture)
            part = Path(scratch) / "json"
            part.write_text(json.dumps({**head, **prediction.summary()}, indent=1) + "\n")
            # what an earlier run said must not stand beside these pictures
            (out / f"{name}.json").unlink(missing_ok=True)
            for ending in RESULTS:
                if ending in pictures:
                    os.replace(Path(scratch) / ending, out / f"{name}_{ending}")
                else:
                    (out / f"{name}_{ending}").unlink(missing_ok=True)
            os.replace(part, out / f"{name}.json")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None


def given_path(text: str) -> Path:
    """A path of the command line; an empty one, as of an unset shell variable, would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path was given")
    return Path(text)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """--visible and --infrared."""
    parser.add_argument("--visible", type=given_path, help="visible image, or a folder of them; may be left out")
    parser.add_argument(
        "--infrared", type=given_path, help="infrared image, or a folder with the same names; may be left out"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fusionsam predict`."""
    add_pair_arguments(parser)
    parser.add_argument(
        "--rgbt", type=given_path, help="instead: a four-channel RGB + thermal PNG as MFNet's, or a folder"
    )
    parser.add_argument(
        "--out", type=given_path, required=True, help="folder for the results; finished pairs are skipped"
    )
    parser.add_argument("--weights", default="tiny", help="shipped name or checkpoint folder (default: tiny)")
    parser.add_argument(
        "--prompts",
        default="self",
        help="self: the model's own points and box; none: its mask prompt only; FILE.json: yours (default: self)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--backend", choices=["torch", "onnx"], default="torch", help="onnx: --weights is an export")
    parser.add_argument(
        "--overwrite", action="store_true", help="predict finished pairs again; replace files and films"
    )
    parser.add_argument(
        "--video", action="store_true", help="the two are films, or folders of frames: write NAME_overlay.mp4"
    )
    parser.add_argument("--fps", type=float, help="with --video: frames a second (default: the film's, 25 for folders)")
    parser.add_argument("--confidence-map", action="store_true", help="also write NAME_confidence.png (0-255)")
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="255 (unknown) in NAME_labels.png where the class is less probable: labels for data.extra_labels",
    )
    parser.add_argument("--as-trained", action="store_true", help="without what calibrate fitted")


def main(args: argparse.Namespace) -> int:
    """`fusionsam predict`."""
    if args.as_trained and args.backend == "onnx":
        raise InputError(
            "--as-trained: what calibrate fitted is inside an export; leave it out, or use --backend torch"
        )
    if args.video:
        from fusionsam import video

        load = partial(FusionSAM.from_pretrained, backend=args.backend, calibrated=not args.as_trained)
        return video.command(args, load, read_prompts)
    if args.fps is not None:
        raise InputError("--fps: is of films; give --video with it, or leave it out")
    kept = (args.weights, args.prompts, args.device, args.overwrite, args.confidence_map, args.rgbt, args.backend)
    done = run(args.visible, args.infrared, args.out, *kept, args.as_trained, args.min_confidence)
    print(f"{done} pair{'s' * (done != 1)} -> {args.out}")
    return 0
