"""From counts to scores, and from the reports of several checkpoints to their mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusionsam.config.options import BootstrapOptions
from fusionsam.evaluation.comparison import by_sequence
from fusionsam.evaluation.report import Report, Scores
from fusionsam.evaluation.report_parts import (
    AwayScore,
    ByClass,
    CheckpointScore,
    Interval,
    ProtocolScore,
    SequenceScore,
    TimeScore,
)
from fusionsam.metrics.boundary import BoundaryScore
from fusionsam.metrics.segmentation import (
    PROTOCOLS,
    CalibrationError,
    ConfusionMatrix,
    ImageMatrices,
    accuracy,
    bootstrap_miou,
    f1,
    headline,
    id_pair,
    iou,
    pixel_accuracy,
    plain,
    protocols_of,
)
from fusionsam.types import IGNORE

TIMES = {"day": "D", "night": "N"}
"""What the ids of MFNet, and of MSRS, which was made from it, end in."""


class Tally:
    """All counts of one evaluation, added image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.confusion = ConfusionMatrix(len(self.classes))
        self.images = ImageMatrices(len(self.classes))
        self.boundary = BoundaryScore(len(self.classes))
        self.calibration: CalibrationError | None = None
        self.away = ConfusionMatrix(len(self.classes))
        self.away_without = ConfusionMatrix(len(self.classes))

    def update(
        self, image_id: str, prediction: ArrayLike, label: ArrayLike, confidence: ArrayLike | None = None
    ) -> None:
        """Add one image: ids (H,W), ids (H,W) with 255 = ignore, probability of the predicted class (H,W) or None.

        Raises InputError for differing sizes, strange ids, or an id added twice."""
        prediction, label = id_pair(prediction, label)
        self.images.add(image_id, self.confusion.update(prediction, label))
        self.boundary.update(prediction, label)
        if confidence is not None:
            self.calibration = self.calibration or CalibrationError()
            self.calibration.update(confidence, prediction, label)

    def update_away(self, ids: ArrayLike, own: ArrayLike, label: ArrayLike, away: NDArray[np.bool_]) -> None:
        """Count the pixels `away` (bool (H,W)) from named points, in the ids (H,W) with them and the `own` without."""
        scored = np.where(away, np.asarray(label), IGNORE)
        self.away.update(ids, scored)
        self.away_without.update(own, scored)


def _named(classes: Sequence[str], ratios: ArrayLike) -> ByClass:
    """Class -> percent, None where undefined."""
    return dict(zip(classes, plain(100 * np.asarray(ratios, np.float64)), strict=True))


def _number(value: float) -> float | None:
    return plain([value])[0]


def interval_of(stack: NDArray[np.integer], protocol: str, draws: int, seed: int) -> Interval | None:
    """95 % bootstrap interval, in percent, of the matrices (n,K,K) of images or sequences; None without draws, and of
    fewer than two, whose resamples are all alike."""
    return plain(bootstrap_miou(stack, protocol, draws, seed)) if draws and len(stack) > 1 else None


def scores(
    tally: Tally,
    dataset: str,
    draws: int = BootstrapOptions.bootstrap,
    seed: int = BootstrapOptions.seed,
    sequences: Mapping[str, str] | None = None,
) -> Scores:
    """Everything that follows from the counts.

    Args:
        tally: The counts.
        dataset: Name of the data set, which decides on day and night, and with the classes on protocols.
        draws: Resamples of the bootstrap; 0 = no interval.
        seed: Of the bootstrap.
        sequences: Image id -> recording sequence, for the interval over sequences.
    """
    matrix, classes = tally.confusion.matrix, tally.classes
    protocol = headline(dataset, classes, matrix.sum(1) > 0)
    protocols = {}
    for name in protocols_of(dataset, classes):
        score = PROTOCOLS[name](matrix)
        protocols[name] = ProtocolScore(_number(score.miou), [classes[i] for i in score.classes])
    return Scores(
        miou=protocols[protocol].miou,
        protocol=protocol,
        protocols=protocols,
        interval=interval_of(tally.images.dense(), protocol, draws, seed),
        by_sequence=_sequence_score(tally, protocol, draws, seed, sequences),
        bootstrap={"draws": draws, "seed": seed},
        n_images=len(tally.images.ids),
        classes=list(classes),
        per_class_iou=_named(classes, iou(matrix)),
        per_class_accuracy=_named(classes, accuracy(matrix)),
        per_class_f1=_named(classes, f1(matrix)),
        per_class_boundary_f=_named(classes, tally.boundary.f_score()),
        pixel_accuracy=_number(100 * pixel_accuracy(matrix)),
        boundary_f=_number(100 * tally.boundary.mean()),
        ece=None if tally.calibration is None else _number(100 * tally.calibration.value()),
        confusion_matrix=matrix.tolist(),
        by_time=_by_time(tally, draws, seed) if dataset in ("mfnet", "msrs") else None,
        away=_away_score(tally),
    )


def _away_score(tally: Tally) -> AwayScore | None:
    """None where no point named a class."""
    found, own = tally.away.matrix, tally.away_without.matrix
    if not found.any():
        return None
    mean, mean_own = (_number(PROTOCOLS["present"](matrix).miou) for matrix in (found, own))
    iou_found, iou_own = (_named(tally.classes, iou(matrix)) for matrix in (found, own))
    share = _number(100 * found.sum() / tally.confusion.matrix.sum())
    return AwayScore(share, mean, iou_found, mean_own, iou_own)


def _sequence_score(
    tally: Tally, protocol: str, draws: int, seed: int, sequences: Mapping[str, str] | None
) -> SequenceScore | None:
    """None where an image has no sequence."""
    ids = tally.images.ids
    if not ids or sequences is None or not all(i in sequences for i in ids):
        return None
    stack = by_sequence(tally.images.dense(), [sequences[i] for i in ids])
    return SequenceScore(len(stack), interval_of(stack, protocol, draws, seed))


def _by_time(tally: Tally, draws: int, seed: int) -> dict[str, TimeScore]:
    found = {}
    for name, letter in TIMES.items():
        ids = [i for i in tally.images.ids if i.removesuffix("_flip").endswith(letter)]
        if ids:
            matrices = tally.images.dense(ids)
            matrix = matrices.sum(0, dtype=np.int64)
            score = PROTOCOLS["present"](matrix)
            found[name] = TimeScore(
                n_images=len(ids),
                miou=_number(score.miou),
                interval=interval_of(matrices, "present", draws, seed),
                per_class_iou=_named(tally.classes, iou(matrix)),
                classes=[tally.classes[i] for i in score.classes],
            )
    return found


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample deviation of what is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def _mean_by_class(parts: Sequence[ByClass], classes: Sequence[str]) -> tuple[ByClass, ByClass]:
    """Mean and sample deviation of each class."""
    both = {name: _mean([part[name] for part in parts]) for name in classes}
    return {name: mean for name, (mean, _) in both.items()}, {name: dev for name, (_, dev) in both.items()}


def summarise(many: Sequence[Report]) -> Report:
    """One report over several checkpoints on the same images: the mean of each score, its sample deviation, the sum of
    the matrices, and each checkpoint's own figures under `checkpoints`. The title is the first one's."""
    found = copy.deepcopy(many[0])
    classes = found.classes
    for key in ("miou", "pixel_accuracy", "boundary_f", "ece"):
        mean, deviation = _mean([getattr(one, key) for one in many])
        setattr(found, key, mean)
        setattr(found, f"{key}_deviation", deviation)
    for key in ("per_class_iou", "per_class_accuracy", "per_class_f1", "per_class_boundary_f"):
        means, deviations = _mean_by_class([getattr(one, key) for one in many], classes)
        setattr(found, key, means)
        setattr(found, f"{key}_deviation", deviations)
    for name, score in found.protocols.items():
        score.miou = _mean([one.protocols[name].miou for one in many])[0]
    for name, part in (found.by_time or {}).items():
        parts = [(one.by_time or {})[name] for one in many]
        part.miou, part.interval = _mean([each.miou for each in parts])[0], None
        part.per_class_iou = _mean_by_class([each.per_class_iou for each in parts], classes)[0]
    found.away = _mean_away([one.away for one in many if one.away is not None], classes)
    found.confusion_matrix = np.sum([one.confusion_matrix for one in many], axis=0).tolist()
    found.seconds, found.seconds_counting = (
        sum(getattr(one, key) for one in many) for key in ("seconds", "seconds_counting")
    )
    # what holds for one of them holds for the mean
    found.notes = list(dict.fromkeys(note for one in many for note in one.notes))
    found.fitted = {key: max(one.fitted[key] for one in many) for key in found.fitted}
    prompts = {one.prompts for one in many}
    found.prompts = prompts.pop() if len(prompts) == 1 else "mixed"
    found.interval = found.by_sequence = found.weights_card = found.weights_sha256 = found.per_image = None
    found.weights = [str(one.weights) for one in many]
    found.checkpoints = [_checkpoint(one) for one in many]
    return found


def _mean_away(parts: Sequence[AwayScore], classes: Sequence[str]) -> AwayScore | None:
    if not parts:
        return None
    share, miou, without = (_mean([getattr(one, key) for one in parts])[0] for key in ("share", "miou", "miou_without"))
    found, own = (
        _mean_by_class([getattr(one, key) for one in parts], classes)[0]
        for key in ("per_class_iou", "per_class_iou_without")
    )
    return AwayScore(share, miou, found, without, own)


def _checkpoint(one: Report) -> CheckpointScore:
    weights = None if one.weights is None else str(one.weights)
    return CheckpointScore(
        weights, one.weights_card, one.weights_sha256, one.prompts, one.miou, one.interval, one.per_class_iou,
        one.fitted,
    )  # fmt: skip
