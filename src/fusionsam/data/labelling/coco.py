"""Objects as a COCO file, and back (https://cocodataset.org/#format-data), masks by pycocotools: run-length codes, or
polygons as `polygons` has them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusionsam.data.labelling.exchange import Annotated, Color, Region, Size, SizeOf, require_size
from fusionsam.data.labelling.polygons import coco_masks, from_polygons, to_polygons
from fusionsam.io import write_json
from fusionsam.types import InputError

LARGEST = 512 << 20
"""Bytes of a file that is read."""
Row = Mapping[str, object]


@dataclass(frozen=True)
class Coco:
    """COCO files; with `polygons` written as polygons, not as run-length codes. Both are read."""

    polygons: bool = False

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """Every object; how many. Categories have the ids of the classes."""
        tools = coco_masks()
        images: list[Row] = []
        annotations: list[Row] = []
        for number, picture in enumerate(pictures, 1):
            height, width = picture.size
            images.append({"id": number, "file_name": picture.name, "height": height, "width": width})
            for one in picture.regions:
                if self.polygons:
                    segmentation: object = to_polygons(one.mask, one.box[0], one.box[1])
                else:
                    code = tools.encode(np.asfortranarray(one.whole(picture.size), dtype=np.uint8))
                    segmentation = {"size": [height, width], "counts": code["counts"].decode("ascii")}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": classes.index(one.class_name),
                        "segmentation": segmentation,
                        "area": int(one.mask.sum()),
                        "bbox": list(one.box),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(classes) if i]
        content = {"info": {"description": "labelled with fusionsam"}, "images": images, "annotations": annotations}
        write_json(path, {**content, "categories": categories}, "choose another file")
        return len(annotations)

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures."""
        content = _content(path)
        names = _names(path, content)
        of_image = defaultdict(list)
        for one in content["annotations"]:
            of_image[one["image_id"]].append(one)
        for image in content["images"]:
            name = str(image["file_name"])
            size = size_of(name)
            if size is None or image["id"] not in of_image:
                continue
            height, width = size
            require_size(f"{path}: {name}", (image.get("height", height), image.get("width", width)), size)
            rows = of_image[image["id"]]
            yield Annotated(
                name, size, [Region.of(names[one["category_id"]], _decode(one, size, str(path))) for one in rows]
            )


def read_json(path: Path) -> object:
    """The content of a JSON file; InputError for one that is too large, or none."""
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: is larger than {LARGEST >> 20} MiB; split it")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())[:80]})") from None


def _content(path: Path) -> dict[str, list[dict[str, object]]]:
    content = read_json(path)
    needed = {"images": {"id", "file_name"}, "annotations": {"image_id", "category_id"}, "categories": {"id", "name"}}
    found = {}
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= set(row) for row in rows):
            raise InputError(f"{path}: is no COCO file; expected {part} with {', '.join(sorted(keys))}")
        for row in rows:
            if any(isinstance(row[key], dict | list) for key in keys):
                raise InputError(f"{path}: is no COCO file; expected numbers and names in {part}")
        found[part] = rows
    return found


def _names(path: Path, content: Mapping[str, Sequence[Row]]) -> dict[object, str]:
    """Class name of every category; InputError for one, or an image, that is used but not listed, or listed twice."""
    for part, key in (("categories", "category_id"), ("images", "image_id")):
        ids = Counter(row["id"] for row in content[part])
        if twice := [id for id, count in ids.items() if count > 1]:
            raise InputError(f"{path}: lists the id {twice[0]!r} twice in {part}; expected each once, renumber them")
        for one in content["annotations"]:
            if one[key] not in ids:
                raise InputError(
                    f"{path}: annotation {one.get('id')}: {key} {one[key]!r} is not listed; expected an id of {part} "
                    f"(first: {next(iter(ids), None)!r}); add it there, or remove the annotation"
                )
    return {row["id"]: str(row["name"]) for row in content["categories"]}


def _decode(one: Row, size: Size, path: str) -> NDArray[np.bool_]:
    tools, shape = coco_masks(), one.get("segmentation")
    height, width = size
    try:
        if isinstance(shape, list):
            return from_polygons([part for part in shape if len(part) >= 6], height, width)
        if not isinstance(shape, dict) or shape.get("size") != [height, width]:
            raise ValueError("no segmentation of the picture's size")
        counts = shape["counts"]
        plain = counts if isinstance(counts, list) else _counts(counts)
        if min(plain, default=0) < 0 or sum(plain) != height * width:  # the library would write beyond its buffer
            raise ValueError(f"counts of {sum(plain)} pixels")
        if isinstance(counts, list):
            code = tools.frPyObjects(shape, height, width)
        else:
            code = {"size": [height, width], "counts": counts.encode("ascii")}
        mask: NDArray[np.bool_] = tools.decode(code).astype(bool)
    except InputError:
        raise
    except Exception as error:  # the library raises what its C code meets
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: annotation {one.get('id')}: no mask of {height}x{width} ({reason})") from None
    return mask


def _counts(text: str) -> list[int]:
    """The counts in COCO's compressed string: five bits a character, from the third on as differences."""
    counts: list[int] = []
    value = bits = 0
    for character in text.encode("ascii"):
        code = character - 48
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << bits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    return counts
