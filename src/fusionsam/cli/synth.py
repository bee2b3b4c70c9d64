"""The command `fusionsam synth`: draw a synthetic data set."""

from __future__ import annotations

import argparse
import re

from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.io import given_path


def image_size(text: str) -> tuple[int, int]:
    """HxW as typed, in pixels."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise InputError(f"--size: found {text!r}, expected HEIGHTxWIDTH in pixels, for example 480x640")
    return int(found[1]), int(found[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fusionsam synth`."""
    told = "folder to write to, in MFNet's layout: new, or of the same seed and size and no more pairs"
    parser.add_argument("--out", type=given_path, required=True, help=told)
    parser.add_argument("--pairs", type=int, required=True, metavar="N", help="number of scenes; every second at night")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed draws the same scenes (0)")
    parser.add_argument("--size", default="480x640", metavar="HxW", help="pixels a side, 32 to 4096 (480x640)")


def main(args: argparse.Namespace) -> int:
    """Draw, and say what lies where."""
    if args.seed < 0:
        raise InputError(f"--seed: {args.seed}; expected 0 or more")
    lists = synthesize(args.out, args.pairs, args.seed, image_size(args.size))
    counts = ", ".join(f"{name} {len(lists[name])}" for name in ("train", "val", "test"))
    print(f"{args.pairs} pairs in {args.out} ({counts}); use them with --data.dataset mfnet --data.root {args.out}")
    return 0
