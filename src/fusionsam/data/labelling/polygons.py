"""Masks to polygons and back, exact to a pixel.

A polygon runs along the edges of pixels: (0, 0) is the upper left corner of the picture, (1, 1) the lower right one of
its first pixel. A pixel belongs to a polygon as pycocotools decides it. Polygons have no holes: an object with holes,
or of several parts, becomes several polygons that touch but do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.types import InputError

Polygon = list[float]
"""x0, y0, x1, y1 ... in pixels."""
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""Right, down, left, up: x, y."""
_EIGHT = np.ones((3, 3), bool)


def coco_masks() -> ModuleType:
    """pycocotools' functions on masks; InputError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError('masks: pycocotools is not installed; pip install "fusionsam[label]"') from None
    return mask


def to_polygons(mask: NDArray[np.bool_], x: int = 0, y: int = 0) -> list[Polygon]:
    """A mask (h,w) whose upper left corner lies at x, y of the picture as polygons; their union is the mask.

    >>> to_polygons(np.array([[False, True, True]]))
    [[1.0, 0.0, 3.0, 0.0, 3.0, 1.0, 1.0, 1.0]]
    """
    regions, _ = ndimage.label(mask)  # four neighbours: parts that meet in a corner alone are two
    found: list[Polygon] = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        part = regions[rows, columns] == number
        left, top = x + columns.start, y + rows.start
        # eight neighbours outside: what is open at a corner is no hole
        holes = ndimage.binary_fill_holes(part, _EIGHT) & ~part
        if not holes.any():
            found.append(_outline(part, left, top))
            continue
        lies = np.flatnonzero((ndimage.label(holes, _EIGHT)[0] == 1).any(0))
        cut = int(lies[0] + lies[-1] + 1) // 2  # through the middle of the first hole, which opens it
        found += to_polygons(part[:, :cut], left, top) + to_polygons(part[:, cut:], left + cut, top)
    return found


def _outline(part: NDArray[np.bool_], left: int, top: int) -> Polygon:
    """The border of one connected region without holes, clockwise; corners alone."""
    inside = np.pad(part, 1)
    border = {  # edges by direction, the region on their right: where they begin
        0: inside & ~np.roll(inside, 1, 0),
        1: inside & ~np.roll(inside, -1, 1),
        2: inside & ~np.roll(inside, -1, 0),
        3: inside & ~np.roll(inside, 1, 1),
    }
    start_of = ((0, 0), (1, 0), (1, 1), (0, 1))  # of a pixel's upper, right, lower and left edge
    edges = {
        (int(column) + start_of[way][0] - 1, int(row) + start_of[way][1] - 1, way)
        for way, there in border.items()
        for row, column in np.argwhere(there)
    }
    px, py, way = begin = min((edge for edge in edges if edge[2] == 0), key=lambda edge: (edge[1], edge[0]))
    corners: Polygon = []
    while True:
        corners += [float(left + px), float(top + py)]
        while (px, py, way) in edges:  # straight on
            px, py = px + _STEPS[way][0], py + _STEPS[way][1]
            if (px, py, (way + 1) % 4) in edges:
                break  # to the right first: two pixels that meet in a corner stay apart
        way = (way + 1) % 4 if (px, py, (way + 1) % 4) in edges else (way + 3) % 4
        if (px, py, way) == begin:
            return corners


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> NDArray[np.bool_]:
    """Polygons as one mask (height, width): their union. ValueError for what is no polygon, or lies far away."""
    tools = coco_masks()
    ready = []
    for corners in polygons:
        values = np.asarray(corners, np.float64).ravel()
        if len(values) < 6 or len(values) % 2:
            raise ValueError(f"a polygon of {len(values)} numbers; expected x and y of three corners or more")
        if not np.isfinite(values).all():
            raise ValueError("a corner that is not finite")
        far = max(height, width)  # beyond that the library would walk along a very long edge
        xs, ys = values[::2], values[1::2]
        if min(xs.min(), ys.min()) < -far or xs.max() > width + far or ys.max() > height + far:
            raise ValueError(f"a corner far outside of {width}x{height} pixels")
        ready.append(values.tolist())
    if not ready:
        raise ValueError("no polygon")
    mask: NDArray[np.bool_] = tools.decode(tools.merge(tools.frPyObjects(ready, height, width))).astype(bool)
    return mask
