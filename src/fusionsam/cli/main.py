"""The command `fusionsam`: finds the sub-command's module, parses, runs, and turns bad input into one line.

Only the standard library is imported here, and a sub-command's module only when it was asked for, so that
`fusionsam --help` answers at once. A command's module has `main(args) -> int`, and `add_arguments(parser)` or, where
a plain argparse parser does not do, `parse(prog, argv) -> Namespace`. `args.command_line` holds what was typed.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fusionsam.cli.parser import Parser, UsageError, suggestion

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (one line of help, module that owns the command)
    "predict": ("fuse pairs of images and label every pixel", "cli.predict"),
    "align": ("find how two cameras stand to each other, for pairs that are not aligned", "cli.align"),
    "info": ("show a model's parts, sizes, classes and where its weights came from", "cli.info"),
    "train": ("train by a configuration file, or resume a run", "training.run"),
    "evaluate": ("score a model or a folder of predictions against labels", "evaluation.run"),
    "robustness": ("score a model on disturbed pairs: a camera missing, displaced, in fog", "evaluation.robustness"),
    "calibrate": (
        "fit a temperature that makes confidences honest, and class offsets",
        "evaluation.calibrate",
    ),
    "baselines": ("score an unmodified Segment Anything, prompted by points and boxes", "evaluation.sam_baseline"),
    "fusion-metrics": ("score fused pictures by the eleven fusion metrics", "evaluation.fusion"),
    "report": ("tables and panels from a folder of evaluations", "evaluation.tables.run"),
    "reconstruct": ("show what the tokenizer keeps of a pair", "evaluation.reconstruct"),
    "data": ("look at a data set before hours are spent on it", "cli.data"),
    "synth": ("draw paired street scenes with labels", "cli.synth"),
    "benchmark": ("measure time and memory beside SAM, SegFormer and the obvious alternative", "cli.benchmark"),
    "export": ("write the model as ONNX and compare it with the original", "export.onnx"),
    "serve": ("answer pairs over HTTP", "server.run"),
    "demo": ("try the model in a browser", "page.run"),
}
INTERRUPTED, TERMINATED = 130, 143


def available() -> dict[str, str]:
    """Commands whose module is installed, with their line of help."""
    return {name: line for name, (line, module) in COMMANDS.items() if importlib.util.find_spec(f"fusionsam.{module}")}


def overview() -> str:
    """What `fusionsam --help` prints."""
    lines = [f"  {name:<16}{line}" for name, line in available().items()]
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
        from fusionsam import __version__

        print(f"fusionsam {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    commands = available()
    if name not in commands:
        raise UsageError(f"no command {name!r}{suggestion(name, commands)}; choose one of {', '.join(commands)}")
    module = importlib.import_module(f"fusionsam.{COMMANDS[name][1]}")
    prog = f"fusionsam {name}"
    if hasattr(module, "Options"):
        from fusionsam.cli import options

        return int(module.main(options.parse(module.Options, prog, rest, shlex.join(["fusionsam", *argv]))))
    if hasattr(module, "parse"):
        args = module.parse(prog, rest)
    else:
        parser = Parser(prog=prog, description=COMMANDS[name][0])
        module.add_arguments(parser)
        args = parser.parse_args(rest)
    args.command_line = shlex.join(["fusionsam", *argv])
    return int(module.main(args))


def main(argv: list[str] | None = None) -> int:
    """The console entry: exit code 0, 2 for bad input (one line on stderr), 130 when interrupted, 143 when terminated,
    or the command's own."""
    for stream in (sys.stdout, sys.stderr):
        # names of files may hold what a terminal of ASCII cannot show: they are escaped, the work is done all the same
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    with _cleaning_up():
        return _answer(argv)


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
        from fusionsam.errors import InputError  # its module imports torch: not before it is needed

        if not isinstance(error, InputError):
            raise
        return _say(f"error: {' '.join(str(error).split())}", 2)


def _say(message: str, code: int) -> int:
    print(f"fusionsam: {message}", file=sys.stderr)
    return code
