"""The command `fusionsam`: finds the sub-command, parses, runs, and turns bad input into one line.

Only the standard library is imported here, and a sub-command's file only when it was asked for, so that
`fusionsam --help` answers at once. A command's file has `main(options) -> int` and the dataclass `Options` that
`cli.options` makes flags of; where that does not do, `parse(prog, argv, command) -> options`, `command` being what was
typed. It imports what computes in `main`, so that its help answers before torch has been loaded.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fusionsam.cli.parser import UsageError, suggestion

COMMANDS = {
    # each is the file of its name in this folder
    "predict": "fuse pairs of images and label every pixel",
    "align": "find how two cameras stand to each other, for pairs that are not aligned",
    "info": "show a model's parts, sizes, classes and where its weights came from",
    "train": "train by a configuration file, or resume a run",
    "evaluate": "score a model or a folder of predictions against labels",
    "robustness": "score a model on disturbed pairs: a camera missing, displaced, in fog",
    "calibrate": "fit a temperature that makes confidences honest, and class offsets",
    "clicks": "count the clicks that a Segment Anything needs for an object",
    "baselines": "score an unmodified Segment Anything, prompted by points and boxes",
    "fusion-metrics": "score fused pictures by the eleven fusion metrics",
    "report": "tables and panels from a folder of evaluations",
    "reconstruct": "show what the tokenizer keeps of a pair",
    "data": "look at a data set before hours are spent on it, or make one of annotations",
    "synth": "draw paired street scenes with labels",
    "benchmark": "measure time and memory beside SAM, SegFormer and the obvious alternative",
    "export": "write the model as ONNX and compare it with the original",
    "serve": "answer pairs over HTTP",
    "label": "label a folder of pairs in a browser, objects by clicks",
    "demo": "try the model in a browser",
}
INTERRUPTED, TERMINATED = 130, 143


def overview() -> str:
    """What `fusionsam --help` prints."""
    lines = [f"  {name:<16}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fusionsam [-h] [--version] COMMAND ...",
            "",
            "Fuse a visible and a thermal image into one picture and label every pixel.",
            "",
            "commands:",
            *lines,
            "",
            "fusionsam COMMAND --help explains a command.",
        ]
    )


def run(argv: list[str]) -> int:
    """Find, parse and run the sub-command in `argv`; its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from fusionsam.types import VERSION

        print(f"fusionsam {VERSION}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}{suggestion(name, COMMANDS)}; choose one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"fusionsam.cli.{name.replace('-', '_')}")
    if hasattr(command, "parse"):
        given = command.parse(f"fusionsam {name}", rest, shlex.join(["fusionsam", *argv]))
    else:
        from fusionsam.cli import options

        given = options.parse(command.Options, f"fusionsam {name}", rest, shlex.join(["fusionsam", *argv]))
    return int(command.main(given))


def main(argv: list[str] | None = None) -> int:
    """The console entry: exit code 0, 2 for bad input (one line on stderr), 130 when interrupted, 143 when terminated,
    or the command's own."""
    _print_any_name()
    with _cleaning_up():
        return _answer(argv)


def _print_any_name() -> None:
    """Output in an encoding that lacks a name shows its code, as in o/\\xfcn, instead of ending in a UnicodeEncodeError
    after the results have been written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl+C does, so that temporary files go; some commands set their own."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _answer(argv: list[str] | None) -> int:
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except SystemExit as exit:  # --help has been printed
        return exit.code if isinstance(exit.code, int) else 0
    except UsageError as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered would fail again
            return _say(f"error: the output cannot be written ({error.strerror}); make room for it", 2)
        if error.filename is None:
            raise
        return _say(f"error: {error.filename}: {error.strerror}; check the path and its permissions", 2)
    except ValueError as error:
        from fusionsam.types import InputError

        if not isinstance(error, InputError):
            raise
        return _say(f"error: {' '.join(str(error).split())}", 2)


def _say(message: str, code: int) -> int:
    print(f"fusionsam: {message}", file=sys.stderr)
    return code
