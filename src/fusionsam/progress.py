"""Progress bars that suit where they are written: redrawn in a terminal, a line a minute in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines where the output is no terminal."""


class LineProgress(tqdm):  # type: ignore[type-arg]
    """tqdm that writes whole lines, at most one every EVERY seconds and one at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._told = time.monotonic()
        self._last: float = 0
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Write the state as a line if the last one is long ago."""
        if time.monotonic() - self._told < EVERY:
            return False
        self._line()
        return True

    def close(self) -> None:
        """The last line."""
        if self.disable:
            return
        self.disable = True
        type(self)._decr_instances(self)  # type: ignore[attr-defined]
        if self.n != self._last:
            self._line()

    def _line(self) -> None:
        self._told, self._last = time.monotonic(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """As tqdm.tqdm, for the place that standard error is."""
    terminal = (isatty := getattr(kwargs.get("file") or sys.stderr, "isatty", None)) is not None and isatty()
    return (tqdm if terminal else LineProgress)(*args, **kwargs)
