"""What is asked of the C library: to keep the memory that is freed, or to give it back."""

from __future__ import annotations

import ctypes
import sys
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""


_kept = False
"""Whether `keep_memory` holds in this process."""


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, to use it again; whether the C library knows how (glibc does).

    glibc gives every large tensor back to the kernel as soon as it is freed, and the kernel clears each page anew for
    the next one: a seventh of a training step. Numbers and peak memory stay the same. Only for a command whose process
    ends with its work.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    global _kept
    _kept = bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return _kept


class FreeMemory:
    """Gives memory that is free back to the system, at most once in `every` seconds: call it before each inference.

    Pairs of many sizes leave free memory in pieces between what PyTorch keeps of each size, which glibc does not give
    back by itself: a server grew by 185 MiB in 20 minutes. `malloc_trim` does, in some ten milliseconds; where there is
    none (other systems than Linux, other C libraries), and after `keep_memory`, nothing happens.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._last: float | None = None  # of this process: a model may be copied to another one

    def __call__(self) -> bool:
        """Whether memory was given back now."""
        now = time.monotonic()
        if _kept:
            return False
        if self._last is None:
            self._last = now
        if now - self._last < self.every or not sys.platform.startswith("linux"):
            return False
        self._last = now
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not kept: a model may be copied to other processes
        if trim is not None:
            trim(0)
        return trim is not None
