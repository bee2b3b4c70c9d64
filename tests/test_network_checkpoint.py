"""Checkpoints: what is saved is what is loaded, and whatever does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionsam.checkpoint import CARD, CONFIG, WEIGHTS, build_network, load_network, save_checkpoint
from fusionsam.config import preset
from fusionsam.structures import InputError


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_float32_is_identical_and_float16_nearly(make_debug, pair, tmp_path, shared):
    network = make_debug(lambda config: setattr(config.tokenizer, "shared_codebook", shared))
    before = network(*pair)
    save_checkpoint(tmp_path / "whole", network, {"miou": 41.0})
    loaded, card = load_network(tmp_path / "whole")
    assert card["miou"] == 41.0
    assert card["name"] == "whole"
    assert not loaded.training
    assert loaded.config == network.config
    after = loaded(*pair)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.fused, before.fused)
    assert torch.equal(after.latents.infrared_codes, before.latents.infrared_codes)
    assert (loaded.tokenizer.quantizers[0] is loaded.tokenizer.quantizers[1]) is shared

    save_checkpoint(tmp_path / "half", network, {}, half=True)
    stored = load_file(tmp_path / "half" / WEIGHTS)
    assert all(t.dtype == torch.float16 for t in stored.values() if t.is_floating_point())
    assert all(t.isfinite().all() for t in stored.values() if t.is_floating_point())
    halved, _ = load_network(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in halved.parameters())
    logits = halved(*pair).logits
    assert not torch.equal(logits, before.logits)
    assert (logits - before.logits).abs().mean() < 0.02 * before.logits.std()


@pytest.fixture
def folder(debug, tmp_path):
    save_checkpoint(tmp_path / "fine", debug, {})
    return tmp_path / "fine"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("head.mlp.6.bias"), r"head\.mlp\.6\.bias missing"),
        (lambda t: t.update({"head.extra": torch.ones(3)}), r"head\.extra not in the model"),
        (lambda t: t.update({"head.mlp.6.bias": torch.ones(11)}), r"head\.mlp\.6\.bias has shape \(11,\).* \(9,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(InputError, match=told) as caught:
        load_network(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def damage(folder, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (WEIGHTS, b"", "cannot be read"),
        (WEIGHTS, b"\x08\x00\x00\x00\x00\x00\x00\x00{garbage", "cannot be read"),
        (CONFIG, b"tokenizer: [", "cannot be read"),
        (CONFIG, b"tokenizer: {dims: 3}", r"unknown setting 'tokenizer\.dims'"),
        (CONFIG, b"tokenizer: {dim: wide}", r"tokenizer\.dim: found 'wide', expected int"),
        (CONFIG, b"", "found NoneType, expected a mapping"),
        (CARD, b"{", "cannot be read"),
    ],
)
def test_damaged_files_are_told_in_one_line(folder, name, content, told):
    damage(folder, name, content)
    with pytest.raises(InputError, match=told) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(folder):
    whole = (folder / WEIGHTS).read_bytes()
    damage(folder, WEIGHTS, whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_network(folder)


def test_unknown_names_list_the_choices(tmp_path):
    with pytest.raises(InputError, match="no such folder; give a checkpoint folder or a shipped name"):
        load_network(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"a folder without {WEIGHTS}"):
        load_network(tmp_path)


def test_saving_again_leaves_no_rest_and_the_last_weights(debug, folder):
    with torch.no_grad():
        debug.head.mlp[6].bias += 1
    save_checkpoint(folder, debug, {"step": 7})
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    assert torch.equal(load_file(folder / WEIGHTS)["head.mlp.6.bias"], debug.head.mlp[6].bias)
    assert json.loads((folder / CARD).read_text())["step"] == 7


def test_a_stage_one_tokenizer_starts_a_network(debug, folder, make_debug):
    config = preset("debug")
    config.tokenizer_weights = str(folder)
    network = build_network(config)
    for name, value in network.tokenizer.state_dict().items():
        assert torch.equal(value, debug.tokenizer.state_dict()[name]), name
    config.tokenizer.codebook_size = 64
    with pytest.raises(InputError, match=r"model\.tokenizer_weights: .* other model\.tokenizer settings"):
        build_network(config)
