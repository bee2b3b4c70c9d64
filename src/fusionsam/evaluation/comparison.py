"""One evaluation held against another of the same images: is the difference real?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fusionsam.metrics.segmentation import PROTOCOLS, Difference, ImageMatrices, iou, paired_bootstrap, plain
from fusionsam.types import InputError

Counts = NDArray[np.int32]

FEW = 6
"""Of fewer images or sequences every resample may lie on one side by chance alone: 2 ** -5 of them do."""


@dataclass
class ClassGap:
    """IoU of one class in percent, ours, theirs and ours less theirs; None where undefined."""

    ours: float | None = None
    theirs: float | None = None
    difference: float | None = None


@dataclass
class ImageByImage:
    """Means over images of each image's own mIoU, and on how many images ours is the better one."""

    OMITTED: ClassVar[frozenset[str]] = frozenset({"miou", "difference", "interval", "better", "worse"})

    miou: list[float | None] | None = None
    difference: float | None = None
    interval: list[float | None] | None = None
    better: int | None = None
    worse: int | None = None
    words: str = ""


@dataclass
class SequenceGap:
    """The paired bootstrap with whole recording sequences resampled: frames of one are much alike, so an interval over
    single frames is too narrow."""

    n_sequences: int = 0
    interval: list[float | None] = field(default_factory=list)
    p: float = 1.0
    real: bool = False
    words: str = ""


@dataclass
class Comparison:
    """Ours less theirs on the images that both scored, percentage points."""

    OMITTED: ClassVar[frozenset[str]] = frozenset({"images", "by_sequence", "report"})

    title: str = ""
    """Of their report."""
    protocol: str = ""
    n_common: int = 0
    miou: list[float | None] = field(default_factory=lambda: [None, None])
    """Ours, theirs."""
    difference: float | None = None
    interval: list[float | None] = field(default_factory=list)
    p: float = 1.0
    real: bool = False
    words: str = ""
    per_class_iou: dict[str, ClassGap] = field(default_factory=dict)
    images: ImageByImage | None = None
    by_sequence: SequenceGap | None = None
    report: str | None = None
    """Path of their report."""


def compare(
    ours: ImageMatrices,
    theirs: ImageMatrices,
    classes: Sequence[str],
    protocol: str,
    draws: int,
    seed: int = 0,
    title: str = "",
    sequences: Mapping[str, str] | None = None,
) -> Comparison:
    """Ours less theirs on the images that both scored and that have a label, with a paired bootstrap of `draws`
    resamples, and in words whether it is real at 95 %.

    Args:
        ours: Matrices of each image.
        theirs: Those of the other report.
        classes: Names of the K classes.
        protocol: Name of PROTOCOLS, ours.
        draws: Resamples of the bootstrap.
        seed: Of the bootstrap.
        title: Of the other report.
        sequences: Image id -> recording sequence; with them the bootstrap over sequences is made too.

    Raises:
        InputError: no image is common, or the labels were not the same.
    """
    common, a, b = _common(ours, theirs)
    void = list(PROTOCOLS[protocol].ignored)
    told = np.asarray(
        np.delete(a, void, axis=1).any((1, 2))
    )  # an image without a counted label speaks for neither side
    if told.any():
        common, a, b = [common[place] for place in np.flatnonzero(told)], a[told], b[told]
    gap = paired_bootstrap(a, b, protocol, draws, seed)
    real, verdict = _verdict(gap, int(told.sum()))
    words = f"mIoU ({protocol}) differs by {gap.difference:+.2f} points on {len(a)} common images, {verdict}"
    rows = {}
    for name, one, two in zip(classes, _percent(a), _percent(b), strict=True):
        rows[name] = ClassGap(one, two, None if one is None or two is None else one - two)
    return Comparison(
        title=title,
        protocol=protocol,
        n_common=len(a),
        miou=plain([PROTOCOLS[protocol](stack.sum(0, dtype=np.int64)).miou for stack in (a, b)]),
        difference=plain([gap.difference])[0],
        interval=plain(gap.interval),
        p=gap.p,
        real=real,
        words=words,
        per_class_iou=rows,
        images=_image_by_image(a, b, draws, seed),
        by_sequence=_sequence_by_sequence(common, a, b, protocol, draws, seed, sequences),
    )


def _common(ours: ImageMatrices, theirs: ImageMatrices) -> tuple[list[str], Counts, Counts]:
    """The ids that both scored, and their matrices (n,K,K), ours and theirs."""
    known = set(theirs.ids)
    common = [i for i in ours.ids if i in known]
    if not common:
        raise InputError("against: no image was scored in both reports; compare reports of one split")
    if ours.num_classes != theirs.num_classes:
        raise InputError("against: the reports differ in the number of classes; compare reports of one class set")
    a, b = ours.dense(common), theirs.dense(common)
    differs = np.flatnonzero((a.sum(2) != b.sum(2)).any(1))
    if len(differs):
        raise InputError(
            f"against: {len(differs)} images were scored with other labels (first: {common[differs[0]]}); compare "
            "reports made with the same label files"
        )
    return common, a, b


def _verdict(gap: Difference, count: int, what: str = "images") -> tuple[bool, str]:
    """Whether the difference is real at 95 %, and the sentence from the interval on."""
    low, high = gap.interval
    found = f"95 % interval {low:+.2f} to {high:+.2f}, p = {gap.p:.3f}: "
    if count < FEW:
        return False, f"{found}too few {what} to tell"
    if (low > 0 or high < 0) and gap.p < 0.05:
        return True, f"{found}the difference is real at 95 %"
    why = "0 is within the interval" if low <= 0 <= high else "p is not below 0.05"
    return False, f"{found}the difference is not real at 95 % ({why})"


def _sequence_by_sequence(
    ids: Sequence[str],
    a: Counts,
    b: Counts,
    protocol: str,
    draws: int,
    seed: int,
    sequences: Mapping[str, str] | None,
) -> SequenceGap | None:
    """The paired bootstrap over sequences; None where an image has none."""
    if sequences is None or not all(i in sequences for i in ids):
        return None
    names = [sequences[i] for i in ids]
    one, two = by_sequence(a, names), by_sequence(b, names)
    gap = paired_bootstrap(one, two, protocol, draws, seed)
    real, verdict = _verdict(gap, len(one), "sequences")
    words = f"over {len(one)} recording sequences: {verdict}"
    return SequenceGap(len(one), plain(gap.interval), gap.p, real, words)


def by_sequence(matrices: NDArray[np.integer], names: Sequence[str]) -> NDArray[np.int64]:
    """Matrices (n,K,K) of images, each of the sequence `names`[i] -> their sums (S,K,K), in order of first mention."""
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    summed = np.zeros((len(order), *matrices.shape[1:]), np.int64)
    np.add.at(summed, [order[name] for name in names], matrices)
    return summed


def _image_by_image(a: Counts, b: Counts, draws: int, seed: int) -> ImageByImage:
    """Means over images of each image's own mIoU (`present`), the bootstrap interval of their difference, and on how
    many images ours is the better one. One large object decides less here than in counts of all pixels together."""
    labelled = np.flatnonzero(a.any((1, 2)))  # an image may be all void
    if not len(labelled):
        return ImageByImage(words="image by image: no pixel has a label")
    ours, theirs = (PROTOCOLS["present"].many(stack[labelled]) for stack in (a, b))
    gap = ours - theirs
    rng = np.random.default_rng(seed)
    # one draw after the other: all at once would be draws x images of memory
    means = [gap[rng.integers(0, len(gap), len(gap))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    better, worse = int((gap > 0).sum()), int((gap < 0).sum())
    return ImageByImage(
        miou=plain([ours.mean(), theirs.mean()]),
        difference=plain([gap.mean()])[0],
        interval=plain([low, high]),
        better=better,
        worse=worse,
        words=f"image by image: mIoU {ours.mean():.2f} and {theirs.mean():.2f}, {gap.mean():+.2f} (95 % interval "
        f"{low:+.2f} to {high:+.2f}), better on {better} and worse on {worse} of {len(gap)}",
    )


def _percent(stack: Counts) -> list[float | None]:
    return plain(100 * iou(stack.sum(0, dtype=np.int64)))
