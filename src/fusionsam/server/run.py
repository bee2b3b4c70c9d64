"""One model behind HTTP, on loopback unless told otherwise."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

from fusionsam.data.rigs import read_aligner
from fusionsam.inference.device import slower
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server.config import ServeConfig
from fusionsam.types import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

TOKEN = "FUSIONSAM_TOKEN"
RIG = "this server's rig"
"""What answers call it: clients need not know where it lies."""
DRAIN_SECONDS = 0.5
"""Between the signal and the closing of the port: requests on their way in still get their 503 instead of a reset."""


def _app_module() -> ModuleType:
    try:
        import uvicorn  # noqa: F401

        from fusionsam.server import app as serve_app
    except ImportError as missing:
        raise InputError(f'serve: {missing.name} is not installed; pip install "fusionsam[serve]"') from None
    return serve_app


def read_token(file: Path | None) -> str | None:
    """The bearer token from `file`, else from the environment (a command line would show it to every user of the
    machine). Raises InputError for an unreadable or empty one."""
    if file is None:
        token, where = os.environ.get(TOKEN), f"{TOKEN} in the environment"
        if token is None:
            return None
    else:
        where = f"--token-file {file}"
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: cannot be read ({error}); give a text file with the token") from None
    if not token.strip():
        raise InputError(f"{where}: is empty; put a token in it, or leave it out to serve without one")
    return token.strip()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. Raises InputError if that cannot be."""
    if not 0 <= port < 2**16:  # the system would quietly take it modulo 65536
        raise InputError(f"--port: found {port}, expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port}: cannot be served ({reason}); choose another --host or --port") from None
    return bound


def serve(
    weights: str,
    device: str,
    precision: str,
    host: str,
    port: int,
    token_file: Path | None,
    config: ServeConfig,
    access_log: bool,
    align: Path | None = None,
) -> None:
    """Serve `weights` at the address until told to stop, and say how many requests were answered; every pair is of the
    two cameras of the rig `align`. Raises InputError as its parts do."""
    module = _app_module()
    token = read_token(token_file)
    aligner = read_aligner(align, RIG)
    bound = bind(host, port)  # before the model is read: a port in use is told at once
    try:
        model = FusionSAM.from_pretrained(weights, device, precision=precision)
    except InputError:
        bound.close()
        raise
    if line := slower(model.precision, model.device):
        print(f"fusionsam serve: {line}", file=sys.stderr)
    app = module.create_app(model, config, token, aligner)
    host, port = bound.getsockname()[:2]
    if token is None and not ipaddress.ip_address(host).is_loopback:
        print(f"fusionsam serve: {host} is open to others and asks for no token; set {TOKEN}", file=sys.stderr)
    bound.listen(2048)  # whoever reads the address below may connect at once
    shown = f"[{host}]" if ":" in host else host
    print(f"fusionsam serve: {model.name} on {model.device}, http://{shown}:{port} (docs at /docs)", flush=True)
    run(app, bound, config.timeout, access_log)
    metrics = app.state.service.metrics
    accepted, answered = (metrics.count(counter) for counter in (metrics.accepted, metrics.answered))
    left = metrics.count(metrics.left)
    gone = f", {left} clients had gone" if left else ""
    print(f"fusionsam serve: stopped; {answered} of {accepted} accepted requests answered{gone}", flush=True)


def run(app: FastAPI, bound: socket.socket, timeout: float, access_log: bool = False) -> None:
    """Serve `app` until SIGTERM or SIGINT, then finish what was accepted; a second signal stops at once."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if app.state.service.draining:
                self.should_exit = self.force_exit = True
                return
            app.state.service.draining = True
            closing = threading.Timer(DRAIN_SECONDS, lambda: setattr(self, "should_exit", True))
            closing.daemon = True
            closing.start()

    settings = uvicorn.Config(
        app,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=75,  # more than the longest Retry-After: who obeys it finds the connection open
        timeout_graceful_shutdown=int(2 * timeout) + 10,  # an upload and its answer
    )
    Server(settings).run(sockets=[bound])
