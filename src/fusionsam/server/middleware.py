"""What every request passes first: bearer token, the refusal of new work during shutdown, and the counting."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionsam.server.uploads import drain

log = logging.getLogger(__name__)
OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Answered without a token: probes carry none, and these tell nothing."""
ROUTES = ("/v2", "/v1/predict", "/v1/sessions", "/v1/model", "/metrics", "/docs", "/openapi.json", *OPEN)
ACCEPTED = "fusionsam.accepted"
"""Key of the scope of requests that have got a place in the line."""


class Metrics:
    """Prometheus' view of one server; a registry of its own, so that two in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        of = {"registry": self.registry}
        self.requests = Counter(
            "fusionsam_requests",
            "Requests answered",
            ("method", "route", "status"),
            **of,  # type: ignore[arg-type]
        )
        self.seconds = Histogram(
            "fusionsam_request_seconds",
            "From the first byte of a request to the last of its answer",
            ("route",),
            **of,  # type: ignore[arg-type]
        )
        self.batch = Histogram(
            "fusionsam_batch_size",
            "Pairs that ran together",
            buckets=(1, 2, 4, 8, 16, 32),
            **of,  # type: ignore[arg-type]
        )
        self.model_seconds = Histogram("fusionsam_model_seconds", "The model's time a batch", **of)  # type: ignore[arg-type]
        self.accepted = Counter("fusionsam_accepted", "Requests that got a place in the line", **of)  # type: ignore[arg-type]
        self.answered = Counter("fusionsam_answered", "Of these, answered to the last byte", **of)  # type: ignore[arg-type]
        self.left = Counter("fusionsam_left", "Of these, given up because the client had gone", **of)  # type: ignore[arg-type]

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge that asks `value` whenever it is read."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def of_batch(self, size: int, seconds: float) -> None:
        """One batch has run."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def count(self, counter: Counter) -> int:
        """Value of a counter without labels."""
        return int(next(s.value for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")))


def route_of(path: str) -> str:
    """The path's template: labels must not grow with what clients invent."""
    if path.startswith("/v1/sessions/"):
        return "/v1/sessions/{id}/prompts" if path.endswith("/prompts") else "/v1/sessions/{id}"
    if path.startswith("/v2/models/"):
        last = path.rpartition("/")[2]
        return "/v2/models/{name}" + (f"/{last}" if last in ("infer", "ready") else "")
    return path if path in ROUTES else "other"


def error(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Every refusal of this server: {"error": one sentence}."""
    return JSONResponse({"error": " ".join(sentence.split())}, status, headers)


class Gate:
    """ASGI middleware. `draining` tells whether the server is about to stop."""

    def __init__(self, app: ASGIApp, metrics: Metrics, draining: Callable[[], bool], token: str | None) -> None:
        self.app, self.metrics, self.draining = app, metrics, draining
        self.token = None if token is None else hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on; count either."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), math.nan

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.draining():  # or a kept connection would be cut between two requests
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                route = route_of(scope["path"])
                self.metrics.requests.labels(_method(scope), route, f"{status:g}").inc()
                self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
                if scope.get(ACCEPTED):
                    self.metrics.answered.inc()

        refusal = self._refusal(scope)
        if refusal is None:
            try:
                await self.app(scope, receive, counted)
            except Exception:
                if not math.isnan(status):  # the answer has begun: only cutting it off tells the client
                    raise
                log.exception("%s %s failed", scope["method"], route_of(scope["path"]))
                answer = error(500, "an unexpected error; the server's log holds the details")
                await answer(scope, receive, counted)  # here, so that it is counted
        else:
            await drain(Request(scope, receive))
            await refusal(scope, receive, counted)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["path"] not in OPEN and not self._known(scope):
            sentence = "a bearer token is needed; send it as 'Authorization: Bearer TOKEN'"
            return error(401, sentence, {"WWW-Authenticate": "Bearer"})
        if self.draining() and scope["method"] == "POST":
            return error(503, "the server is shutting down; try again in 5 s", {"Retry-After": "5"})
        return None

    def _known(self, scope: Scope) -> bool:
        if self.token is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        # digests have one length, so that the comparison's time tells nothing of the token's
        same = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self.token)
        return same and kind.lower() == b"bearer"


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
