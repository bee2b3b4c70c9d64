"""What a batch tells beside its results: the pairs that failed."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable
from pathlib import Path

from fusionsam.io import say, whole
from fusionsam.types import InputError

FAILURES = "failures.csv"
SOME_FAILED = 3
"""Exit code of a batch that is done but for some pairs."""


class Failures:
    """Pairs that could not be done, kept in `out`/failures.csv (pair, reason) from the first on.

    A failure is one line at the end of the file, so that a process may be killed at any time and a million of them cost
    no more than a line each; where a pair is listed twice, the later line counts. The next run begins with what is
    still to be done of that list, and `close` leaves each pair that failed once. Lines of pairs that a run is not about
    stay.

    Args:
        out: folder of the results.
        todo: pairs that this run tries.
        done: others, which it finds done; they are no longer listed.

    Raises:
        InputError: a failures.csv that predict did not write.
    """

    def __init__(self, out: Path, todo: Collection[str], done: Collection[str] = ()) -> None:
        self.path = out / FAILURES
        self.failed: dict[str, str] = {}
        stored = self._read()
        self._before = {name: reason for name, reason in stored.items() if name not in done}
        self._others = {name: reason for name, reason in self._before.items() if name not in todo}
        self._replace(self._before)

    def add(self, name: str, reason: str) -> None:
        """One more."""
        reason = " ".join(reason.split()).removeprefix(f"{name}: ")
        self.failed[name] = reason
        if self._before.get(name) == reason:  # listed already
            return
        lines = _table([(name, reason)])
        try:
            with self.path.open("ab", buffering=0) as file:  # one write: a killed process leaves a line or none
                file.write(lines if file.tell() else _HEAD + lines)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from None

    def close(self, done: int) -> int:
        """Tell how many failed; the exit code. A list without a line goes."""
        self._replace({**self._others, **self.failed})
        if self._others:
            say(f"{self.path}: still lists {len(self._others)} pairs that this run was not about")
        if not self.failed:
            return 0
        say(f"failed: {len(self.failed)}, done: {done} pairs; the reasons are in {self.path}; the first:")
        for name, reason in list(self.failed.items())[:5]:
            say(f"  {name}: {reason}")
        return SOME_FAILED

    def _read(self) -> dict[str, str]:
        """The list as it stands; a last line that a full disk or a power cut left broken is not in it."""
        try:
            data = self.path.read_bytes()
            lines = data[: data.rfind(b"\n") + 1]
            if not lines and _HEAD.startswith(data):
                return {}
            if not lines.startswith(_HEAD):
                raise ValueError
            rows = list(csv.reader(io.StringIO(lines.decode("utf-8"), newline="")))[1:]
            return dict(rows)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, csv.Error):
            raise InputError(f"{self.path}: was not written by predict; choose another --out, or move it") from None

    def _replace(self, rows: dict[str, str]) -> None:
        if rows:  # nothing is touched that stands as it should
            content = _HEAD + _table(rows.items())
            if self.path.is_file() and self.path.read_bytes() == content:
                return
            with whole(self.path) as part:
                part.write_bytes(content)
        else:
            self.path.unlink(missing_ok=True)


_HEAD = b"pair,reason\n"


def _table(rows: Iterable[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")
