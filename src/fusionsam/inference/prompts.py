"""Prompts as JSON: a person's points and boxes from a file or a request, and any prompts for a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionsam.errors import InputError
from fusionsam.types import Prompts


def prompts_to_json(prompts: Prompts) -> dict[str, Any]:
    """Source, points with labels (padding left out) and boxes of the first image, in pixels, one decimal."""
    points: list[list[float]] = []
    labels: list[int] = []
    if prompts.points is not None and prompts.point_labels is not None:
        for xy, label in zip(prompts.points[0].tolist(), prompts.point_labels[0].tolist(), strict=True):
            if label >= 0:
                points.append([round(v, 1) for v in xy])
                labels.append(int(label))
    boxes = [] if prompts.boxes is None else [[round(v, 1) for v in box] for box in prompts.boxes[0].tolist()]
    return {"source": prompts.source, "points": points, "labels": labels, "boxes": boxes}


def prompts_file(prompts: str | None) -> Path | None:
    """The JSON file that --prompts names; None for self, none and nothing. InputError where there is no such file."""
    if prompts is None or prompts in ("self", "none"):
        return None
    if not Path(prompts).is_file():
        raise InputError(f"prompts {prompts}: neither self nor none nor a JSON file; see the README for its form")
    return Path(prompts)


def read_prompts(path: Path, name: str, size: tuple[int, int]) -> Prompts:
    """User prompts for the pair `name` of `size` (H, W) from a JSON file.

    {"points": [[x, y], ...], "labels": [1, 0, ...], "boxes": [[x0, y0, x1, y1], ...]} for every pair, or such an
    object under each pair's name. Labels: 1 on the object, 0 off it; all 1 when left out. InputError for anything else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"prompts {path}: cannot be read ({error.strerror}); give self, none or a JSON file") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and brackets in brackets
        raise InputError(f"prompts {path}: not JSON ({error}); see the README for the form") from None
    known = {"points", "labels", "boxes"}
    if isinstance(raw, dict) and not known & set(raw):
        if name not in raw:
            raise InputError(f"prompts {path}: holds no prompts for {name!r}; add them under that name")
        raw = raw[name]
    return prompts_from(raw, f"prompts {path}", repr(name), size)


def prompts_from(raw: Any, where: str, owner: str, size: tuple[int, int]) -> Prompts:
    """User prompts for a picture of `size` (H, W) from the object {"points", "labels", "boxes"} of `read_prompts`.

    `where` and `owner` name the source and the pair in the InputError for anything else."""
    keys = ("points", "labels", "boxes")
    if not isinstance(raw, dict) or not set(raw) <= set(keys) or not (raw.get("points") or raw.get("boxes")):
        raise InputError(f"{where}: expected points and labels, or boxes, for {owner}; see the README")
    height, width = size
    arrays: dict[str, Tensor | None] = {"points": None, "boxes": None}
    for key, columns in (("points", 2), ("boxes", 4)):
        if not raw.get(key):
            continue
        try:
            array = torch.tensor(raw[key], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # the last two: integers beyond any float
            array = torch.empty(0)
        if array.ndim != 2 or array.shape[1] != columns or not bool(array.isfinite().all()):
            raise InputError(f"{where}: {key} of {owner} must be a list of {columns} numbers each")
        limit = torch.tensor([width, height] * (columns // 2))
        if columns == 4 and bool((array[:, :2] > array[:, 2:]).any()):
            raise InputError(f"{where}: boxes of {owner} must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
        if columns == 4:  # a box may be given by its edges, which end at W and H
            array[:, 2:] = torch.where(array[:, 2:] == limit[2:], array[:, 2:] - 1, array[:, 2:])
        if bool((array < 0).any()) or bool((array >= limit).any()):
            raise InputError(f"{where}: {key} of {owner} lie outside of its {width}x{height} pixels")
        arrays[key] = array[None]
    points = arrays["points"]
    labels = None
    if points is not None:
        given = raw.get("labels", [1] * points.shape[1])
        if not isinstance(given, list) or len(given) != points.shape[1] or any(g not in (0, 1) for g in given):
            raise InputError(f"{where}: labels of {owner} must be one 0 or 1 for each of its points")
        labels = torch.tensor([int(g) for g in given])[None]
    return Prompts(points=points, point_labels=labels, boxes=arrays["boxes"], source="user")
