"""`fusionsam reconstruct`: what LSTG keeps of a pair, as pictures and figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.data.dataset import read_sample
from fusionsam.data.images import write_png
from fusionsam.data.splits import Entry
from fusionsam.data.transforms import to_unit
from fusionsam.errors import InputError
from fusionsam.evaluation.options import ReconstructOptions
from fusionsam.inference.files import pairs_to_predict, require_apart
from fusionsam.inference.predictor import choose_device
from fusionsam.inference.render import codes_picture
from fusionsam.io import Made, OutputFolder, write_json
from fusionsam.metrics.reconstruction import (
    MODALITIES,
    CodeUsage,
    bits_per_pixel,
    codebook_size,
    psnr,
    rebuild,
    require_decoder,
    structural_similarity,
)
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.progress import progress_bar
from fusionsam.training.perceptual import EncoderLevels, Vgg16, load_vgg16, perceptual_distance
from fusionsam.types import LARGEST
from fusionsam.weights import pretrained as foreign
from fusionsam.weights.checkpoint import load_network, read_checkpoint

SUMMARY = "summary.json"
SMALLEST = 7
"""Pixels a side: the window of SSIM."""
ERROR_GAIN = 4
"""Error maps show |I - I^| times this, cut at white: at 30 dB the mean error is 8 of 255."""


def load_tokenizer(source: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """LSTG of a whole checkpoint or of a stage-1 one, in eval mode, and its card. InputError where it does not fit."""
    tensors, config, card = read_checkpoint(source)
    own = {n.removeprefix("tokenizer."): t for n, t in tensors.items() if n.startswith("tokenizer.")}
    if config.tokenizer.shared_codebook:
        own |= {"quantizers.1." + n.removeprefix("quantizers.0."): t for n, t in own.items() if "quantizers.0." in n}
    tokenizer = Tokenizer(config.tokenizer)
    require_decoder(tokenizer)
    foreign.load_exactly(tokenizer, own, f"weights {source}")
    return tokenizer.eval(), card


def _phi(weights: str | Path, vgg16: Path | None, vgg16_input: Any) -> EncoderLevels | Vgg16 | None:
    """Phi of eq. 7; None where there is no network for it."""
    if vgg16 is not None:
        return load_vgg16(vgg16, vgg16_input, "--vgg16")
    if vgg16_input != "auto":
        raise InputError(f"--vgg16-input {vgg16_input}: is of a VGG16, and none is given; add --vgg16, or leave it out")
    if not any(name.startswith("image_encoder.") for name in read_checkpoint(weights)[0]):
        return None
    return EncoderLevels(load_network(weights)[0].image_encoder)


def error_map(image: Tensor, rebuilt: Tensor) -> Tensor:
    """Mean absolute error over the channels times ERROR_GAIN: (1,C,H,W) in [0,1] -> uint8 (1,H,W)."""
    error = ERROR_GAIN * (image - rebuilt).abs().mean(1)[0]
    return (error.clamp(0, 1) * 255).round().to(torch.uint8)[None]


def codes_map(codes: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """Codes (h,w,codebooks) as colours at the image's size, uint8 (height, width * codebooks, 3), side by side."""
    step = Tokenizer.STRIDE
    maps = [codes_picture(book.cpu().numpy()) for book in codes.unbind(-1)]
    return np.concatenate([m.repeat(step, 0).repeat(step, 1)[:height, :width] for m in maps], axis=1)


@torch.inference_mode()
def run(options: ReconstructOptions) -> dict[str, Any]:
    """Rebuild files or folders into `options.out`; returns what summary.json holds.

    For NAME.png and each modality NAME_visible.png (as it was read), NAME_visible_reconstruction.png,
    NAME_visible_error.png (ERROR_GAIN times the error) and NAME_visible_codes.png (a colour an entry; absent for
    continuous latents). The summary gives each modality's means over the images, usage and perplexity over all images
    together, and the figures of each image. `perceptual` is eq. 7 by `perceptual_by`: the VGG16 in the file `vgg16`, or
    the early features of the checkpoint's own image encoder; a checkpoint of stage 1 has none. Raises InputError as its
    parts do.
    """
    visible, infrared, out = options.visible, options.infrared, options.out
    weights, vgg16 = options.weights, options.vgg16
    entries = pairs_to_predict(visible, infrared)
    endings = [f"_{name}{kind}.png" for name in MODALITIES for kind in ("", "_reconstruction", "_error", "_codes")]
    folders = any(path is not None and path.is_dir() for path in (visible, infrared))
    require_apart(entries, out, endings, folders)
    inputs = {entry.id: _digest(entry) for entry in entries}
    earlier = _require_ours(out, inputs, endings)
    tokenizer, card = load_tokenizer(weights)
    where = choose_device(options.device)
    tokenizer = tokenizer.to(where)
    phi = _phi(weights, vgg16, options.vgg16_input)
    phi = None if phi is None else phi.to(where)
    size, bits = codebook_size(tokenizer), bits_per_pixel(tokenizer)
    # told before the first picture, so that a run that is killed can be started again over its own pictures
    begun = {**{entry.id: {} for entry in entries}, **earlier["images"]}
    write_json(out / SUMMARY, {**earlier, "unfinished": True, "inputs": inputs, "images": begun})
    images: dict[str, dict[str, Any]] = {}
    usage = {name: CodeUsage(size or 1) for name in MODALITIES}
    for entry in progress_bar(entries, desc="reconstruct", unit="pair", disable=len(entries) == 1):
        sample = read_sample(entry)
        images[entry.id] = {}
        for index, (name, array) in enumerate(zip(MODALITIES, (sample.visible, sample.infrared), strict=True)):
            if array is None:
                continue
            height, width = array.shape[1:]
            if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
                raise InputError(
                    f"{entry.id}: {name} is {height}x{width}, expected {SMALLEST} to {LARGEST} a side; resize it"
                )
            image = to_unit(array)[None].to(where)
            rebuilt, codes = rebuild(tokenizer, index, image)
            figures: dict[str, Any] = {
                "psnr": psnr(image, rebuilt),
                "ssim": structural_similarity(image, rebuilt),
            }
            if phi is not None:
                with torch.no_grad():
                    figures["perceptual"] = float(perceptual_distance(phi, image, rebuilt))
            prefix = f"{entry.id}_{name}"
            write_png(out / f"{prefix}.png", array)
            write_png(out / f"{prefix}_reconstruction.png", (rebuilt[0] * 255).round().to(torch.uint8))
            write_png(out / f"{prefix}_error.png", error_map(image, rebuilt))
            if codes is not None:
                write_png(out / f"{prefix}_codes.png", codes_map(codes[0], *sample.size))
                usage[name].update(codes)
                alone = CodeUsage(size or 1)
                alone.update(codes)
                figures |= {"codebook_usage": alone.usage, "perplexity": alone.perplexity, "bits_per_pixel": bits}
            images[entry.id][name] = {key: round(value, 4) for key, value in figures.items()}
    summary: dict[str, Any] = {
        "weights": Path(weights).name,
        "commit": card.get("commit", ""),
        "step": card.get("step"),
        "pairs": len(entries),
        "codebook_size": size,
    }
    if phi is not None:
        summary["perceptual_by"] = "vgg16" if vgg16 is not None else "image encoder"
    for name in MODALITIES:
        rows = [figures[name] for figures in images.values() if name in figures]
        if not rows:
            continue
        keys = [key for key in ("psnr", "ssim", "perceptual") if key in rows[0]]
        summary[name] = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in keys}
        if size is not None:
            summary[name] |= {"bits_per_pixel": bits, **usage[name].as_dict()}
    summary |= {"inputs": inputs, "images": images}
    write_json(out / SUMMARY, summary)
    return summary


def _digest(entry: Entry) -> str:
    """16 hex digits of a pair's files; InputError if they cannot be read."""
    found = hashlib.sha256()
    for path in (entry.visible, entry.infrared):
        try:
            found.update(b"-" if path is None else path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return found.hexdigest()[:16]


def _require_ours(out: Path, inputs: Mapping[str, str], endings: Sequence[str]) -> dict[str, Any]:
    """An earlier run's summary.json. InputError for one that somebody else wrote, for one of other images, whose
    figures would be lost, and for a picture of these names that it does not tell of."""
    folder = OutputFolder(out, "reconstruct")
    stored: Any = folder.read(SUMMARY)
    found: dict[str, Any] = {"images": {}, "pairs": 0} if stored is None else stored
    if not isinstance(found.get("images"), dict) or "pairs" not in found:
        folder.foreign(SUMMARY)
    digests = found.get("inputs")
    digests = digests if isinstance(digests, dict) else {}
    folder.require_none_lost(SUMMARY, "image", [id for id, figures in found["images"].items() if figures], inputs)
    for id, digest in inputs.items():
        name = f"files of {id}"
        told = Made({name: digests.get(id, digest)}) if id in found["images"] else None
        folder.state(SUMMARY, told, Made({name: digest}), [f"{id}{ending}" for ending in endings])
    return found
