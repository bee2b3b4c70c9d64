"""Prompts as a person gives them, from Python, a file or a request, and any prompts as JSON for a report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fusionsam.types import PROMPT_TENSORS, InputError, JsonObject, Prompts

Mode = Literal["self", "none"]
"""Prompts of the network's own, or none."""


def prompts_to_json(prompts: Prompts) -> JsonObject:
    """Source, points with labels (padding left out) and boxes of the first image, in pixels, one decimal; where any
    names a class, the ids of the classes beside them."""
    points: list[list[float]] = []
    labels: list[int] = []
    classes: list[int | None] = []
    if prompts.points is not None and prompts.point_labels is not None:
        named = _ids(prompts.point_classes, prompts.points.shape[1])
        for xy, label, index in zip(prompts.points[0].tolist(), prompts.point_labels[0].tolist(), named, strict=True):
            if label >= 0:
                points.append([round(v, 1) for v in xy])
                labels.append(int(label))
                classes.append(index)
    boxes = [] if prompts.boxes is None else [[round(v, 1) for v in box] for box in prompts.boxes[0].tolist()]
    found: JsonObject = {"source": prompts.source, "points": points, "labels": labels, "boxes": boxes}
    if prompts.point_classes is not None:
        found["classes"] = classes
    if prompts.box_classes is not None:
        found["box_classes"] = _ids(prompts.box_classes, len(boxes))
    return found


def _ids(classes: Tensor | None, count: int) -> list[int | None]:
    return [None] * count if classes is None else [int(v) if v >= 0 else None for v in classes[0].tolist()]


FORM = '{"points": [[x, y]], "labels": [1], "boxes": [[x0, y0, x1, y1]]}'
"""Of prompts, in a message."""


def prompts_file(prompts: str | None) -> Path | None:
    """The JSON file that --prompts names; None for self, none and nothing. InputError where there is no such file."""
    if prompts is None or prompts in ("self", "none"):
        return None
    if not Path(prompts).is_file():
        raise InputError(f"prompts {prompts}: neither self nor none nor a JSON file of the form {FORM}")
    return Path(prompts)


def prompt_mode(prompts: str | None) -> Mode | None:
    """What --prompts says where it names no file; None leaves it to the model's configuration."""
    return "self" if prompts == "self" else "none" if prompts == "none" else None


def read_prompts(path: Path, name: str, size: tuple[int, int], classes: Sequence[str] = ()) -> Prompts:
    """User prompts for the pair `name` of `size` (H, W) from a JSON file.

    {"points": [[x, y], ...], "labels": [1, 0, ...], "boxes": [[x0, y0, x1, y1], ...]} for every pair, or such an
    object under each pair's name. Labels: 1 on the object, 0 off it; all 1 when left out. "classes" names a class of
    `classes` (or its id, or null) for each point, "box_classes" for each box. InputError for anything else.
    """
    raw = _content(path)
    if _by_name(raw):
        if name not in raw:
            raise InputError(f"prompts {path}: holds no prompts for {name!r}; add them under that name")
        raw = raw[name]
    return prompts_from(raw, f"prompts {path}", repr(name), size, classes)


KEYS = ("points", "labels", "boxes", "classes", "box_classes")
"""What an object of prompts may hold."""
ANY_SIZE = (1 << 24, 1 << 24)


def require_clicks(path: Path, names: Collection[str], classes: Sequence[str], untaught: str | None) -> None:
    """InputError for a file of which no pair of `names` can take its prompts, and for one that names classes for a
    network that cannot use them: `untaught` says why and what to do, None = it can."""
    raw = _content(path)
    if not _by_name(raw):
        prompts_from(raw, f"prompts {path}", "every pair", ANY_SIZE, classes)
    elif not set(names) & set(raw):
        first = next(iter(names), "")
        raise InputError(f"prompts {path}: holds no prompts for {first!r} or any other pair; expected the "
                         f"form {FORM}, or such objects under the pairs' names")  # fmt: skip
    objects = [raw[name] for name in names if name in raw] if _by_name(raw) else [raw]
    lists = [found.get(key) for found in objects if isinstance(found, dict) for key in ("classes", "box_classes")]
    if untaught and any(given is not None for found in lists if isinstance(found, list) for given in found):
        raise InputError(f"prompts {path}: names a class; {untaught}")


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"prompts {path}: cannot be read ({error.strerror}); give self, none or a JSON file") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and brackets in brackets
        raise InputError(f"prompts {path}: not JSON ({error}); expected the form {FORM}") from None


def _by_name(raw: object) -> bool:
    """Whether it is an object of objects, under names of pairs."""
    return isinstance(raw, dict) and not set(KEYS) & set(raw)


def prompts_from(raw: object, where: str, owner: str, size: tuple[int, int], classes: Sequence[str] = ()) -> Prompts:
    """User prompts for a picture of `size` (H, W) from the object of `read_prompts`.

    `where` and `owner` name the source and the pair in the InputError for anything else."""
    if not isinstance(raw, dict) or not set(raw) <= set(KEYS) or not (raw.get("points") or raw.get("boxes")):
        raise InputError(f"{where}: expected points and labels, or boxes, for {owner}, in the form {FORM}")
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
    named = {"classes": points, "box_classes": arrays["boxes"]}
    ids = {key: _class_ids(raw.get(key), key, places, where, owner, classes) for key, places in named.items()}
    return Prompts(
        points=points,
        point_labels=labels,
        boxes=arrays["boxes"],
        source="user",
        point_classes=ids["classes"],
        box_classes=ids["box_classes"],
    )


def _class_ids(
    raw: object, key: str, places: Tensor | None, where: str, owner: str, classes: Sequence[str]
) -> Tensor | None:
    """Names, ids and nulls -> int64 (1,n), -1 for null; InputError for what is no class, and for another number."""
    if not raw:
        return None
    count = 0 if places is None else places.shape[1]
    if not isinstance(raw, list) or len(raw) != count:
        raise InputError(f"{where}: {key} of {owner} must be one class or null for each of its {count} prompts")
    found = []
    for given in raw:
        known = given in classes if isinstance(given, str) else given is None or type(given) is int
        if not known or (isinstance(given, int) and not 0 <= given < len(classes)):
            raise InputError(
                f"{where}: {key} of {owner} has {str(given)[:40]!r}, expected one of {', '.join(classes)}, or null"
            )
        found.append(-1 if given is None else classes.index(given) if isinstance(given, str) else int(given))
    return torch.tensor(found)[None]


def given_prompts(
    prompts: Prompts | Mapping[str, object] | Mode | None, size: tuple[int, int], classes: Sequence[str]
) -> tuple[Prompts | None, Mode | None]:
    """What a caller gave, as prompts of tensors for one pair of `size` (H, W), or as a mode, or neither; `classes` are
    the names of the network's.

    Raises InputError for anything else, prompts of more than one image, and labels other than 1, 0 and -1."""
    if prompts is None or isinstance(prompts, str):
        return None, prompts
    if isinstance(prompts, Mapping):
        plain = {key: _plain(value) for key, value in prompts.items()}
        return prompts_from(plain, "prompts", "this pair", size, classes), None
    if not isinstance(prompts, Prompts):
        raise InputError(f"prompts: found {type(prompts).__name__}; expected self, none, a Prompts or a dictionary")
    found = prompts.as_tensors()
    for name in PROMPT_TENSORS:
        value = getattr(found, name)
        if value is not None and len(value) != 1:
            raise InputError(f"prompts.{name}: found {len(value)} rows of prompts for 1 image; give one (batch of 1)")
    labels = [] if found.point_labels is None else found.point_labels.flatten().tolist()
    if strange := [label for label in labels if label not in (-1, 0, 1)]:
        raise InputError(f"prompts.point_labels: found {strange[0]}, expected 1 (on the object), 0 (off it) or -1")
    return found, None


def _plain(value: object) -> object:
    """Arrays, tensors and tuples, and lists of them, as lists."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
