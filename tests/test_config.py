"""Settings: refused by the name the user typed, presets that build, YAML files that parse."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml

import fusionsam.config.bounds
import fusionsam.config.model
import fusionsam.config.training
from fusionsam.config.load import read_settings
from fusionsam.config.schema import (
    PRESETS,
    Config,
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TokenizerConfig,
    from_dict,
    preset,
    to_dict,
)
from fusionsam.errors import InputError
from fusionsam.models.network import FusionSAMNetwork

ROOT = Path(__file__).parents[1]
YAMLS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "experiments").glob("*/*.yaml")])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"modle": {}}, "unknown setting 'modle'; expected one of model, data, loss, train"),
        (
            {"model": {"tokenizer": {"codebook": 3}}},
            "unknown setting 'model.tokenizer.codebook'; expected one of tokens,",
        ),
        ({"model": {"tokenizer": None}}, "model.tokenizer: found NoneType, expected a mapping"),
        ({"model": {"encoder": {"kind": "resnet"}}}, "model.encoder.kind: found 'resnet', expected Literal"),
        ({"model": {"max_side": "512"}}, "model.max_side: found '512', expected int"),
        ({"model": {"prompts": {"box": 1}}}, "model.prompts.box: found 1, expected bool"),
        ({"train": {"batch_size": True}}, "train.batch_size: found True, expected int"),
        ({"train": {"lr": "fast"}}, "train.lr: found 'fast', expected float"),
        ({"data": {"crop": [352]}}, "data.crop: found [352], expected tuple[int, int]"),
        ({"model": {"palette": [[1, 2]]}}, "model.palette: found [[1, 2]]"),
        ([], "found list, expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named_in_full(values, told):
    with pytest.raises(InputError) as caught:
        from_dict(Config, values, "a.yaml")
    assert str(caught.value).startswith(f"a.yaml: {told}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"palette": [(0, 0, 0)]}, "model.palette: 1 colours for 9 model.classes"),
        ({"foreground": [1, 9, -1]}, r"model.foreground: ids \[9, -1\] are not among the 9"),
        ({"decoder": DecoderConfig(heads=7)}, "model.decoder.hidden: 256 with 7 model.decoder.heads"),
        ({"decoder": DecoderConfig(hidden=24)}, "model.decoder.hidden: 24 with 8 model.decoder.heads"),
        ({"decoder": DecoderConfig(hidden=4, heads=1)}, "model.decoder.hidden: 4 with 1 model.decoder.heads"),
        ({"classes": ["one"], "palette": [(0, 0, 0)], "foreground": []}, "model.classes: 1 class; expected at least 2"),
        ({"tokenizer": TokenizerConfig(dim=66)}, "model.fusion.heads: 4 does not divide model.tokenizer.dim 66"),
        (
            {"fusion": FusionConfig(kv_stride=6, query_stride=4)},
            "model.fusion.query_stride: 4 does not divide model.fusion.kv_stride 6",
        ),
        ({"max_side": 63}, "model.max_side: 63; expected 64 to 4096"),
    ],
)
def test_impossible_pairs_are_refused_by_name(changes, told):
    with pytest.raises(InputError, match=told):
        ModelConfig(**changes)
    assert ModelConfig(max_side=64).max_side == 64


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.batch_size", 0, "at least 1"),
        ("train.max_steps", -1, "at least 1"),  # Lightning would train for ever
        ("train.lr", float("nan"), "at least 0"),
        ("train.ema_decay", 1.5, "0 to 1"),
        ("train.seed", -1, "0 to 4.29497e+09"),
        ("data.modality_dropout", 0.6, "0 to 0.5"),
        ("data.crop", [352, 8], "16 to 4096"),
        ("data.scale", [0, 1], "0.01 to 100"),
        ("data.scale", [2, 1], "the smaller factor first"),
        ("loss.dice_weight", -0.1, "at least 0"),
        ("model.tokenizer.codebook_size", 0, "at least 1"),
        ("model.fusion.picture_dilations", [2, 0], "at least 1"),
        ("model.prompts.points", 100000, "0 to 1000"),
        ("train.epochs", float("inf"), "a finite number, at least 0"),
        ("model.fusion.kv_stride", 1000, "1 to 64"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_by_name(name, value, expected):
    values = {}
    inner = values
    for part in name.split(".")[:-1]:
        inner = inner.setdefault(part, {})
    inner[name.split(".")[-1]] = value
    with pytest.raises(InputError) as caught:
        from_dict(Config, values, "a.yaml")
    assert str(caught.value).startswith(f"{name}: ")
    assert str(caught.value).endswith(f"; expected {expected}")


def test_every_number_has_bounds_that_its_default_keeps():
    config = Config()
    held = set(fusionsam.config.bounds.BOUNDS)
    found = set()
    for part in (config.model, *vars(config.model).values(), config.data, config.loss, config.train):
        if section := getattr(part, "section", None):
            hints = get_type_hints(type(part))
            numbers = {n for n in vars(part) if re.search(r"\b(int|float)\b", str(hints[n]))}
            found |= {f"{section}.{n}" for n in numbers}
    unbounded = {"model.palette", "model.foreground", "model.decoder.logit_scale", "data.labels_map", "train.devices"}
    assert (
        found - held == unbounded
    )  # palette, foreground and labels_map have checks of their own, devices are Lightning's
    assert held <= found


def test_positions_need_four_channels_each():
    with pytest.raises(InputError, match=r"model\.tokenizer\.dim: 66 must be a multiple of 4"):
        ModelConfig(tokenizer=TokenizerConfig(dim=66), fusion=FusionConfig(heads=2))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_yaml(name):
    config = preset(name)
    assert isinstance(config, ModelConfig)
    assert config.preset == name
    with torch.device("meta"):
        network = FusionSAMNetwork(config)
    assert network.mask_decoder.sam.num_mask_tokens == 9
    plain = yaml.safe_load(yaml.safe_dump(_lists(to_dict(config))))
    assert from_dict(ModelConfig, plain, "stored") == config
    assert preset(name) == config
    assert preset(name).tokenizer is not config.tokenizer  # nobody shares a preset


def _lists(value):
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def test_an_unknown_preset_lists_the_choices():
    with pytest.raises(InputError, match="preset 'huge' is not known; choose one of debug, tiny, vit_b"):
        preset("huge")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_experiment_file_holds_known_settings_only(path):
    values = yaml.safe_load(path.read_text())
    config = from_dict(Config, values, path.name)
    assert config.model.preset in PRESETS
    base = str(ROOT / "configs" / "mfnet_tiny.yaml")  # which some files take settings back of
    differs = to_dict(config) != to_dict(Config()) or read_settings(base, "--config", str(path)) != read_settings(base)
    assert differs, "an experiment without a difference"


def test_there_are_experiment_files():
    assert YAMLS


def test_every_setting_has_its_help_text():
    """The docstring under a field is the help text of the command line: none may be missing."""
    sources = [inspect.getsource(module) for module in (fusionsam.config.model, fusionsam.config.training)]
    for node in ast.parse(
        "\n".join(source.replace("from __future__ import annotations", "") for source in sources)
    ).body:
        if not isinstance(node, ast.ClassDef) or node.name in ("Config", "Bounded"):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            kind = ast.unparse(field.annotation) if isinstance(field, ast.AnnAssign) else "Config"
            if not kind.endswith("Config") and not kind.startswith("ClassVar"):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id}"
