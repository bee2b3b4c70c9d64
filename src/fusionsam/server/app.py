"""The server's paths, as a FastAPI application around one model."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from fusionsam.alignment.apply import Aligner
from fusionsam.inference.celsius import class_temperatures
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server import kserve
from fusionsam.server.answers import PICTURES, answer, wanted_kind, wanted_pictures
from fusionsam.server.config import ServeConfig
from fusionsam.server.jobs import Decode, Encode, Images, Predict
from fusionsam.server.middleware import Gate, error
from fusionsam.server.queue import Busy
from fusionsam.server.service import Service
from fusionsam.server.uploads import IMAGES, MODES, decode_images, form_prompts, prompts_of, read_json
from fusionsam.types import LARGEST, SMALLEST, VERSION, InputError, JsonObject


def _told(pair: Images, prediction: Prediction) -> JsonObject:
    """What an answer tells besides: degrees Celsius of each class, where the file told them, how the two cameras were
    brought together, where there is a rig, and what was found and guessed in the files."""
    found = {} if pair.celsius is None else {"celsius": class_temperatures(pair.celsius, prediction)}
    found |= {"alignment": pair.alignment} if pair.alignment else {}
    return found | ({"input": pair.input} if pair.input else {})


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
    _predict_path(app, service)
    _session_paths(app, service)
    _state_paths(app, service)
    kserve.add_paths(app, service)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus' page."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _predict_path(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", openapi_extra=_PAIR, responses=_ERRORS)
    async def predict(request: Request, images: str = "fused,labels,overlay") -> Response:
        """Fuse and label one pair; `Accept: application/zip` for a zip. Either image may be left out."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        async with service.form(request) as form:

            async def work() -> Response:
                pair = await service.thread(decode_images, form, service.config.max_pixels, service.aligner)
                prediction = await service.result(
                    Predict(pair, form_prompts(form, pair.size, service.model.config.classes))
                )
                return await service.thread(answer, prediction, pictures, kind, 200, _told(pair, prediction))

            return await service.accepted(request, work)


def _session_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/sessions", openapi_extra=_PAIR, responses=_ERRORS, status_code=201)
    async def begin(request: Request, images: str = "fused,labels,overlay") -> Response:
        """Encode one pair for many prompts. Answers with the session's `id` and the model's own prediction."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        async with service.form(request) as form:
            if "prompts" in form:
                raise HTTPException(422, "prompts: not taken here; send them to /v1/sessions/ID/prompts")

            async def work() -> Response:
                pair = await service.thread(decode_images, form, service.config.max_pixels, service.aligner)
                session, prediction = await service.result(Encode(pair))
                held = service.sessions.add(session)
                head = {"id": held.id, "expires_in": service.config.session_seconds, **_told(pair, prediction)}
                return await service.thread(answer, prediction, pictures, kind, 201, head)

            return await service.accepted(request, work)

    body = {"content": {"application/json": {"schema": {"properties": _PROMPTS_SCHEMA}}}}

    @app.post("/v1/sessions/{id}/prompts", openapi_extra={"requestBody": body}, responses=_ERRORS)
    async def prompt(request: Request, id: str, images: str = "labels,overlay") -> Response:
        """Label a session's pair again, steered by points and boxes in its pixels. Costs the decoder only."""
        kind, pictures = wanted_kind(request.headers.get("accept", "")), wanted_pictures(images)
        session = service.session(id)
        prompts = prompts_of(
            await read_json(request, service.config.timeout), session.size, service.model.config.classes
        )

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


def _state_paths(app: FastAPI, service: Service) -> None:
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
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
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
