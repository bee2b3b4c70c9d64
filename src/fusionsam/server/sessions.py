"""What the server remembers between two clicks: encoded pairs, for a while, up to a number and a size."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fusionsam.types import Encoded, Latents


@dataclass
class Session:
    """One encoded pair."""

    id: str
    encoded: Encoded
    nbytes: int
    used: float  # by the clock of its store


def slim(encoded: Encoded) -> Encoded:
    """Without what no prompt needs, and without the padding that views would keep alive."""
    nothing = torch.empty(0)
    return replace(encoded, latents=Latents(nothing, nothing), fused=encoded.fused.clone())


def nbytes(encoded: Encoded) -> int:
    """Memory of the tensors that `decode` needs."""
    features = encoded.features
    tensors = [features.embedding, *features.levels, encoded.fused, encoded.z_f, encoded.mask_prompt]
    return sum(t.numel() * t.element_size() for t in tensors)


class Sessions:
    """Sessions by id. One ends `seconds` after its last use, or when `count` or `max_bytes` would be exceeded and it
    is the one unused for longest. `clock` gives seconds."""

    def __init__(self, seconds: float, count: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.count, self.max_bytes = seconds, count, max_bytes
        self._clock = clock
        self._held: OrderedDict[str, Session] = OrderedDict()  # the one unused for longest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._held)

    @property
    def nbytes(self) -> int:
        """Memory of all that is held."""
        with self._lock:
            self._expire()
            return sum(session.nbytes for session in self._held.values())

    def add(self, encoded: Encoded) -> Session:
        """Keep `encoded` under a new id that nobody can guess."""
        session = Session(secrets.token_urlsafe(16), encoded, nbytes(encoded), self._clock())
        with self._lock:
            self._expire()
            self._held[session.id] = session
            while len(self._held) > 1 and (
                len(self._held) > self.count or sum(s.nbytes for s in self._held.values()) > self.max_bytes
            ):
                self._held.popitem(last=False)
        return session

    def get(self, id: str) -> Session | None:
        """The session, its time begun anew; None if there is none, or none any more."""
        with self._lock:
            self._expire()
            session = self._held.get(id)
            if session is not None:
                session.used = self._clock()
                self._held.move_to_end(id)
            return session

    def remove(self, id: str) -> bool:
        """End a session; whether there was one."""
        with self._lock:
            self._expire()
            return self._held.pop(id, None) is not None

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self.seconds
        while self._held and next(iter(self._held.values())).used < oldest_allowed:
            self._held.popitem(last=False)
