"""`fusionsam reconstruct`: what LSTG keeps of a pair, as pictures and figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.data.dataset import read_sample
from fusionsam.data.images import write_png
from fusionsam.data.splits import Entry
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation.options import ReconstructOptions
from fusionsam.inference.device import choose_device
from fusionsam.inference.files import require_apart
from fusionsam.inference.render import codes_picture
from fusionsam.inference.selection import every_pair
from fusionsam.io import Made, OutputFolder, progress_bar, write_json
from fusionsam.metrics.perceptual import EncoderLevels, PerceptualInput, Vgg16, load_vgg16, perceptual_distance
from fusionsam.metrics.reconstruction import MODALITIES, CodeUsage, psnr, structural_similarity
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.types import LARGEST, InputError, JsonObject, Sample
from fusionsam.weights import pretrained as foreign
from fusionsam.weights.checkpoint import Card, load_network, read_checkpoint

Figures = dict[str, float]
"""Name of a figure -> its value, of one picture."""

SUMMARY = "summary.json"
SMALLEST = 7
"""Pixels a side: the window of SSIM."""
ENDINGS = [f"_{name}{kind}.png" for name in MODALITIES for kind in ("", "_reconstruction", "_error", "_codes")]
"""Of a pair's pictures."""
ERROR_GAIN = 4
"""Error maps show |I - I^| times this, cut at white: at 30 dB the mean error is 8 of 255."""


def load_tokenizer(source: str | Path) -> tuple[Tokenizer, Card]:
    """LSTG of a whole checkpoint or of a stage-1 one, in eval mode, and its card. InputError where it does not fit."""
    tensors, config, card = read_checkpoint(source)
    own = {n.removeprefix("tokenizer."): t for n, t in tensors.items() if n.startswith("tokenizer.")}
    if config.tokenizer.shared_codebook:
        own |= {"quantizers.1." + n.removeprefix("quantizers.0."): t for n, t in own.items() if "quantizers.0." in n}
    tokenizer = Tokenizer(config.tokenizer)
    tokenizer.require_decoder()
    foreign.load_exactly(tokenizer, own, f"weights {source}")
    return tokenizer.eval(), card


def _phi(weights: str | Path, vgg16: Path | None, vgg16_input: PerceptualInput) -> EncoderLevels | Vgg16 | None:
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
def run(options: ReconstructOptions) -> JsonObject:
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
    entries = every_pair(visible, infrared)
    folders = any(path is not None and path.is_dir() for path in (visible, infrared))
    require_apart(entries, out, ENDINGS, folders)
    inputs = {entry.id: _digest(entry) for entry in entries}
    earlier = _require_ours(out, inputs, ENDINGS)
    rebuilder, card = Rebuilder.load(weights, options.device, vgg16, options.vgg16_input)
    # told before the first picture, so that a run that is killed can be started again over its own pictures
    begun = {**{entry.id: {} for entry in entries}, **earlier["images"]}
    write_json(out / SUMMARY, {**earlier, "unfinished": True, "inputs": inputs, "images": begun})
    images = {}
    for entry in progress_bar(entries, desc="reconstruct", unit="pair", disable=len(entries) == 1):
        images[entry.id] = rebuilder.rebuild(read_sample(entry), out)
    summary: JsonObject = {
        "weights": Path(weights).name,
        "commit": card.get("commit", ""),
        "step": card.get("step"),
        "pairs": len(entries),
        "codebook_size": rebuilder.size,
    }
    if rebuilder.phi is not None:
        summary["perceptual_by"] = "vgg16" if vgg16 is not None else "image encoder"
    summary |= rebuilder.summarise(list(images.values()))
    summary |= {"inputs": inputs, "images": images}
    write_json(out / SUMMARY, summary)
    return summary


class Rebuilder:
    """LSTG with what is counted over all pictures."""

    def __init__(self, tokenizer: Tokenizer, device: str, phi: EncoderLevels | Vgg16 | None) -> None:
        self.tokenizer, self.device = tokenizer.to(device), device
        self.phi = None if phi is None else phi.to(device)
        self.size, self.bits = tokenizer.codebook_size, tokenizer.bits_per_pixel
        self.usage = {name: CodeUsage(self.size or 1) for name in MODALITIES}

    @classmethod
    def load(
        cls, weights: str | Path, device: str, vgg16: Path | None, vgg16_input: PerceptualInput
    ) -> tuple[Rebuilder, Card]:
        """LSTG of a checkpoint, and its card. InputError where it does not fit."""
        tokenizer, card = load_tokenizer(weights)
        where = choose_device(device)
        return cls(tokenizer, where, _phi(weights, vgg16, vgg16_input)), card

    def rebuild(self, sample: Sample, out: Path) -> dict[str, Figures]:
        """Write the pictures of one pair; modality -> its figures. InputError for a size that cannot be rebuilt."""
        found = {}
        for index, (name, array) in enumerate(zip(MODALITIES, (sample.visible, sample.infrared), strict=True)):
            if array is None:
                continue
            height, width = array.shape[1:]
            if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
                raise InputError(
                    f"{sample.id}: {name} is {height}x{width}, expected {SMALLEST} to {LARGEST} a side; resize it"
                )
            write_png(out / f"{sample.id}_{name}.png", array)
            figures = self._one(index, to_unit(array)[None].to(self.device), out / f"{sample.id}_{name}")
            found[name] = {key: round(value, 4) for key, value in figures.items()}
        return found

    def _one(self, index: int, image: Tensor, stem: Path) -> Figures:
        """Write what one picture (1,C,H,W) in [0,1] was rebuilt to, its error and its codes; its figures."""
        rebuilt, codes = self.tokenizer.rebuild(index, image)
        figures = {"psnr": psnr(image, rebuilt), "ssim": structural_similarity(image, rebuilt)}
        if self.phi is not None:
            with torch.no_grad():
                figures["perceptual"] = float(perceptual_distance(self.phi, image, rebuilt))
        write_png(Path(f"{stem}_reconstruction.png"), (rebuilt[0] * 255).round().to(torch.uint8))
        write_png(Path(f"{stem}_error.png"), error_map(image, rebuilt))
        if codes is not None:
            write_png(Path(f"{stem}_codes.png"), codes_map(codes[0], image.shape[2], image.shape[3]))
            self.usage[MODALITIES[index]].update(codes)
            alone = CodeUsage(self.size or 1)
            alone.update(codes)
            figures |= {"codebook_usage": alone.usage, "perplexity": alone.perplexity}
            figures["bits_per_pixel"] = self.bits or 0.0
        return figures

    def summarise(self, images: Sequence[Mapping[str, Figures]]) -> JsonObject:
        """Modality -> means over the pictures, usage and perplexity over all of them together."""
        found: JsonObject = {}
        for name in MODALITIES:
            rows = [figures[name] for figures in images if name in figures]
            if not rows:
                continue
            keys = [key for key in ("psnr", "ssim", "perceptual") if key in rows[0]]
            means: JsonObject = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in keys}
            if self.size is not None:
                means |= {"bits_per_pixel": self.bits, **self.usage[name].as_dict()}
            found[name] = means
        return found


def _digest(entry: Entry) -> str:
    """16 hex digits of a pair's files; InputError if they cannot be read."""
    found = hashlib.sha256()
    for path in (entry.visible, entry.infrared):
        try:
            found.update(b"-" if path is None else path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return found.hexdigest()[:16]


def _require_ours(out: Path, inputs: Mapping[str, str], endings: Sequence[str]) -> JsonObject:
    """An earlier run's summary.json. InputError for one that somebody else wrote, for one of other images, whose
    figures would be lost, and for a picture of these names that it does not tell of."""
    folder = OutputFolder(out, "reconstruct")
    stored = folder.read(SUMMARY)
    found: JsonObject = {"images": {}, "pairs": 0} if stored is None else stored
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
