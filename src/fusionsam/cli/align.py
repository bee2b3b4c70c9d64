"""The command `fusionsam align`: how two cameras stand to each other, from pairs or from clicked points."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.config.options import AnyPairOptions, CommandLine, OverwriteOption
from fusionsam.io import whole
from fusionsam.types import VERSION, InputError


@dataclass(frozen=True, kw_only=True)
class Options(AnyPairOptions, OverwriteOption, CommandLine):
    """Find the transformation between two cameras that are fixed to each other, from pairs that they took at the same
    moments: rig.json, and a picture beside it that shows how well it fits. Other commands take it as --align."""

    out: Path
    """rig.json to write; the picture is rig.png"""
    points: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """corresponding points, at least four, in the place of a search"""
    pairs: int = 8
    """pairs of a folder to find it from: the sharpest and most varied"""
    lens: bool = False
    """find two radial terms of the lens besides: for lenses that bend straight lines; give eight pairs or more"""
    visible_calibration: str | None = field(default=None, metadata={"metavar": "FILE"})
    """OpenCV's, ROS's or Kalibr's calibration of the visible camera, whose lens distortion is taken off; FILE:cam1 for
    one of several"""
    infrared_calibration: str | None = field(default=None, metadata={"metavar": "FILE"})
    """the same of the infrared camera"""
    overwrite: bool = OverwriteOption.overwrite
    """replace a rig, and its picture, that are there"""

    def __post_init__(self) -> None:
        """InputError for options that cannot be."""
        if self.out.suffix.lower() != ".json":
            raise InputError(f"--out {self.out}: expected a file name that ends in .json, for example rig.json")
        if not 1 <= self.pairs <= 100:
            raise InputError(f"--pairs {self.pairs}: expected 1 to 100")
        if self.lens and (self.infrared_calibration or self.points):
            raise InputError("--lens: finds the infrared lens in pairs; leave out --infrared-calibration and --points")


def main(options: Options) -> int:
    """Find, judge, write and say what was found."""
    from fusionsam.data import rigs
    from fusionsam.inference.files import require_kept
    from fusionsam.inference.selection import every_pair

    out = options.out
    beside = out.with_suffix(".png")
    if not options.overwrite and (there := [path for path in (out, beside) if path.exists()]):
        raise InputError(f"{there[0]}: is there; choose another --out, or --overwrite")
    entries = every_pair(options.visible, options.infrared, options.rgbt)
    require_kept(entries, [out, beside])
    cameras = rigs.read_cameras(options.visible_calibration, options.infrared_calibration)
    if options.points is not None:
        rig, shown = rigs.clicked(entries, options.points, cameras)
    else:
        found = rigs.fit(entries, options.pairs, options.lens, cameras)
        if not found.verdict.accepted:
            raise InputError(f"{options.visible or options.rgbt}: {found.verdict.text}")
        rig, shown = found.rig, found.shown
    rig.told.update({"fusionsam": VERSION, "command": options.command})
    image = rigs.picture(rig, shown)
    with whole(beside) as part:
        image.save(part, format="PNG")
    rig.write(out)
    print(rig.told["verdict"])
    for warning in rig.told["warnings"]:
        print(f"warning: {warning}")
    print(f"{out}, and {beside} to look at ({shown.id})")
    return 0
