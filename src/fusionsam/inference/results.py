"""What one pair's results are: what was asked for, pictures and JSON; the same for files, folders and tables."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.maker import MAKER, MATRIX
from fusionsam.data.dataset import read_sample
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.radiometric import read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.inference import onnx as backends
from fusionsam.inference.celsius import celsius_tiff, class_temperatures
from fusionsam.inference.device import slower
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode, given_prompts, prompts_file, read_prompts, require_clicks
from fusionsam.inference.render import confidence_map
from fusionsam.inference.views import require_one_as_it_is, require_one_view, require_scales
from fusionsam.io import say
from fusionsam.models.network import UNTAUGHT
from fusionsam.types import IGNORE, InputError, JsonObject, Notice, Prompts, Sample, told_of
from fusionsam.weights.checkpoint import WEIGHTS, calibrated_digest, config_file, locate

CONFIDENCE, CELSIUS, RECORD = "_confidence.png", "_celsius.tif", ".json"
ENDINGS = ("_fused.png", "_labels.png", "_overlay.png", CONFIDENCE, CELSIUS, RECORD)
"""How the names of a pair's results end: with the pair's id before them the whole names."""
SOURCES = ("visible", "infrared", "rgbt", "radiometric")


UNALIGNED = Notice(
    "not aligned",
    "the rig was not used: of a picture that stands alone, and of a radiometric file, whose maker aligned it, the "
    "results are in the picture's own frame",
)


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

    def read(self, entry: Entry) -> Read:
        """The pictures of a pair. InputError where they cannot be read."""
        sample = read_sample(entry, align=self.aligner, reading=self.reading)
        celsius = None if entry.radiometric is None else read_radiometric(entry.radiometric).celsius()
        if self.aligner is not None and not sample.alignment:
            sample.notices.append(UNALIGNED)
            sample.alignment["applied"] = False
        if self.options.backend == "onnx" and sample.covered is not None and not bool(sample.covered.all()):
            sample.notices.append(backends.FILLED)
            sample.alignment["filled"] = True
        return Read(entry.id, sample, celsius, radiometric=entry.radiometric is not None)

    def results(self, read: Read, sources: JsonObject, prediction: Prediction) -> Results:
        """The files of a pair, made of `sources`, as `predict` writes them."""
        sample, options = read.sample, self.options
        told: JsonObject = {"name": read.id, **self.described, "run": {**self.settings, **sources}}
        if sample.alignment:
            told["alignment"] = sample.alignment
        if found := told_of(sample.input, sample.notices, options=True):
            told["input"] = found
        prediction, unknown = masked(prediction, options.min_confidence)  # before anything is derived
        files = pictures(prediction, options.confidence_map)
        if read.radiometric:
            moved = sample.alignment.get(MATRIX)
            told["celsius"] = None if read.celsius is None else class_temperatures(read.celsius, prediction, moved)
            if options.celsius and read.celsius is not None:
                files[CELSIUS] = celsius_tiff(read.celsius)
        return Results(prediction, files, {**told, **unknown, **prediction.summary()})


@dataclass(frozen=True)
class Read:
    """A pair as it was read."""

    id: str
    sample: Sample
    celsius: NDArray[np.float32] | None
    """Of a radiometric file that holds the constants."""
    radiometric: bool


@dataclass(frozen=True)
class Results:
    """What is written of a pair."""

    prediction: Prediction
    """Without the labels that are not certain enough."""
    files: dict[str, bytes]
    """Ending of the name -> content, the JSON aside."""
    told: JsonObject
    """NAME.json."""


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


def require_possible(options: PredictOptions, radiometric: bool) -> None:
    """InputError for options with which no pair can be done. `radiometric`: whether a file is."""
    require_one_as_it_is(options.scales)
    require_scales(options.scales)
    if prompts_file(options.prompts) is not None:
        require_one_view(options.scales, options.flip)
    if options.align == MAKER and not radiometric:
        raise InputError("--align maker: is for radiometric files, and none was given; give a rig.json, or auto")


def describe(options: PredictOptions, model: FusionSAM, aligner: Aligner | None, ids: Collection[str]) -> Request:
    """The request of a run with `model` on the pairs `ids`. InputError for options that cannot be read, or are not for
    this model."""
    clicks = prompts_file(options.prompts)
    if clicks is not None:
        untaught = backends.UNTAUGHT if options.backend == "onnx" else UNTAUGHT
        require_clicks(clicks, ids, model.config.classes, None if model.network.steering is not None else untaught)
    reading = InfraredOptions.typed(options.infrared_range, options.polarity, options.palette)
    mode = options.prompts or model.config.prompts.mode
    steered = mode if clicks is None else hashlib.sha256(clicks.read_bytes()).hexdigest()
    scales, flip = options.scales, options.flip
    settings: JsonObject = {
        "weights": fingerprint(options.weights, options.backend),
        "calibrated": calibrated_digest(model.card),
        "prompts": steered,
        **({"confidence_map": True} if options.confidence_map else {}),
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
    return {key: identity(getattr(entry, key)) for key in SOURCES}


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
    it is drawn, the overlay shows what a training would be taught. What a person named stays."""
    if not min_confidence:
        return prediction, {}
    unknown = prediction.confidence < min_confidence
    prompts = prediction.prompts
    if prompts.points is not None and prompts.point_classes is not None:
        height, width = unknown.shape
        x, y = prompts.points[0][prompts.point_classes[0] >= 0].round().long().unbind(-1)
        unknown[y.clamp(0, height - 1).numpy(), x.clamp(0, width - 1).numpy()] = False
    labels = np.where(unknown, np.uint8(IGNORE), prediction.labels)
    return replace(prediction, labels=labels), {"unknown_share": round(100 * float(unknown.mean()), 4)}


def pictures(prediction: Prediction, with_confidence: bool) -> dict[str, bytes]:
    """Ending of the name -> PNG. A person's own clicks belong in the overlay; the model's own would only cover it
    (they are in the JSON)."""
    found = {
        "_fused.png": prediction.fused,
        "_labels.png": prediction.labels,
        "_overlay.png": np.asarray(prediction.overlay(show_prompts=prediction.prompts.source == "user")),
    }
    if with_confidence:
        found[CONFIDENCE] = confidence_map(prediction.confidence)
    return {ending: _png(picture) for ending, picture in found.items()}


def _png(picture: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(data, format="PNG")
    return data.getvalue()
