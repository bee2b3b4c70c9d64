"""What a command that computes asks of the C library."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""


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
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
