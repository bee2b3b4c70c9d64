"""Every limit of the server once; the command line's flags and help come from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of a server."""

    queue: int = 64
    """requests accepted at once, waiting and running; more are answered 503"""
    max_batch: int = 8
    """pairs of equal size that run together"""
    batch_pixels: int = 2**20
    """pixels of such a batch, all pairs together"""
    timeout: float = 30.0
    """seconds for the upload, and again for the answer"""
    max_upload_mb: float = 32.0
    """largest request body, MiB"""
    max_pixels: int = 2048 * 2048
    """largest height x width that is decoded"""
    session_seconds: float = 600.0
    """a session ends this long after its last use"""
    max_sessions: int = 32
    """beyond it the session unused for longest ends"""
    session_mb: float = 1024.0
    """memory of all sessions, MiB, with the same consequence"""

    def __post_init__(self) -> None:
        """InputError for a limit that would refuse everything, by its flag."""
        for limit in fields(ServeConfig):
            value = getattr(self, limit.name)
            if not 0 < value < math.inf:
                raise InputError(f"{flag(limit.name)}: found {value}, expected a finite number above 0")


def flag(name: str) -> str:
    """The command line's name of a limit."""
    return "--" + name.replace("_", "-")
