"""What a batch tells beside its results: the pairs that failed, and what is odd about those that did not."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from fusionsam.io import write_text
from fusionsam.types import Sample

FAILURES = "failures.csv"
SOME_FAILED = 3
"""Exit code of a batch that is done but for some pairs."""


def say(line: str) -> None:
    """A line on stderr that leaves a progress bar whole."""
    tqdm.write(line, file=sys.stderr)


class Failures:
    """Pairs that could not be done, kept in `out`/failures.csv (pair, reason) from the first on."""

    def __init__(self, out: Path) -> None:
        self.path = out / FAILURES
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """One more; the file is complete after each."""
        self.rows.append((name, " ".join(reason.split()).removeprefix(f"{name}: ")))
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("pair", "reason"), *self.rows])
        write_text(self.path, table.getvalue())

    def close(self, done: int) -> int:
        """Tell how many failed; the exit code. A list of an earlier run goes where nothing failed now."""
        if not self.rows:
            if _is_ours(self.path):
                self.path.unlink()
            return 0
        say(f"failed: {len(self.rows)}, done: {done} pairs; the reasons are in {self.path}; the first:")
        for name, reason in self.rows[:5]:
            say(f"  {name}: {reason}")
        return SOME_FAILED


def _is_ours(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith("pair,reason\n")
    except (OSError, UnicodeDecodeError):
        return False


class NoticeBook:
    """Notices of many pairs: the first of a kind is said at once, the others are counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.pairs = 0

    def add(self, sample: Sample) -> None:
        """Those of one pair."""
        self.pairs += 1
        for kind, text in sample.notices:
            if not self.counts[kind]:
                say(f"{sample.id}: {text}")
            self.counts[kind] += 1

    def close(self) -> None:
        """How often each was seen, where it was more than once."""
        for kind, count in self.counts.items():
            if count > 1:
                say(f"{kind}: {count} of {self.pairs} pairs, each told in its JSON")
