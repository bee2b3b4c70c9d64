"""The flags of `--align`, for every command that reads pairs."""

from __future__ import annotations

import argparse


def add_align_arguments(parser: argparse.ArgumentParser, frame: bool = False) -> None:
    """--align and --no-refine, and with `frame` --frame."""
    parser.add_argument(
        "--align",
        metavar="RIG",
        help="rig.json of `fusionsam align`, or auto to find one in these pairs first: for cameras that see apart",
    )
    if frame:
        parser.add_argument(
            "--frame", choices=["visible", "infrared"], default="visible", help="camera whose pixels the results have"
        )
    parser.add_argument(
        "--no-refine", action="store_true", help="with --align: the rig alone, without a small shift of each pair"
    )
