"""Objects as Label Studio's JSON of tasks, and back (https://labelstud.io/guide/export#json). Masks are brush strokes
in its run-length code, exact; polygons and rectangles are read, too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from fusionsam.data.labelling.coco import read_json
from fusionsam.data.labelling.drawing import to_runs
from fusionsam.data.labelling.exchange import Annotated, Color, Region, Size, SizeOf, require_size
from fusionsam.data.labelling.polygons import from_polygons
from fusionsam.io import write_text
from fusionsam.types import InputError

_AREAS = {"brushlabels", "polygonlabels", "rectanglelabels"}
_REFUSED = {"keypointlabels", "ellipselabels", "vectorlabels", "bitmasklabels", "videorectangle"}
_SIZES = (3, 4, 8, 16)
"""Bits of a run's length; which of them, each run says in two bits."""


class LabelStudio:
    """Label Studio's tasks, for a `BrushLabels` named label on an `Image` named image."""

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """A task a picture; how many objects."""
        tasks, count = [], 0
        for picture in pictures:
            height, width = picture.size
            results = []
            for one in picture.regions:
                count += 1
                results.append(
                    {
                        "id": f"object{count}", "type": "brushlabels", "from_name": "label", "to_name": "image",
                        "origin": "manual", "image_rotation": 0, "original_width": width, "original_height": height,
                        "value": {"format": "rle", "rle": encode(one.whole(picture.size)),
                                  "brushlabels": [one.class_name]},
                    }
                )  # fmt: skip
            tasks.append({"data": {"image": picture.name}, "annotations": [{"result": results}]})
        write_text(path, json.dumps(tasks) + "\n", "choose another file")
        return count

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """The wanted pictures that somebody annotated: a task without an annotation, or with one that was cancelled, is
        no empty picture. InputError also for a task with two annotations: which of them counts?"""
        tasks = read_json(path)
        if not isinstance(tasks, list) or not all(
            isinstance(task, dict)
            and isinstance(task.get("data"), dict)
            and isinstance(task.get("annotations"), list)
            and all(isinstance(one, dict) for one in task["annotations"])
            for task in tasks
        ):
            raise InputError(f"{path}: is no list of tasks; export from Label Studio as JSON (not JSON-MIN)")
        for task in tasks:
            made = [one for one in task["annotations"] if not one.get("was_cancelled")]
            if not made:
                continue
            names = sorted(_names(task["data"]), key=lambda name: "." not in name)  # what looks like a file first
            known = (name for name in names if size_of(name, guess=True) is not None)
            name = next(known, names[0] if names else None)  # a task of no pair is told once
            size = None if name is None else size_of(name)
            if name is None or size is None:
                continue
            if len(made) > 1:
                raise InputError(f"{path}: {name}: has {len(made)} annotations; keep one")
            results = made[0].get("result")
            if not isinstance(results, list) or not all(isinstance(row, dict) for row in results):
                raise InputError(f"{path}: {name}: expected a list of results")
            yield Annotated(name, size, [region for row in results for region in _regions(path, name, row, size)])


def _names(data: Mapping[str, object]) -> Iterator[str]:
    """File names that a task's data may mean: of an upload, Label Studio puts eight digits before the name."""
    for value in data.values():
        if isinstance(value, str):
            name = re.split(r"[/\\=]", unquote(value))[-1]
            yield name
            yield re.sub(r"^[0-9a-f]{8}-", "", name)


def _regions(path: Path, picture: str, row: Mapping[str, object], size: Size) -> Iterator[Region]:
    kind, value = str(row.get("type")), row.get("value")
    if kind in _REFUSED:
        raise InputError(f"{path}: {picture}: {kind} cannot be read; expected {', '.join(sorted(_AREAS))}")
    if kind not in _AREAS:
        return  # choices and texts of the whole picture
    try:
        if not isinstance(value, Mapping):
            raise ValueError("expected a value")
        labels = value.get(kind)
        if not isinstance(labels, list) or len(labels) != 1:
            raise ValueError(f"expected one class in {kind}, found {labels!r}")
        require_size(f"{path}: {picture}", (row.get("original_height"), row.get("original_width")), size)
        yield Region.of(str(labels[0]), _mask(kind, value, size))
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {picture}: {kind} {row.get('id')!r} cannot be read ({reason})") from None


def _mask(kind: str, value: Mapping[str, object], size: Size) -> NDArray[np.bool_]:
    height, width = size
    if kind == "brushlabels":
        return decode(value["rle"], size)
    percent = np.array([width, height]) / 100
    if kind == "polygonlabels":
        corners = np.asarray(value["points"], np.float64) * percent
    else:
        x, y, wide, high = (float(str(value[key])) for key in ("x", "y", "width", "height"))
        turn = math.radians(float(str(value.get("rotation", 0))))  # clockwise round the upper left corner
        across = np.array([math.cos(turn), math.sin(turn)]) * wide * percent[0]
        down = np.array([-math.sin(turn), math.cos(turn)]) * high * percent[1]
        start = np.array([x, y]) * percent
        corners = np.array([start, start + across, start + across + down, start + down])
    # percents of a pixel's edge are fractions; what is meant is the edge
    return from_polygons([np.round(corners, 6).ravel().tolist()], height, width)


def encode(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H,W) as Label Studio's run-length code of a picture of four channels, all 0 or 255: its length in 32
    bits, the word size, four sizes of lengths, then runs of one value."""
    bits = [f"{4 * mask.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for number, count in enumerate(to_runs(mask)):
        word, left = f"{255 * (number % 2):08b}", 4 * count
        while left:
            index = next(i for i, size in enumerate(_SIZES) if min(left, 1 << _SIZES[-1]) <= 1 << size)
            run = min(left, 1 << _SIZES[index])
            bits.append(f"1{index:02b}{run - 1:0{_SIZES[index]}b}{word}")
            left -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode(code: object, size: Size) -> NDArray[np.bool_]:
    """Label Studio's run-length code as a mask (H,W): pixels whose fourth channel is not 0. ValueError unless it is of
    a picture of that size."""
    if not isinstance(code, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in code):
        raise ValueError("rle is no list of bytes")
    text, at = "".join(f"{byte:08b}" for byte in code), 0

    def take(count: int) -> int:
        nonlocal at
        if at + count > len(text):
            raise ValueError("rle ends too early")
        at += count
        return int(text[at - count : at], 2)

    total, word = take(32), take(5) + 1
    if total != 4 * size[0] * size[1]:
        raise ValueError(f"rle is of {total} values, expected {4 * size[0] * size[1]}")
    lengths = [take(4) + 1 for _ in range(4)]
    values, filled = np.zeros(total, bool), 0
    while filled < total:
        same = take(1)
        run = take(lengths[take(2)]) + 1
        if filled + run > total:
            raise ValueError("rle is too long")
        values[filled : filled + run] = take(word) if same else [take(word) for _ in range(run)]
        filled += run
    return values.reshape(*size, 4)[:, :, 3]
