"""Distortion of a lens: the polynomial of Brown and Conrady in OpenCV's terms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionsam.alignment.geometry import Size, rescaling
from fusionsam.types import InputError, JsonObject

NAMES = ("fx", "fy", "cx", "cy")
STEPS = 20


@dataclass(frozen=True)
class Lens:
    """Focal lengths and centre in pixels, and the distortion (k1, k2, p1, p2, k3) of OpenCV."""

    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, float, float, float, float]

    def distorted(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the lens puts (N,2) x, y of an ideal picture."""
        x, y = (points[:, 0] - self.cx) / self.fx, (points[:, 1] - self.cy) / self.fy
        x, y = self._bent(x, y)
        return np.stack([x * self.fx + self.cx, y * self.fy + self.cy], 1)

    def undistorted(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """The ideal place of (N,2) x, y: `distorted` inverted by fixed-point steps, as OpenCV does."""
        x0, y0 = (points[:, 0] - self.cx) / self.fx, (points[:, 1] - self.cy) / self.fy
        x, y = x0, y0
        for _ in range(STEPS):
            u, v = self._bent(x, y)
            x, y = x + 0.8 * (x0 - u), y + 0.8 * (y0 - v)
        return np.stack([x * self.fx + self.cx, y * self.fy + self.cy], 1)

    def _bent(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        k1, k2, p1, p2, k3 = self.distortion
        # far outside of the picture the polynomial runs away; nothing is looked at there
        r = np.minimum(x * x + y * y, self._farthest())
        radial = 1 + r * (k1 + r * (k2 + r * k3))
        return x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x), y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y

    def _farthest(self) -> float:
        return 4.0 * ((self.cx / self.fx) ** 2 + (self.cy / self.fy) ** 2) + 1e-6

    def rescaled(self, source: Size, target: Size) -> Lens:
        """For a resized copy of the picture."""
        way = rescaling(source, target)
        x, y = way[0, 0], way[1, 1]
        return Lens(self.fx * x, self.fy * y, self.cx * x + way[0, 2], self.cy * y + way[1, 2], self.distortion)

    def as_dict(self) -> dict[str, object]:
        """As rig.json has it."""
        return {**{name: getattr(self, name) for name in NAMES}, "distortion": list(self.distortion)}

    @classmethod
    def from_dict(cls, values: JsonObject, name: str) -> Lens:
        """InputError for anything but the numbers of `as_dict`; the distortion may end early."""
        remedy = f"expected {', '.join(NAMES)} and distortion [k1, k2, p1, p2, k3]"
        try:
            four = [float(values[key]) for key in NAMES]
            bent = [float(value) for value in values["distortion"]]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{name}: no camera matrix and distortion; {remedy}") from None
        if len(bent) > 5 or not np.isfinite([*four, *bent]).all() or min(four[:2]) <= 0:
            raise InputError(
                f"{name}: focal lengths {four[:2]}, {len(bent)} coefficients; {remedy}, all finite, fx and fy above 0"
            )
        k1, k2, p1, p2, k3 = [*bent, 0.0, 0.0, 0.0, 0.0, 0.0][:5]
        fx, fy, cx, cy = four
        return cls(fx, fy, cx, cy, (k1, k2, p1, p2, k3))
