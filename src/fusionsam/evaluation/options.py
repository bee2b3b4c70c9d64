"""The options of what scores a model. No torch: `--help` is made from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fusionsam.config.options import (
    AlignOptions,
    BootstrapOptions,
    CommandLine,
    DataOptions,
    DeviceOption,
    LabelOptions,
    OutOption,
    PairOptions,
    PrecisionOption,
    WeightsOption,
)

CONDITION_NAMES = (
    "full", "visible only", "infrared only", "infrared shifted 2 px", "infrared shifted 4 px", "infrared shifted 8 px",
    "infrared shifted 16 px", "infrared shifted 8 px, realigned", "infrared shifted 16 px, realigned", "noise",
    "blur", "fog", "over-exposure", "under-exposure", "dead infrared frame", "objects half as large",
    "objects a third as large", "coarse infrared", "black-hot infrared", "infrared in the middle",
    "haze removed from infrared",
)  # fmt: skip
"""Names of the corruptions that `robustness` knows, in the order of its table; the first is the reference."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataOptions, LabelOptions, AlignOptions, PrecisionOption, BootstrapOptions, CommandLine):
    """What is evaluated, and how.

    >>> EvaluateConfig("mfnet", "data/mfnet", "val", weights=["tiny"]).bootstrap
    1000
    """

    weights: Sequence[str | Path] = ()
    """checkpoint folders or shipped names; several: mean and deviation"""
    predictions: Path | str | None = None
    """instead of --weights: folder of ID.png or ID_labels.png: class ids, or palette colours, RGB or BGR"""
    out: Path | str | None = None
    """folder for report.json and per_image.json; from Python, None writes nothing"""
    prompts: Literal["self", "none", "oracle", "named"] | None = None
    """as the weights were configured if left out; oracle: drawn from the ground truth; named: the same
    points, each of which names its class to steering (weights that have it), which paints the cells of the points"""
    as_trained: bool = False
    """without the offsets and temperature that calibrate stored"""
    modality: Literal["both", "visible", "infrared"] = "both"
    """what the model sees"""
    flip: bool = False
    """average with the mirrored pair; the report says so"""
    scales: Sequence[float] = (1.0,)
    """average over resized copies; the report says so"""
    seeds: bool = False
    """the weights are one configuration trained from different seeds; refused if the seeds they record repeat"""
    against: Path | str | None = field(default=None, metadata={"metavar": "REPORT.json"})
    """a report of the same split: is the difference real?"""
    allow_partial: bool = False
    """score a folder with missing or extra predictions"""
    allow_train_test_leak_and_know_that_scores_are_worthless: bool = False
    """score although pictures were trained on"""
    worst: int = 0
    """draw so many of the pairs with the lowest mIoU into OUT/worst"""
    train_split: str | None = None
    """split the leak guard compares with (left out: as recorded by the weights, or train); 'none': only with what the
    weights themselves remember, and the title says so"""
    predicted_by: Path | str | None = field(default=None, metadata={"metavar": "W"})
    """checkpoint that made --predictions: the leak guard asks it what it saw"""
    prediction_format: Literal["auto", "ids", "rgb", "bgr"] = "auto"
    """how --predictions are written; auto finds out"""


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions(
    DataOptions, AlignOptions, WeightsOption, OutOption, DeviceOption, BootstrapOptions, CommandLine
):
    """Score a model on pairs of which a camera is missing, displaced or disturbed. Writes robustness.json, .md, .tex
    and .csv into --out."""

    conditions: Sequence[str] = field(default=CONDITION_NAMES, metadata={"metavar": "NAME"})
    """which of the conditions"""
    against: Sequence[str] = field(default=(), metadata={"metavar": "DIR"})
    """such folders of other models, as further columns"""
    as_trained: bool = False
    """without the offsets that calibrate stored"""
    prompts: Literal["self", "none"] | None = None
    """as the weights were configured if left out"""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(DataOptions, LabelOptions, AlignOptions, DeviceOption, CommandLine):
    """Fit a temperature that makes confidences mean something, on a --split of pairs that were not trained on and will
    not be reported on."""

    weights: str
    """checkpoint folder; its training.json receives the temperature"""
    class_offsets: bool = False
    """before that, fit what to add to each class's logits for the best mIoU, in the place of stored offsets; changes
    the class maps; none are kept if those of other pairs gain nothing"""
    dry_run: bool = False
    """print, and leave the checkpoint as it is"""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(DataOptions, OutOption, WeightsOption, DeviceOption, BootstrapOptions, CommandLine):
    """Score an unmodified Segment Anything (the paper's Table 4). Writes predictions/ and a report into --out; label
    maps that are finished there are kept. --weights draw the fused picture and, with prompts self, points, box and
    classes."""

    sam: str
    """SamModel or Sam2Model (folder or hub name), or a SAM or MobileSAM file"""
    image: Literal["visible", "infrared", "fused"] = "fused"
    """what SAM sees"""
    prompts: Literal["self", "oracle"] = "self"
    """self: our network's points, box and classes; oracle: from the ground truth, an upper bound"""
    points: int = 10
    """drawn of each class with oracle; self takes what the weights are configured for"""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class FusionMetricsOptions(AlignOptions, OutOption, DeviceOption, CommandLine):
    """Score fused pictures by eleven measures. Writes fusion_metrics.csv, fusion_metrics.json and, with the command,
    fusion_metrics_run.json into --out."""

    visible: Path
    """folder of visible images"""
    infrared: Path
    """folder of infrared images of the same names"""
    fused: Sequence[Path] = ()
    """folders of fused pictures, NAME.png or NAME_fused.png"""
    weights: Sequence[str] = ()
    """checkpoint folders or shipped names whose fusion is measured"""
    baselines: bool = True
    """the built-in fusions beside them: average, maximum, laplacian_pyramid, guided_filter"""
    labels: Path | None = None
    """folder of label maps (PNG of ids) of the same names: also measure how much the objects of --label-id stand out"""
    label_id: int | None = None
    """the id of the objects, such as 2 for MFNet's person"""
    workers: int = field(default_factory=cores)
    """processes that measure; networks run in the parent"""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(PairOptions, OutOption, WeightsOption, DeviceOption):
    """Show what the tokenizer keeps of a pair, by --weights of stage 1 or whole. Writes pictures and summary.json into
    --out."""

    vgg16: Path | None = None
    """VGG16 features (.safetensors) for the perceptual distance (left out: the checkpoint's image encoder)"""
    vgg16_input: Literal["auto", "imagenet", "caffe"] = "auto"
    """what that VGG16 expects: RGB by ImageNet's mean, or Caffe's BGR; auto: as the file says"""
