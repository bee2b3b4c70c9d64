"""The paths of the Open Inference Protocol (KServe V2, as Triton has it) beside the server's own: tensors in, tensors
out, as JSON or binary behind it.

Protocol: github.com/kserve/open-inference-protocol, with its binary tensor data extension.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from torch import Tensor

from fusionsam.inference.prediction import Prediction
from fusionsam.server.jobs import Images, Predict
from fusionsam.server.middleware import error
from fusionsam.server.service import Service
from fusionsam.server.uploads import MAX_FIELD, check_sizes, parse_json, prompts_in, read_body
from fusionsam.types import VERSION, InputError, JsonObject

HEADER = "inference-header-content-length"
"""Bytes of JSON at the head of a body whose tensors follow in binary."""
INPUTS = {"visible": 3, "infrared": 1}
"""Name -> channels; UINT8, or FP32 in [0,1]."""
OUTPUTS = {"fused": ("UINT8", [-1, 3, -1, -1]), "labels": ("UINT8", [-1, -1, -1]), "confidence": ("FP32", [-1, -1, -1])}
KINDS: dict[str, np.dtype[np.generic]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
Array = NDArray[np.uint8] | NDArray[np.float32]


@dataclass
class Asked:
    """One inference request."""

    id: str
    pairs: list[Images]
    prompts: str | None
    outputs: dict[str, bool]  # name -> whether its data is wanted in binary


def add_paths(app: FastAPI, service: Service) -> None:
    """Put the protocol's paths into `app`."""
    name = service.model.name

    def require(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"model {model[:40]!r}: not served here; the one that is: {name}")

    @app.get("/v2")
    async def server() -> JsonObject:
        """Name, version and extensions of the server."""
        return {"name": "fusionsam", "version": VERSION, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    async def live() -> JsonObject:
        """The process answers."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """New work is taken; 503 during shutdown."""
        return JSONResponse({"ready": True}) if service.ready else error(503, "the server takes no new work")

    @app.get("/v2/models/{model}/ready")
    async def model_ready(model: str) -> JSONResponse:
        """The same of the one model."""
        require(model)
        return await ready()

    @app.get("/v2/models/{model}")
    async def metadata(model: str) -> JsonObject:
        """Tensors in and out, and the classes."""
        require(model)
        return describe(name, service.model.config.classes)

    @app.post("/v2/models/{model}/infer")
    async def infer(request: Request, model: str) -> Response:
        """Fuse and label a batch of pairs. Either input may be left out."""
        require(model)
        if (packed := request.headers.get("content-encoding", "identity")) != "identity":
            raise HTTPException(415, f"content-encoding: found {packed[:40]}, expected none; send it uncompressed")
        header = request.headers.get(HEADER)
        with await service.arrived(request, read_body) as body:

            async def work() -> Response:
                asked = await service.thread(parse, body, header, service)
                prompts = prompts_in(asked.prompts, asked.pairs[0].size, service.model.config.classes)
                found = await asyncio.gather(*(service.result(Predict(pair, prompts)) for pair in asked.pairs))
                return await service.thread(answer, asked, found, name)

            return await service.accepted(request, work)


def describe(name: str, classes: list[str]) -> JsonObject:
    """The model's metadata."""
    return {
        "name": name,
        "platform": "pytorch",
        "inputs": [{"name": key, "datatype": "UINT8", "shape": [-1, n, -1, -1]} for key, n in INPUTS.items()],
        "outputs": [{"name": key, "datatype": kind, "shape": shape} for key, (kind, shape) in OUTPUTS.items()],
        "parameters": {"classes": ",".join(classes)},
    }


# -- requests ------------------------------------------------------------------------------------------------------


def parse(body: IO[bytes], header: str | None, service: Service) -> Asked:
    """A request's pairs, within the server's limits. Blocking. InputError or HTTPException 422 for what is wrong."""
    if header is not None and not (header.isdigit() and int(header) <= MAX_FIELD):
        raise InputError(f"{HEADER}: found {header[:20]}, expected the JSON's bytes, at most {MAX_FIELD}")
    raw = parse_json(body.read() if header is None else body.read(int(header)), "the body")
    if not isinstance(raw, dict):
        raise InputError("the body: expected an object with inputs")
    parameters = raw.get("parameters") or {}
    if not isinstance(parameters, dict) or not isinstance(prompts := parameters.get("prompts"), str | None):
        raise InputError("parameters: expected an object whose prompts is text: self, none, or JSON")
    tensors: dict[str, Tensor] = {}
    for item in _objects(raw, "inputs"):
        name, tensor = _tensor(item, body, service.config.max_pixels)
        if name in tensors:
            raise InputError(f"inputs: {name} is there twice; send it once")
        tensors[name] = tensor
    if body.read(1):
        raise InputError("the body: bytes are left after the last input; binary_data_size and the data differ")
    id = raw.get("id", "")
    if not isinstance(id, str) or len(id) > 256:
        raise InputError("id: expected text of at most 256 characters")
    return Asked(id, _pairs(tensors, service), prompts, _outputs(raw, bool(parameters.get("binary_data_output"))))


def _objects(raw: JsonObject, key: str) -> list[JsonObject]:
    items = raw.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{key}: expected a list of objects, at least one")
    return items


def _tensor(item: JsonObject, body: IO[bytes], max_pixels: int) -> tuple[str, Tensor]:
    name, kind, shape = item.get("name"), item.get("datatype"), item.get("shape")
    if not isinstance(name, str) or name not in INPUTS:
        raise InputError(f"inputs: {str(name)[:40]!r} is not known; send {' and '.join(INPUTS)}, or one of them")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{name}: datatype {str(kind)[:20]!r}, expected UINT8, or FP32 in [0, 1]")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{name}: shape {str(shape)[:60]}, expected [batch, {INPUTS[name]}, height, width]")
    if shape[1] != INPUTS[name]:
        raise InputError(f"{name}: shape {shape}, expected {INPUTS[name]} channels in second place")
    check_sizes({name: (shape[2], shape[3])})
    if shape[2] * shape[3] > max_pixels:
        raise InputError(f"{name}: {shape[2]}x{shape[3]} pixels, expected at most {max_pixels} in all")
    dtype = KINDS[kind]
    parameters = item.get("parameters") or {}
    bytes_ = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if bytes_ is None:
        array = _of_json(name, item.get("data"), dtype, math.prod(shape))
    else:
        wanted = math.prod(shape) * dtype.itemsize
        data = body.read(wanted) if bytes_ == wanted else b""
        if len(data) != wanted:
            raise InputError(f"{name}: binary_data_size {str(bytes_)[:20]} or its data, expected {wanted} bytes")
        array = np.frombuffer(bytearray(data), dtype)
    if kind == "FP32" and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{name}: values outside of 0 to 1, or nan; divide by the largest value that there can be")
    return name, torch.from_numpy(array.reshape(shape))


def _of_json(name: str, data: object, dtype: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
    """Numbers of a (nested) list; none is rounded or wrapped."""
    try:
        found = np.asarray(data)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    numbers = "iu" if dtype.kind == "u" else "iuf"
    if found.dtype.kind not in numbers or found.size != count:
        raise InputError(
            f"{name}: data of {found.size} values ({found.dtype}), expected {count} numbers of its datatype"
        )
    if dtype.kind == "u" and (found.min() < 0 or found.max() > 255):
        raise InputError(f"{name}: UINT8 data outside of 0 to 255")
    return np.ascontiguousarray(found.ravel(), dtype)


def _pairs(tensors: dict[str, Tensor], service: Service) -> list[Images]:
    batches = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(batches.values())) > 1:
        raise InputError(f"inputs: batches of {batches['visible']} visible and {batches['infrared']} infrared images")
    if (batch := next(iter(batches.values()))) > service.config.max_batch:
        raise InputError(f"inputs: a batch of {batch}, expected at most {service.config.max_batch}")
    check_sizes({name: (t.shape[2], t.shape[3]) for name, t in tensors.items()}, service.aligner is None)
    visible, infrared = (tensors.get(name) for name in INPUTS)
    pairs = [
        Images(None if visible is None else visible[i], None if infrared is None else infrared[i]) for i in range(batch)
    ]
    if service.aligner is None:
        return pairs
    if any(tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError("inputs: FP32, but this server aligns pairs; send UINT8")
    aligned = [service.aligner(pair.visible, pair.infrared) for pair in pairs]
    return [Images(pair.visible, pair.infrared, covered=pair.covered, alignment=pair.told) for pair in aligned]


def _outputs(raw: JsonObject, binary: bool) -> dict[str, bool]:
    """All of them unless some are asked for."""
    if not raw.get("outputs"):
        return dict.fromkeys(OUTPUTS, binary)
    wanted: dict[str, bool] = {}
    for item in _objects(raw, "outputs"):
        name, parameters = item.get("name"), item.get("parameters") or {}
        if not isinstance(name, str) or name not in OUTPUTS or not isinstance(parameters, dict):
            raise InputError(f"outputs: {str(name)[:40]!r} is not known; choose among {', '.join(OUTPUTS)}")
        wanted[name] = bool(parameters.get("binary_data", binary))
    return wanted


# -- answers -------------------------------------------------------------------------------------------------------


def answer(asked: Asked, found: Sequence[Prediction], model: str) -> Response:
    """The wanted outputs of all pairs. Blocking."""
    outputs: list[JsonObject] = []
    parts: list[bytes] = []
    for name, binary in asked.outputs.items():
        kind = OUTPUTS[name][0]
        array = np.stack([_output(one, name) for one in found]).astype(KINDS[kind], copy=False)
        item: JsonObject = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if binary:
            parts.append(array.tobytes())
            item["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            item["data"] = array.ravel().tolist()
        outputs.append(item)
    told: JsonObject = {"model_name": model, **({"id": asked.id} if asked.id else {}), "outputs": outputs}
    head = json.dumps(told).encode()
    if not parts:
        return Response(head, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Response(b"".join([head, *parts]), headers=headers, media_type="application/octet-stream")


def _output(prediction: Prediction, name: str) -> Array:
    if name == "fused":
        return np.ascontiguousarray(prediction.fused.transpose(2, 0, 1))
    return prediction.labels if name == "labels" else prediction.confidence
