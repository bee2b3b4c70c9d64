"""Plane geometry in pixels: x right, y down, the centre of the first pixel at (0, 0)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.types import Array

Matrix = Array
"""3 x 3, of homogeneous coordinates (x, y, 1)."""
Size = tuple[int, int]
"""(H, W) in pixels."""


def apply(matrix: Matrix, points: Array) -> NDArray[np.float64]:
    """Points (N,2) x, y -> (N,2); infinite where the matrix sends a point to the horizon."""
    homogeneous = np.c_[points, np.ones(len(points))] @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return homogeneous[:, :2] / homogeneous[:, 2:]


def corners(size: Size) -> NDArray[np.float64]:
    """(4,2) x, y of the outer pixels' centres, clockwise from the top left."""
    height, width = size
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], dtype=np.float64)


def rescaling(source: Size, target: Size) -> Matrix:
    """From pixels of a picture to pixels of its resized copy."""
    x, y = target[1] / source[1], target[0] / source[0]
    return np.array([[x, 0, 0.5 * x - 0.5], [0, y, 0.5 * y - 0.5], [0, 0, 1]])


def similarity(scale: float, degrees: float, source: tuple[float, float], target: tuple[float, float]) -> Matrix:
    """Scale and turn about the point `source`, which comes to lie at `target`."""
    turn = np.deg2rad(degrees)
    c, s = np.cos(turn) * scale, np.sin(turn) * scale
    (x, y), (u, v) = source, target
    return np.array([[c, -s, u - c * x + s * y], [s, c, v - s * x - c * y], [0, 0, 1]])


def centre(size: Size) -> tuple[float, float]:
    """x, y of the middle of a picture."""
    return (size[1] - 1) / 2, (size[0] - 1) / 2


def from_points(source: NDArray[np.float64], target: NDArray[np.float64]) -> Matrix:
    """The homography of least squares that moves points (N,2) to (N,2), N at least 4 (Hartley's normalised direct
    linear transformation). LinAlgError or a matrix with infinite values where they do not determine one."""
    ways = [_normalising(points) for points in (source, target)]
    (one, two) = (apply(way, points) for way, points in zip(ways, (source, target), strict=True))
    (x, y), (u, v) = one.T, two.T
    o, z = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate(
        [
            np.stack([x, y, o, z, z, z, -u * x, -u * y, -u], 1),
            np.stack([z, z, z, x, y, o, -v * x, -v * y, -v], 1),
        ]
    )
    solution = np.linalg.svd(rows)[2][-1].reshape(3, 3)
    matrix = np.linalg.inv(ways[1]) @ solution @ ways[0]
    return matrix / matrix[2, 2]


def _normalising(points: NDArray[np.float64]) -> Matrix:
    """Moves the mean to 0 and the mean distance to the square root of 2."""
    mean = points.mean(0)
    scale = np.sqrt(2) / max(float(np.linalg.norm(points - mean, axis=1).mean()), 1e-9)
    return np.array([[scale, 0, -scale * mean[0]], [0, scale, -scale * mean[1]], [0, 0, 1]])


def corner_modes(size: Size) -> Tensor:
    """(8,4,2) ways to move the corners of a picture: shift x, shift y, scale, turn, aspect, shear, perspective x and y.
    The first four make a similarity."""
    x, y = torch.tensor([-1.0, 1, 1, -1]).double(), torch.tensor([-1.0, -1, 1, 1]).double()
    ratio = size[0] / size[1]
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    pairs = [(one, zero), (zero, one), (x, ratio * y), (-ratio * y, x), (x, -ratio * y), (ratio * y, x)]
    pairs += [(x * y, zero), (zero, x * y)]
    return torch.stack([torch.stack(pair, 1) for pair in pairs])


def moved_corners(size: Size, moves: Tensor) -> Tensor:
    """The homography (3,3) that moves the corners of a picture by `moves` (4,2) pixels, with its gradient."""
    start = torch.from_numpy(corners(size))
    (x, y), (u, v) = start.T, (start + moves).T
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    rows = torch.cat(
        [
            torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], 1),
            torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], 1),
        ]
    )
    solution = torch.linalg.solve(rows, torch.cat([u, v]))
    return torch.cat([solution, torch.ones(1).double()]).reshape(3, 3)
