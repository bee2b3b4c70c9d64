"""How much labelled objects stand out in a picture: the brightness of each against that of a ring around it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.types import InputError

SMALLEST_OBJECT = 30
"""Pixels below which an object does not count: its border is most of it."""
GAP, RING = 2, 10
"""Pixels around an object that belong to neither (labels are not exact there), and the width of the ring behind."""
RING_SHARE = 4
"""The ring of a large object is a quarter of its diameter wide where that is more than RING."""


class Surrounded(NamedTuple):
    """Where one object and its surroundings are; both bool (H,W)."""

    inside: NDArray[np.bool_]
    ring: NDArray[np.bool_]


def surrounded(mask: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None) -> list[Surrounded]:
    """Every connected object of at least SMALLEST_OBJECT pixels of `mask` (H,W), with the ring around it.

    The ring leaves out every pixel of `mask` and those that are not `valid`. Objects without a ring are left out.
    InputError where `mask` is no (H,W) array.

    >>> mask = np.zeros((40, 40), bool); mask[10:20, 10:20] = True
    >>> [(int(one.inside.sum()), bool(one.ring[15, 25])) for one in surrounded(mask)]
    [(100, True)]
    """
    if mask.ndim != 2:
        raise InputError(f"mask: found shape {mask.shape}, expected (H,W); give one label map")
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    near = ndimage.distance_transform_edt(~mask) <= GAP
    allowed = ~near if valid is None else ~near & valid
    found = []
    for index, place in enumerate(ndimage.find_objects(labels), 1):
        inside = labels == index
        if inside.sum() < SMALLEST_OBJECT or place is None:
            continue
        diameter = max(part.stop - part.start for part in place)
        width = GAP + max(RING, diameter // RING_SHARE)
        # distances within a window: the ring cannot reach farther
        window = tuple(slice(max(0, part.start - width - 1), part.stop + width + 1) for part in place)
        ring = np.zeros_like(mask)
        ring[window] = (ndimage.distance_transform_edt(~inside[window]) <= width) & allowed[window]
        if ring.any():
            found.append(Surrounded(inside, ring))
    return found


def contrast(grey: NDArray[np.float64], objects: list[Surrounded]) -> list[float]:
    """|mean inside - mean of the ring| of each object, of a grey picture (H,W) in 0-255: grey levels, 0 to 255.

    >>> mask = np.zeros((40, 40), bool); mask[10:20, 10:20] = True
    >>> contrast(np.where(mask, 90.0, 40.0), surrounded(mask))
    [50.0]
    """
    return [abs(float(grey[one.inside].mean()) - float(grey[one.ring].mean())) for one in objects]
