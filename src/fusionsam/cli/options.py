"""A command's options are a dataclass; its flags, their types, their help and their defaults are read from it.

>>> @dataclass(frozen=True, kw_only=True)
... class Options(OutOption, DeviceOption):
...     \"\"\"What the command does: the text above the flags.\"\"\"
...
...     pairs: int = 32
...     \"\"\"how many of them\"\"\"

gives `--out OUT (required)`, `--device DEVICE`, `--pairs N  how many of them (default: 32)`. Shared fields stand in
`config.options`. A default is never handed to argparse: what was not typed is left to the dataclass.

Types: str, int, float, Path, Address; `T | None`; a union of types is read as its first; `Literal` gives choices; a
sequence takes one or more values; bool is a switch, with a `--no-` form where the default is True. Metadata of a field:
`metavar` (for the help), `one_of` (names for the help; the command checks the value), `flag=False` (no flag).
"""

from __future__ import annotations

import argparse
import ast
import collections.abc
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fusionsam.cli.parser import Parser
from fusionsam.config.options import Address, CommandLine
from fusionsam.io import given_address, given_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_SEQUENCES = (list, tuple, collections.abc.Sequence)


@dataclass(frozen=True)
class Flag:
    """How one field is typed."""

    name: str
    help: str
    arguments: dict[str, Any]
    """What `argparse.add_argument` takes."""


def parse(kind: type[T], prog: str, argv: Sequence[str], command: str = "") -> T:
    """The dataclass `kind` that `argv` describes; one that is a CommandLine gets the `command` as it was typed.

    Raises UsageError for a command line that does not fit, and what `kind.__post_init__` raises."""
    typed = vars(parser(kind, prog).parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    return kind(**values, **({"command": command} if issubclass(kind, CommandLine) else {}))


def parser(kind: type[DataclassInstance], prog: str) -> Parser:
    """The parser of the dataclass `kind`, whose docstring becomes the description."""
    made = Parser(prog=prog, description=inspect.cleandoc(kind.__doc__ or ""), argument_default=argparse.SUPPRESS)
    add_flags(made, kind)
    return made


def add_flags(made: argparse.ArgumentParser, kind: type[DataclassInstance]) -> None:
    """One flag a field of `kind`."""
    for flag in flags(kind):
        made.add_argument(flag.name, help=flag.help.replace("%", "%%"), **flag.arguments)


def flags(kind: type[DataclassInstance]) -> list[Flag]:
    """The flags of `kind`: those of its bases from left to right, then its own."""
    hints, texts = get_type_hints(kind), docstrings(kind)
    homes = [*kind.__mro__[1:], kind]
    place = {name: index for index, home in enumerate(homes) for name in vars(home).get("__annotations__", {})}
    ordered = sorted((f for f in fields(kind) if f.metadata.get("flag", True)), key=lambda f: place[f.name])
    return [_flag(item, hints[item.name], texts.get(item.name, "")) for item in ordered]


def docstrings(kind: type[DataclassInstance]) -> dict[str, str]:
    """Field name -> the docstring under it, on one line; a subclass' own counts before that of its base."""
    found: dict[str, str] = {}
    for home in reversed(kind.__mro__):
        if not is_dataclass(home):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(home))).body
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                found[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def flag_name(field_name: str) -> str:
    """'class_file' -> '--class-file', 'import_' -> '--import' (a word that Python keeps for itself)."""
    return "--" + field_name.rstrip("_").replace("_", "-")


def shown(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _flag(item: Field[object], hint: object, text: str) -> Flag:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    arguments = _arguments(hint)
    if default is MISSING:
        arguments["required"] = True
    if arguments.get("action") == "store_true" and default is True:
        arguments["action"] = argparse.BooleanOptionalAction
    if item.name.endswith("_"):
        arguments["dest"] = item.name
    if "metavar" in item.metadata:
        arguments["metavar"] = item.metadata["metavar"]
    if "one_of" in item.metadata:
        text += f": {', '.join(item.metadata['one_of'])}"
    if default is MISSING:
        text += " (required)"
    elif default is not None and default is not False and default not in ((), ""):
        text += f" (default: {'on' if default is True else shown(default)})"
    return Flag(flag_name(item.name), text, arguments)


def _arguments(hint: object) -> dict[str, Any]:
    """Type, number of values and choices of a flag with this type hint."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return _arguments(next(choice for choice in inner if choice is not NoneType))
    if origin is Literal:
        return {"choices": inner}
    if origin in _SEQUENCES:
        return {**_arguments(inner[0]), "nargs": "+"}
    if hint is bool:
        return {"action": "store_true"}
    kind, metavar = _READ.get(hint, (hint, None))
    return {"type": kind, **({} if metavar is None else {"metavar": metavar})}


def _given_text(text: str) -> str:
    """Text of the command line; an empty one, as of an unset shell variable, is never meant."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text was given")
    return text


_READ: dict[object, tuple[object, str | None]] = {
    Path: (given_path, "PATH"),
    Address: (given_address, "ADDRESS"),
    str: (_given_text, None),
    int: (int, "N"),
    float: (float, "X"),
}
"""Type hint -> how typed text is read, and what stands for it in the help."""
