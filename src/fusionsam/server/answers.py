"""Predictions as bytes: JSON with PNGs inside, or a zip. Blocking."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from typing import Literal

import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fusionsam.inference.prediction import Prediction
from fusionsam.inference.render import confidence_map

Kind = Literal["application/json", "application/zip"]
KINDS: tuple[Kind, ...] = ("application/json", "application/zip")
PICTURES = ("fused", "labels", "overlay", "confidence")


def wanted_kind(accept: str) -> Kind:
    """The kind of answer an Accept header prefers (RFC 9110, 12.5.1); JSON where it does not care, else HTTP 406."""
    ranges: dict[str, float] = {}
    for item in (accept or "*/*").split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        ranges[name] = quality

    def quality_of(kind: str) -> float:
        return next((ranges[name] for name in (kind, "application/*", "*/*") if name in ranges), 0.0)

    best = max(KINDS, key=quality_of)
    if quality_of(best) <= 0:
        raise HTTPException(406, f"accept: found {accept[:80]!r}, expected {' or '.join(KINDS)}")
    return best


def wanted_pictures(names: str) -> list[str]:
    """'fused,labels' -> its names, each once; HTTP 422 for one that is not known."""
    found = list(dict.fromkeys(name for name in names.split(",") if name))
    strange = [name for name in found if name not in PICTURES]
    if strange:
        raise HTTPException(422, f"images: {strange[0][:40]!r} is not known; choose among {', '.join(PICTURES)}")
    return found


def answer(
    prediction: Prediction, pictures: list[str], kind: Kind, status: int = 200, head: dict[str, object] | None = None
) -> Response:
    """`head` and the summary, with the `pictures` as base64 PNGs under `images`, or as NAME.png in a zip."""
    result = {**(head or {}), **prediction.summary()}
    files = {name: _png(_picture(prediction, name)) for name in pictures}
    if kind == "application/zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNGs do not shrink further
            archive.writestr("result.json", json.dumps(result, indent=1))
            for name, data in files.items():
                archive.writestr(f"{name}.png", data)
        return Response(buffer.getvalue(), status, media_type=kind)
    result["images"] = {name: base64.b64encode(data).decode() for name, data in files.items()}
    return Response(json.dumps(result), status, media_type=kind)


def _picture(prediction: Prediction, name: str) -> Image.Image:
    if name == "overlay":  # a person's own clicks belong in the picture, as in `fusionsam predict`
        return prediction.overlay(show_prompts=prediction.prompts.source == "user")
    if name == "confidence":
        return Image.fromarray(np.asarray(confidence_map(prediction.confidence)))
    return Image.fromarray(prediction.fused if name == "fused" else prediction.labels)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
