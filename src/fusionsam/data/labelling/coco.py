"""Objects as a COCO file, and back (https://cocodataset.org/#format-data). Masks are written as run-length codes, which
are exact; polygons are read, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusionsam.data.labelling.drawing import Drawing
from fusionsam.data.labelling.folder import LabelFolder, pair_size
from fusionsam.errors import InputError
from fusionsam.io import write_json

LARGEST = 512 << 20
"""Bytes of a COCO file that is read."""


def _masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError('COCO: pycocotools is not installed; pip install "fusionsam[label]"') from None
    return mask


def write(path: str | Path, folder: LabelFolder) -> int:
    """Every object of the folder as one COCO file; how many. Pictures are named by their visible file (infrared where
    there is none), categories have the ids of the classes. InputError where it cannot be written."""
    tools = _masks()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, entry in enumerate(folder.entries, 1):
        file = entry.visible or entry.infrared
        assert file is not None
        height, width = pair_size(entry)
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        if not folder.progress[entry.id].objects:
            continue
        drawing = folder.open(entry)
        for one in drawing.objects():
            code = tools.encode(np.asfortranarray(drawing.instances == one["id"], dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": one["class"],
                    "segmentation": {"size": [height, width], "counts": code["counts"].decode("ascii")},
                    "area": one["pixels"],
                    "bbox": one["box"],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(folder.classes) if i]
    content = {"info": {"description": "labelled with fusionsam"}, "images": images, "annotations": annotations}
    write_json(path, {**content, "categories": categories}, "choose another --export-coco")
    return len(annotations)


def read(path: str | Path, folder: LabelFolder) -> tuple[int, int]:
    """Objects of a COCO file into the folder's pairs that have none yet, later ones over earlier ones; how many, and of
    how many pairs. Categories are found by name.

    InputError for a file that is not COCO, a category that the classes lack, a picture of another size, or a pair that
    is labelled already; then nothing is written."""
    tools, content = _masks(), _read(Path(path))
    classes = _categories(Path(path), content, folder)
    by_name = {file.name: entry for entry in folder.entries for file in (entry.visible, entry.infrared) if file}
    images = {image["id"]: image for image in content["images"]}
    drawings: dict[str, tuple[Any, Drawing]] = {}
    for one in content["annotations"]:
        image = images.get(one["image_id"])
        entry = None if image is None else by_name.get(Path(str(image["file_name"])).name)
        if image is None or entry is None:
            continue  # a file of many pictures may hold more than these
        height, width = pair_size(entry)
        if (image.get("height", height), image.get("width", width)) != (height, width):
            raise InputError(
                f"{path}: {image['file_name']} is {image['height']}x{image['width']}, the pair {height}x{width}"
            )
        if folder.progress[entry.id].objects:
            raise InputError(f"{path}: pair {entry.id!r} has objects already; choose another --out")
        drawing = drawings.setdefault(entry.id, (entry, Drawing.empty((height, width))))[1]
        mask = _decode(tools, one, height, width, str(path))
        if mask.any():
            number = len(drawing.classes) + 1
            drawing.instances[mask] = number
            drawing.classes[number] = classes[one["category_id"]]
    count = 0
    for entry, drawing in drawings.values():
        left = set(np.unique(drawing.instances).tolist())
        drawing.classes = {number: kind for number, kind in drawing.classes.items() if number in left}
        count += len(drawing.classes)
        folder.save(entry, drawing, "import", source=Path(path).name)
    return count, len(drawings)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: is larger than {LARGEST >> 20} MiB; split it")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())[:80]})") from None
    needed = {"images": {"id", "file_name"}, "annotations": {"image_id", "category_id"}, "categories": {"id", "name"}}
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= set(row) for row in rows):
            raise InputError(f"{path}: is no COCO file; expected {part} with {', '.join(sorted(keys))}")
    return dict(content)


def _categories(path: Path, content: dict[str, Any], folder: LabelFolder) -> dict[Any, int]:
    used = {one["category_id"] for one in content["annotations"]}
    found = {}
    for category in content["categories"]:
        name = str(category["name"])
        if name in folder.classes[1:]:
            found[category["id"]] = folder.classes.index(name)
        elif category["id"] in used:
            raise InputError(f"{path}: category {name!r} is not among the classes {', '.join(folder.classes[1:])}")
    if not used <= set(found):
        raise InputError(f"{path}: category {next(iter(used - set(found)))} is not listed; expected it in categories")
    return found


def _decode(tools: Any, one: dict[str, Any], height: int, width: int, path: str) -> NDArray[np.bool_]:
    shape = one.get("segmentation")
    try:
        if isinstance(shape, list):
            code = tools.merge(tools.frPyObjects([part for part in shape if len(part) >= 6], height, width))
        elif isinstance(shape, dict) and shape.get("size") == [height, width]:
            counts = shape["counts"]
            plain = counts if isinstance(counts, list) else _counts(counts)
            if min(plain, default=0) < 0 or sum(plain) != height * width:  # the library would write beyond its buffer
                raise ValueError(f"counts of {sum(plain)} pixels")
            if isinstance(counts, list):
                code = tools.frPyObjects(shape, height, width)
            else:
                code = {"size": [height, width], "counts": counts.encode("ascii")}
        else:
            raise ValueError("no segmentation of the picture's size")
        mask: NDArray[np.bool_] = tools.decode(code).astype(bool)
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
