"""Checkpoints: what is saved is what is loaded, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fusionsam.io
from fusionsam.cli.info import describe
from fusionsam.config.schema import EncoderConfig, HeadConfig, preset
from fusionsam.data.fingerprints import Fingerprints
from fusionsam.data.splits import Entry
from fusionsam.errors import InputError
from fusionsam.types import Sample
from fusionsam.weights import checkpoint
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import CARD, CONFIG, WEIGHTS, load_network, save_checkpoint
from fusionsam.weights.interpolate import interpolate
from fusionsam.weights.ship import ship, with_steering


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_float32_is_identical_and_float16_nearly(make_debug, pair, tmp_path, shared):
    network = make_debug(lambda config: setattr(config.tokenizer, "shared_codebook", shared))
    network.to(memory_format=torch.channels_last)  # as a checkpoint is loaded; another layout rounds in another way
    before = network(*pair)
    save_checkpoint(tmp_path / "whole", network, {"miou": 41.0})
    (tmp_path / "usual").touch()
    assert {file.stat().st_mode for file in (tmp_path / "whole").iterdir()} == {(tmp_path / "usual").stat().st_mode}
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


@torch.no_grad()
@pytest.mark.parametrize("training", ["full", "frozen", "lora"])
def test_every_way_of_training_the_encoder_comes_back(make_debug, pair, tmp_path, training):
    network = make_debug(lambda config: setattr(config.encoder, "training", training))
    network.to(memory_format=torch.channels_last)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(2))  # adapters begin at no effect
    save_checkpoint(tmp_path / "run", network, {})
    loaded, _ = load_network(tmp_path / "run")
    assert torch.equal(loaded(*pair).logits, network(*pair).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in network.named_parameters() if p.requires_grad
    }
    if training == "lora":
        rewrite(tmp_path / "run", lambda t: t.pop(next(n for n in t if ".lora_A." in n)))
        with pytest.raises(InputError, match=r"lora_A\..* missing"):
            load_network(tmp_path / "run")


def test_adapters_begin_on_a_checkpoint_trained_without_them_and_not_the_other_way_round(make_debug, pair, tmp_path):
    start = make_debug()
    save_checkpoint(tmp_path / "full", start, {})
    config = preset("debug")
    config.encoder.training, config.start_from = "lora", str(tmp_path / "full")
    adapted = build_network(config, to_train=True).eval()
    assert any(".lora_" in name for name in adapted.state_dict())
    torch.testing.assert_close(adapted(*pair).logits, start(*pair).logits)  # adapters begin at no effect
    save_checkpoint(tmp_path / "lora", adapted, {})
    config.encoder.training, config.start_from = "full", str(tmp_path / "lora")
    with pytest.raises(InputError, match=r"^model\.encoder\.training: full, but .*lora of .* has LoRA adapters; give"):
        build_network(config)
    # another image encoder takes nothing over from the adapted one
    save_file(timm.create_model("mobilenetv2_050", pretrained=False).state_dict(), tmp_path / "imagenet.safetensors")
    config.encoder = EncoderConfig(source="mobilenetv2_050", weights=str(tmp_path / "imagenet.safetensors"))
    new = build_network(config, to_train=True).state_dict()
    assert torch.equal(new["prompt_encoder.sam.no_mask_embed.weight"], adapted.prompt_encoder.sam.no_mask_embed.weight)


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_an_encoder_to_train_behind_has_weights(training):
    config = preset("debug")
    config.encoder.training = training
    assert build_network(config).config is config  # to count parameters, no weights are needed
    with pytest.raises(InputError, match=rf"^model\.encoder\.training: {training}, .*model\.sam_weights are given"):
        build_network(config, to_train=True)
    config.encoder.training = "full"
    build_network(config, to_train=True)


def test_a_shipped_card_names_data_and_origin_without_folders(debug, tmp_path):
    data = {"dataset": "mfnet", "train_split": "train", "root": "/somewhere/mfnet156", "val_split": "val"}
    told = (
        "train --data.root /somewhere/mfnet156 --data.extra_pairs '[/somewhere/a,/somewhere/b]' --see https://x.org/y"
    )
    card = {"seed": 3, "config": {"data": data}, "command": told, "halfway_from": ["/somewhere/runs/x", "tiny"]}
    save_checkpoint(tmp_path / "run", debug, card)
    shown = {"split": "mfnet156/val", "protocol": "present", "miou": 41.5, "per_class_iou": {"car": 12.0}}
    ship(tmp_path / "run", tmp_path / "small", val=shown)
    assert "somewhere" not in (tmp_path / "small" / CARD).read_text()
    network, card = load_network(tmp_path / "small")
    assert card["data"] == {"dataset": "mfnet", "train_split": "train"}
    assert card["command"] == "train --data.root mfnet156 --data.extra_pairs '[a,b]' --see https://x.org/y"
    assert card["halfway_from"] == ["x", "tiny"]
    lines = describe(network, card, "small").splitlines()
    assert "data             mfnet, trained on train" in lines
    assert "started from     data mfnet156" in lines
    assert lines[-1] == "val: mIoU 41.5 (present, mfnet156/val)"


def test_info_tells_where_tiny_comes_from():
    if "tiny" not in checkpoint.shipped():
        pytest.skip("no shipped checkpoint in this tree")
    network, card = load_network("tiny")
    text = describe(network, card, "tiny")
    told = card["val"]
    assert re.search(rf"^val( as trained)?: mIoU {told['miou']} \({told['protocol']}, {told['split']}\)$", text, re.M)
    assert ("val as trained" in text) == ("class_offsets" in card)
    assert all(str(value) in text for value in card["started_from"].values())
    assert "{" not in text


def test_the_commit_is_this_packages_own(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "io.py").write_text("")
    monkeypatch.setattr(fusionsam.io, "__file__", str(tmp_path / "io.py"))
    assert fusionsam.io.commit() == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "another project, in whose folder the package is installed")
    assert fusionsam.io.commit() == "unknown"
    git("add", "io.py")
    git("commit", "-m", "the package itself")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert fusionsam.io.commit() == head[:12]


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
        (CARD, b"[]", "is no training card"),
        (CARD, b'{"config": 5}', "is no training card"),
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
    with pytest.raises(InputError, match="no such folder; give a checkpoint folder, a shipped name"):
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
    config.tokenizer.dead_code_threshold = 3.0  # how it goes on to learn is free
    network = build_network(config)
    for name, value in network.tokenizer.state_dict().items():
        assert torch.equal(value, debug.tokenizer.state_dict()[name]), name
    config.tokenizer.codebook_size = 64
    with pytest.raises(InputError, match=r"^model\.tokenizer\.codebook_size: 64, but .* has 32; "):
        build_network(config)


def test_fine_tuning_starts_from_every_tensor_of_a_checkpoint(make_debug, tmp_path):
    first = make_debug()
    save_checkpoint(tmp_path / "first", first, {})
    config = preset("debug")
    config.start_from = str(tmp_path / "first")
    torch.manual_seed(11)
    started = build_network(config).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in first.state_dict().items())


def test_fine_tuning_on_other_classes_matches_them_by_name(make_debug, tmp_path, capsys):
    first = make_debug()
    save_checkpoint(tmp_path / "first", first, {})
    config, old = preset("debug"), first.state_dict()
    names = list(config.classes)
    config.start_from = str(tmp_path / "first")
    config.classes = [names[0], names[2], "dog", names[1]]
    config.palette = config.palette[:4]
    new = build_network(config).state_dict()
    said = f"classes; kept by name: {names[0]}, {names[2]}, {names[1]}; new: dog"
    assert said in capsys.readouterr().err
    hypernetwork = "mask_decoder.sam.output_hypernetworks_mlps.{}.proj_out.weight"
    for row, place in ((0, 0), (1, 2), (3, 1)):
        for name in ("head.mlp.6.weight", "mask_decoder.sam.mask_tokens.weight"):
            assert torch.equal(new[name][row], old[name][place]), (name, row)
        assert torch.equal(new[hypernetwork.format(row)], old[hypernetwork.format(place)])
    assert not any(torch.equal(new["head.mlp.6.weight"][2], row) for row in old["head.mlp.6.weight"])
    assert torch.equal(new[hypernetwork.format(2)], old[hypernetwork.format(3)])  # of a class that is gone
    config.classes, config.palette = [names[1], names[0], *names[2:]], preset("debug").palette  # as many
    new = build_network(config).state_dict()
    order = [1, 0, *range(2, len(names))]
    assert torch.equal(new["head.mlp.6.bias"], old["head.mlp.6.bias"][order])
    masks = old[hypernetwork.format(0)].shape[0]
    seen = [each["head.mlp.0.weight"][:, masks : masks + len(names)] for each in (new, old)]
    assert torch.equal(seen[0], seen[1][:, order])


def test_fine_tuning_may_add_what_begins_as_if_it_were_not_there(make_debug, pair, tmp_path):
    def lite(config):
        config.encoder = EncoderConfig(source="tf_efficientnet_lite0")

    first = make_debug(lite)
    with torch.no_grad():
        first.picture_head.out.weight.normal_(std=0.3)  # at zero the picture would hide what was added
    save_checkpoint(tmp_path / "first", first, {})
    config = preset("debug")
    config.encoder = EncoderConfig(source="tf_efficientnet_lite0", guided=True, thermal=True)
    config.fusion.picture_dilations = (2, 4)
    config.start_from = str(tmp_path / "first")
    grown = build_network(config).eval()
    added = {name.split(".")[1] for name in set(grown.state_dict()) - set(first.state_dict())}
    assert added == {"guide", "thermal", "inject", "context"}
    backbones = [dict(part.named_parameters()) for part in (grown.image_encoder.thermal, first.image_encoder.backbone)]
    assert all(torch.equal(parameter, backbones[1][name]) for name, parameter in backbones[0].items())
    with torch.no_grad():
        wanted, found = first(*pair), grown(*pair)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.fused, wanted.fused, rtol=1e-4, atol=1e-5)
        grown.image_encoder.guide.weight.normal_(std=0.1)
        assert not torch.allclose(grown(*pair).logits, wanted.logits, rtol=1e-2, atol=1e-3)


def test_fine_tuning_with_another_image_encoder_keeps_all_that_its_widths_do_not_shape(make_debug, tmp_path):
    first = make_debug()
    save_checkpoint(tmp_path / "first", first, {})
    config = preset("debug")
    config.start_from = str(tmp_path / "first")
    config.encoder = EncoderConfig(source="tf_efficientnet_lite0", thermal=True)
    with pytest.raises(InputError, match=r"model\.encoder\.kind: timm, but .* has tinyvit; give "):
        build_network(config)
    foreign_weights = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    save_file(foreign_weights, tmp_path / "imagenet.safetensors")
    config.encoder.weights = str(tmp_path / "imagenet.safetensors")
    new, old = build_network(config).state_dict(), first.state_dict()
    for stream in ("backbone", "thermal"):
        assert torch.equal(new[f"image_encoder.{stream}.conv_stem.weight"], foreign_weights["conv_stem.weight"])
    anew = {name for name in new if name not in old or not torch.equal(new[name], old[name])}
    assert anew
    assert all(n.startswith(("image_encoder.", "mask_decoder.fine.", "head.lateral.")) for n in anew)


def test_fine_tuning_on_other_classes_renews_only_what_their_number_shapes(make_debug, tmp_path):
    first = make_debug()
    save_checkpoint(tmp_path / "first", first, {})
    old = first.state_dict()
    for names in (["road", "person"], [f"class {i}" for i in range(11)]):
        config = preset("debug")
        config.start_from = str(tmp_path / "first")
        config.classes, config.palette, config.foreground = names, [(i, 1, 2) for i in range(len(names))], [1]
        new = build_network(config).state_dict()
        taken = {n for n in new if n in old and old[n].shape == new[n].shape and torch.equal(old[n], new[n])}
        anew = set(new) - taken
        assert anew
        # a token and a hypernetwork a class, the head's last layer and its first, which sees the classes' FOT logits
        begun = ("mask_decoder.sam.mask_tokens.", "mask_decoder.sam.output_hypernetworks_mlps.", "head.mlp.")
        assert all(n.startswith((*begun, "mask_decoder.sam.iou_prediction_head.")) for n in anew), sorted(anew)


def test_fine_tuning_takes_lstg_from_where_it_is_named(make_debug, tmp_path):
    first, second = make_debug(), make_debug(lambda config: setattr(config.tokenizer, "codebook_size", 37))
    save_checkpoint(tmp_path / "first", first, {})
    save_checkpoint(tmp_path / "second", second, {})
    config = preset("debug")
    config.tokenizer.codebook_size = 37
    config.start_from = str(tmp_path / "first")
    with pytest.raises(InputError, match=r"model\.start_from .*tokenizer\.quantizers"):
        build_network(config)
    config.tokenizer_weights = str(tmp_path / "second")
    built = build_network(config).state_dict()
    for name, tensor in second.state_dict().items():
        source = tensor if name.startswith("tokenizer.") else first.state_dict()[name]
        assert torch.equal(built[name], source), name


def test_continuous_latents_start_from_a_quantised_stage_1_without_its_codebooks(make_debug, tmp_path):
    first = make_debug()
    save_checkpoint(tmp_path / "stage_1", first, {})
    config = preset("debug")
    config.tokenizer.tokens = "continuous"
    config.tokenizer_weights = str(tmp_path / "stage_1")
    built = build_network(config).tokenizer.state_dict()
    assert all(torch.equal(tensor, first.tokenizer.state_dict()[name]) for name, tensor in built.items())
    config.tokenizer.dim = 20  # any other difference is still refused
    with pytest.raises(InputError, match=r"^model\.tokenizer\.dim: 20, but .* has 16; "):
        build_network(config)


def test_halfway_is_the_mean_of_start_and_end_and_new_parts_count_as_they_began(make_debug, tmp_path):
    timm_kind = EncoderConfig(kind="timm")
    start = make_debug(lambda config: setattr(config, "encoder", timm_kind))
    end = make_debug(lambda config: setattr(config, "encoder", replace(timm_kind, thermal=True)))
    with torch.no_grad():
        for parameter in end.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_checkpoint(tmp_path / "start", start, {})
    save_checkpoint(tmp_path / "end", end, {"step": 9, "val": {"val/miou": 3}, "calibration": {}, "class_offsets": {}})
    middle, card = load_network(interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "middle"))
    assert (card["step"], card["interpolated_from"], card["share"]) == (9, str(tmp_path / "start"), 0.5)
    assert not {"val", "calibration", "class_offsets"} & card.keys()  # they were of other weights
    first, last, mean = (network.state_dict() for network in (start, end, middle))
    stem = "image_encoder.{}.conv_stem.weight"
    torch.testing.assert_close(
        mean[stem.format("backbone")], (first[stem.format("backbone")] + last[stem.format("backbone")]) / 2
    )
    torch.testing.assert_close(
        mean[stem.format("thermal")], (first[stem.format("backbone")] + last[stem.format("thermal")]) / 2
    )
    torch.testing.assert_close(mean["image_encoder.inject.0.weight"], last["image_encoder.inject.0.weight"] / 2)
    nearer, _ = load_network(interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "nearer", share=0.25))
    inject = "image_encoder.inject.0.weight"
    torch.testing.assert_close(nearer.state_dict()[inject], last[inject] / 4)
    with pytest.raises(InputError, match=r"share: 1\.5, expected a number from 0 to 1"):
        interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "none", share=1.5)
    far = make_debug(lambda c: (setattr(c, "encoder", timm_kind), setattr(c.fusion, "picture_dilations", (2, 4))))
    last = far.picture_head.context[-1].weight.detach().normal_()
    save_checkpoint(tmp_path / "far", far, {})
    middle, _ = load_network(interpolate(tmp_path / "start", tmp_path / "far", tmp_path / "farther"))
    assert torch.equal(middle.picture_head.context[1].weight, far.picture_head.context[1].weight)  # began at random
    torch.testing.assert_close(middle.picture_head.context[-1].weight, last / 2)  # began at zero
    other = make_debug(lambda config: setattr(config.head, "width", 24))
    save_checkpoint(tmp_path / "other", other, {})
    with pytest.raises(InputError, match=r"model\.start_from"):
        interpolate(tmp_path / "other", tmp_path / "end", tmp_path / "none")


def test_offsets_fitted_after_training_are_not_inherited(make_debug, tmp_path):
    start, end = make_debug(), make_debug()
    fitted = {"class_offsets": {"offsets": dict.fromkeys(start.config.classes, 4.0)}, "calibration": {"temperature": 2}}
    for name, network in (("start", start), ("end", end)):
        save_checkpoint(tmp_path / name, network, fitted)
    config = replace(start.config, start_from=str(tmp_path / "start"))
    last = "head.mlp.6.bias"
    torch.testing.assert_close(build_network(config).state_dict()[last], start.state_dict()[last])
    middle, card = load_network(interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "middle"))
    torch.testing.assert_close(middle.state_dict()[last], (start.state_dict()[last] + end.state_dict()[last]) / 2)
    assert not fitted.keys() & card.keys()
    shipped, card = load_network(ship(tmp_path / "start", tmp_path / "shipped"))
    torch.testing.assert_close(shipped.state_dict()[last], start.state_dict()[last] + 4, atol=1e-3, rtol=1e-3)
    assert card.items() >= fitted.items()


def test_halfway_keeps_a_tokenizer_from_elsewhere_and_refuses_other_classes(make_debug, tmp_path):
    start, stage_1 = make_debug(), make_debug()
    with torch.no_grad():
        for parameter in stage_1.tokenizer.parameters():
            parameter.add_(1)
    save_checkpoint(tmp_path / "start", start, {})
    save_checkpoint(tmp_path / "stage_1", stage_1, {})
    config = replace(start.config, start_from=str(tmp_path / "start"), tokenizer_weights=str(tmp_path / "stage_1"))
    save_checkpoint(tmp_path / "end", build_network(config), {})
    middle, _ = load_network(interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "middle"))
    for name, tensor in stage_1.tokenizer.state_dict().items():
        assert torch.equal(middle.tokenizer.state_dict()[name], tensor)
    other = make_debug(lambda config: setattr(config, "classes", [*config.classes[:-1], "else"]))
    save_checkpoint(tmp_path / "other", other, {})
    with pytest.raises(InputError, match="has other classes than"):
        interpolate(tmp_path / "start", tmp_path / "other", tmp_path / "none")


def test_a_head_of_another_kind_begins_anew_and_is_not_averaged(make_debug, tmp_path):
    timm_kind = EncoderConfig(kind="timm")
    start = make_debug(lambda config: setattr(config, "encoder", timm_kind))
    save_checkpoint(tmp_path / "start", start, {})
    config = replace(
        start.config, start_from=str(tmp_path / "start"), head=replace(start.config.head, width=32, pyramid=32)
    )
    end = build_network(config)
    begun, last = start.state_dict(), end.state_dict()
    assert all(torch.equal(begun[n], last[n]) for n in begun if not n.startswith("head."))
    with torch.no_grad():
        for parameter in end.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_checkpoint(tmp_path / "end", end, {})
    middle = load_network(interpolate(tmp_path / "start", tmp_path / "end", tmp_path / "middle"))[0].state_dict()
    last = end.state_dict()
    assert any(name.startswith("head.pyramid.") for name in middle)
    for name, tensor in middle.items():
        expected = last[name] if name.startswith("head.") else (last[name] + begun[name]) / 2
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    with pytest.raises(InputError, match=r"^model\.head\.pyramid: 32, but the image encoder has 3 levels"):
        make_debug(lambda config: setattr(config.head, "pyramid", 32))
    with pytest.raises(InputError, match=r"^model\.head\.width: 24, .* give a multiple of 32"):
        make_debug(
            lambda config: (setattr(config, "encoder", timm_kind), setattr(config, "head", HeadConfig(24, pyramid=32)))
        )


def test_a_full_disk_is_one_sentence_and_leaves_nothing(make_debug, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"a part")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("fusionsam.weights.checkpoint.save_file", full)
    with pytest.raises(InputError, match=r"out/model\.safetensors: cannot be written \(No space left"):
        save_checkpoint(tmp_path / "out", make_debug(), {})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_of_stage_1_says_what_it_is(folder):
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if n.startswith("tokenizer.")}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"holds LSTG alone \(stage 1\); give it as model\.tokenizer_weights"):
        load_network(folder)


def test_a_retired_setting_loads_where_it_did_nothing_and_is_explained_where_it_did(make_debug, tmp_path):
    folder = save_checkpoint(tmp_path / "old", make_debug(), {})
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(stored.replace("encoder:\n", "encoder:\n  sam: false\n  thermal_share: 0.0\n"))
    load_network(folder)
    (folder / "config.yaml").write_text(stored.replace("encoder:\n", "encoder:\n  thermal_share: 1.0\n"))
    with pytest.raises(InputError, match=r"encoder\.thermal_share: 1\.0, but this setting is gone .*; remove it"):
        load_network(folder)


def test_weights_of_two_checkpoints_remember_the_pairs_of_both(make_debug, tmp_path):
    base, steered = make_debug(), make_debug(lambda config: setattr(config.steering, "width", 8))
    for number, (name, network) in enumerate({"base": base, "steered": steered}.items()):
        save_checkpoint(tmp_path / name, network, {})
        seen = Fingerprints()
        pair = torch.randint(256, (4, 64, 64), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        seen.add(Entry(name, tmp_path / "v.png", tmp_path / "i.png"), Sample(name, pair[:3], pair[3:]))
        seen.write(tmp_path / name)
    both = {pair for name in ("base", "steered") for pair in Fingerprints.read(tmp_path / name).content}
    assert len(both) == 2
    made = [
        with_steering(tmp_path / "base", tmp_path / "steered", tmp_path / "moved"),
        interpolate(tmp_path / "steered", tmp_path / "base", tmp_path / "mean"),
    ]
    assert [set(Fingerprints.read(folder).content) for folder in made] == [both, both]


def test_steering_moves_to_weights_of_the_same_network(make_debug, pair, tmp_path):
    base, steered = make_debug(), make_debug(lambda config: setattr(config.steering, "width", 8))
    other = make_debug(lambda config: setattr(config.head, "width", 24))
    with torch.no_grad():
        steered.steering.out.weight.normal_()
    for name, network in (("base", base), ("steered", steered), ("other", other)):
        save_checkpoint(tmp_path / name, network, {"step": len(name), "steering": {"seed": 3}})
    both, card = load_network(with_steering(tmp_path / "base", tmp_path / "steered", tmp_path / "both"))
    assert (card["step"], card["steering"]) == (4, {"seed": 3})
    alone, _ = load_network(tmp_path / "base")
    assert torch.equal(both(*pair).logits, alone(*pair).logits)
    for name, tensor in steered.steering.state_dict().items():
        assert torch.equal(both.steering.state_dict()[name], tensor)
    for donor, told in (("base", "have no steering"), ("other", "have no steering")):
        with pytest.raises(InputError, match=told):
            with_steering(tmp_path / "base", tmp_path / donor, tmp_path / "none")
    with pytest.raises(InputError, match="are of another network than"):
        with_steering(tmp_path / "other", tmp_path / "steered", tmp_path / "none")


def test_weights_are_called_as_their_folder_from_within_it(make_debug, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "mine" / "final", make_debug(), {})
    (tmp_path / "mine" / "final" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "final")
    for source in (".", "below/..", "../final"):
        assert load_network(source)[1]["name"] == "final"
