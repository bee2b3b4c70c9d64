"""The command `fusionsam align`: how two cameras stand to each other, from pairs or from clicked points."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusionsam.errors import InputError
from fusionsam.io import VERSION, given_path, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fusionsam align`."""
    parser.description = (
        "Find the transformation between two cameras that are fixed to each other, from pairs that they took at the "
        "same moments: rig.json, and a picture beside it that shows how well it fits."
    )
    parser.add_argument("--visible", type=given_path, help="visible picture, or a folder of them")
    parser.add_argument("--infrared", type=given_path, help="infrared picture, or a folder with the same names")
    parser.add_argument("--rgbt", type=given_path, help="instead: four-channel files as MFNet's")
    parser.add_argument("--out", type=given_path, required=True, help="rig.json to write; the picture is rig.png")
    parser.add_argument("--points", type=given_path, metavar="FILE", help="corresponding points instead of a search")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="pairs to find it from, of a folder (8)")
    parser.add_argument("--overwrite", action="store_true", help="replace a rig that is there")


def main(args: argparse.Namespace) -> int:
    """Find, judge, write and say what was found."""
    from fusionsam.data import rigs
    from fusionsam.inference.files import pairs_to_predict

    out: Path = args.out
    if out.suffix.lower() != ".json":
        raise InputError(f"--out {out}: expected a file name that ends in .json, for example rig.json")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out}: is there; choose another --out, or --overwrite")
    if not 1 <= args.pairs <= 100:
        raise InputError(f"--pairs {args.pairs}: expected 1 to 100")
    entries = pairs_to_predict(args.visible, args.infrared, args.rgbt)
    if args.points is not None:
        rig, shown = rigs.clicked(entries, args.points)
    else:
        found = rigs.fit(entries, args.pairs)
        if not found.verdict.accepted:
            raise InputError(f"{args.visible or args.rgbt}: {found.verdict.text}")
        rig, shown = found.rig, found.shown
    rig.told.update({"fusionsam": VERSION, "command": args.command_line})
    image = rigs.picture(rig, shown)
    beside = out.with_suffix(".png")
    with whole(beside) as part:
        image.save(part, format="PNG")
    rig.write(out)
    print(rig.told["verdict"])
    for warning in rig.told["warnings"]:
        print(f"warning: {warning}")
    print(f"{out}, and {beside} to look at ({shown.id})")
    return 0
