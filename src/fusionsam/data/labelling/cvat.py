"""Objects as "CVAT for images 1.1" XML, and back (https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/).
Masks are run-length codes, exact; boxes and polygons are read, too."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fusionsam.data.labelling.coco import LARGEST
from fusionsam.data.labelling.drawing import from_runs, to_runs
from fusionsam.data.labelling.exchange import Annotated, Color, Region, Size, SizeOf, require_size
from fusionsam.data.labelling.polygons import from_polygons
from fusionsam.io import write_text
from fusionsam.types import InputError

AREAS = ("mask", "polygon", "box")
"""Shapes that cover pixels. Tags and skeletons are left out; points, lines, ellipses and cuboids refused."""
_REFUSED = ("polyline", "points", "ellipse", "cuboid")


class Cvat:
    """CVAT's XML of pictures."""

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """Every object as a mask; how many."""
        root, count = ET.Element("annotations"), 0
        ET.SubElement(root, "version").text = "1.1"
        labels = ET.SubElement(ET.SubElement(ET.SubElement(root, "meta"), "task"), "labels")
        for name, color in list(zip(classes, palette, strict=True))[1:]:
            label = ET.SubElement(labels, "label")
            ET.SubElement(label, "name").text = name
            ET.SubElement(label, "color").text = "#{:02x}{:02x}{:02x}".format(*color)
            ET.SubElement(label, "attributes")
        for number, picture in enumerate(pictures):
            height, width = picture.size
            image = ET.SubElement(
                root, "image", id=str(number), name=picture.name, width=str(width), height=str(height)
            )
            for order, one in enumerate(picture.regions):
                left, top, wide, high = map(str, one.box)
                place = {"left": left, "top": top, "width": wide, "height": high, "z_order": str(order)}
                code = ", ".join(map(str, to_runs(one.mask)))
                told = {"label": one.class_name, "source": "manual", "occluded": "0", "rle": code, **place}
                ET.SubElement(image, "mask", told)
                count += 1
        ET.indent(root)
        text = ET.tostring(root, encoding="unicode")
        write_text(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n', "choose another file")
        return count

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures; shapes of higher `z_order` lie above."""
        for image in _root(path).findall("image"):
            name = image.get("name", "")
            size = size_of(name)
            if size is None:
                continue
            require_size(f"{path}: {name}", (_whole(path, image, "height"), _whole(path, image, "width")), size)
            for kind in _REFUSED:
                if image.find(kind) is not None:
                    raise InputError(
                        f"{path}: {name}: has {kind}, which covers no pixels; expected mask, polygon or box"
                    )
            shapes = sorted(
                (shape for shape in image if shape.tag in AREAS), key=lambda shape: _whole(path, shape, "z_order", 0)
            )
            yield Annotated(name, size, [_region(path, name, shape, size) for shape in shapes])


def _root(path: Path) -> ET.Element:
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: is larger than {LARGEST >> 20} MiB; split it")
        content = path.read_bytes()
        if b"<!" in content[:4096] and b"<!DOCTYPE" in content:  # entities could grow without bound
            raise InputError(f"{path}: declares a document type; expected CVAT's plain XML")
        root = ET.fromstring(content)
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as XML ({' '.join(str(error).split())[:80]})") from None
    if root.tag != "annotations":
        raise InputError(f"{path}: is no CVAT file; found <{root.tag[:40]}>, expected <annotations>")
    if root.find("track") is not None:
        raise InputError(f"{path}: is CVAT for video; export the task as CVAT for images 1.1")
    return root


def _whole(path: Path, element: ET.Element, key: str, default: int | None = None) -> int:
    value = element.get(key)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise InputError(f"{path}: <{element.tag}> has {key} {value!r}; expected a whole number") from None


def _region(path: Path, picture: str, shape: ET.Element, size: Size) -> Region:
    label = shape.get("label", "")
    height, width = size
    try:
        if shape.tag == "mask":
            x, y, wide, high = box = tuple(_whole(path, shape, key) for key in ("left", "top", "width", "height"))
            if min(box) < 0 or x + wide > width or y + high > height:
                raise InputError(f"found {list(box)}; expected it inside of {width}x{height} pixels")
            runs = [int(value) for value in shape.get("rle", "").split(",")]
            return Region(label, (x, y, wide, high), from_runs(runs, high, wide))
        if shape.tag == "box":
            x0, y0, x1, y1 = (float(shape.get(key, "nan")) for key in ("xtl", "ytl", "xbr", "ybr"))
            turn = float(shape.get("rotation", 0))
            corners = _turned([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], turn)
        else:
            points = (point.split(",") for point in shape.get("points", "").split(";"))
            corners = [(float(px), float(py)) for px, py in points]
        return Region.of(label, from_polygons([np.ravel(corners).tolist()], height, width))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {picture}: {shape.tag} of {label!r} cannot be read ({reason})") from None


def _turned(corners: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    """Corners turned clockwise round their middle, as CVAT's rotated boxes."""
    middle = np.mean(corners, 0)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    moved = np.asarray(corners) - middle
    turned = np.stack([moved[:, 0] * cosine - moved[:, 1] * sine, moved[:, 0] * sine + moved[:, 1] * cosine], 1)
    return [(float(x), float(y)) for x, y in turned + middle]
