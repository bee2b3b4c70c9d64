"""The labelling page's paths, as a FastAPI application around one workspace."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fusionsam.server.labelling.workspace import Workspace
from fusionsam.types import InputError

LOSSLESS = 2_000_000
"""Pixels up to which pictures are sent as PNG; larger ones as JPEG, which is a tenth of it."""
MOST_BYTES = 64 << 20
"""Of one request: the runs of a ragged mask of 12 megapixels are some megabytes of JSON."""


def create_app(workspace: Workspace, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application, which answers under the names `hosts` alone: a page elsewhere whose name is turned to this
    machine gets nothing. `app.state.token` tells pictures of this run from those a browser has kept of another."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        workspace.close()

    app = FastAPI(title="FusionSAM labelling", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.token = secrets.token_hex(4)
    static = resources.files("fusionsam.server.labelling") / "static"
    _guards(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.get("/")
    async def page() -> Response:
        return Response((static / "index.html").read_bytes(), media_type="text/html")

    @app.get("/api/project")
    async def project() -> dict[str, object]:
        return {**workspace.describe(), "token": app.state.token}

    @app.get("/api/pairs/{index}")
    async def show(index: int) -> dict[str, object]:
        return await anyio.to_thread.run_sync(workspace.show, index)

    @app.get("/api/pairs/{index}/picture/{name}")
    async def picture(index: int, name: str) -> Response:
        return await anyio.to_thread.run_sync(_picture, workspace, index, name)

    @app.post("/api/pairs/{index}/mask")
    async def mask(index: int, request: Request) -> dict[str, object]:
        asked = await _body(request)
        return await anyio.to_thread.run_sync(workspace.mask, index, asked)

    @app.post("/api/pairs/{index}/change")
    async def change(index: int, request: Request) -> dict[str, object]:
        asked = await _body(request)
        return await anyio.to_thread.run_sync(workspace.change, index, asked)

    @app.get("/api/pairs/{index}/temperatures")
    async def temperatures(index: int) -> dict[str, object]:
        return await anyio.to_thread.run_sync(workspace.temperatures, index)

    app.mount("/static", StaticFiles(directory=str(static)))
    return app


def _picture(workspace: Workspace, index: int, name: str) -> Response:
    image = Image.fromarray(workspace.pair(index).picture(name))
    kind = "PNG" if image.width * image.height <= LOSSLESS else "JPEG"
    content = io.BytesIO()
    image.save(content, kind, **({"compress_level": 1} if kind == "PNG" else {"quality": 90}))
    kept = {"Cache-Control": "private, max-age=86400"}  # the address holds the run's token
    return Response(content.getvalue(), media_type=f"image/{kind.lower()}", headers=kept)


async def _body(request: Request) -> dict[str, object]:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise InputError(f"request: more than {MOST_BYTES >> 20} MiB; draw a simpler mask")
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise InputError("request: expected a JSON object")
    return asked


def _guards(app: FastAPI) -> None:
    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> Response:
        return JSONResponse({"error": " ".join(str(error).split())}, 422)

    @app.middleware("http")
    async def own_page_only(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Another page in the same browser must not draw."""
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return JSONResponse({"error": "asked from another page; open the labelling page itself"}, 403)
        response: Response = await call_next(request)
        response.headers.setdefault("Cache-Control", "no-store")
        return response
