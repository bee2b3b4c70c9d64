"""The command `fusionsam train`."""

from __future__ import annotations

from argparse import Namespace


def parse(prog: str, argv: list[str], command: str = "") -> Namespace:
    """Settings and --resume of `fusionsam train`: any field of the configuration is a flag."""
    from fusionsam.config.load import parse_settings

    args = parse_settings(prog, argv, {"resume": "continue the run in train.out from its last checkpoint"})
    args.command = command
    return args


def main(args: Namespace) -> int:
    """Train, and say where the weights are."""
    from fusionsam.training.run import train

    out = train(args.settings, args.resume, args.command)
    print(f"weights: {out / 'best'} (best validation), {out / 'final'}")
    return 0
