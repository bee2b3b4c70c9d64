"""From a FLIR camera's counts to degrees Celsius: Planck's law with the constants of the camera, as in Thermimage's
raw2temp (G. J. Tattersall) and the papers of Minkina and Dudzik on the air between camera and object."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

ZERO = 273.15
"""Kelvin at 0 degrees Celsius."""


@dataclass(frozen=True)
class Planck:
    """The constants that a file holds; temperatures in degrees Celsius, distance in metres, humidity 0..1."""

    r1: float
    b: float
    f: float
    o: float
    r2: float
    emissivity: float = 1.0
    distance: float = 1.0
    reflected: float = 20.0
    air: float = 20.0
    window: float = 20.0
    window_transmission: float = 1.0
    humidity: float = 0.5
    alpha1: float = 0.006569
    alpha2: float = 0.01262
    beta1: float = -0.002276
    beta2: float = -0.00667
    x: float = 1.9

    def usable(self) -> bool:
        """Whether temperatures can come of them: many files hold zeros."""
        positive = (self.r1, self.b, self.r2, self.emissivity, self.window_transmission)
        kelvin = (self.reflected + ZERO, self.air + ZERO, self.window + ZERO)
        sane = all(math.isfinite(value) for value in astuple(self)) and self.distance >= 0 and self.emissivity <= 1
        if not (sane and all(value > 0 for value in positive) and all(150 < value < 2000 for value in kelvin)):
            return False
        try:
            self.celsius(np.array([[0, 65535]], np.uint16))
        except (ArithmeticError, ValueError):  # each may be a number, and all together none of a camera
            return False
        return True

    def celsius(self, counts: NDArray[np.uint16]) -> NDArray[np.float32]:
        """(H,W) counts -> (H,W) degrees Celsius; NaN where the law has no answer."""
        air = self._transmission()
        e, glass = self.emissivity, self.window_transmission
        with np.errstate(all="ignore"):
            received = counts.astype(np.float64) / (e * air * glass * air)
            received -= (1 - e) / e * self._counts(self.reflected)
            received -= (1 - air) / (e * air) * self._counts(self.air)
            received -= (1 - glass) / (e * air * glass) * self._counts(self.window)
            received -= (1 - air) / (e * air * glass * air) * self._counts(self.air)
            kelvin = self.b / np.log(self.r1 / (self.r2 * (received + self.o)) + self.f)
            return (kelvin - ZERO).astype(np.float32)

    def _counts(self, celsius: float) -> float:
        """What a black body of that temperature would give."""
        return self.r1 / (self.r2 * (math.exp(self.b / (celsius + ZERO)) - self.f)) - self.o

    def _transmission(self) -> float:
        """Of half of the way through the air, 0..1."""
        t = self.air
        humidity = self.humidity if self.humidity <= 2 else self.humidity / 100  # some files hold percent
        water = humidity * math.exp(1.5587 + 0.06939 * t - 0.00027816 * t**2 + 0.00000068455 * t**3)
        way, root = math.sqrt(self.distance / 2), math.sqrt(max(water, 0))
        first = math.exp(-way * (self.alpha1 + self.beta1 * root))
        return self.x * first + (1 - self.x) * math.exp(-way * (self.alpha2 + self.beta2 * root))
