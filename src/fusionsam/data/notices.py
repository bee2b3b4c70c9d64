"""What is odd about the files of many pairs, or was guessed of them, is said once a kind."""

from __future__ import annotations

from collections import Counter

from fusionsam.io import say
from fusionsam.types import Sample

CHECK_TELLS = "; `fusionsam data check` lists them"
"""Where those of a data set are told one by one."""


def without_options(text: str) -> str:
    """A notice where there is none of the options that it may speak of: they are those of `predict`."""
    return f"{text} (options of fusionsam predict)" if "--" in text else text


class NoticeBook:
    """Notices of many pairs: the first of a kind is said at once, the others are counted. `options`: whether the
    command has those that they speak of."""

    def __init__(self, options: bool = False) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()
        self.pairs = 0

    def add(self, sample: Sample) -> None:
        """Those of one pair."""
        self.pairs += 1
        for kind, text in sample.notices:
            if not self.counts[kind]:
                say(f"{sample.id}: {text if self.options else without_options(text)}")
            self.counts[kind] += 1

    def close(self, where: str = "") -> None:
        """How often each was seen, where it was more than once; `where` says where all of them are told."""
        for kind, count in self.counts.items():
            if count > 1:
                say(f"{kind}: {count} of {self.pairs} pairs{where}")

    def lines(self) -> list[str]:
        """The same for a report: a line a kind, those that were seen once too."""
        return [f"input files: {kind}: {count} of {self.pairs} pairs" for kind, count in self.counts.items()]
