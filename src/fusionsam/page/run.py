"""A page to try the model on, served from this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from fusionsam.data.rigs import read_aligner
from fusionsam.inference.predictor import FusionSAM
from fusionsam.types import InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `port`, or to a free one for 0. InputError when that cannot be."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port: {port}; expected 0 to 65535")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: cannot listen ({error.strerror}); choose another") from None
    return listener


def run(weights: str, device: str, host: str, port: int, align: Path | None = None) -> None:
    """Serve the page until interrupted. InputError without gradio, and as its parts do."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('demo: gradio is not installed; pip install "fusionsam[demo]"')
    aligner = read_aligner(align)
    with (
        listen(host, port) as listener,  # before the model: a port in use is told at once
        tempfile.TemporaryDirectory(prefix="fusionsam-demo-") as folder,
        suppress(KeyboardInterrupt),
    ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes then, too
        # both are read when gradio is imported: where uploads go; no statistics, no look for a newer version
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        from fusionsam.page import layout as demo_page

        demo_page.serve(FusionSAM.from_pretrained(weights, device), listener, Path(folder), aligner)
