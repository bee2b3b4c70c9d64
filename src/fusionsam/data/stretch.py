"""From deep infrared (16 bits, floats, degrees Celsius) to the 8 bits that the network sees.

The scene alone decides the range: what is no temperature (nodata, NaN, saturated rows) and what lies far from all the
rest (a fire, a dead pixel) is left out of it, however much of the picture it fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.types import Array, InputError, Notice

TAILS = (0.5, 99.5)
"""Percentiles of the scene that become 0 and 255."""
FEW_LEVELS = 32
"""Fewer grey levels than this are worth a warning."""
_SENTINELS = (0.0, -1.0, 65535.0, 65534.0, 32767.0, -32768.0, -9999.0, -99999.0, 16383.0, 4095.0, 1023.0)
_SPIKE = 0.002  # share of the picture from which on one single value can be nodata
_MOST = 0.12  # share of the picture that isolated values may fill
_GAPS = ((1.5, 0.15), (3.0, 0.5))  # (empty stretch in widths of the scene, share of what is beyond that may lie in it)
_EDGE, _GLOW = 3, 6  # pixels beside nodata, and beside isolated values, where resampling mixed them with the scene
_SAMPLE = 2_000_000  # values that are sorted where a picture, or a film, has more


@dataclass(frozen=True)
class Range:
    """The values that become 0 and 255, and how they were found."""

    low: float
    high: float
    how: Literal["found", "given", "film"] = "found"
    left_out: float = 0.0
    """Percent of the pixels that had no say: nodata and isolated values."""
    nodata: tuple[float, ...] = ()
    """Values that were taken for no temperature; shown as the coldest."""
    levels: int = 256
    """Grey levels that the scene fills in the result."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "how": self.how,
            "left_out_percent": round(self.left_out, 3),
            "nodata": [round(value, 4) for value in self.nodata],
            "grey_levels": self.levels,
        }

    def notices(self) -> list[Notice]:
        """What a person should know; most pictures give none."""
        said = []
        if self.left_out >= 1 and self.how == "found":
            said.append(
                Notice(
                    "range",
                    f"{self.left_out:.1f} % of the infrared pixels are nodata or far from the rest and were left out "
                    f"of the range {self.low:g} to {self.high:g}",
                    "--infrared-range LOW HIGH sets another",
                )
            )
        if self.levels < FEW_LEVELS:
            said.append(
                Notice(
                    "few grey levels",
                    f"the infrared picture has {self.levels} grey levels within {self.low:g} to {self.high:g}; give "
                    "the deeper original, or another range",
                    "--infrared-range LOW HIGH sets it",
                )
            )
        return said


def find_range(values: Array, nodata: float | None = None) -> Range:
    """The range of the scene in a picture (H,W), or in several of a film stacked to one of (n*H,W).

    `nodata` is the value that the file declares for it (GDAL_NODATA). A picture of one value has low equal to high.

    Raises:
        InputError: no finite value is left.
    """
    with np.errstate(over="ignore"):  # doubles that no float32 holds, as GDAL's usual nodata, are no heat
        valid = np.isfinite(values.astype(np.float32))
    declared = _declared(nodata, values.dtype)
    for value in declared:
        valid &= values != np.asarray(value).astype(values.dtype)
    if not valid.any():
        raise InputError("holds no finite pixel value; expected a picture")
    spikes = _spikes(values, valid)
    scene = valid & ~np.isin(values, np.asarray(spikes).astype(values.dtype)) if spikes else valid
    scene = _without_edge(~scene, scene, _EDGE)
    low_fence, high_fence = _fences(_sample(values[scene]))
    far = scene & ((values < low_fence) | (values > high_fence))
    scene = _without_edge(far, scene & ~far, _GLOW) if far.any() else scene
    kept = values[scene].astype(np.float32)
    low, high = (float(end) for end in np.percentile(kept, TAILS))
    if high <= low:
        low, high = float(kept.min()), float(kept.max())
    ignored = int((~valid).sum()) + int(np.isin(values[valid], spikes).sum()) + int(far.sum())
    found = Range(low, high, left_out=100 * ignored / values.size, nodata=(*declared, *spikes))
    return replace(found, levels=count_levels(values[scene], found))


def given_range(values: Array, low: float, high: float, nodata: float | None = None) -> Range:
    """A range that a person fixed, or that of the film a frame belongs to, with the grey levels of this picture.

    Raises:
        InputError: the two are not finite, or not in order.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"infrared range {low:g} {high:g}: expected two numbers, the lower first")
    outside = ~((values >= low) & (values <= high))
    fixed = Range(float(low), float(high), "given", 100 * float(outside.mean()), _declared(nodata, values.dtype))
    return replace(fixed, levels=count_levels(values[~outside], fixed))


def stretch(values: Array, used: Range, hot_is_black: bool = False) -> NDArray[np.uint8]:
    """(H,W) of any number type as uint8: `used.low` and what is below is 0, `used.high` and what is above 255; the
    other way round where `hot_is_black`.

    Nodata and NaN are 0 in any case, but saturated pixels that fill neither whole rows nor the border stay hot."""
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    scaled = (np.nan_to_num(numbers, nan=used.low, posinf=used.high, neginf=used.low) - used.low) / max(
        used.high - used.low, 1e-12
    )
    grey = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    if hot_is_black:
        grey = np.where(np.isnan(numbers), np.uint8(0), 255 - grey)
    for value in used.nodata:
        mask = values == np.asarray(value).astype(values.dtype)
        if mask.any() and (value <= used.low or _is_frame(mask)):
            grey[mask] = 0
    return grey


def count_levels(values: Array, used: Range) -> int:
    """Different grey values of `values` (any shape) within the range."""
    if values.size == 0:
        return 0
    inside = values[(values >= used.low) & (values <= used.high)]
    return len(np.unique(_plain(inside.astype(np.float32), used))) if inside.size else 0


def _plain(values: Array, used: Range) -> NDArray[np.uint8]:
    return (((values - used.low) / max(used.high - used.low, 1e-12)).clip(0, 1) * 255).round().astype(np.uint8)


def _sample(values: Array) -> NDArray[np.float64]:
    step = max(1, values.size // _SAMPLE)
    return np.sort(values[::step].astype(np.float64))


def _spikes(values: Array, valid: NDArray[np.bool_]) -> tuple[float, ...]:
    """Single values that fill a share of the picture and lie outside of all the rest: nodata and saturation.

    Well-known ones, and the type's own ends, need a small gap to the scene; any other needs one as wide as the
    scene."""
    usual: Sequence[float] = _SENTINELS
    if values.dtype.kind in "iu":
        kind = np.iinfo(values.dtype)
        usual = (*usual, float(kind.min), float(kind.max))
    seen = values[valid]
    ends = [float(seen.min()), float(seen.max())]
    counts = {value: int((seen == np.asarray(value).astype(values.dtype)).sum()) for value in {*usual, *ends}
              if _fits(value, values.dtype)}  # fmt: skip
    candidates = {value: count for value, count in counts.items() if count >= _SPIKE * values.size}
    if not candidates:
        return ()
    rest = _sample(seen[~np.isin(seen, np.asarray(list(candidates)).astype(values.dtype))])
    if len(rest) < 16:
        return ()
    low, high = np.percentile(rest, (1, 99))
    width = max(high - low, 1e-9)

    def apart(value: float) -> bool:
        if value < low:
            return value < low - (0.1 if value in usual else 1.0) * width
        if value < high + 0.1 * width:
            return False
        # a hot thing beyond what the sensor can tell belongs to the scene, unless it is far away
        return value > high + width or (value in usual and _is_frame(values == np.asarray(value).astype(values.dtype)))

    return tuple(sorted(value for value in candidates if apart(value)))


def _declared(nodata: float | None, kind: np.dtype) -> tuple[float, ...]:
    """The file's own nodata, where pixels of `kind` can have it; NaN is left out in any case, and is no JSON."""
    return () if nodata is None or not np.isfinite(nodata) or not _fits(nodata, kind) else (nodata,)


def _fits(value: float, kind: np.dtype) -> bool:
    return kind.kind not in "iu" or np.iinfo(kind).min <= value <= np.iinfo(kind).max


def _fences(ordered: NDArray[np.float64]) -> tuple[float, float]:
    """The values beyond which there is nothing but isolated ones, after an empty stretch wider than the whole scene."""
    low, high = -np.inf, np.inf
    for _ in range(3):  # a fire may hide behind a dead pixel
        above, below = _first_gap(ordered), _first_gap(-ordered[::-1])
        if above is None and below is None:
            break
        high, low = (high if above is None else above), (low if below is None else -below)
        ordered = ordered[(ordered >= low) & (ordered <= high)]
    return low, high


def _first_gap(ordered: NDArray[np.float64]) -> float | None:
    """The last value of the scene before a gap, from below; None where the values go on without one."""
    count = len(ordered)
    floor = ordered[int(TAILS[0] / 100 * count)]
    last = ordered[int((1 - _MOST) * count) : count - 1]
    found = []
    for widths, share in _GAPS:
        begin = np.searchsorted(ordered, last, "right")
        end = np.searchsorted(ordered, last + widths * np.maximum(last - floor, 1e-9), "left")
        beyond = count - end
        hits = np.flatnonzero((beyond > 0) & (end - begin <= share * beyond) & (last > floor))
        # as far out as can be: warm people before a fire belong to the scene
        found += [float(last[hits[-1]])] if len(hits) else []
    return max(found) if found else None


def _without_edge(mask: NDArray[np.bool_], scene: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """`scene` without the pixels beside those of `mask`, unless hardly any would be left."""
    if not mask.any():
        return scene
    inner = scene & ~ndimage.binary_dilation(mask, iterations=pixels)
    return inner if inner.sum() >= max(16, 0.5 * scene.sum()) else scene


def _is_frame(mask: NDArray[np.bool_]) -> bool:
    """Whether most of the pixels belong to patches that reach the border, as a registered picture's surroundings and
    dead rows do."""
    patches, _ = ndimage.label(mask)
    border = np.unique(np.concatenate([patches[0], patches[-1], patches[:, 0], patches[:, -1]]))
    outside = np.isin(patches, border[border > 0])
    return bool(outside.sum() >= 0.5 * mask.sum())
