"""Where an evaluation gets its predictions from: a checkpoint that looks at the pair, or a folder of label maps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.image_files import image_size
from fusionsam.data.predictions import Format, PredictionFolder
from fusionsam.data.transforms import to_unit
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.views import require_one_view
from fusionsam.models.prompts import oracle_prompts
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.types import FROM_TRUTH, InputError, JsonObject, LabelledSample, Output, PromptMode, Prompts, Sample


class Predicted(NamedTuple):
    """One image, all of it at the label's own size."""

    label: Tensor  # int64 (H,W)
    ids: NDArray[np.int64]  # (H,W)
    confidence: NDArray[np.float32] | None  # (H,W), probability of ids; None where nobody told it
    prompts: PromptMode | None  # what steered SAM, as the model's output says; None for a folder
    away: NDArray[np.bool_] | None = None  # (H,W), false where points that named their class painted it themselves
    own: NDArray[np.int64] | None = None  # (H,W), the ids without those points
    sample: LabelledSample | None = None  # the pair as it was read; None for a folder


REACH = 2 * Tokenizer.STRIDE
"""Pixels around a point that names a class beyond which steering gives no pixel that class by force: two latent cells,
at sizes that the network does not reduce."""


@dataclass
class NetworkPredictor:
    """Predicts with a checkpoint. Labels enter by `prompts` oracle and named alone."""

    model: FusionSAM
    prompts: Literal["self", "none", "oracle", "named"] | None = None
    """None = as the weights were configured."""
    modality: Literal["both", "visible", "infrared"] = "both"
    flip: bool = False
    scales: Sequence[float] = (1.0,)
    seed: int = 0
    """Of oracle prompts."""

    def __call__(self, data: LabelledPairs, index: int) -> Predicted:
        """Mean probabilities over scales and mirrored views. InputError if the pair lacks the wanted modality."""
        sample = data[index]
        images = self.images(sample)
        there = None if sample.covered is None else sample.covered[None]
        if self.prompts not in FROM_TRUTH:
            mode = self.prompts if self.prompts in ("self", "none") else None
            output = self.model.infer_views(images[0], images[1], None, mode, self.scales, self.flip, there)
            return self._predicted(sample, output)
        require_one_view(self.scales, self.flip)
        points, foreground = self.model.config.prompts.points or 10, list(data.row.foreground)
        prompts = oracle_prompts(
            sample.label[None], data.row.num_classes, foreground, points, self.seed * 1_000_003 + index,
            named=self.prompts == "named",
        )  # fmt: skip
        if prompts.points is None or prompts.point_classes is None:
            return self._predicted(sample, self.model.infer(images[0], images[1], prompts, covered=there))
        return self._named(sample, images, prompts, there)

    def _named(
        self, sample: LabelledSample, images: Sequence[Tensor | None], prompts: Prompts, covered: Tensor | None
    ) -> Predicted:
        # what names no class stays in the class map without points, or it would count as the points' work
        output, own = self.model.infer_named(images[0], images[1], prompts, covered)
        height, width = sample.label.shape
        factor = max(height, width) / self.model.config.max_side
        reach = REACH if factor <= 1 else math.ceil((REACH + 1) * factor)  # resizing back takes in one pixel more
        assert prompts.points is not None
        assert prompts.point_classes is not None
        away = away_from(prompts.points[0][prompts.point_classes[0] >= 0], (height, width), reach)
        return self._predicted(sample, output)._replace(away=away, own=own[0].argmax(0).cpu().numpy())

    def _predicted(self, sample: LabelledSample, output: Output) -> Predicted:
        confidence, ids = (output.logits.float() / self.model.temperature).softmax(1)[0].max(0)
        found = (ids.cpu().numpy(), confidence.cpu().numpy())
        return Predicted(sample.label, *found, output.prompts.source, sample=sample)

    def images(self, sample: Sample) -> list[Tensor | None]:
        """Visible (1,3,H,W) and infrared (1,1,H,W) in [0,1] as the network sees them; InputError if neither is left."""
        visible = None if self.modality == "infrared" else sample.visible
        infrared = None if self.modality == "visible" else sample.infrared
        if visible is None and infrared is None:
            raise InputError(f"{sample.id}: has no {self.modality} image, but --modality {self.modality} asks for it")
        return [None if image is None else to_unit(image)[None] for image in (visible, infrared)]

    def describe(self) -> JsonObject:
        """What the report says of the weights, from their card."""
        keys = ("name", "version", "commit", "command", "seed", "step", "hours", "val", "class_offsets", "config")
        known = {key: self.model.card[key] for key in keys if key in self.model.card}
        if offsets := known.get("class_offsets"):
            known["class_offsets"] = {key: value for key, value in offsets.items() if key != "content"}
        # JSON has no infinity, which some settings may be
        known = json.loads(json.dumps(known), parse_constant=str)
        return {"weights_card": {"preset": self.model.config.preset, **known}, "prediction_format": None}


def away_from(points: Tensor, size: tuple[int, int], reach: int) -> NDArray[np.bool_]:
    """Bool `size` (H,W): false up to `reach` pixels beside, above and below each point (P,2), x and y in pixels."""
    away = np.ones(size, bool)
    for x, y in points.round().long().tolist():
        away[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = False
    return away


class FolderPredictor:
    """Reads label maps that somebody else predicted.

    Raises InputError for missing or extra files (unless `allow_partial`) and for sizes other than the labels'."""

    def __init__(
        self,
        folder: str | Path,
        data: LabelledPairs,
        format: Format | Literal["auto"] = "auto",
        allow_partial: bool = False,
    ) -> None:
        ids = [entry.id for entry in data.entries]
        self.prompts: PromptMode | None = "oracle" if _drawn_from_truth(Path(folder)) else None
        self.folder = PredictionFolder(folder, ids, data.row.palette, format)
        for kind, names in (("missing", self.folder.missing), ("not in the split", self.folder.extra)):
            if names and not allow_partial:
                raise InputError(
                    f"{folder}: {len(names)} predictions {kind} (first: {', '.join(names[:5])}), the split has "
                    f"{len(ids)} images; complete the folder or give --allow-partial"
                )
        for entry in data.entries:
            assert entry.label is not None
            if entry.id in self.folder.paths and self.folder.size(entry.id) != (size := image_size(entry.label)):
                found, wanted = "x".join(map(str, self.folder.size(entry.id))), "x".join(map(str, size))
                raise InputError(
                    f"{self.folder.paths[entry.id]}: {found}, its label is {wanted} (height x width); predict at the "
                    "label's size"
                )

    def __call__(self, data: LabelledPairs, index: int) -> Predicted:
        """The stored ids of one image; the pair itself is not decoded."""
        label = data.label(index)
        return Predicted(label, self.folder[data.entries[index].id].numpy(), None, self.prompts)

    def describe(self) -> JsonObject:
        """What the report says of the folder."""
        return {
            "weights_card": None,
            "predictions": str(self.folder.folder),
            "prediction_format": self.folder.format,
            "missing": len(self.folder.missing),
            "extra": len(self.folder.extra),
            "missing_ids": self.folder.missing,
            "extra_files": self.folder.extra,
        }


def _drawn_from_truth(folder: Path) -> bool:
    """Whether `fusionsam baselines --prompts oracle` made these label maps: it says so in the file beside them."""
    beside = folder.resolve().parent / "settings.json"  # the parent of "." is "." again
    try:
        return json.loads(beside.read_text(encoding="utf-8")).get("prompts") == "oracle"
    except (OSError, ValueError, AttributeError):
        return False
