"""The command `fusionsam train`."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace

from fusionsam.config.datasets import typed_labels_map
from fusionsam.inference.memory import keep_memory
from fusionsam.types import InputError


def parse(prog: str, argv: list[str], command: str = "") -> Namespace:
    """Settings and --resume of `fusionsam train`: any field of the configuration is a flag."""
    from fusionsam.config.load import parse_settings

    switches = {"resume": "continue the run in train.out from its last checkpoint"}
    args = parse_settings(prog, _with_labels_map(argv), switches)
    args.command = command
    return args


def _with_labels_map(argv: list[str]) -> list[str]:
    """`--labels-map 255:1 --ignore 7`, as other commands take them, in the form of a setting."""
    short = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    short.add_argument("--labels-map", nargs="+", action="extend", default=[])
    short.add_argument("--ignore", nargs="+", action="extend", type=int, default=[])
    try:
        given, rest = short.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}; as in --labels-map 255:1, --ignore 7") from None
    mapped = typed_labels_map(given.labels_map, given.ignore)
    return [*rest, f"--data.labels_map={json.dumps(mapped)}"] if mapped else rest


def main(args: Namespace) -> int:
    """Train, and say where the weights are."""
    from fusionsam.training.run import train

    keep_memory()
    out = train(args.settings, args.resume, args.command)
    print(f"weights: {out / 'best'} (best validation), {out / 'final'}")
    return 0
