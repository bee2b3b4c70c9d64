"""The two pictures of one entry, and what is odd about them as a pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os.path import realpath
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusionsam.data import palettes
from fusionsam.data.images import read_heat, read_rgbt, read_visible_facts
from fusionsam.data.infrared import DEFAULT, PHOTOGRAPH, Heat, InfraredOptions, to_heat
from fusionsam.data.radiometric import read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.types import LARGEST, LUMA, SMALLEST, InputError, JsonObject, Notice


@dataclass
class ReadPair:
    """uint8 (3,H,W) and (1,H,W) as read; the sizes may still differ."""

    visible: Tensor | None
    infrared: Tensor | None
    facts: JsonObject = field(default_factory=dict)
    """How the files were read: plain JSON types."""
    notices: list[Notice] = field(default_factory=list)


def read_pair(entry: Entry, reading: InfraredOptions = DEFAULT) -> ReadPair:
    """Both pictures of an entry. Raises InputError for what cannot be read."""
    if entry.radiometric is not None:
        return _radiometric_pair(entry.radiometric, reading)
    if entry.rgbt is not None:
        visible, infrared = read_rgbt(entry.rgbt)
        heat = to_heat(infrared[0].numpy(), reading)
        return ReadPair(visible, torch.from_numpy(heat.pixels)[None], {"infrared": heat.facts}, heat.notices)
    seen, told = (None, {}) if entry.visible is None else read_visible_facts(entry.visible)
    warm = None if entry.infrared is None else read_heat(entry.infrared, reading)
    facts = {"visible": told} if told else {}
    if warm is None:
        return ReadPair(seen, None, facts)
    facts["infrared"] = warm.facts
    notices = [*warm.notices, *_odd(entry, seen, told, warm)]
    return ReadPair(seen, torch.from_numpy(warm.pixels)[None], facts, notices)


def _radiometric_pair(path: Path, reading: InfraredOptions) -> ReadPair:
    """The counts as heat and, where it is inside, the part of the visible picture that they cover, of one size: that of
    the visible part, or the camera's own, enlarged to what the network takes."""
    heat = read_heat(path, reading)
    file = read_radiometric(path)
    size = heat.pixels.shape
    visible = None
    if file.visible is not None:
        box = (0.0, 0.0, *file.visible.shape[1::-1])
        if file.alignment is not None:
            box = file.alignment.box(file.visible.shape[:2], size)
        else:
            heat.notices.append(
                Notice("no alignment", "the file does not tell how its two pictures lie; one was laid on the other")
            )
        size = (round(box[3] - box[1]), round(box[2] - box[0]))
        if not all(1 <= side <= LARGEST for side in size):  # a damaged scale would ask for any amount of memory
            raise InputError(
                f"{path}: its infrared picture lies over {size[1]}x{size[0]} pixels of its visible one; expected 1 to "
                f"{LARGEST} a side; give the file as the camera wrote it"
            )
        visible = _part(file.visible, box, size)
    factor = max(1, math.ceil(SMALLEST / min(size)))
    size = (size[0] * factor, size[1] * factor)
    if max(size) > LARGEST:
        raise InputError(
            f"{path}: holds {heat.pixels.shape[1]}x{heat.pixels.shape[0]} pixels of heat, {size[1]}x{size[0]} at a "
            f"size that the network takes; expected at most {LARGEST} a side; give the file as the camera wrote it"
        )
    visible = visible if visible is None or factor == 1 else _part(visible, (0, 0, *visible.shape[1::-1]), size)
    warm = np.asarray(Image.fromarray(heat.pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    facts = {"infrared": {**heat.facts, "size": list(heat.pixels.shape)}}
    seen = None if visible is None else torch.from_numpy(np.ascontiguousarray(visible.transpose(2, 0, 1)))
    return ReadPair(seen, torch.from_numpy(np.array(warm))[None], facts, heat.notices)


def _part(
    picture: NDArray[np.uint8], box: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """(H,W,3) resampled to `size` from the box x0, y0, x1, y1; black where it goes beyond the picture."""
    image = Image.fromarray(picture).transform(size[::-1], Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _odd(entry: Entry, visible: Tensor | None, told: JsonObject, heat: Heat) -> list[Notice]:
    """The same file twice, exchanged cameras, one camera alone turned."""
    if visible is None or entry.visible is None or entry.infrared is None:
        return []
    found = []
    if realpath(entry.visible) == realpath(entry.infrared) or _same(visible, heat):
        found.append(
            Notice(
                "one picture twice",
                f"{entry.visible} and {entry.infrared} hold the same picture; give the other camera",
            )
        )
    elif heat.facts.get("palette", {}).get("colors", 0) > PHOTOGRAPH and _is_grey(visible):
        found.append(
            Notice(
                "exchanged cameras",
                f"{entry.visible} is grey and {entry.infrared} a colour picture; exchange the two",
            )
        )
    turned = {str(path): facts.get("orientation", 1) for path, facts in
              ((entry.visible, told), (entry.infrared, heat.facts))}  # fmt: skip
    if len(set(turned.values())) > 1:
        first, second = (f"{path} {'says' if value != 1 else 'says no'} orientation{f' {value}' if value != 1 else ''}"
                         for path, value in turned.items())  # fmt: skip
        found.append(
            Notice(
                "one camera turned",
                f"{first}, {second} (EXIF or TIFF); each was turned by its own tag; if they do not match now, remove "
                "the tag from the one that has it",
            )
        )
    return found


def _is_grey(visible: Tensor) -> bool:
    return not palettes.is_colorful(visible.permute(1, 2, 0).numpy())


def _same(visible: Tensor, heat: Heat) -> bool:
    if heat.facts.get("kind") not in ("8-bit", "8-bit colour") or visible.shape[1:] != heat.pixels.shape:
        return False
    grey = visible.numpy()
    if (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all():
        return bool((grey[0] == heat.pixels).all() and np.ptp(heat.pixels) > 0)
    if heat.facts["kind"] == "8-bit" or "palette" not in heat.facts:
        return False
    weights = np.array(LUMA, dtype=np.float32)
    return bool((np.moveaxis(grey, 0, -1).astype(np.float32) @ weights).round().astype(np.uint8).tobytes()
                == heat.pixels.tobytes())  # fmt: skip
