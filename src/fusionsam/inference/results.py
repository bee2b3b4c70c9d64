"""What one pair's results are: what was asked for, pictures and JSON; the same for files, folders and tables."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fusionsam.alignment.apply import Aligner
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.splits import Entry
from fusionsam.inference import onnx as backends
from fusionsam.inference.device import slower
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode, given_prompts, prompts_file, read_prompts
from fusionsam.inference.render import confidence_map
from fusionsam.io import say
from fusionsam.types import IGNORE, InputError, JsonObject, Prompts, Sample, told_of
from fusionsam.weights.checkpoint import WEIGHTS, calibrated_digest, config_file, locate

RESULTS = ("fused.png", "labels.png", "overlay.png", "confidence.png")
SOURCES = ("visible", "infrared", "rgbt")


@dataclass(frozen=True)
class Request:
    """What is asked of every pair of a run."""

    options: PredictOptions
    reading: InfraredOptions
    aligner: Aligner | None
    settings: JsonObject
    """What decides the results: plain JSON, the digests of weights, calibration, prompts and rig among it."""
    described: JsonObject
    """The weights in words."""

    def head(self, id: str, sources: JsonObject, sample: Sample) -> JsonObject:
        """How a pair's JSON begins."""
        head: JsonObject = {"name": id, **self.described, "run": {**self.settings, **sources}}
        if sample.alignment:
            head["alignment"] = sample.alignment
        if told := told_of(sample.input, sample.notices, options=True):
            head["input"] = told
        return head


def open_model(options: PredictOptions) -> FusionSAM:
    """The model that the options name."""
    model = FusionSAM.from_pretrained(
        options.weights,
        options.device,
        options.backend,
        calibrated=not options.as_trained,
        precision=options.precision,
    )
    if line := slower(model.precision, model.device):
        say(line)
    return model


def describe(options: PredictOptions, model: FusionSAM, aligner: Aligner | None) -> Request:
    """The request of a run with `model`. InputError for options that cannot be read."""
    clicks = prompts_file(options.prompts)
    reading = InfraredOptions.typed(options.infrared_range, options.polarity, options.palette)
    mode = options.prompts or model.config.prompts.mode
    steered = mode if clicks is None else hashlib.sha256(clicks.read_bytes()).hexdigest()
    scales, flip = options.scales, options.flip
    settings: JsonObject = {
        "weights": fingerprint(options.weights, options.backend),
        "calibrated": calibrated_digest(model.card),
        "prompts": steered + "+confidence" * options.confidence_map,
        **({"precision": options.precision} if options.precision != "fp32" else {}),
        **({"min_confidence": options.min_confidence} if options.min_confidence else {}),
        **({"align": [aligner.rig.digest, options.frame, not options.no_refine]} if aligner else {}),
        **({"scales": list(scales), "flip": flip} if flip or len(scales) > 1 else {}),
        **reading.to_dict(),
        **({"celsius": True} if options.celsius else {}),
    }
    described = {"weights": model.name, "commit": model.card.get("commit", ""), "step": model.card.get("step")}
    return Request(options, reading, aligner, settings, described)


def fingerprint(weights: str, backend: str) -> str:
    """SHA-256 of the files of the weights: names and steps may agree."""
    if backend == "onnx":
        files = backends.files(weights)
    else:
        folder = locate(weights)
        files = [folder / WEIGHTS, config_file(folder)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def made_with(model: FusionSAM) -> JsonObject:
    """What the labels of a model depend on, beside the pair: names do not tell, for the last folder of every training
    is called alike. A network in memory has no files, and is never taken for another."""
    weights = secrets.token_hex(8) if model.folder is None else fingerprint(str(model.folder), "torch")
    return {"weights": weights, "calibrated": calibrated_digest(model.card)}


def identity(path: Path | None) -> list[object] | None:
    """Path, size and time of a file, by which a replaced input is known. InputError where there is none."""
    if path is None:
        return None
    try:
        facts = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def sources_of(entry: Entry) -> JsonObject:
    """`identity` of each file of an entry: an unchanged one is not read twice."""
    found: JsonObject = {key: identity(getattr(entry, key)) for key in SOURCES}
    return found if entry.radiometric is None else {**found, "radiometric": identity(entry.radiometric)}


def predict_alike(model: FusionSAM, samples: Sequence[Sample], options: PredictOptions) -> list[Prediction]:
    """Predictions of pairs of one size, of which all have the same cameras and masks, in one forward pass."""
    clicks = prompts_file(options.prompts)
    first = samples[0]
    steer: Prompts | Mode | str | None = options.prompts
    if clicks is not None:
        assert len(samples) == 1
        steer = read_prompts(clicks, first.id, first.size, model.config.classes)
    ready = [model.preprocess(sample.visible, sample.infrared) for sample in samples]
    visible, infrared = (
        None if images[0] is None else torch.cat([image for image in images if image is not None])
        for images in zip(*ready, strict=True)
    )
    covered = torch.stack([sample.covered for sample in samples if sample.covered is not None]) if (
        first.covered is not None
    ) else None  # fmt: skip
    own, mode = given_prompts(steer, first.size, model.config.classes)  # type: ignore[arg-type]
    output = model.infer_views(visible, infrared, own, mode, options.scales, options.flip, covered)
    return [model.postprocess(output, row=row) for row in range(len(samples))]


def masked(prediction: Prediction, min_confidence: float) -> tuple[Prediction, JsonObject]:
    """The prediction with 255 in place of labels below `min_confidence`, and what its JSON tells of that: masked before
    it is drawn, the overlay shows what a training would be taught."""
    if not min_confidence:
        return prediction, {}
    unknown = prediction.confidence < min_confidence
    labels = np.where(unknown, np.uint8(IGNORE), prediction.labels)
    return replace(prediction, labels=labels), {"unknown_share": round(100 * float(unknown.mean()), 4)}


def pictures(prediction: Prediction, with_confidence: bool) -> dict[str, bytes]:
    """Ending of the file -> PNG. A person's own clicks belong in the overlay; the model's own would only cover it
    (they are in the JSON)."""
    found = {
        "fused.png": prediction.fused,
        "labels.png": prediction.labels,
        "overlay.png": np.asarray(prediction.overlay(show_prompts=prediction.prompts.source == "user")),
    }
    if with_confidence:
        found["confidence.png"] = confidence_map(prediction.confidence)
    return {ending: _png(picture) for ending, picture in found.items()}


def _png(picture: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(data, format="PNG")
    return data.getvalue()
