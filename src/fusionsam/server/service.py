"""What the server's paths share: the model, its queue, its sessions and counters."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, TypeVarTuple

import anyio
from fastapi import FastAPI, Request, Response
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from fusionsam.alignment.apply import Aligner
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.session import Session
from fusionsam.server.config import ServeConfig
from fusionsam.server.jobs import Engine, Work
from fusionsam.server.middleware import ACCEPTED, Metrics
from fusionsam.server.queue import Batcher, Busy
from fusionsam.server.sessions import Sessions
from fusionsam.server.uploads import drain, read_form

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Service:
    """The model, its line, its sessions and counters: what the paths share."""

    def __init__(self, model: FusionSAM, config: ServeConfig, aligner: Aligner | None = None) -> None:
        self.aligner = aligner
        self.model, self.config, self.engine = model, config, Engine(model)
        self.metrics, self.draining = Metrics(), False
        self.sessions = Sessions(config.session_seconds, config.max_sessions, int(config.session_mb * 2**20))
        self.batcher: Batcher[Work] | None = None
        self.uploading = 0
        self.metrics.gauge("fusionsam_uploading", "Requests whose images arrive", lambda: self.uploading)
        self.metrics.gauge("fusionsam_sessions", "Sessions that are held", lambda: len(self.sessions))
        self.metrics.gauge("fusionsam_session_bytes", "Their memory", lambda: self.sessions.nbytes)
        self.metrics.gauge("fusionsam_in_flight", "Accepted requests", lambda: self.line.accepted)
        self.metrics.gauge("fusionsam_waiting", "Of these, waiting for the model", lambda: self.line.waiting)

    @property
    def line(self) -> Batcher[Work]:
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

    async def thread(self, function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """`function` off the event loop, a few at a time."""

        def run() -> T:
            # the limiter alone forgets a thread whose request was cancelled, though it goes on decoding
            with self.decoding:
                return function(*arguments)

        return await anyio.to_thread.run_sync(run, limiter=self.pool)

    async def result(self, job: Work) -> Any:
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

    async def accepted(self, request: Request, work: Callable[[], Coroutine[None, None, Response]]) -> Response:
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
