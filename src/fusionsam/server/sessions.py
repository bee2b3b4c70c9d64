"""What the server remembers between two clicks: encoded pairs, for a while, up to a number and a size."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fusionsam.inference.session import Session


@dataclass
class Held:
    """A session that is remembered under an id."""

    id: str
    session: Session
    used: float  # by the clock of its store


class Sessions:
    """Sessions by id. One ends `seconds` after its last use, or when `count` or `max_bytes` would be exceeded and it
    is the one unused for longest. `clock` gives seconds."""

    def __init__(self, seconds: float, count: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.count, self.max_bytes = seconds, count, max_bytes
        self._clock = clock
        self._held: OrderedDict[str, Held] = OrderedDict()  # the one unused for longest first
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
            return sum(held.session.nbytes for held in self._held.values())

    def add(self, session: Session) -> Held:
        """Keep `session` under a new id that nobody can guess."""
        held = Held(secrets.token_urlsafe(16), session, self._clock())
        with self._lock:
            self._expire()
            self._held[held.id] = held
            while len(self._held) > 1 and (
                len(self._held) > self.count or sum(h.session.nbytes for h in self._held.values()) > self.max_bytes
            ):
                self._held.popitem(last=False)
        return held

    def get(self, id: str) -> Held | None:
        """The session, its time begun anew; None if there is none, or none any more."""
        with self._lock:
            self._expire()
            held = self._held.get(id)
            if held is not None:
                held.used = self._clock()
                self._held.move_to_end(id)
            return held

    def remove(self, id: str) -> bool:
        """End a session; whether there was one."""
        with self._lock:
            self._expire()
            return self._held.pop(id, None) is not None

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self.seconds
        while self._held and next(iter(self._held.values())).used < oldest_allowed:
            self._held.popitem(last=False)
