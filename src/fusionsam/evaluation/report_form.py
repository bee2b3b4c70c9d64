"""From JSON to the dataclasses of a report and back, and which form each key must have."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

from fusionsam.types import InputError

T = TypeVar("T")

REQUIRED = {"title", "miou", "per_class_iou", "confusion_matrix", "split_ids_sha256", "dataset"}
"""Keys without which a JSON file is no report of ours."""


def plain_json(value: object) -> object:
    """Dataclasses as dictionaries, their fields of `OMITTED` left out where None; everything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        omitted: frozenset[str] = getattr(value, "OMITTED", frozenset())
        pairs = ((each.name, getattr(value, each.name)) for each in fields(value))
        return {name: plain_json(part) for name, part in pairs if not (part is None and name in omitted)}
    if isinstance(value, dict):
        return {name: plain_json(part) for name, part in value.items()}
    return [plain_json(part) for part in value] if isinstance(value, list | tuple) else value


def build(cls: type[T], values: Mapping[str, object]) -> T:
    """The dataclass `cls` from the keys that it knows; where JSON says null, or nothing, a field has its default."""
    hints = get_type_hints(cls)
    given: dict[str, object] = {}
    for each in fields(cls):  # type: ignore[arg-type]
        if each.name in values and (values[each.name] is not None or _takes_none(hints[each.name])):
            given[each.name] = _convert(hints[each.name], values[each.name])
    return cls(**given)


def _takes_none(hint: object) -> bool:
    return type(None) in get_args(hint)


def _convert(hint: object, value: object) -> object:
    """`value` as the type `hint` says: dataclasses, also as values of lists and dictionaries."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        found = [part for part in get_args(hint) if _holds_dataclass(part)]
        return _convert(found[0], value) if found else value
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value) if isinstance(value, Mapping) else hint()
    if _holds_dataclass(hint) and isinstance(value, dict):
        return {name: _convert(get_args(hint)[-1], part) for name, part in value.items()}
    if _holds_dataclass(hint) and isinstance(value, list):
        return [_convert(get_args(hint)[-1], part) for part in value]
    return value


def _holds_dataclass(hint: object) -> bool:
    return is_dataclass(hint) or any(map(_holds_dataclass, get_args(hint)))


def optional_number(value: object) -> bool:
    """Whether it is a finite number or null."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(optional_number, value.values()))


def _mious(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(p, dict) and optional_number(p.get("miou")) for p in value.values()
    )


def _matrix(value: object, side: int) -> bool:
    rows = value if isinstance(value, list) else []
    numbers = [cell for row in rows if isinstance(row, list) and len(row) == side for cell in row]
    return len(rows) == side and len(numbers) == side**2 and all(type(n) is int and n >= 0 for n in numbers)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(optional_number, value)) and None not in value


def _interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(optional_number, value))


def _objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


Rule = tuple[str, Callable[[object], bool]]
_ALWAYS: dict[str, Rule] = {
    "title": ("text", _text),
    "dataset": ("text", _text),
    "split_ids_sha256": ("text", _text),
    "n_images": ("a count", lambda v: type(v) is int and v >= 0),
    "miou": ("a number or null", optional_number),
    "protocol": ("text", _text),
    "per_class_iou": ("class -> percent", _score_map),
    "protocols": ("protocol -> miou", _mious),
}
_WHERE_THERE: dict[str, Rule] = {
    "interval": ("two numbers", _interval),
    "by_time": ("day, night -> miou", _mious),
    "baseline": ("sam and image", lambda v: isinstance(v, dict) and {"sam", "image"} <= set(v)),
    "checkpoints": ("reports of checkpoints", _objects),
    "scales": ("numbers", _numbers),
    "precision": ("text", _text),
    "notes": ("a list of sentences", _texts),
    "labels_map": ("ids of the label files -> class ids", lambda v: isinstance(v, dict)),
    "per_class_accuracy": ("class -> percent", _score_map),
    "per_class_f1": ("class -> percent", _score_map),
    "per_class_boundary_f": ("class -> percent", _score_map),
}


def require_form(values: Mapping[str, object], source: str) -> None:
    """InputError that begins with `source` unless every key that is read has its form; it names the first that has
    not."""
    if lacking := sorted(REQUIRED - set(values)):
        raise InputError(f"{source}: lacks {', '.join(lacking)}; expected a report.json of fusionsam evaluate")
    named = values["per_class_iou"] if isinstance(values["per_class_iou"], dict) else {}
    of_these: dict[str, Rule] = {
        "classes": ("the classes of per_class_iou", lambda v: v == list(named)),
        "confusion_matrix": ("a square of counts", lambda v: _matrix(v, len(named))),
    }
    for name, (expected, fits) in {**_ALWAYS, **of_these, **_WHERE_THERE}.items():
        given = values.get(name)
        if not (given is None and name in _WHERE_THERE) and not fits(given):
            raise InputError(f"{source}: {name}: found {str(given)[:60]!r}, expected {expected}; evaluate again")
