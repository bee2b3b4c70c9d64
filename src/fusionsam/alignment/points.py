"""A rig from points that a person clicked in both pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusionsam.alignment.geometry import Matrix, Size, apply, from_points
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.rig import Rig, require_sound
from fusionsam.types import InputError, JsonObject

FEWEST = 4
LARGE = 0.02
"""Mean distance of the points after the fit, as a share of the visible picture's longer side, that is warned of."""
COLUMNS = ["visible_x", "visible_y", "infrared_x", "infrared_y"]
FORMAT = (
    'expected JSON {"visible": [[x, y], ...], "infrared": [[x, y], ...]}, or CSV rows '
    f"{','.join(COLUMNS)} (with this heading, or without one; named columns may come in any order)"
)


def read_points(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,2) x, y in the visible and in the infrared picture, N at least 4. InputError for anything else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}); {FORMAT}") from None
    try:
        if text.lstrip().startswith("{"):
            values: JsonObject = json.loads(text)
            one, two = (np.array(values[name], dtype=np.float64) for name in ("visible", "infrared"))
        else:
            rows = [row for row in csv.reader(text.splitlines()) if row and not row[0].lstrip().startswith("#")]
            order = list(range(len(COLUMNS)))
            if rows and _is_heading(rows[0]):
                order, rows = _order(rows[0]), rows[1:]
            table = np.array([[float(cell) for cell in row] for row in rows], dtype=np.float64)
            if table.ndim != 2 or table.shape[1] != 4:
                raise ValueError("not four columns")
            one, two = table[:, order[:2]], table[:, order[2:]]
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:80]}; {FORMAT}") from None
    if one.ndim != 2 or one.shape != two.shape or one.shape[1] != 2 or not np.isfinite([one, two]).all():
        raise InputError(f"{path}: found points of shapes {one.shape} and {two.shape}; {FORMAT}")
    if len(one) < FEWEST:
        raise InputError(f"{path}: {len(one)} pairs of points, expected at least {FEWEST}; click more")
    return one, two


def _is_heading(row: list[str]) -> bool:
    """Whether every cell is a name: a point with a typing error in it is none."""
    return all(cell.lstrip()[:1].isalpha() and not _is_number(cell) for cell in row)


def _order(heading: list[str]) -> list[int]:
    """Where each of COLUMNS stands. ValueError for other names: taken by their place, they may mean another camera."""
    names = [cell.strip().lower() for cell in heading]
    if sorted(names) != sorted(COLUMNS):
        raise ValueError(f"found the columns {', '.join(names)}")
    return [names.index(name) for name in COLUMNS]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def few_points(visible: NDArray[np.float64], infrared: NDArray[np.float64], start: Matrix) -> Matrix:
    """What up to three points tell besides `start` (infrared to visible): one a shift, two a scale and a turn, three
    an affine map. `start` where they tell nothing, or lie on one line."""
    moved, move = apply(start, infrared), np.eye(3)
    if len(moved) >= 3 and abs(np.linalg.det(np.c_[moved[:3], np.ones(3)])) > 1:
        move[:2] = np.linalg.lstsq(np.c_[moved, np.ones(len(moved))], visible, rcond=None)[0].T
    elif len(moved) >= 2 and np.linalg.norm(moved[1] - moved[0]) > 1:
        (a, b), (c, d) = (points[1] - points[0] for points in (moved, visible))
        across, along = (a * c + b * d) / (a * a + b * b), (a * d - b * c) / (a * a + b * b)
        move[:2, :2] = [[across, -along], [along, across]]
        move[:2, 2] = visible[0] - move[:2, :2] @ moved[0]
    elif len(moved):
        move[:2, 2] = visible[0] - moved[0]
    return move @ start


def rig_from_points(
    visible: NDArray[np.float64],
    infrared: NDArray[np.float64],
    visible_size: Size,
    infrared_size: Size,
    name: str,
    lenses: tuple[Lens | None, Lens | None] = (None, None),
) -> Rig:
    """The homography of least squares, after the distortion of the two `lenses` has been taken off. InputError, naming
    `name`, for points outside of the pictures, on one line or that contradict one another so much that the picture
    would fold."""
    for kind, points, size in (("visible", visible, visible_size), ("infrared", infrared, infrared_size)):
        outside = ((points < -0.5) | (points > np.array(size)[::-1] - 0.5)).any(1)
        if outside.any():
            x, y = points[outside][0]
            raise InputError(
                f"{name}: the {kind} point ({x:g}, {y:g}) lies outside of {size[0]}x{size[1]} (height x width) pixels; "
                "give x then y, in pixels of the picture as it is"
            )
        spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
        if spread[1] < 0.01 * max(size):
            raise InputError(f"{name}: the {kind} points lie on one line; click them all over the picture")
    visible, infrared = (
        points if lens is None else lens.undistorted(points)
        for points, lens in zip((visible, infrared), lenses, strict=True)
    )
    try:
        matrix = from_points(infrared, visible)
    except np.linalg.LinAlgError:
        matrix = np.full((3, 3), np.nan)
    if not np.isfinite(matrix).all():
        raise InputError(f"{name}: the points determine no transformation; click them all over the picture")
    distances = np.linalg.norm(apply(matrix, infrared) - visible, axis=1)
    warnings = []
    if len(visible) == FEWEST:
        warnings.append(
            "found from 4 points, which any transformation fits; click six or more to learn how well it does"
        )
    elif distances.mean() > LARGE * max(visible_size):
        worst = int(distances.argmax()) + 1
        warnings.append(f"the points disagree by {distances.mean():.1f} pixels; the worst is number {worst}")
    told = {
        "source": "points",
        "points": len(visible),
        "point_error": round(float(distances.mean()), 3),
        "point_errors": [round(float(value), 3) for value in distances],
        "verdict": f"fitted to {len(visible)} points, mean distance {distances.mean():.1f} visible pixels",
        "warnings": warnings,
    }
    rig = Rig(visible_size, infrared_size, matrix, *lenses, told=told)
    require_sound(rig, name)
    return rig
