"""The network as ONNX files that have proved themselves equal to it in ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusionsam.export.graphs import DecoderHalf, EncoderHalf, Whole, scenes, write_onnx
from fusionsam.inference.onnx import (
    DECODER,
    ENCODER,
    WHOLE,
    WHOLE_INT8,
    Arrays,
    OnnxNetwork,
    metadata,
    open_session,
    run_session,
    runtime,
)
from fusionsam.io import scratch
from fusionsam.models.geometry import fit
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.tokenizer import Quantizer
from fusionsam.types import SMALLEST, VERSION, Array, InputError, JsonObject
from fusionsam.weights.checkpoint import WEIGHTS, calibrated_digest, load_network, locate

LOGITS, PIXELS = 1e-3, 1e-3
"""An exported file may differ from PyTorch by no more than this in any logit or colour, and in no larger share of
pixels' classes."""
SIZES = ((128, 96), (107, 149))  # one a multiple of everything, one of nothing; one upright, one not
BATCHES = (1, 2)
DRAWN = 32  # scenes to choose from
FIXED_SIZE = "fusionsam_{}x{}.onnx"
"""The file for one size, height first (`export.fixed`)."""


def write(network: FusionSAMNetwork, out: Path, facts: JsonObject | None = None) -> list[JsonObject]:
    """fusionsam.onnx, encoder.onnx and decoder.onnx in `out`, each under its name only after it has been compared with
    `network` in ONNX Runtime; returns the comparisons. `facts` (name, weights, card) go into the files' metadata.

    InputError if a file differs by more than the limits, if ONNX Runtime refuses it, or if `out` cannot be written.
    """
    about = {"fusionsam": json.dumps(describe(network, facts or {}))}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with scratch(out) as folder:
            for name, kind in ((WHOLE, Whole), (ENCODER, EncoderHalf), (DECODER, DecoderHalf)):
                write_onnx(kind(network), about, folder / name)
            found = compare(network, folder)
            for name in (WHOLE, ENCODER, DECODER):
                os.replace(folder / name, out / name)
            for path in (out / WHOLE_INT8, *out.glob(FIXED_SIZE.format("*", "*"))):
                _drop_stale(path, (facts or {}).get("weights", ""))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return found


def _drop_stale(path: Path, weights: str) -> None:
    """Remove a file of another export, of other weights, which would pass for one of these."""
    if path.is_file():
        try:
            kept = bool(weights) and metadata(open_session(path))["weights"] == weights
        except InputError:
            kept = False
        if not kept:
            path.unlink()


def describe(network: FusionSAMNetwork, facts: JsonObject) -> JsonObject:
    """What is written into each file: all that is needed to use it without this package."""
    config = asdict(network.config)
    return {
        "version": VERSION,
        "classes": config["classes"],
        "palette": config["palette"],
        "preprocessing": {
            "visible": "RGB, float32 in [0, 1] (8-bit values / 255), (batch, 3, height, width)",
            "infrared": "grey, float32 in [0, 1], (batch, 1, height, width), pixel-aligned with visible",
            "present": "bool (batch or 1, 2): visible there, infrared there; may be left out if both are; an absent "
            "image is fed as zeros",
            "smallest_side": SMALLEST,
            "largest_side": network.config.max_side,
            "padding": "inside the model",
        },
        "prompts": config["prompts"],
        "weights": facts.get("weights", ""),
        "name": facts.get("name", network.config.preset),
        "card": facts.get("card", {}),
        "config": config,
    }


def compare(network: FusionSAMNetwork, folder: Path) -> list[JsonObject]:
    """The files in `folder` against `network` at two sizes and two batches; the larger batch lacks one image of each
    kind. One row a file and case, as `difference` gives it. InputError for the first row beyond the limits."""
    drawn = {size: firm_scenes(network, size, max(BATCHES)) for size in SIZES}
    cases = [_case(network, drawn[size], batch) for size in SIZES for batch in BATCHES]
    rows = []
    # one file after the other: a session keeps the memory of its largest run for as long as it lives
    for name, open_file in ((WHOLE, _whole), (f"{ENCODER} + {DECODER}", _halves)):
        answer = open_file(folder)
        for arrays, wanted in cases:
            batch, _, *size = arrays["visible"].shape
            row = {"file": name, "size": size, "batch": batch, **difference(answer(arrays), wanted)}
            rows.append(row)
            _refuse_beyond_limits(row)
        del answer
    return rows


def _case(network: FusionSAMNetwork, drawn: tuple[Tensor, ...], batch: int) -> tuple[Arrays, Arrays]:
    """What goes in and what PyTorch makes of it."""
    visible, infrared, present = (part[:batch].clone() for part in drawn)
    if batch == max(BATCHES):
        present[-1, 1] = present[-2, 0] = False
        visible = visible * present[:, 0, None, None, None]
        infrared = infrared * present[:, 1, None, None, None]
    with torch.inference_mode():
        output = network(visible, infrared, present=present)
    arrays = {"visible": visible.numpy(), "infrared": infrared.numpy()}
    if not bool(present.all()):  # else the file's own default answers
        arrays["present"] = present.numpy()
    return arrays, {"fused": output.fused.numpy(), "logits": output.logits.numpy()}


def _whole(folder: Path) -> Callable[[Arrays], Arrays]:
    return partial(run_session, open_session(folder / WHOLE))


def _halves(folder: Path) -> Callable[[Arrays], Arrays]:
    network = OnnxNetwork(folder)

    def answer(arrays: Arrays) -> Arrays:
        output = network(**{name: torch.from_numpy(values) for name, values in arrays.items()})
        return {"fused": output.fused.numpy(), "logits": output.logits.numpy()}

    return answer


def firm_scenes(network: FusionSAMNetwork, size: tuple[int, int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of DRAWN scenes the `count` whose codes rounding errors decide least, as `export_graphs.scenes` gives them.

    A token equally far from two codes takes either, in PyTorch too when batch or threads change; the logits around it
    then differ far more than any error of the file would make them.
    """
    drawn = [scenes(size, 1, seed) for seed in range(DRAWN)]
    drawn.sort(key=lambda images: code_gap(network, *images[:2]), reverse=True)
    visible, infrared, present = (torch.cat(parts) for parts in zip(*drawn[:count], strict=True))
    return visible, infrared, present


@torch.inference_mode()
def code_gap(network: FusionSAMNetwork, visible: Tensor, infrared: Tensor) -> float:
    """The smallest gap between a token's nearest and second nearest code, as a share of their squared norms; infinite
    without codebooks. Images (B,3,H,W) and (B,1,H,W) in [0,1]."""
    smallest, tokenizer = float("inf"), network.tokenizer
    size = (visible.shape[2], visible.shape[3])
    for index, quantizer in enumerate(getattr(tokenizer, "quantizers", ())):
        if not isinstance(quantizer, Quantizer):
            continue
        z = tokenizer.encoders[index](fit((visible, infrared)[index], size, network.multiple))
        tokens = quantizer.vq.project_in(z.flatten(2).transpose(1, 2))
        for part, book in zip(tokens.split(quantizer.codebook.shape[2], dim=2), quantizer.codebook, strict=True):
            squares = book.square().sum(1) + part.square().sum(2, keepdim=True)
            nearest = (squares - 2 * part @ book.T).topk(2, dim=2, largest=False)
            gap = (nearest.values[..., 1] - nearest.values[..., 0]) / squares.gather(2, nearest.indices).amax(2)
            smallest = min(smallest, float(gap.min()))
    return smallest


def difference(found: dict[str, Array], wanted: dict[str, Array]) -> dict[str, float]:
    """Fused pictures (B,3,H,W) and logits (B,K,H,W): the largest differences, and the share of pixels (0..1) with
    another class. Infinite where shapes differ."""
    if any(found[name].shape != wanted[name].shape for name in wanted):
        return {"logits": float("inf"), "fused": float("inf"), "pixels": 1.0}
    largest = {name: float(np.abs(found[name] - wanted[name]).max()) for name in ("logits", "fused")}
    return {**largest, "pixels": float((found["logits"].argmax(1) != wanted["logits"].argmax(1)).mean())}


def _refuse_beyond_limits(row: JsonObject) -> None:
    if row["logits"] <= LOGITS and row["fused"] <= LOGITS and row["pixels"] <= PIXELS:  # not a number fails too
        return
    height, width = row["size"]
    raise InputError(
        f"{row['file']}: at {height}x{width}, batch {row['batch']}, it differs from PyTorch by {row['logits']:.2g} in "
        f"logits, {row['fused']:.2g} in the picture and in {row['pixels']:.3%} of the classes; the limits are "
        f"{LOGITS:g}, {LOGITS:g} and {PIXELS:.1%}, so no file was kept; use --backend torch"
    )


def export(weights: str, out: Path) -> list[JsonObject]:
    """The checkpoint `weights` as ONNX files in `out`; returns a row of figures for each comparison with PyTorch.

    Raises InputError as its parts do, and for a file that differs, which is not kept."""
    runtime()
    network, card = load_network(weights)
    identity = hashlib.sha256((locate(weights) / WEIGHTS).read_bytes())
    if card.get("class_offsets"):
        card["class_offsets"] = {"offsets": card["class_offsets"]["offsets"]}  # they are inside the files
        identity.update(calibrated_digest({"class_offsets": card["class_offsets"]}).encode())
    kept = {key: card[key] for key in ("commit", "step", "calibration", "class_offsets") if key in card}
    return write(network, out, {"name": card["name"], "weights": identity.hexdigest(), "card": kept})
