"""Where a model runs."""

from __future__ import annotations

import ctypes
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from fusionsam.types import InputError


def choose_device(device: str) -> str:
    """auto -> cuda, mps or cpu, whichever is there first; anything else is checked (InputError)."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()  # of the device meta nothing comes back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"device {device!r}: not usable here ({reason}); use auto or cpu") from None
    return device


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of `--precision`: what matrix products and convolutions compute with."""


def require_precision(precision: str, device: torch.device) -> None:
    """InputError for a precision that is not known, or that is not for `device`."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision fp16: is for GPUs; on a CPU take bf16 or fp32")


def knows_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16: without them it is slower than float32."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def slower(precision: str, device: torch.device) -> str | None:
    """A line for whoever asked for bf16 where it takes more time than float32; None elsewhere."""
    if precision != "bf16" or knows_bfloat16(device):
        return None
    return f"--precision bf16: this {device.type} has no instructions for bfloat16; fp32 takes less time"


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Within it networks compute in `precision` (torch.autocast); LSTG chooses its codes in float32 all the same."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class FreeMemory:
    """Gives memory that is free back to the system, at most once in `every` seconds: call it before each inference.

    Pairs of many sizes leave free memory in pieces between what PyTorch keeps of each size, which glibc does not give
    back by itself: a server grew by 185 MiB in 20 minutes. `malloc_trim` does, in some ten milliseconds; where there is
    none (other systems than Linux, other C libraries), nothing happens.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._last: float | None = None  # of this process: a model may be copied to another one

    def __call__(self) -> bool:
        """Whether memory was given back now."""
        now = time.monotonic()
        if self._last is None:
            self._last = now
        if now - self._last < self.every or not sys.platform.startswith("linux"):
            return False
        self._last = now
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not kept: a model may be copied to other processes
        if trim is not None:
            trim(0)
        return trim is not None
