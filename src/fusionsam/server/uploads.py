"""From bytes on the wire to images, within limits: nothing is decoded before its size is known to be small enough.

Raises HTTPException 400 (form), 408 (too slow), 413 (too many bytes), 415 (no form), 422 (no such image).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from fusionsam.alignment.apply import Aligner
from fusionsam.data.image_files import MAX_PIXELS, image_size
from fusionsam.data.pairs import ReadPair, read_pair
from fusionsam.data.radiometric import read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.inference.prompts import Mode, prompts_from
from fusionsam.server.jobs import Images
from fusionsam.types import LARGEST, SMALLEST, InputError, JsonObject, Prompts, told_of

IMAGES = ("visible", "infrared", "rgbt", "radiometric")
BOTH = ("rgbt", "radiometric")
"""Fields whose file holds both images."""
MAX_FIELD = 64 * 1024
"""Bytes of a text field, and of a JSON body."""
MAX_MEMORY = 2**20
"""Bytes of a body that are held in memory; what is larger lies on disk."""
Body = tempfile.SpooledTemporaryFile[bytes]
MAX_PROMPTS = 256
"""Points and boxes of one request."""
MODES: dict[str, Mode] = {"self": "self", "none": "none"}
DRAINED = 256 * 2**20
"""Bytes of a refused body that are read and thrown away, so that the client gets to read the answer."""


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; HTTPException 413 once they exceed `limit` bytes, after the rest was thrown away."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        await drain(request)
        raise _too_large(limit)
    read, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        read += len(chunk)
        if read > limit:
            if more:
                await drain(request)
            raise _too_large(limit)
        yield chunk


async def drain(request: Request, seconds: float = 30.0) -> None:
    """Read and drop what is left of a body: closing with unread bytes would reset the connection, answer and all."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return  # this client waits for our word before it sends
    dropped = 0
    try:
        async with asyncio.timeout(seconds):
            while dropped < DRAINED:
                message = await request.receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the request body is larger than {limit} bytes; send smaller images")


async def read_form(request: Request, limit: int, seconds: float) -> FormData:
    """The multipart form of at most `limit` bytes that arrives within `seconds`; its files may lie on disk."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise HTTPException(
            415, f"content-type: found {kind[:80] or 'none'}, expected multipart/form-data with the images"
        )
    parser = MultiPartParser(
        request.headers, limited(request, limit), max_files=2, max_fields=2, max_part_size=MAX_FIELD
    )
    try:
        async with asyncio.timeout(seconds):
            form = await parser.parse()
    except TimeoutError:
        raise _too_slow(seconds) from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection closed before the whole body had arrived") from None
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message.rstrip('.')}") from None
    except OSError as error:  # large files go to disk while they arrive
        raise _not_stored(error) from None
    except (ValueError, KeyError, LookupError, AttributeError, TypeError) as error:  # of headers within the form
        raise HTTPException(
            400, f"the form cannot be read ({type(error).__name__}); send multipart/form-data"
        ) from None
    try:
        _check_fields(form)
    except HTTPException:
        await form.close()
        raise
    return form


def _check_fields(form: FormData) -> None:
    names = [name for name, _ in form.multi_items()]
    for name, value in form.multi_items():
        if name not in (*IMAGES, "prompts"):
            raise HTTPException(422, f"field {name[:40]!r}: not known; send {', '.join(IMAGES)} or prompts")
        if names.count(name) > 1:
            raise HTTPException(422, f"field {name!r}: sent {names.count(name)} times; send it once")
        if isinstance(value, UploadFile) != (name in IMAGES):
            wanted = "a file (with a filename)" if name in IMAGES else "text without a filename"
            raise HTTPException(422, f"field {name!r}: expected {wanted}")
    if not set(names) & set(IMAGES):
        raise HTTPException(422, "neither visible nor infrared was sent; send at least one image file")
    images = [name for name in names if name in IMAGES]
    if (alone := next((name for name in BOTH if name in names), None)) and len(images) > 1:
        others = " and ".join(sorted(set(images) - {alone}))
        raise HTTPException(422, f"{alone} holds both images; leave {others} out")


async def read_json(request: Request, seconds: float) -> object:
    """A small JSON body."""
    with await read_body(request, MAX_FIELD, seconds) as body:
        return parse_json(body.read(), "the body")


async def read_body(request: Request, limit: int, seconds: float) -> Body:
    """A body of at most `limit` bytes that arrives within `seconds`, as a file at its beginning; large ones lie on
    disk."""
    body: Body = tempfile.SpooledTemporaryFile(MAX_MEMORY)  # noqa: SIM115 (it is handed on)
    try:
        async with asyncio.timeout(seconds):
            async for chunk in limited(request, limit):
                body.write(chunk)
        body.seek(0)
        return body
    except BaseException as error:
        body.close()
        if isinstance(error, TimeoutError):
            raise _too_slow(seconds) from None
        if isinstance(error, ClientDisconnect):
            raise HTTPException(400, "the connection closed before the whole body had arrived") from None
        if isinstance(error, OSError):
            raise _not_stored(error) from None
        raise


def _too_slow(seconds: float) -> HTTPException:
    return HTTPException(408, f"the request body did not arrive within {seconds:g} s; send it faster")


def _not_stored(error: OSError) -> HTTPException:
    reason = error.strerror or type(error).__name__
    return HTTPException(503, f"the upload cannot be stored ({reason}); try again in 30 s", {"Retry-After": "30"})


def parse_json(raw: str | bytes, what: str) -> object:
    """`raw` as JSON, or HTTPException 422."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"{what}: not JSON ({str(error)[:80]}); see /docs for the form") from None


def decode_images(form: FormData, max_pixels: int, aligner: Aligner | None = None) -> Images:
    """The form's images, upright and of equal size, into which `aligner` brings those of two cameras. Blocking; every
    header is judged before any pixel is decoded.

    Raises InputError that speaks of the field, not of the name the client gave its file: names are never used."""
    with tempfile.TemporaryDirectory(prefix="fusionsam-") as folder:
        paths: dict[str, Path] = {}
        for name, upload in form.multi_items():
            if isinstance(upload, UploadFile):
                paths[name] = Path(folder) / name
                with paths[name].open("wb") as target:
                    shutil.copyfileobj(upload.file, target)
        try:
            most = min(max_pixels, MAX_PIXELS)
            sizes = {name: image_size(path, most, as_infrared=name == "infrared") for name, path in paths.items()}
            if "radiometric" in paths:
                return _radiometric(paths["radiometric"], most)
            check_sizes(sizes, aligner is None)
            images = _read(paths)
            if aligner is None or images.visible is None or images.infrared is None:
                return images
            pair = aligner(images.visible, images.infrared)
            return Images(pair.visible, pair.infrared, covered=pair.covered, alignment=pair.told, input=images.input)
        except InputError as error:
            text = str(error).replace(f"{folder}{os.sep}", "").replace("--rgbt", "the field rgbt")
            raise InputError(text) from None


def _radiometric(path: Path, max_pixels: int) -> Images:
    """Both images of one file, and its temperatures; the maker has aligned them, so that no rig is asked."""
    file = read_radiometric(path, max_pixels)  # before anything is enlarged
    pair = read_pair(Entry("radiometric", radiometric=path))
    found = Images(pair.visible, pair.infrared, file.celsius(), input=_told(pair, path.parent))
    check_sizes({"radiometric": found.size})
    if found.size[0] * found.size[1] > max_pixels:
        raise InputError(f"radiometric: covers {found.size[1]}x{found.size[0]} pixels; expected up to {max_pixels}")
    return found


def _read(paths: dict[str, Path]) -> Images:
    """What lies at the fields' paths."""
    pair = read_pair(Entry("pair", paths.get("visible"), paths.get("infrared"), rgbt=paths.get("rgbt")))
    return Images(pair.visible, pair.infrared, input=_told(pair, next(iter(paths.values())).parent))


def _told(pair: ReadPair, folder: Path) -> JsonObject:
    """The key `input` of an answer, as predict has it in NAME.json; the upload's own folder is nobody's business."""
    told = told_of(pair.facts, pair.notices)
    return told and {**told, "notices": [text.replace(f"{folder}{os.sep}", "") for text in told["notices"]]}


def check_sizes(sizes: dict[str, tuple[int, int]], equal: bool = True) -> None:
    """InputError unless every (H, W) is one that the network takes, and all are `equal`."""
    for name, (height, width) in sizes.items():
        if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
            raise InputError(
                f"{name}: found {width}x{height} pixels, expected {SMALLEST} to {LARGEST} a side; resize the pair"
            )
    if equal and len(set(sizes.values())) > 1:
        shown = " and ".join(f"{name} {width}x{height}" for name, (height, width) in sizes.items())
        raise InputError(f"the images differ in size: {shown} pixels; send an aligned pair")


def prompts_of(raw: object, size: tuple[int, int], classes: Sequence[str]) -> Prompts | Mode:
    """`{"mode": "self"}`, `{"mode": "none"}`, or points and boxes, which may name `classes`; InputError for anything
    else."""
    if isinstance(raw, dict) and "mode" in raw:
        if len(raw) > 1 or not isinstance(raw["mode"], str) or raw["mode"] not in MODES:
            raise InputError("prompts: mode must be self or none, and stand alone; or give points, labels and boxes")
        return MODES[raw["mode"]]
    if isinstance(raw, dict):
        count = sum(len(raw[key]) for key in ("points", "boxes") if isinstance(raw.get(key), list))
        if count > MAX_PROMPTS:
            raise InputError(f"prompts: found {count} points and boxes, expected at most {MAX_PROMPTS}")
    return prompts_from(raw, "prompts", "this pair", size, classes)


def prompts_in(text: str | None, size: tuple[int, int], classes: Sequence[str]) -> Prompts | Mode | None:
    """The prompts of a text field: self, none, or JSON; None where there is no such field."""
    if text is None:
        return None
    return prompts_of({"mode": text} if text in MODES else parse_json(text, "prompts"), size, classes)


def form_prompts(form: FormData, size: tuple[int, int], classes: Sequence[str]) -> Prompts | Mode | None:
    """Those of a form."""
    return prompts_in(str(form["prompts"]) if "prompts" in form else None, size, classes)
