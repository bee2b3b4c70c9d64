"""Degrees Celsius of the classes of a radiometric pair."""

from __future__ import annotations

import io

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.inference.prediction import Prediction
from fusionsam.types import JsonObject


def celsius_tiff(celsius: NDArray[np.float32]) -> bytes:
    """NAME_celsius.tif of degrees Celsius (H,W)."""
    data = io.BytesIO()
    tifffile.imwrite(data, celsius, metadata={"unit": "degrees Celsius"})
    return data.getvalue()


def class_temperatures(
    celsius: NDArray[np.float32], prediction: Prediction, moved: list[list[float]] | None = None
) -> JsonObject:
    """Least, mean and greatest of degrees Celsius (H,W) of all and of each class that occurs, at the size of the
    labels; plain JSON types. `moved` (3 x 3) is what --align maker did to the infrared pixels of that size, and
    temperatures follow."""
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
