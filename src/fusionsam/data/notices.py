"""What is odd about the files of many pairs, or was guessed of them, is said once a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fusionsam.io import say
from fusionsam.types import Sample

CHECK_TELLS = "; `fusionsam data check` lists them"
"""Where those of a data set are told one by one."""


class NoticeBook:
    """Notices of many pairs: the first of a kind is said at once, the others are counted. `options`: whether the
    command is `predict`, which has those that they speak of."""

    def __init__(self, options: bool = False) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()
        self.pairs = 0

    def add(self, sample: Sample) -> None:
        """Those of one pair."""
        self.pairs += 1
        for notice in sample.notices:
            if not self.counts[notice.kind]:
                say(f"{sample.id}: {notice.sentence(self.options)}")
            self.counts[notice.kind] += 1

    def count(self, kinds: Sequence[str]) -> None:
        """Those of one pair that was told earlier."""
        self.pairs += 1
        self.counts.update(kinds)

    def close(self, where: str = "") -> None:
        """How often each was seen, where it was more than once; `where` says where all of them are told."""
        for kind, count in self.counts.items():
            if count > 1:
                say(f"{kind}: {count} of {self.pairs} pairs{where}")

    def lines(self) -> list[str]:
        """The same for a report: a line a kind, those that were seen once too."""
        return [f"input files: {kind}: {count} of {self.pairs} pairs" for kind, count in self.counts.items()]
