"""argparse with one-line errors: what every command of `fusionsam` is parsed by."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class UsageError(Exception):
    """A command line that cannot be understood, in one sentence."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence instead of a page of usage, and flags are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the sentence, with the command that explains more."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but a misspelt flag is named before anything is said of required ones."""
        typed = list(args or [])
        typed = typed[: typed.index("--")] if "--" in typed else typed
        if self._subparsers is None:
            for flag in (token.split("=")[0] for token in typed if token.startswith("--")):
                if flag not in self._option_string_actions:
                    self.error(f"unknown flag {flag}{suggestion(flag, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)


def suggestion(typed: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(typed, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
