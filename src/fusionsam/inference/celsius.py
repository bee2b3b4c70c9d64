"""Degrees Celsius of the classes of a radiometric pair."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.radiometric import read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.inference.prediction import Prediction
from fusionsam.io import whole
from fusionsam.types import JsonObject


def add_celsius(
    out: Path, entry: Entry, prediction: Prediction, keep: bool, moved: list[list[float]] | None = None
) -> JsonObject | None:
    """Least, mean and greatest temperature of each class that occurs, in degrees Celsius, at the size of the labels;
    None where the file has no constants. `moved` (3 x 3) is what --align maker did to the infrared pixels of that size,
    and temperatures follow. With `keep` NAME_celsius.tif (float32, the camera's own size) is written."""
    assert entry.radiometric is not None
    celsius = read_radiometric(entry.radiometric).celsius()
    if celsius is None:
        return None
    if keep:
        with whole(out / f"{entry.id}_celsius.tif") as part:
            part.write_bytes(celsius_tiff(celsius))
    return class_temperatures(celsius, prediction, moved)


def celsius_tiff(celsius: NDArray[np.float32]) -> bytes:
    """NAME_celsius.tif of degrees Celsius (H,W)."""
    data = io.BytesIO()
    tifffile.imwrite(data, celsius, metadata={"unit": "degrees Celsius"})
    return data.getvalue()


def class_temperatures(
    celsius: NDArray[np.float32], prediction: Prediction, moved: list[list[float]] | None = None
) -> JsonObject:
    """Least, mean and greatest of degrees Celsius (H,W) of all and of each class that occurs; plain JSON types. `moved`
    as in `add_celsius`."""
    height, width = prediction.labels.shape
    warm = np.asarray(Image.fromarray(celsius).resize((width, height), Image.Resampling.BILINEAR))
    if moved is not None:
        warp = Warp(Rig((height, width), (height, width), np.array(moved)))
        image, inside = warp(torch.from_numpy(warm.copy())[None])
        warm = torch.where(inside, image[0], torch.nan).numpy()
    found: JsonObject = {"unit": "degrees Celsius", "all": _range(celsius), "classes": {}}
    for index, name in enumerate(prediction.classes):
        if (inside := prediction.labels == index).any():
            found["classes"][name] = _range(warm[inside])
    return found


def _range(values: NDArray[np.float32]) -> dict[str, float] | None:
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    return {
        "min": round(float(known.min()), 2), "mean": round(float(known.mean()), 2), "max": round(float(known.max()), 2),
    }  # fmt: skip
