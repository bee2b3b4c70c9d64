"""Temperatures under masks: area, extremes, mean and 95th percentile of every object or class, in degrees Celsius.

Takes the temperatures of a radiometric infrared picture as an array, wherever they come from. Pixels without a
temperature are nan; they are counted and left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.io import write_text
from fusionsam.types import IGNORE, InputError

Celsius = NDArray[np.floating]
MIN_PIXELS = 20
"""Smaller regions are no object of `of_objects`: a mask's ragged edge leaves such crumbs."""


@dataclass(frozen=True)
class Temperatures:
    """What the pixels of one mask say; degrees Celsius, None where no pixel has a temperature."""

    area: int
    """Pixels of the mask."""
    unknown: int
    """Of these, without a temperature."""
    minimum: float | None = None
    mean: float | None = None
    maximum: float | None = None
    p95: float | None = None
    """95th percentile, linear between the ranks as numpy has it: a maximum that one bad pixel does not move."""
    coldest: tuple[int, int] | None = None
    """x, y of the coldest pixel; of equal ones the upper left."""
    hottest: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reading:
    """One line of the table: an object or a class of one picture."""

    picture: str
    object: int
    """Number of the object in its picture, from 1; 0 for a whole class."""
    class_id: int
    class_name: str
    temperatures: Temperatures


def read_celsius(path: str | Path) -> Celsius | None:
    """Degrees Celsius (H,W) of a radiometric file; None for another picture, and for a file without the camera's
    constants. InputError for a damaged one."""
    if not is_radiometric(path):
        return None
    file = read_radiometric(path)
    return None if file.planck is None else file.celsius()


def under(celsius: ArrayLike, mask: ArrayLike) -> Temperatures:
    """Statistics of the temperatures under one mask.

    Args:
        celsius: float (H,W), degrees Celsius, nan where there is none.
        mask: bool (H,W).

    Raises:
        InputError: for arrays of other shapes, or of two sizes.

    >>> under([[20.0, 30.0], [40.0, 21.0]], [[True, True], [True, False]]).hottest
    (0, 1)
    """
    heat, inside = _checked(celsius, mask)
    inside = inside.astype(bool)
    known = inside & np.isfinite(heat)
    area = int(np.count_nonzero(inside))
    values = heat[known].astype(np.float64)
    if not len(values):
        return Temperatures(area, area)
    rows, columns = np.nonzero(known)
    cold, hot = int(values.argmin()), int(values.argmax())
    return Temperatures(
        area,
        area - len(values),
        float(values.min()),
        float(values.mean()),
        float(values.max()),
        float(np.percentile(values, 95)),
        (int(columns[cold]), int(rows[cold])),
        (int(columns[hot]), int(rows[hot])),
    )


def of_classes(
    celsius: ArrayLike, labels: ArrayLike, classes: Sequence[str], picture: str = "", background: bool = False
) -> list[Reading]:
    """One reading for every class that the label map (H,W) holds, class 0 only with `background`; 255 (ignore) never.

    InputError for a label map of another size, or with ids that `classes` does not name."""
    heat, ids = _checked(celsius, labels)
    return [
        Reading(picture, 0, class_id, classes[class_id], under(heat, ids == class_id))
        for class_id in _present(ids, classes)
        if class_id > 0 or background
    ]


def of_objects(
    celsius: ArrayLike, labels: ArrayLike, classes: Sequence[str], picture: str = "", min_pixels: int = MIN_PIXELS
) -> list[Reading]:
    """One reading for every connected region (8 neighbours) of at least `min_pixels` of every class above 0, the
    hottest first. Raises as `of_classes`."""
    heat, ids = _checked(celsius, labels)
    found = []
    for class_id in _present(ids, classes):
        if class_id == 0:
            continue
        regions, count = ndimage.label(ids == class_id, structure=np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        found += [(class_id, under(heat, regions == i)) for i in range(1, count + 1) if sizes[i] >= min_pixels]
    found.sort(key=lambda one: -np.inf if one[1].maximum is None else one[1].maximum, reverse=True)
    return [
        Reading(picture, number, class_id, classes[class_id], read) for number, (class_id, read) in enumerate(found, 1)
    ]


def of_instances(
    celsius: ArrayLike, instances: ArrayLike, kinds: Mapping[int, int], classes: Sequence[str], picture: str = ""
) -> list[Reading]:
    """One reading for every object of a drawing, then one for every class that occurs, over all of its objects.

    Args:
        celsius: float (H,W), degrees Celsius, nan where there is none.
        instances: int (H,W), number of each pixel's object, 0 for nothing.
        kinds: The class id of every object's number.
        classes: Names of the classes by their ids.
        picture: Name in the table.

    Raises:
        InputError: as `under`.

    >>> one, whole = of_instances([[20.0, 30.0], [40.0, 21.0]], [[7, 7], [0, 0]], {7: 1}, ["none", "pipe"])
    >>> one.object, one.class_name, one.temperatures.maximum, whole.object, whole.temperatures.mean
    (7, 'pipe', 30.0, 0, 25.0)
    """
    heat, numbers = _checked(celsius, instances)
    found = [
        Reading(picture, number, kind, classes[kind], under(heat, numbers == number))
        for number, kind in sorted(kinds.items())
    ]
    for kind in sorted(set(kinds.values())):
        inside = np.isin(numbers, [number for number, its in kinds.items() if its == kind])
        found.append(Reading(picture, 0, kind, classes[kind], under(heat, inside)))
    return found


def to_csv(readings: Iterable[Reading]) -> str:
    """Readings as CSV with a head line; temperatures with two decimals, empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [field.name for field in fields(Temperatures) if field.name not in ("coldest", "hottest")]
    units = [name if name in ("area", "unknown") else f"{name}_c" for name in columns]
    writer.writerow(
        ["picture", "object", "class_id", "class", *units, "coldest_x", "coldest_y", "hottest_x", "hottest_y"]
    )
    for one in readings:
        values = asdict(one.temperatures)
        spots = [*(values["coldest"] or ("", "")), *(values["hottest"] or ("", ""))]
        cells = [_cell(values[name]) for name in columns]
        writer.writerow([one.picture, one.object, one.class_id, one.class_name, *cells, *spots])
    return text.getvalue()


def write_csv(path: str | Path, readings: Iterable[Reading]) -> Path:
    """`to_csv` as a file, whole or not at all; InputError if it cannot be written."""
    return write_text(path, to_csv(readings))


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _checked(celsius: ArrayLike, second: ArrayLike) -> tuple[Celsius, NDArray[np.integer]]:
    heat, other = np.asarray(celsius), np.asarray(second)
    if heat.ndim != 2 or heat.dtype.kind not in "fiu":
        raise InputError(f"temperatures: found {heat.dtype} of shape {heat.shape}; expected numbers (H,W) in Celsius")
    if other.shape != heat.shape:
        raise InputError(
            f"temperatures: are {heat.shape[0]}x{heat.shape[1]}, the mask or label map is "
            f"{'x'.join(map(str, other.shape))} (height x width); expected one aligned size"
        )
    return (heat if heat.dtype.kind == "f" else heat.astype(np.float64)), other


def _present(ids: NDArray[np.integer], classes: Sequence[str]) -> list[int]:
    present = [int(i) for i in np.unique(ids) if i != IGNORE]
    strange = [i for i in present if not 0 <= i < len(classes)]
    if strange:
        raise InputError(f"label map: found id {strange[0]}; expected ids of {len(classes)} classes, or {IGNORE}")
    return present
