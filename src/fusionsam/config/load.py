"""From YAML files and flags to a Config.

Order, later wins: the defaults of `config`, the preset named by model.preset, the catalogue row of data.dataset
(classes, palette, foreground), the YAML files, the flags.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jsonargparse
import yaml

from fusionsam.config.datasets import find
from fusionsam.config.schema import Config, DataConfig, from_dict, preset, to_dict
from fusionsam.types import InputError, JsonObject

_EARLY = ("model.preset", "data.dataset", "data.class_file")  # they decide the defaults of other settings


def parse_settings(prog: str, argv: Sequence[str], switches: Mapping[str, str] | None = None) -> argparse.Namespace:
    """The settings that `argv` describes, as `args.settings` (a Config), and each of `switches` (name -> help) as a
    bool. InputError names a misspelt key or a wrong value by its full dotted name."""
    switches = switches or {}
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", action="append", default=[])
    for name in _EARLY:
        early.add_argument(f"--{name}")
    early.add_argument("--print_config", action="store_true")
    try:
        given, _ = early.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from None
    chosen: JsonObject = {}
    for file in given.config:
        chosen |= _deciding(_read(Path(file)))
    chosen |= {name: value for name in _EARLY if (value := getattr(given, name)) is not None}
    parser = _parser(prog, _defaults(chosen), switches)
    flags = [token for token in argv if token != "--print_config"]
    _known_flags(parser, flags)
    try:
        parsed = parser.parse_args(flags)
    except (argparse.ArgumentError, TypeError) as error:
        raise InputError(_one_line(str(error))) from None
    values = {name: parsed[name].as_dict() for name in to_dict(Config())}
    args = argparse.Namespace(settings=from_dict(Config, values, "settings"))
    for name in switches:
        setattr(args, name, parsed[name])
    if given.print_config:
        print(as_yaml(args.settings), end="")
        raise SystemExit(0)
    return args


def read_settings(file: str | Path, *flags: str) -> Config:
    """The Config of a YAML file with `flags` (such as '--train.lr=1e-3') on top."""
    settings: Config = parse_settings("fusionsam train", ["--config", str(file), *flags]).settings
    return settings


def as_yaml(settings: Config) -> str:
    """Every setting as YAML that `--config` reads back to the same."""
    return yaml.safe_dump(_plain(to_dict(settings)), sort_keys=False)


def differences(first: object, second: object, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two nested dictionaries differ."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [] if _plain(first) == _plain(second) else [prefix]
    names = [*first, *(name for name in second if name not in first)]
    return [d for n in names for d in differences(first.get(n), second.get(n), f"{prefix}.{n}" if prefix else n)]


def _defaults(chosen: Mapping[str, object]) -> Config:
    settings = Config()
    settings.model = preset(str(chosen.get("model.preset", settings.model.preset)))
    file = chosen.get("data.class_file")
    if file is not None:
        DataConfig(class_file=str(file))  # an empty one is told by its name
    row = find(str(chosen.get("data.dataset", settings.data.dataset)), None if file is None else str(file))
    if row.classes:
        settings.model.classes, settings.model.palette = list(row.classes), list(row.palette)
        settings.model.foreground = list(row.foreground)
    return settings


def _parser(prog: str, defaults: Config, switches: Mapping[str, str]) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        usage="%(prog)s --config FILE [--SECTION.NAME VALUE ...]",
        description="Any field of the configuration is a flag and a key of the YAML file; flags win.",
    )
    parser.add_argument("--config", action="config", help="YAML file with settings")
    for name, line in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=line)
    parser.add_class_arguments(Config, None)
    parser.set_defaults(to_dict(defaults))
    return parser


def _read(path: Path) -> JsonObject:
    """The mapping in a YAML file, every key of it known."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"--config: {path} cannot be read ({reason}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config: {path} is not YAML ({' '.join(str(error).split())}); mend it") from None
    if content is None:
        raise InputError(f"--config: {path} is empty; expected settings (--print_config shows them)")
    _check_keys(content, to_dict(Config()), "", path)
    return content  # type: ignore[no-any-return]


def _check_keys(content: object, known: JsonObject, prefix: str, path: Path) -> None:
    if not isinstance(content, dict):
        where = prefix.rstrip(".") or "the file"
        raise InputError(f"{path}: {where} is {type(content).__name__}, expected a mapping of {', '.join(known)}")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise InputError(f"{path}: unknown setting {name}{_nearest(name, list(_dotted(to_dict(Config()))))}")
        if isinstance(known[key], dict) and known[key]:  # a section; data.labels_map has keys of its own
            _check_keys(value, known[key], f"{name}.", path)


def _dotted(values: JsonObject, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _deciding(content: JsonObject) -> JsonObject:
    found: JsonObject = {}
    for name in _EARLY:
        section, key = name.split(".")
        if content.get(section, {}).get(key) is not None:
            found[name] = content[section][key]
    return found


def _known_flags(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    known = parser._option_string_actions
    for flag in (token.split("=")[0] for token in flags if token.startswith("--")):
        if flag not in known and flag.rstrip("+") not in known:
            near = _nearest(flag.removeprefix("--"), [k.removeprefix("--") for k in known])
            raise InputError(f"unknown setting {flag.removeprefix('--')}{near}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists all"


def _one_line(message: str) -> str:
    line = re.sub(r'^Parser key "([^"]+)":', r"\1:", " ".join(message.split()))
    union = re.fullmatch(r"(.*: )Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", line)
    line = f"{union[1]}Expected one of {union[2]}. Got value: {union[3]}" if union else line
    line = re.sub(r"<class '(\w+)'>", r"\1", line).replace("NoneType", "null")
    return re.sub(r"(?:a )?(?:typing\.)?Literal\[([^\]]*)\]", r"one of \1", line)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
