"""Every limit of the server once; the command line's flags and help come from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fusionsam.errors import InputError


def _limit(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ServeConfig:
    """Limits of a server. Raises InputError for one that would refuse everything."""

    queue: int = _limit(64, "requests accepted at once, waiting and running; more are answered 503")
    max_batch: int = _limit(8, "pairs of equal size that run together")
    batch_pixels: int = _limit(2**20, "pixels of such a batch, all pairs together")
    timeout: float = _limit(30.0, "seconds for the upload, and again for the answer")
    max_upload_mb: float = _limit(32.0, "largest request body, MiB")
    max_pixels: int = _limit(2048 * 2048, "largest height x width that is decoded")
    session_seconds: float = _limit(600.0, "a session ends this long after its last use")
    max_sessions: int = _limit(32, "beyond it the session unused for longest ends")
    session_mb: float = _limit(1024.0, "memory of all sessions, MiB, with the same consequence")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < math.inf:
                raise InputError(f"{flag(limit.name)}: found {value:g}, expected a finite number above 0")


def flag(name: str) -> str:
    """The command line's name of a limit."""
    return "--" + name.replace("_", "-")
