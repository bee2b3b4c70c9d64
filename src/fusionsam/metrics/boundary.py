"""Boundary F-score: do the outlines of a prediction lie where those of the label do?"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

from fusionsam.metrics.segmentation import Counts, Ids, Ratios, id_pair, ratio

Places = NDArray[np.int64]
_MARGIN = 1e-6  # undoes rounding; squared distances are whole numbers, so it lets no other pixel in
_FEW = 2**22  # comparisons of pixels; a search tree is faster than more of them


def _boundary(ids: Ids, valid: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Pixels with a 4-neighbour of another id, both valid (None = all); the picture's border makes no boundary."""
    edge = np.zeros(ids.shape, bool)
    for one, two in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = ids[one] != ids[two]
        if valid is not None:
            differs &= valid[one] & valid[two]
        edge[one] |= differs
        edge[two] |= differs
    return edge


@lru_cache(maxsize=16)
def _disc(reach: int, radius: float) -> NDArray[np.int64]:
    """(row, column) offsets (n,2) of the pixels within `radius` of one, nearest first."""
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    squared = (offsets**2).sum(1)
    inside = squared <= radius**2 + _MARGIN
    return offsets[inside][np.argsort(squared[inside], kind="stable")]


def _near(points: Places, ours: Ids, theirs: Ids, width: int, offsets: NDArray[np.int64]) -> Places:
    """Those of `points`, places in the flat maps `ours` and `theirs` of rows of `width`, that have in `theirs` within
    `offsets` (n,2), nearest first, what they have in `ours`."""
    steps = offsets @ np.array([width, 1])
    found, start, many = [points[:0]], 0, 1
    # most are found nearby, so few are looked for further away
    while len(points) and start < len(steps) and len(points) * (len(steps) - start) < _FEW:
        around = theirs.take(steps[start : start + many, None] + points)
        hit = (around == ours.take(points)).any(0)
        found.append(points[hit])
        points, start, many = points[~hit], start + many, min(2 * many, 64)
    if len(points) and start < len(steps):
        radius = float(np.hypot(*offsets[-1]))
        for index in np.unique(ours[points]):
            mine = points[ours[points] == index]
            targets = np.stack(np.divmod(np.flatnonzero(theirs == index), width), 1)
            places, bound = np.stack(np.divmod(mine, width), 1), radius + _MARGIN  # which the tree excludes
            distance, _ = KDTree(targets).query(places, distance_upper_bound=bound)
            found.append(mine[np.isfinite(distance)])
    return np.concatenate(found)


class BoundaryScore:
    """Boundary F-score per class, with counts pooled over images (Csurka et al., BMVC 2013, with Perazzi et al.'s
    tolerance as a share of the diagonal, CVPR 2016).

    The boundary of a class is its pixels that touch (4-neighbours) a pixel of another class. Precision is the share
    of predicted boundary pixels within `tolerance` x diagonal (Euclidean, in pixels, not rounded) of the true boundary
    of the same class, recall the share of true ones within it of the predicted.
    """

    def __init__(self, num_classes: int, tolerance: float = 0.0075) -> None:
        self.tolerance = tolerance
        self.counts: Counts = np.zeros((num_classes, 4), np.int64)
        """Per class: predicted pixels near the truth, predicted, true pixels near the prediction, true."""

    def update(self, prediction: ArrayLike, label: ArrayLike, ignore: int = 255) -> None:
        """Add one image: integer ids (H,W) both; pixels with label `ignore` are not looked at."""
        predicted, truth = id_pair(prediction, label)
        ignored = truth == ignore
        valid = ~ignored if ignored.any() else None
        radius = self.tolerance * float(np.hypot(*truth.shape))
        classes, reach = len(self.counts), int(radius + _MARGIN)
        height, width = truth.shape
        maps, points = [], []
        for ids in (predicted, truth):
            # a margin lets every offset stay inside; the id behind the last says that there is no boundary
            marks = np.full((height + 2 * reach, width + 2 * reach), classes, np.min_scalar_type(classes))
            edge = _boundary(ids, valid) & (ids < classes)
            edge = edge if ids.dtype.kind == "u" else edge & (ids >= 0)
            np.copyto(marks[reach : reach + height, reach : reach + width], ids, where=edge, casting="unsafe")
            maps.append(marks.ravel())
            points.append(np.flatnonzero(maps[-1] != classes))
        totals = [np.bincount(marks[here], minlength=classes) for marks, here in zip(maps, points, strict=True)]
        offsets = _disc(reach, radius)
        for side, (ours, theirs) in enumerate((maps, maps[::-1])):
            candidates = points[side]
            if (totals[1 - side][totals[side] > 0] == 0).any():  # classes that the other side has nowhere
                candidates = candidates[totals[1 - side][ours[candidates]] > 0]
            near = _near(candidates, ours, theirs, width + 2 * reach, offsets)
            self.counts[:, 2 * side] += np.bincount(ours[near], minlength=classes)
            self.counts[:, 2 * side + 1] += totals[side]

    def merge(self, other: BoundaryScore) -> None:
        """Add the counts of another process."""
        self.counts += other.counts

    def f_score(self) -> Ratios:
        """F per class (K,): 2PR/(P+R), 0 if only one side has a boundary or nothing matches, NaN if neither has."""
        near_truth, predicted, near_prediction, truth = self.counts.T.astype(np.float64)
        share, recall = np.nan_to_num(ratio(near_truth, predicted)), np.nan_to_num(ratio(near_prediction, truth))
        score = np.nan_to_num(ratio(2 * share * recall, share + recall))
        return np.where(predicted + truth > 0, score, np.nan)

    def mean(self) -> float:
        """Mean F over the classes that have a boundary in the labels; NaN without any."""
        has_truth = self.counts[:, 3] > 0
        return float(ratio(self.f_score()[has_truth].sum(), has_truth.sum()))
