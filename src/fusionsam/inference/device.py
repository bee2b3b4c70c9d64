"""Where a model runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fusionsam.io import said
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
        raise InputError(f"device {device!r}: not usable here ({said(error)}); use auto or cpu") from None
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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that there is no room: of a CPU, unlike a GPU, by the text alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
