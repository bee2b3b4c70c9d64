"""Where a model runs."""

from __future__ import annotations

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
