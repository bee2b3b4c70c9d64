"""The command `fusionsam synth`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.config.options import OutOption
from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class Options(OutOption):
    """Draw paired street scenes with labels, in MFNet's layout."""

    out: Path = field()
    """folder to write to: new, or of the same seed and size and no more pairs"""
    pairs: int
    """number of scenes; every second at night"""
    seed: int = 0
    """the same seed draws the same scenes"""
    size: str = field(default="480x640", metadata={"metavar": "HxW"})
    """pixels a side, 32 to 4096"""

    def __post_init__(self) -> None:
        """InputError for a seed or a size that cannot be."""
        if self.seed < 0:
            raise InputError(f"--seed: {self.seed}; expected 0 or more")
        _ = self.sides

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.size)
        if not found:
            raise InputError(f"--size: found {self.size!r}, expected HEIGHTxWIDTH in pixels, for example 480x640")
        return int(found[1]), int(found[2])


def main(options: Options) -> int:
    """Draw, and say what lies where."""
    from fusionsam.data.synthetic.scenes import synthesize

    lists = synthesize(options.out, options.pairs, options.seed, options.sides)
    counts = ", ".join(f"{name} {len(lists[name])}" for name in ("train", "val", "test"))
    told = f"{options.pairs} pairs in {options.out} ({counts})"
    print(f"{told}; use them with --data.dataset mfnet --data.root {options.out}")
    return 0
