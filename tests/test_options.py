"""A command's options are one dataclass: the flags, their help and their defaults all come from it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fusionsam.cli import options
from fusionsam.cli.main import COMMANDS, main
from fusionsam.cli.parser import UsageError
from fusionsam.config.options import CommandLine, DataOptions
from fusionsam.config.schema import Config, preset
from fusionsam.evaluation import conditions, simple_fusions
from fusionsam.evaluation.options import CONDITION_NAMES, FusionMetricsOptions


@dataclass(frozen=True, kw_only=True)
class Sample(DataOptions, CommandLine):
    """Text above
    the flags, 100 %."""

    many: Sequence[float] = (1.0, 1.25)
    """several numbers"""
    kind: Literal["a", "b"] | None = None
    """one of two"""
    large: int = 2**20
    """a large number"""
    share: float = 0.25
    """a share, 50 %"""
    figures: bool = True
    """drawn"""
    dry_run: bool = False
    """nothing is
    written"""
    where: Path | None = field(default=None, metadata={"metavar": "F"})
    """a file"""


NEEDED = ["--dataset", "mfnet", "--root", "r"]


def test_what_is_typed_becomes_the_dataclass_and_the_rest_its_defaults() -> None:
    made = options.parse(Sample, "x", [*NEEDED, "--many", "1", "2", "--kind", "b", "--no-figures"], "fusionsam x")
    assert made == Sample("mfnet", Path("r"), many=(1.0, 2.0), kind="b", figures=False, command="fusionsam x")
    typed = ["--large", "3", "--dry-run", "--where", "a/b", "--class-file", "c.yaml", "--split", "t", "--share=0.5"]
    made = options.parse(Sample, "x", [*NEEDED, *typed])
    assert (made.large, made.dry_run, made.where, made.class_file) == (3, True, Path("a/b"), Path("c.yaml"))
    assert (made.split, made.share, made.many) == ("t", 0.5, (1.0, 1.25))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "the following arguments are required: --dataset, --root"),
        ([*NEEDED, "--class-file", ""], "argument --class-file: an empty path was given"),
        ([*NEEDED, "--split", " "], "argument --split: an empty text was given"),
        ([*NEEDED, "--kind", "c"], "argument --kind: invalid choice: 'c' (choose from"),
        ([*NEEDED, "--large", "1.5"], "argument --large: invalid int value: '1.5'"),
        ([*NEEDED, "--lrge", "1"], "unknown flag --lrge (did you mean --large?)"),
        ([*NEEDED, "--command", "1"], "unknown flag --command"),
    ],
)
def test_what_does_not_fit_is_one_sentence(argv: list[str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse(Sample, "fusionsam x", argv)
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith("; see fusionsam x --help")


def test_help_writes_numbers_as_they_are_typed() -> None:
    text = options.parser(Sample, "x").format_help()
    flat = " ".join(text.split())
    assert "Text above the flags, 100 %." in flat
    for told in (
        "a large number (default: 1048576)", "several numbers (default: 1 1.25)", "a share, 50 % (default: 0.25)",
        "--figures, --no-figures drawn (default: on)", "nothing is written --where F a file",
        "row of the catalogue: mfnet, msrs", "(required)",
    ):  # fmt: skip
        assert told in flat
    assert "--command" not in text


def field_texts(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring, read in another way than the code under test does: by the lines after the field."""
    found = {}
    for home in reversed(kind.__mro__[:-1]):
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[home.__module__]))):
            if isinstance(node, ast.ClassDef) and node.name == home.__name__:
                for here, after in zip(node.body, node.body[1:], strict=False):
                    if isinstance(here, ast.AnnAssign) and isinstance(after, ast.Expr):
                        found[here.target.id] = ast.literal_eval(after.value)  # type: ignore[union-attr]
    return found


def plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def solid(text: str) -> str:
    """Without white space: the help breaks lines at hyphens, too."""
    return "".join(text.split())


FROM_A_DATACLASS = [name for name in COMMANDS if name != "train"]


@pytest.mark.parametrize("name", FROM_A_DATACLASS)
def test_help_shows_every_field_with_its_docstring_and_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = importlib.import_module(f"fusionsam.cli.{name.replace('-', '_')}").Options
    assert main([name, *(["check"] if name == "data" else []), "--help"]) == 0
    flat = " ".join(re.sub(r"-\n *", "-", capsys.readouterr().out).split())
    texts = field_texts(kind)
    shown = [item for item in fields(kind) if item.metadata.get("flag", True)]
    assert shown
    for item in shown:
        flag = options.flag_name(item.name)
        assert flag in flat
        text = " ".join(texts[item.name].split())
        assert text, item.name
        _, found, after = flat.partition(text)
        assert found, f"{flag}: {text!r} is not in the help"
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if default is MISSING:
            assert "(required)" in after.split(" --")[0], flag
        elif isinstance(default, bool | None):
            continue
        else:
            values = default if isinstance(default, tuple) else (default,)
            typed = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
            assert not typed or f"(default: {typed})" in after.split(" --")[0], flag


def test_help_of_train_shows_every_setting_with_its_docstring_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    flat = solid(capsys.readouterr().out)
    missing = []

    def look(part: Any, path: str) -> None:
        texts = field_texts(type(part))
        for item in fields(part):
            value = getattr(part, item.name)
            if is_dataclass(value):
                look(value, f"{path}{item.name}.")
                continue
            after = flat.partition(f"--{path}{item.name}")[2].partition(solid(texts[item.name]))[2]
            shown = "null" if value is None else str(value)
            if not after or (plain(value) and f"default:{solid(shown)})" not in after.partition("--")[0]):
                missing.append((path + item.name, value, after[:80]))

    settings = Config(model=preset(Config().model.preset))
    look(settings, "")
    assert not missing


def test_no_help_loads_torch() -> None:
    code = (
        "import sys; from fusionsam.cli.main import COMMANDS, main\n"
        "for name in COMMANDS: main([name, '--help'])\n"
        "print('LOADED', sorted({'torch', 'transformers', 'timm', 'lightning'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.stdout.splitlines()[-1] == "LOADED []"


def test_names_in_the_help_are_those_that_the_code_knows() -> None:
    assert tuple(conditions.CONDITIONS) == CONDITION_NAMES
    assert field_texts(FusionMetricsOptions)["baselines"].endswith(", ".join(simple_fusions.FUSIONS))
