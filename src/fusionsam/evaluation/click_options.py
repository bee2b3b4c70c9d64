"""The options of `fusionsam clicks`. No torch: `--help` is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from fusionsam.config.options import BootstrapOptions, CommandLine, DataOptions, DeviceOption, OutOption, WeightsOption
from fusionsam.types import InputError

Picture = Literal["visible", "infrared", "fused"]
Choose = Literal["score", "best"]
FEWEST = 5
"""Clicks that --most allows at least: IoU after 1, 3 and 5 is told."""


@dataclass(frozen=True, kw_only=True)
class ClicksOptions(DataOptions, OutOption, WeightsOption, DeviceOption, BootstrapOptions, CommandLine):
    """Count the clicks that a Segment Anything needs for the objects of a labelled split, on the visible, the infrared
    and our fused picture, by the standard protocol of interactive segmentation. Writes clicks.json, .md, .tex, .csv and
    objects.jsonl; finished pairs of --out are kept."""

    sam: str = "sam"
    """sam (ships with the package), or a SAM, SAM2 or MobileSAM of your own: folder, hub name or file"""
    images: Sequence[Picture] = ("visible", "infrared", "fused")
    """pictures to click on"""
    choose: Choose = "score"
    """which of a first click's three masks the user takes: the one with the highest predicted IoU, or the best one"""
    min_pixels: int = 400
    """smaller regions are left out"""
    steer: bool = False
    """measure instead what clicks that name a class do to the class map of --weights (IoU in the object's box, at most
    5 clicks); writes steering.json, .md, .tex, .csv and steered.jsonl"""
    most: int = 10
    """clicks on one object"""
    pairs: int = field(default=0, metadata={"metavar": "N"})
    """draw N pairs by the seed, 0 = all; a larger number keeps those of a smaller one"""

    def __post_init__(self) -> None:
        """InputError for what cannot be."""
        lowest = {"min_pixels": 1, "most": FEWEST, "pairs": 0, "seed": 0, "bootstrap": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag}: found {getattr(self, name)}; expected at least {least}")
        if self.steer:
            plain = {one.name: one.default for one in fields(self)}
            found = {"sam": self.sam, "images": tuple(self.images), "choose": self.choose, "most": self.most}
            if given := [f"--{name}" for name, value in found.items() if value != plain[name]]:
                raise InputError(f"--steer: clicks on the class map alone; leave out {', '.join(given)}")
        if not self.images:
            raise InputError("--images: found none; expected some of visible, infrared, fused")


def settings(options: ClicksOptions) -> dict[str, object]:
    """What a measured pair depends on, apart from the weights' content."""
    names = ("dataset", "split", "sam", "choose", "min_pixels", "most", "seed")
    found: dict[str, object] = {name: getattr(options, name) for name in names}
    found["images"] = list(dict.fromkeys(options.images))
    if "fused" in options.images:
        found["weights"] = Path(options.weights).name
    return found
