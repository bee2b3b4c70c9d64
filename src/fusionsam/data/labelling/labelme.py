"""Objects as labelme's JSON, a file a picture in one folder, and back (https://github.com/wkentaro/labelme). Masks are
PNGs inside of the JSON, exact; polygons, rectangles and circles are read, too. labelme itself is under the GPL, and not
needed."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fusionsam.data.labelling.coco import read_json
from fusionsam.data.labelling.exchange import Annotated, Color, Region, Size, SizeOf, require_size
from fusionsam.data.labelling.polygons import from_polygons
from fusionsam.io import write_json
from fusionsam.types import InputError

VERSION = "5.5.0"
"""Of labelme, whose files these are as; masks are known from 5.3 on."""
CIRCLE = 90
"""Corners of a circle."""


class Labelme:
    """A folder of labelme's files."""

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """NAME.json for every picture, in place of all JSON files of the folder; how many objects."""
        count, written = 0, set()
        for picture in pictures:
            height, width = picture.size
            content: dict[str, object] = {
                "version": VERSION, "flags": {}, "shapes": [_shape(one) for one in picture.regions],
                "imagePath": picture.name, "imageData": None, "imageHeight": height, "imageWidth": width,
            }  # fmt: skip
            written.add(write_json(path / f"{Path(picture.name).stem}.json", content, "choose another folder"))
            count += len(picture.regions)
        for file in set(path.glob("*.json")) - written:  # of pictures whose drawings are gone
            file.unlink()
        return count

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures of a folder, or of one file."""
        if not path.exists():
            raise InputError(f"{path}: is not there; expected a folder of labelme's JSON files")
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: holds no .json file; expected a folder of labelme's")
        for file in files:
            content = read_json(file)
            shapes = content.get("shapes") if isinstance(content, dict) else None
            if not isinstance(content, dict) or not isinstance(shapes, list):
                raise InputError(f"{file}: is no file of labelme; expected shapes")
            name = str(content.get("imagePath") or file.name).replace("\\", "/")
            size = size_of(name)
            if size is None:
                continue
            given = (content.get("imageHeight") or size[0], content.get("imageWidth") or size[1])
            require_size(f"{file}: {name}", given, size)
            yield Annotated(name, size, [_region(file, shape, size) for shape in shapes])


def _shape(one: Region) -> dict[str, object]:
    x, y, width, height = one.box
    png = io.BytesIO()
    Image.fromarray(one.mask.astype(np.uint8) * 255).save(png, "PNG")
    return {
        "label": one.class_name, "points": [[float(x), float(y)], [float(x + width - 1), float(y + height - 1)]],
        "group_id": None, "description": "", "shape_type": "mask", "flags": {},
        "mask": base64.b64encode(png.getvalue()).decode("ascii"),
    }  # fmt: skip


def _region(file: Path, shape: object, size: Size) -> Region:
    if not isinstance(shape, dict):
        raise InputError(f"{file}: found {str(shape)[:40]!r}; expected an object for every shape")
    label, kind = str(shape.get("label", "")), str(shape.get("shape_type") or "polygon")
    try:
        points = np.asarray(shape.get("points"), np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
            raise ValueError("points are no list of x, y")
        if kind == "mask":
            return _mask(label, points, str(shape.get("mask")), size)
        return Region.of(label, from_polygons([_corners(kind, points).ravel().tolist()], *size))
    except (ValueError, OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{file}: {kind} of {label!r} cannot be read ({reason})") from None


def _mask(label: str, points: NDArray[np.float64], text: str, size: Size) -> Region:
    x, y = (int(value) for value in points[0])
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        width, height = image.size
        if min(x, y) < 0 or x + width > size[1] or y + height > size[0]:
            raise ValueError(f"{width}x{height} pixels at {x}, {y} are outside of {size[1]}x{size[0]}")
        return Region(label, (x, y, width, height), np.asarray(image.convert("L")) > 0)


def _corners(kind: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    if kind == "polygon":
        return points
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        angles = np.linspace(0, 2 * np.pi, CIRCLE, endpoint=False)
        return points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    raise ValueError(f"a {kind} of {len(points)} points covers no pixels; expected mask, polygon, rectangle or circle")
