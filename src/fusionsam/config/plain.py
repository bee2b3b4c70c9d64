"""Settings to and from the plain dictionaries of YAML and JSON."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_origin, get_type_hints

from fusionsam.types import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


def to_dict(config: DataclassInstance) -> dict[str, object]:
    """A dataclass as plain dictionaries and lists, ready for YAML or JSON."""
    return asdict(config)


def _typed(hint: object, value: object) -> object:
    """`value` if it is what `hint` says, lists made tuples where those are meant; TypeError if it is something else."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        for choice in args:
            with suppress(TypeError):
                return _typed(choice, value)
    elif origin is Literal:
        if value in args:
            return value
    elif origin is list and isinstance(value, list):
        return [_typed(args[0], item) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {_typed(args[0], key): _typed(args[1], item) for key, item in value.items()}
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_typed(kind, item) for kind, item in zip(kinds, value, strict=True))
    elif isinstance(hint, type):
        accepted = (int, float) if hint is float else (hint,)
        if isinstance(value, accepted) and (hint is bool or not isinstance(value, bool)):
            return value
    raise TypeError


RETIRED: dict[str, tuple[object, str]] = {
    "encoder.sam": (False, "a TinyViT beside the backbone gained nothing real in 600 steps"),
    "encoder.thermal_share": (0.0, "a share above 0 gained nothing real"),
}
"""Settings that are gone: the value that an old file may still name, which did nothing, and why there is no other."""


def _retired(name: str, value: object, where: str) -> None:
    """InputError where an old file asks for what a retired setting did."""
    idle, why = RETIRED[name.removeprefix("model.")]
    if value != idle:
        raise InputError(f"{where}: {name}: {value!r}, but this setting is gone ({why}); remove it from the file")


def from_dict(kind: type[SettingsT], values: object, where: str, path: str = "") -> SettingsT:
    """A dataclass of this file from plain dictionaries; unknown keys and wrong types are refused by their full name.

    `where` names the source in the InputError, `path` the section of it that `values` is ("tokenizer.").
    """
    if not isinstance(values, dict):
        named = f"{where}: {path.rstrip('.')}" if path else where
        raise InputError(f"{named}: found {type(values).__name__}, expected a mapping of settings")
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    arguments: dict[str, object] = {}
    for key, value in values.items():
        if f"{path}{key}".removeprefix("model.") in RETIRED:
            _retired(f"{path}{key}", value, where)
            continue
        if key not in known:
            raise InputError(f"{where}: unknown setting '{path}{key}'; expected one of {', '.join(known)}")
        hint = hints[key]
        if isinstance(hint, type) and is_dataclass(hint):
            arguments[key] = from_dict(hint, value, where, f"{path}{key}.")
            continue
        try:
            arguments[key] = _typed(hint, value)
        except TypeError:
            kind_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise InputError(f"{where}: {path}{key}: found {value!r}, expected {kind_name}") from None
    return kind(**arguments)
