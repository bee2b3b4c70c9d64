"""The server's paths, as a FastAPI application around one model."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from fusionsam.alignment.apply import Aligner
from fusionsam.errors import InputError
from fusionsam.inference.celsius import class_temperatures
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.session import Session
from fusionsam.io import VERSION
from fusionsam.models.network import parameter_table
from fusionsam.server import kserve
from fusionsam.server.answers import PICTURES, answer, wanted_kind, wanted_pictures
from fusionsam.server.config import ServeConfig
from fusionsam.server.jobs import Decode, Encode, Engine, Images, Predict
from fusionsam.server.middleware import ACCEPTED, Gate, Metrics, error
from fusionsam.server.queue import Batcher, Busy, Job
from fusionsam.server.sessions import Sessions
from fusionsam.server.uploads import IMAGES, MODES, decode_images, drain, form_prompts, prompts_of, read_form, read_json
from fusionsam.types import LARGEST, SMALLEST, JsonObject

T = TypeVar("T")


class Service:
    """The model, its line, its sessions and counters: what the paths share."""

    def __init__(self, model: FusionSAM, config: ServeConfig, aligner: Aligner | None = None) -> None:
        self.aligner = aligner
        self.model, self.config, self.engine = model, config, Engine(model)
        self.metrics, self.draining = Metrics(), False
        self.sessions = Sessions(config.session_seconds, config.max_sessions, int(config.session_mb * 2**20))
        self.batcher: Batcher | None = None
        self.uploading = 0
        self.metrics.gauge("fusionsam_uploading", "Requests whose images arrive", lambda: self.uploading)
        self.metrics.gauge("fusionsam_sessions", "Sessions that are held", lambda: len(self.sessions))
        self.metrics.gauge("fusionsam_session_bytes", "Their memory", lambda: self.sessions.nbytes)
        self.metrics.gauge("fusionsam_in_flight", "Accepted requests", lambda: self.line.accepted)
        self.metrics.gauge("fusionsam_waiting", "Of these, waiting for the model", lambda: self.line.waiting)

    @property
    def line(self) -> Batcher:
        """The batcher of a server that runs."""
        assert self.batcher is not None
        return self.batcher

    @property
    def ready(self) -> bool:
        """Whether new work is taken."""
        return self.batcher is not None and self.batcher.alive and not self.draining

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The worker's life: begun warm, ended with an empty line."""
        config = self.config
        # few at a time: a decoded image is a hundred times its file
        self.pool = anyio.CapacityLimiter(few := max(2, os.cpu_count() or 1))
        self.decoding = threading.Semaphore(few)
        await anyio.to_thread.run_sync(self.engine.warm_up)
        # a fifth of the time-out is left for the upload's decoding and the answer's encoding
        self.batcher = Batcher(
            self.engine,
            config.queue,
            config.max_batch,
            config.batch_pixels,
            0.8 * config.timeout,
            self.metrics.of_batch,
        )
        sweep = asyncio.create_task(self._sweep())
        yield
        sweep.cancel()
        await anyio.to_thread.run_sync(self.batcher.close)

    async def _sweep(self) -> None:
        """Frees expired sessions of a server that nobody asks anything."""
        while True:
            await asyncio.sleep(min(60.0, self.config.session_seconds))
            len(self.sessions)

    async def thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` off the event loop, a few at a time."""

        def run() -> Any:
            # the limiter alone forgets a thread whose request was cancelled, though it goes on decoding
            with self.decoding:
                return function(*arguments)

        return await anyio.to_thread.run_sync(run, limiter=self.pool)

    async def result(self, job: Job) -> Any:
        """What the model makes of `job`."""
        return await asyncio.wrap_future(self.line.submit(job))

    async def arrived(self, request: Request, read: Callable[[Request, int, float], Awaitable[T]]) -> T:
        """What `read` makes of the request's body, unless the line is full already, or twice its length is on its way:
        uploads lie on disk before they get a place."""
        try:
            self.line.refuse_if_full()
            if self.uploading >= 2 * self.config.queue:
                raise Busy(self.line.retry_after())
        except Busy:
            await drain(request)
            raise
        self.uploading += 1
        try:
            return await read(request, int(self.config.max_upload_mb * 2**20), self.config.timeout)
        finally:
            self.uploading -= 1

    @asynccontextmanager
    async def form(self, request: Request) -> AsyncIterator[FormData]:
        """The request's form, as `arrived` lets it in."""
        form = await self.arrived(request, read_form)
        try:
            yield form
        finally:
            await form.close()

    async def accepted(self, request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
        """The answer of `work` from a place in the line, within the time-out, unless the client leaves before."""
        with self.line.place():
            request.scope[ACCEPTED] = True
            self.metrics.accepted.inc()
            task, gone = asyncio.create_task(work()), asyncio.create_task(_disconnected(request))
            try:
                await asyncio.wait({task, gone}, timeout=self.config.timeout, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
                if gone.done():
                    self.metrics.left.inc()
                    request.scope[ACCEPTED] = False
                    return Response(status_code=499)  # nobody reads it; the log and the counters do
                retry = self.line.retry_after()
                raise HTTPException(
                    503,
                    f"no answer within {self.config.timeout:g} s; try again in {retry} s",
                    {"Retry-After": str(retry)},
                )
            finally:
                task.cancel()
                gone.cancel()
                await asyncio.gather(task, gone, return_exceptions=True)

    def session(self, id: str) -> Session:
        """HTTP 404 for one that is not there."""
        held = self.sessions.get(id)
        if held is None:
            raise HTTPException(404, "session: not known, or it has expired; send the pair to /v1/sessions again")
        return held.session


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _told(pair: Images, prediction: Prediction) -> JsonObject:
    """What an answer tells besides: degrees Celsius of each class, where the file told them, and how the two cameras
    were brought together, where there is a rig."""
    found = {} if pair.celsius is None else {"celsius": class_temperatures(pair.celsius, prediction)}
    return found | ({"alignment": pair.alignment} if pair.alignment else {})


def _schema(*files: str) -> JsonObject:
    properties: JsonObject = {name: {"type": "string", "format": "binary"} for name in files}
    properties["prompts"] = {
        "type": "string",
        "description": "self, none (default: as the weights were configured), or JSON: points, labels, boxes, and "
        "classes and box_classes that these name",
    }
    return {"requestBody": {"content": {"multipart/form-data": {"schema": {"properties": properties}}}}}


def _lists(columns: int) -> JsonObject:
    row = {"type": "array", "items": {"type": "number"}, "minItems": columns, "maxItems": columns}
    return {"type": "array", "items": row}


_CLASSES = {"type": "array", "items": {"type": ["string", "integer", "null"]}}
_PROMPTS_SCHEMA = {
    "points": _lists(2),
    "labels": {"type": "array", "items": {"enum": [0, 1]}},
    "boxes": _lists(4),
    "classes": _CLASSES,
    "box_classes": _CLASSES,
    "mode": {"enum": list(MODES)},
}
_ERROR = {"content": {"application/json": {"example": {"error": "one sentence"}}}}
_ERRORS: dict[int | str, JsonObject] = {
    400: {"description": "A form that cannot be read", **_ERROR},
    413: {"description": "Too many bytes", **_ERROR},
    422: {"description": "Not such images, sizes or prompts", **_ERROR},
    503: {"description": "Line full, time over or shutting down; see Retry-After", **_ERROR},
}
_PAIR = _schema(*IMAGES)


def create_app(
    model: FusionSAM, config: ServeConfig | None = None, token: str | None = None, aligner: Aligner | None = None
) -> FastAPI:
    """The application; `app.state.service` is its Service. With `token`, all but the probes ask for it; `aligner`
    brings pairs of two cameras into one frame."""
    config = config or ServeConfig()
    service = Service(model, config, aligner)
    app = FastAPI(title="FusionSAM", version=VERSION, lifespan=service.lifespan, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, metrics=service.metrics, draining=lambda: service.draining, token=token)
    _errors(app)

    @app.post("/v1/predict", openapi_extra=_PAIR, responses=_ERRORS)
    async def predict(request: Request, images: str = "fused,labels,overlay") -> Response:
        """Fuse and label one pair; `Accept: application/zip` for a zip. Either image may be left out."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        async with service.form(request) as form:

            async def work() -> Response:
                pair = await service.thread(decode_images, form, config.max_pixels, service.aligner)
                prediction = await service.result(Predict(pair, form_prompts(form, pair.size, model.config.classes)))
                return await service.thread(answer, prediction, pictures, kind, 200, _told(pair, prediction))

            return await service.accepted(request, work)

    @app.post("/v1/sessions", openapi_extra=_PAIR, responses=_ERRORS, status_code=201)
    async def begin(request: Request, images: str = "fused,labels,overlay") -> Response:
        """Encode one pair for many prompts. Answers with the session's `id` and the model's own prediction."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        async with service.form(request) as form:
            if "prompts" in form:
                raise HTTPException(422, "prompts: not taken here; send them to /v1/sessions/ID/prompts")

            async def work() -> Response:
                pair = await service.thread(decode_images, form, config.max_pixels, service.aligner)
                session, prediction = await service.result(Encode(pair))
                held = service.sessions.add(session)
                head = {"id": held.id, "expires_in": config.session_seconds, **_told(pair, prediction)}
                return await service.thread(answer, prediction, pictures, kind, 201, head)

            return await service.accepted(request, work)

    body = {"content": {"application/json": {"schema": {"properties": _PROMPTS_SCHEMA}}}}

    @app.post("/v1/sessions/{id}/prompts", openapi_extra={"requestBody": body}, responses=_ERRORS)
    async def prompt(request: Request, id: str, images: str = "labels,overlay") -> Response:
        """Label a session's pair again, steered by points and boxes in its pixels. Costs the decoder only."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        session = service.session(id)
        prompts = prompts_of(await read_json(request, config.timeout), session.size, model.config.classes)

        async def work() -> Response:
            prediction = await service.result(Decode(session, prompts))
            return await service.thread(answer, prediction, pictures, kind)

        return await service.accepted(request, work)

    @app.delete("/v1/sessions/{id}", status_code=204)
    async def end(id: str) -> Response:
        """Forget a session."""
        service.session(id)
        service.sessions.remove(id)
        return Response(status_code=204)

    @app.get("/v1/model")
    async def describe() -> JsonObject:
        """What is served: classes, sizes, limits, origin."""
        return _describe(service)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """New work is taken; 503 during shutdown."""
        return JSONResponse({"status": "ready"}) if service.ready else error(503, "the server takes no new work")

    kserve.add_paths(app, service)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus' page."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _describe(service: Service) -> JsonObject:
    model, limits = service.model, service.config
    card: JsonObject = {key: model.card[key] for key in ("commit", "step", "seed", "val") if key in model.card}
    if fitted := model.card.get("class_offsets"):  # val is of the weights without them
        card["class_offsets"] = {key: fitted.get(key) for key in ("offsets", "miou_before", "miou_after")}
    classes = zip(model.config.classes, model.config.palette, strict=True)
    return {
        "name": model.name,
        "version": VERSION,
        "preset": model.config.preset,
        "parameters": sum(row.parameters for row in parameter_table(model.network)),
        "classes": [{"id": i, "name": name, "colour": list(rgb)} for i, (name, rgb) in enumerate(classes)],
        "sides": [SMALLEST, LARGEST],
        "max_side": model.config.max_side,
        "limits": dict(vars(limits)),
        "images": list(PICTURES),
        "rig": _rig(service.aligner),
        "card": card,
    }


def _rig(aligner: Aligner | None) -> JsonObject | None:
    """Sizes (H, W) of the two cameras whose pairs are taken; None where pairs come aligned."""
    if aligner is None:
        return None
    rig = aligner.rig
    sizes = {"visible": list(rig.visible_size), "infrared": list(rig.infrared_size)}
    return {"digest": rig.digest, "frame": aligner.frame, **sizes}


def _errors(app: FastAPI) -> None:
    known = {404: "no such path; see /docs", 405: "this path does not take that method; see /docs"}

    @app.exception_handler(HTTPException)
    async def http(request: Request, e: HTTPException) -> Response:
        plain = e.detail in ("Not Found", "Method Not Allowed")
        return error(e.status_code, known[e.status_code] if plain else str(e.detail), dict(e.headers or {}))

    @app.exception_handler(InputError)
    async def bad_input(request: Request, e: InputError) -> Response:
        return error(422, str(e))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        return error(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(Busy)
    async def busy(request: Request, e: Busy) -> Response:
        return error(503, str(e), {"Retry-After": str(e.retry_after)})
