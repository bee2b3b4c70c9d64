"""Segmentation metrics, all of them streaming: counts are added image by image, scores are functions of the counts.

Rows of a confusion matrix are the truth, columns the prediction. Ratios (IoU, accuracy, F1, boundary F, calibration)
lie in [0, 1] and are NaN where undefined; only the mIoU of a named protocol is in percent, as papers print it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusionsam.types import InputError, JsonObject

Counts = NDArray[np.int64]
Ids = NDArray[np.integer]
"""Class ids of any width."""
Ratios = NDArray[np.float64]


def _ids(values: ArrayLike, name: str) -> Ids:
    """`values` as an integer (H,W) array; torch tensors on the CPU are taken without a copy."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{name}: found {found}, expected integer ids (H, W); take the argmax and drop the batch axis")
    return array


def narrow(ids: Ids) -> Ids:
    """Ids as uint8 if all lie in 0..255, else as they are. Ids mostly come as int64, and reading eight bytes a pixel
    again and again was most of the time that counting took."""
    if ids.dtype == np.uint8 or not ids.size:
        return ids
    # read as unsigned, negative ids are the largest, above all that the type can hold
    largest = min(255, np.iinfo(ids.dtype).max)
    return ids.astype(np.uint8) if ids.view(f"u{ids.itemsize}").max() <= largest else ids


def id_pair(prediction: ArrayLike, label: ArrayLike) -> tuple[Ids, Ids]:
    """Prediction and label as integer (H,W) arrays, uint8 where that holds them; InputError if they are no such thing
    or differ in size."""
    predicted, truth = narrow(_ids(prediction, "prediction")), narrow(_ids(label, "label"))
    if predicted.shape != truth.shape:
        sizes = f"size {predicted.shape} differs from the label's {truth.shape}"
        raise InputError(f"prediction: {sizes}; resize the logits (never the ids) to the label's size")
    return predicted, truth


def _count(values: Ids, length: int) -> Counts:
    """How often each of 0..length-1 occurs in `values` (n,), counted by runs: label maps are made of long ones."""
    if not values.size:
        return np.zeros(length, np.int64)
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    # weights are float64, which holds whole numbers up to 2^53 exactly
    return np.bincount(values[ends], np.diff(ends, prepend=-1), length).astype(np.int64)


def ratio(part: ArrayLike, whole: ArrayLike) -> Ratios:
    """part / whole, NaN where whole is 0."""
    numerator, denominator = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


class ConfusionMatrix:
    """Running K x K counts of (truth, prediction); `matrix` is int64 and holds everything seen so far."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes: found {num_classes}, expected at least 1; give the number of classes")
        self.num_classes = num_classes
        self.matrix: Counts = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: ArrayLike, label: ArrayLike, ignore: int = 255) -> Counts:
        """Add one image, both integer ids (H,W) in 0..K-1, and return its own (K,K) matrix. Pixels with label `ignore`
        are not counted. InputError if sizes differ or an id is outside of 0..K-1."""
        predicted, truth = id_pair(prediction, label)
        valid = truth != ignore
        if not valid.all():
            predicted, truth = predicted[valid], truth[valid]
        for name, ids in (("prediction", predicted), ("label", truth)):
            if ids.size and (ids.min() < 0 or ids.max() >= self.num_classes):
                found = f"found ids {ids.min()} to {ids.max()}, expected 0 to {self.num_classes - 1}"
                raise InputError(f"{name}: {found}; check that the classes are those of the data set")
        cells = self.num_classes**2
        kind = np.dtype(np.uint8 if cells <= 256 else np.int64)
        pairs = truth.astype(kind).ravel() * kind.type(self.num_classes) + predicted.astype(kind).ravel()
        image = _count(pairs, cells).reshape(self.num_classes, self.num_classes)
        self.matrix += image
        return image

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another process or part of the split."""
        if other.num_classes != self.num_classes:
            found = f"{other.num_classes} classes cannot be added to {self.num_classes}"
            raise InputError(f"confusion matrix: {found}; merge matrices of one data set only")
        self.matrix += other.matrix


def _parts(matrix: ArrayLike) -> tuple[Ratios, Ratios, Ratios]:
    """True positives, truth and predicted pixels per class, of shape (...,K)."""
    counts = np.asarray(matrix, np.float64)
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)


def iou(matrix: ArrayLike) -> Ratios:
    """TP / (TP + FP + FN) per class, (...,K,K) -> (...,K); NaN for a class neither in the labels nor predicted."""
    hits, truth, predicted = _parts(matrix)
    return ratio(hits, truth + predicted - hits)


def accuracy(matrix: ArrayLike) -> Ratios:
    """Class accuracy, i.e. recall TP / (TP + FN); NaN for a class that the labels do not contain."""
    hits, truth, _ = _parts(matrix)
    return ratio(hits, truth)


def precision(matrix: ArrayLike) -> Ratios:
    """TP / (TP + FP) per class; NaN for a class that is never predicted."""
    hits, _, predicted = _parts(matrix)
    return ratio(hits, predicted)


def f1(matrix: ArrayLike) -> Ratios:
    """2 TP / (2 TP + FP + FN) per class (Dice); NaN exactly where the IoU is."""
    hits, truth, predicted = _parts(matrix)
    return ratio(2 * hits, truth + predicted)


def pixel_accuracy(matrix: ArrayLike) -> float:
    """Share of counted pixels whose id is right; NaN without any."""
    counts = np.asarray(matrix, np.float64)
    return float(ratio(np.trace(counts), counts.sum()))


def plain(values: ArrayLike | Sequence[float]) -> list[float | None]:
    """Ratios as JSON can hold them: None for NaN."""
    return [None if np.isnan(value) else float(value) for value in np.asarray(values, np.float64)]


class Score(NamedTuple):
    """What a protocol says of a confusion matrix."""

    miou: float  # percent; NaN when no class is counted
    classes: tuple[int, ...]  # ids whose IoU entered the mean


@dataclass(frozen=True)
class Protocol:
    """One published way from a confusion matrix to an mIoU; call it with a (K,K) matrix to get a `Score`.

    `ignored` ids are the data set's way to say "no truth here": their LABEL pixels leave the matrix (whatever was
    predicted there is neither right nor a false positive), and they are not in the mean. A pixel of a counted class
    that is PREDICTED as an ignored id stays, as a miss of its class. `left_out` ids are only absent from the mean:
    their label pixels stay and are false positives of what was predicted there. `absent`: a remaining class leaves
    the mean when the labels lack it (`present`), when labels and prediction lack it (`nan`), or never (`zero`: it
    counts as 0).
    """

    absent: Literal["present", "nan", "zero"]
    ignored: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    num_classes: int | None = None  # the K it is defined for; None = any

    def _counted(self, matrices: ArrayLike) -> tuple[Ratios, NDArray[np.bool_]]:
        """IoU (...,K) with undefined ones as 0, and which of them enter the mean."""
        counts = np.array(matrices, np.float64)
        size = counts.shape[-1]
        if counts.ndim < 2 or counts.shape[-2] != size or self.num_classes not in (None, size):
            wanted = f"{self.num_classes or 'K'} x {self.num_classes or 'K'}"
            raise InputError(f"confusion matrix: {counts.shape} is not {wanted}; choose a protocol of this data set")
        counts[..., list(self.ignored), :] = 0
        value = iou(counts)
        if self.absent == "zero":
            mask = np.ones(value.shape, bool)
        elif self.absent == "nan":
            mask = ~np.isnan(value)
        else:
            mask = counts.sum(-1) > 0
        mask[..., [*self.ignored, *self.left_out]] = False
        return np.nan_to_num(value), mask

    def __call__(self, matrix: ArrayLike) -> Score:
        """mIoU in percent and the class ids in the mean, of one (K,K) matrix."""
        value, mask = self._counted(matrix)
        return Score(float(100 * ratio(value[mask].sum(), mask.sum())), tuple(int(i) for i in np.flatnonzero(mask)))

    def many(self, matrices: ArrayLike) -> Ratios:
        """mIoU in percent of a stack (n,K,K) -> (n,)."""
        value, mask = self._counted(matrices)
        return 100 * ratio((value * mask).sum(-1), mask.sum(-1))


PROTOCOLS: dict[str, Protocol] = {
    "present": Protocol("present"),
    "nan": Protocol("nan"),
    "zero": Protocol("zero"),
    "15-nan": Protocol("nan", num_classes=15),
    "15-zero": Protocol("zero", num_classes=15),
    "14-zero": Protocol("zero", ignored=(0,), num_classes=15),
    "13": Protocol("nan", ignored=(0, 13), num_classes=15),
    "14-present": Protocol("present", left_out=(13,), num_classes=15),
}
"""Every named protocol. `13` leaves out, and `14-zero` counts as 0, a further class absent from a subset."""


def _fmb(dataset: str, classes: Sequence[str]) -> bool:
    # a class file may name others, of which the five protocols say nothing: they speak of these 15 by their places
    return dataset == "fmb" and len(classes) == 15 and classes[13] == "bicycle"


def protocols_of(dataset: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the protocols that fit a data set with these classes: five for FMB with its own, three for every
    other."""
    own = ("15-nan", "15-zero", "14-zero", "13", "14-present")
    return own if _fmb(dataset, classes) else ("present", "nan", "zero")


def headline(dataset: str, classes: Sequence[str], occurs: ArrayLike) -> str:
    """Name of the protocol whose figure stands in the title of a report: `present` everywhere but on FMB (with every
    class in the labels it equals `nan` and `zero`). FMB with its own classes: `14-present` while bicycle is absent, as
    in the official test split; the mean over 15 classes where it occurs. `occurs` (K,): whether the labels hold each
    class."""
    if not _fmb(dataset, classes):
        return "present"
    return "15-nan" if np.asarray(occurs)[13] else "14-present"


class ImageMatrices:
    """Per-image confusion matrices for the bootstrap, kept as (index, count) pairs: a few dozen int64 an image."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._cells: dict[str, tuple[Counts, Counts]] = {}

    @property
    def ids(self) -> list[str]:
        """Image ids in the order they were added."""
        return list(self._cells)

    def add(self, image_id: str, matrix: Counts) -> None:
        """Keep the (K,K) matrix of one image; InputError if the id was there before."""
        if image_id in self._cells:
            raise InputError(f"image {image_id}: found twice in one evaluation; list every id once")
        if np.shape(matrix) != (self.num_classes, self.num_classes):
            raise InputError(
                f"image {image_id}: matrix of shape {np.shape(matrix)}, expected {self.num_classes} classes"
            )
        flat = np.asarray(matrix, np.int64).ravel()
        cells = np.flatnonzero(flat)
        self._cells[image_id] = (cells, flat[cells])

    def dense(self, ids: list[str] | None = None) -> NDArray[np.int32]:
        """int32 (n,K,K) in the order of `ids` (default: as added)."""
        wanted = self.ids if ids is None else ids
        missing = [i for i in wanted if i not in self._cells]
        if missing:
            raise InputError(f"image {missing[0]}: not evaluated ({len(missing)} missing); compare equal id lists")
        stack = np.zeros((len(wanted), self.num_classes**2), np.int32)
        for row, image_id in enumerate(wanted):
            cells, counts = self._cells[image_id]
            stack[row, cells] = counts
        return stack.reshape(-1, self.num_classes, self.num_classes)

    def as_dict(self) -> JsonObject:
        """Plain JSON types, so that a later report can be compared image by image."""
        return {
            "num_classes": self.num_classes,
            "images": {i: [cells.tolist(), counts.tolist()] for i, (cells, counts) in self._cells.items()},
        }

    @classmethod
    def from_dict(cls, values: JsonObject) -> ImageMatrices:
        """The inverse of `as_dict`; InputError if the values do not have its form."""
        try:
            result = cls(int(values["num_classes"]))
            for image_id, (cells, counts) in values["images"].items():
                flat = np.zeros(result.num_classes**2, np.int64)
                flat[np.asarray(cells, np.int64)] = counts
                result.add(image_id, flat.reshape(result.num_classes, result.num_classes))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise InputError(f"per-image matrices: not in the form of our reports ({error}); evaluate again") from error
        return result


def _resampled(matrices: ArrayLike, protocol: str, draws: int, rng: np.random.Generator) -> Ratios:
    """mIoU (draws,) of resamples of the images with replacement."""
    stack = np.asarray(matrices)
    if stack.ndim != 3 or len(stack) == 0 or draws < 1:
        raise InputError(f"bootstrap: {draws} draws of matrices {stack.shape}; expected (n, K, K), n and draws above 0")
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is not known; choose one of {', '.join(PROTOCOLS)}")
    count, size = stack.shape[0], stack.shape[-1]
    # Counts stay far below 2^53, so float64 sums are exact; blocks of draws bound the memory.
    flat = stack.reshape(count, -1).astype(np.float64)
    shares = np.full(count, 1 / count)
    scores = []
    for start in range(0, draws, 100):
        times = rng.multinomial(count, shares, size=min(100, draws - start)).astype(np.float64)
        scores.append(PROTOCOLS[protocol].many((times @ flat).reshape(-1, size, size)))
    return np.concatenate(scores)


def _interval(scores: Ratios) -> tuple[float, float]:
    low, high = np.nanpercentile(scores, (2.5, 97.5)) if not np.isnan(scores).all() else (np.nan, np.nan)
    return float(low), float(high)


def bootstrap_miou(matrices: ArrayLike, protocol: str, draws: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mIoU in percent, resampling images with replacement (Efron 1979).

    `matrices` is (n,K,K), one an image. A class that a resample happens not to contain is treated as the protocol
    treats absent classes, so with few images of a rare class the interval need not be centred on the estimate.
    """
    return _interval(_resampled(matrices, protocol, draws, np.random.default_rng(seed)))


class Difference(NamedTuple):
    """mIoU of a minus that of b, percentage points."""

    difference: float
    interval: tuple[float, float]  # 95 %
    p: float  # two-sided; the smallest value that `draws` can show is 2 / (draws + 1)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, protocol: str, draws: int, seed: int = 0, paired: bool = True
) -> Difference:
    """Is a better than b? Both (n,K,K) over the SAME images in the same order; every draw takes the same images of
    both, so that the difficulty of an image cancels. InputError if the shapes differ.

    With `paired=False` the sets of images may differ (day against night, say), and the draws are independent.
    """
    if paired and np.shape(a) != np.shape(b):
        raise InputError(f"paired bootstrap: {np.shape(a)} and {np.shape(b)} matrices; give the same images of both")
    first = _resampled(a, protocol, draws, np.random.default_rng(seed))
    second = _resampled(b, protocol, draws, np.random.default_rng(seed if paired else seed + 1))
    gap = first - second
    undefined = int(np.isnan(gap).sum())  # draws without a counted class speak for neither side
    tail = min(int((gap <= 0).sum()), int((gap >= 0).sum())) + undefined
    whole = [PROTOCOLS[protocol](np.asarray(stack, np.int64).sum(0)).miou for stack in (a, b)]
    return Difference(whole[0] - whole[1], _interval(gap), min(1.0, 2 * (tail + 1) / (draws + 1)))


class CalibrationError:
    """Expected calibration error over pixels, equal-width bins (Guo et al., arXiv 1706.04599, eq. 3)."""

    def __init__(self, bins: int = 15) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.confidence = np.zeros(bins)
        self.correct = np.zeros(bins)

    def update(self, confidence: ArrayLike, prediction: ArrayLike, label: ArrayLike, ignore: int = 255) -> None:
        """Add one image: probability of the predicted class (H,W) in [0, 1], ids (H,W), ids (H,W)."""
        predicted, truth = id_pair(prediction, label)
        valid = truth != ignore
        sure = np.asarray(confidence, np.float64)
        if sure.shape != truth.shape or not ((sure >= 0) & (sure <= 1 + 1e-6)).all():
            wanted = f"expected {truth.shape} with values in [0, 1]"
            raise InputError(f"confidence: found shape {sure.shape}, {wanted}; take the softmax")
        sure, right = sure[valid], (predicted == truth)[valid]
        bins = len(self.counts)
        index = np.minimum((sure * bins).astype(np.int64), bins - 1)
        self.counts += np.bincount(index, minlength=bins)
        self.confidence += np.bincount(index, weights=sure, minlength=bins)
        self.correct += np.bincount(index, weights=right, minlength=bins)

    def value(self) -> float:
        """Sum over bins of share x |accuracy - mean confidence|, in [0, 1]; NaN before any pixel."""
        return float(ratio(np.abs(self.correct - self.confidence).sum(), self.counts.sum()))
