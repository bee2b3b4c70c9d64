"""Training learns, resumes to the same bits, refuses leaks, and writes down what it did."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from safetensors.torch import load_file

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.rig import Rig
from fusionsam.cli.main import main
from fusionsam.config.datasets import find
from fusionsam.config.load import read_settings
from fusionsam.config.schema import Config, DataConfig, ModelConfig, TrainConfig, from_dict, preset, to_dict
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import Fingerprints
from fusionsam.data.images import write_png
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError
from fusionsam.io import write_json
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.callbacks import BestWeights, WholeFiles
from fusionsam.training.data import _refuse_leaks, data_digests
from fusionsam.training.distill_task import DistillTask
from fusionsam.training.requirements import require_same_sources
from fusionsam.training.run import open_trainer, strategy, total_steps, train
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.types import Batch
from fusionsam.weights.checkpoint import save_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 8
LEAK = "--data.allow_train_test_leak_and_know_that_scores_are_worthless"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    synthesize(root, 8, seed=5, size=(96, 128), progress=False)
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(root: Path, out: Path, *more: str) -> list[str]:
    own = [f"--data.root={root}", f"--train.out={out}", "--train.accelerator=cpu", f"--train.max_steps={STEPS}"]
    return [*own, "--train.validate_every=4", *more]


def run(root: Path, out: Path, *more: str, resume: bool = False) -> Path:
    return train(read_settings(CONFIGS / "debug.yaml", *flags(root, out, *more)), resume, command="a test")


def results(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights with their moving average and buffers; the network that ships; the history without clock times."""
    last = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return last, load_file(out / "final" / "model.safetensors"), [{**line, "hours": None} for line in lines]


def assert_same(first: Path, second: Path) -> None:
    for ours, theirs in zip(results(first)[:2], results(second)[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert results(first)[2] == results(second)[2]


@pytest.fixture(scope="module")
def unbroken(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run(scenes, tmp_path_factory.mktemp("runs") / "unbroken")


class Power(Exception):
    """Gone."""


@pytest.mark.parametrize(
    ("stop", "minutes"),
    [(4, "5"), (5, "0"), (4, "0")],
    ids=["saved by the validation", "saved between validations", "saved always"],
)
def test_k_steps_resume_k_steps_are_2k_steps(
    stop: int, minutes: str, scenes: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = SegmentationTask.on_train_batch_start

    def failing(self: SegmentationTask, batch: Any, batch_idx: int) -> None:
        if self.global_step == stop:
            raise Power
        start(self, batch, batch_idx)

    out, time_between = tmp_path / "broken", f"--train.checkpoint_minutes={minutes}"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", failing)
        with pytest.raises(Power):
            run(scenes, out, time_between)
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == stop
    if stop == 5:  # a session that went on after its checkpoint, to a validation that will come again
        with (out / "history.jsonl").open("a") as file:
            file.write('{"step": 8, "val/miou": 99.0}\n')
    torch.manual_seed(99)  # whatever the new process drew before
    run(scenes, out, time_between, resume=True)
    assert_same(out, unbroken)
    assert results(out)[2][-1]["step"] == STEPS
    card = json.loads((out / "final" / "training.json").read_text())
    assert (card["step"], card["command"]) == (STEPS, "a test")


def test_a_run_killed_in_a_validation_makes_up_for_it(
    scenes: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: SegmentationTask, batch: Any, batch_index: int) -> None:
        raise Power

    out, often = tmp_path / "broken", "--train.checkpoint_minutes=0"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "validation_step", failing)
        with pytest.raises(Power):
            run(scenes, out, often)
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 3  # step 4 is the one that is validated
    run(scenes, out, often, resume=True)
    assert_same(out, unbroken)


def test_killed_command_resumes_to_the_same_numbers(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    executable = Path(sys.executable).with_name("fusionsam")
    command = [str(executable), "train", "--config", str(CONFIGS / "debug.yaml"), *flags(scenes, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--train.checkpoint_minutes=0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 300
    while not (out / "last.ckpt").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "final").exists(), "the run was over before it was killed"
    answer = subprocess.run(
        [*command, "--data.workers=1", "--resume"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stderr
    assert_same(out, unbroken)
    card = json.loads((out / "final" / "training.json").read_text())
    assert card["command"].startswith("fusionsam train --config ")
    assert card["command"].endswith(" --resume")


def test_the_last_step_is_validated_though_validate_every_does_not_divide_it(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    six = "--train.max_steps=6"
    out = run(scenes, tmp_path / "six", six)
    history = results(out)[2]
    assert [line["step"] for line in history] == [4, 6]
    ends = {k: v for k, v in history[-1].items() if k.startswith("val/")}
    final = json.loads((out / "final" / "training.json").read_text())
    assert (final["step"], final["val"]) == (6, ends)
    best = json.loads((out / "best" / "training.json").read_text())
    assert best["val"]["val/miou"] == max(line["val/miou"] for line in history)

    start = SegmentationTask.on_train_batch_start

    def failing(self: SegmentationTask, batch: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            raise Power
        start(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", failing)
        with pytest.raises(Power):
            run(scenes, tmp_path / "broken", six)
    run(scenes, tmp_path / "broken", six, resume=True)
    assert_same(tmp_path / "broken", out)
    run(scenes, tmp_path / "broken", six, resume=True)  # nothing left to do, and nothing forgotten
    assert json.loads((tmp_path / "broken" / "final" / "training.json").read_text())["val"] == ends


@pytest.mark.parametrize(
    ("devices", "nodes", "steps"), [("auto", 1, 33), (1, 1, 33), (2, 1, 17), ("2", 3, 6), ("0,1", 1, 17), ("-1", 2, 17)]
)
def test_epochs_are_passes_of_all_devices_together(devices: int | str, nodes: int, steps: int) -> None:
    config = Config(train=TrainConfig(epochs=10, batch_size=4, devices=devices, num_nodes=nodes))
    assert total_steps(config, 13) == steps
    config.train.max_steps = 7
    assert total_steps(config, 13) == 7


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ({"devices": 2}, 0, "ddp_find_unused_parameters_true"),
        ({"devices": "auto"}, 2, "ddp_find_unused_parameters_true"),
        ({"devices": "0,1", "strategy": "ddp"}, 2, "ddp_find_unused_parameters_true"),
        ({"devices": 1, "num_nodes": 2}, 2, "ddp_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "fsdp"}, 2, "fsdp"),
        ({"devices": 1, "strategy": "ddp"}, 2, "ddp"),
        ({"devices": "auto", "accelerator": "cpu"}, 2, "auto"),
        ({}, 0, "auto"),
    ],
)
def test_several_devices_look_for_unused_parameters(
    asked: dict[str, Any], gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert strategy(TrainConfig(**asked)) == expected


@pytest.mark.parametrize(("written", "read"), [("2", 2), ("auto", "auto"), ("0,1", "0,1")])
def test_devices_are_a_number_or_words(written: str, read: int | str, tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text(f"train:\n  devices: {written}\n")
    assert read_settings(tmp_path / "devices.yaml").train.devices == read
    assert read_settings(CONFIGS / "debug.yaml", f"--train.devices={written}").train.devices == read


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_an_encoder_that_would_stay_random_is_refused(training: str, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^model\.encoder\.training: {training}, .* model\.encoder\.weights nor"):
        run(scenes, tmp_path / "random", f"--model.encoder.training={training}")


def test_lstg_that_would_stay_random_is_refused(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^train\.freeze_tokenizer: true, but LSTG would stay random; give"):
        run(scenes, tmp_path / "random", "--train.freeze_tokenizer=true")
    with pytest.raises(InputError, match=r"^train\.freeze_tokenizer: true"):  # the embedding of pixels is learned, too
        run(scenes, tmp_path / "random", "--train.freeze_tokenizer=true", "--model.tokenizer.tokens=pixels")
    assert not (tmp_path / "random").exists()
    once = ["--train.freeze_tokenizer=true", "--train.max_steps=1", f"--model.start_from={unbroken / 'final'}"]
    assert (run(scenes, tmp_path / "given", *once) / "final").is_dir()


def test_settings_of_an_earlier_version_are_told_what_they_lack(unbroken: Path, tmp_path: Path) -> None:
    old = shutil.copytree(unbroken, tmp_path / "old")
    settings = yaml.safe_load((old / "settings.yaml").read_text())
    del settings["model"]["fusion"]["query_stride"]
    (old / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"settings\.yaml: .* lacks model\.fusion\.query_stride; write 1 there"):
        train(read_settings(old / "settings.yaml", f"--train.out={old}"), resume=True)


def test_a_run_goes_on_where_what_it_began_from_is_another_network_by_now(
    scenes: Path, unbroken: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(unbroken / "final", tmp_path / "start")
    once = [f"--model.start_from={start}", "--train.max_steps=1", "--train.freeze_tokenizer=true"]
    out = run(scenes, tmp_path / "run", *once)
    wanted = load_file(out / "final" / "model.safetensors")
    config = preset("debug")
    config.fusion.picture_width = 6
    save_checkpoint(start, FusionSAMNetwork(config), {})  # as another version ships another tiny
    run(scenes, out, *once, resume=True)
    found = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_start_with_another_picture_head_is_told_by_its_setting(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    start = f"--model.start_from={unbroken / 'final'}"
    both = r"^model\.fusion\.picture_stride: 1, model\.tokenizer\.separable: 2, but .* has 2, 0; make them agree"
    with pytest.raises(InputError, match=both):
        run(scenes, tmp_path / "none", start, "--model.fusion.picture_stride=1", "--model.tokenizer.separable=2")
    with pytest.raises(InputError, match=r"^train\.new_picture_head: true, but train\.stage is segmentation"):
        run(scenes, tmp_path / "none", start, "--train.new_picture_head=true")
    frozen = [start, "--train.freeze_picture=true", "--train.freeze_tokenizer=true"]
    with pytest.raises(InputError, match=r"^train\.freeze_picture: true with model\.fusion\.kv_stride 2; expected 4"):
        run(scenes, tmp_path / "none", *frozen, "--model.fusion.kv_stride=2")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--train.stage=tokenizer"], "train.stage tokenizer; expected segmentation"),
        ([], "no model.start_from; expected the checkpoint whose picture stays"),
        (
            ["--model.start_from=START", "--train.freeze_tokenizer=true", "--model.tokenizer_weights=START"],
            "model.tokenizer_weights; expected LSTG of model.start_from: leave it out",
        ),
        (
            ["--model.start_from=START"],
            "train.freeze_tokenizer false; expected true: the picture is made of its tokens",
        ),
    ],
)
def test_a_picture_that_cannot_be_kept_is_told(more: list[str], told: str, unbroken: Path, tmp_path: Path) -> None:
    settings = [word.replace("START", str(unbroken / "final")) for word in more]
    with pytest.raises(InputError, match=rf"^train\.freeze_picture: true with {told}"):
        run(unbroken, tmp_path / "none", "--train.freeze_picture=true", *settings)


def test_unlabelled_pairs_teach_nothing_beside_a_frozen_picture(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    frozen = [
        "--train.freeze_picture=true",
        "--train.freeze_tokenizer=true",
        f"--model.start_from={unbroken / 'final'}",
    ]
    for part in ("visible", "infrared"):
        (tmp_path / "more" / part).mkdir(parents=True)
        Image.new("RGB" if part == "visible" else "L", (96, 96)).save(tmp_path / "more" / part / "a.png")
    with pytest.raises(InputError, match=r"1 pairs without a label map .* and train\.freeze_picture is true"):
        run(scenes, tmp_path / "none", *frozen, f"--data.extra_pairs=[{tmp_path / 'more'}]")


def test_crops_that_the_network_does_not_take_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.crop: \(32, 64\), expected at least 64 a side"):
        run(tmp_path / "nowhere", tmp_path / "out", "--data.crop=[32, 64]")
    stage_1 = ("--train.stage=tokenizer", "--loss.perceptual_weight=0")
    with pytest.raises(InputError, match=r"^data\.crop: \(32, 30\), expected multiples of 4 in stage tokenizer"):
        run(tmp_path / "nowhere", tmp_path / "out", *stage_1, "--data.crop=[32, 30]")
    judged = ("--loss.adversarial_weight=1", "--train.discriminator_stages=4")
    with pytest.raises(InputError, match=r"^data\.crop: \(16, 16\), expected at least 32 a side with train\.discrim"):
        run(tmp_path / "nowhere", tmp_path / "out", *stage_1, *judged, "--data.crop=[16, 16]")


def test_weights_of_a_perceptual_loss_that_is_not_taken_are_refused(scenes: Path, tmp_path: Path) -> None:
    given = ("--train.stage=tokenizer", f"--train.perceptual_weights={tmp_path / 'vgg16.pth'}")
    with pytest.raises(InputError, match=r"^train\.perceptual_weights: .*vgg16\.pth, but train\.perceptual is encoder"):
        run(scenes, tmp_path / "out", *given)


CURVE = """
import json, sys, torch, fusionsam.training.run as t
from fusionsam.config.load import read_settings
config, out, *flags = sys.argv[1:]
torch.set_num_threads(1)
class Curve(t.L.Callback):
    def on_train_batch_end(self, trainer, *_):
        curve.append(float(trainer.callback_metrics["loss/total"]))
curve, fit = [], t.L.Trainer.fit
def fit_and_keep(trainer, task, *args, **more):
    trainer.callbacks.append(Curve())
    fit(trainer, task, *args, **more)
    torch.save((curve, task.network.state_dict()), f"{out}-{trainer.global_rank}.pt")
t.L.Trainer.fit = fit_and_keep
t.train(read_settings(config, f"--train.out={out}", "--train.accelerator=cpu", "--train.max_steps=8",
    "--train.validate_every=8", *flags))
"""


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        pytest.param("tokenizer_debug.yaml", "vq", id="stage 1"),
        pytest.param("debug.yaml", "vq", id="stage 2"),
        pytest.param("debug.yaml", "fsq", id="stage 2, fsq", marks=pytest.mark.slow),  # no codebook to keep alike
    ],
)  # fmt: skip
def test_two_processes_of_torchrun_learn_as_one_does(config: str, quantizer: str, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "curve.py").write_text(CURVE)
    given = [str(CONFIGS / config), f"--data.root={scenes}", f"--model.tokenizer.quantizer={quantizer}"]
    # OMP_NUM_THREADS, as torchrun sets it for its own processes
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for devices, start in ((1, [sys.executable]), (2, two)):
        out = tmp_path / str(devices)
        more = [given[0], str(out), *given[1:], f"--train.devices={devices}", f"--train.batch_size={4 // devices}"]
        done = subprocess.run(
            [*start, str(tmp_path / "curve.py"), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    (one, _), (first, ours), (second, theirs) = (
        torch.load(f"{tmp_path}/{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert first == second  # the mean over both is logged
    # the pairs of a step are the same; a loss that is a mean over pixels of a class is not the mean of two such means,
    # and codebooks begin with, and follow, the pairs of the first process
    assert first == pytest.approx(one, rel=0.05)
    assert max(one) > 1.2 * min(one)  # so that other pairs would show


def test_a_run_that_began_on_more_devices_is_not_gone_on_with(tmp_path: Path) -> None:
    best = BestWeights(tmp_path / "run", {}, Fingerprints(), "pairs", 5)
    best.devices = 2  # as train.devices auto may find
    state = best.state_dict()
    best.load_state_dict(state)
    best.devices = 1
    with pytest.raises(InputError, match=r"^train\.devices: 1 in all, but .*run began with 2"):
        best.load_state_dict(state)


def test_a_pair_without_label_in_a_validation_split_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, kinds in (("train", ("visible", "infrared", "label")), ("val", ("visible", "infrared"))):
        for kind in kinds:
            (tmp_path / "pairs" / split / kind).mkdir(parents=True)
            array = rng.integers(0, 9 if kind == "label" else 255, (96, 128), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "pairs" / split / kind / f"{split}.png")
    (tmp_path / "classes.yaml").write_text(
        yaml.safe_dump({"classes": Config().model.classes, "palette": [list(c) for c in Config().model.palette]})
    )
    more = ["--data.dataset=pairs", f"--data.class_file={tmp_path / 'classes.yaml'}"]
    with pytest.raises(InputError, match=r"data\.val_split: val of 'val' has no label"):
        run(tmp_path / "pairs", tmp_path / "run", *more)


def test_usage_is_the_percentage_of_codes_that_were_chosen(make_debug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_debug()
    task = SegmentationTask(network, Config(model=network.config), 7, torch.full((9,), 1 / 9))
    logged: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: float(value)}))
    task.matrix.update(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long))
    task.count_codes("visible", torch.tensor([[[[0], [3]]], [[[-1], [-1]]]]))  # the second image is absent
    task.count_codes("visible", torch.tensor([[[[3], [31]]]]))
    task.count_codes("infrared", torch.full((1, 1, 2, 1), -1))
    task.on_validation_epoch_end()
    assert (logged["val/usage_visible"], logged["val/usage_infrared"]) == (100 * 3 / 32, 0)


def test_validation_sees_an_absent_image_as_prediction_does(make_debug: Any) -> None:
    network = make_debug()
    with torch.no_grad():
        network.tokenizer.missing.normal_()
        for parameter in network.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    settings = Config(model=network.config)
    settings.train.ema_decay = 0.0
    task = SegmentationTask(network, settings, 7, torch.full((9,), 1 / 9))
    visible, label = torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.long)
    task.validation_step(Batch(visible, torch.zeros(1, 1, 64, 96), label, torch.tensor([[True, False]]), ["x"]), 0)
    with torch.no_grad():
        expected = network.eval()(visible, None).logits.argmax(1)
    assert task.matrix.matrix[0].tolist() == torch.bincount(expected.flatten(), minlength=9).tolist()
    assert set(task.used) == {"visible"} or int(task.used["infrared"].sum()) == 0


@pytest.mark.parametrize("stage", ["segmentation", "distill"])
def test_a_large_gradient_of_one_part_leaves_the_others_theirs(make_debug: Any, stage: str) -> None:
    network = make_debug()
    config = Config(model=network.config)
    if stage == "distill":
        config.train.stage, config.train.distill = "distill", ["image_encoder", "picture_head"]
        task: Any = DistillTask(network, make_debug(), config, 7)
        network.requires_grad_(True)
    else:
        task = SegmentationTask(network, config, 7, torch.full((9,), 1 / 9))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    next(network.picture_head.parameters()).grad.view(-1)[0] = 200.0
    next(network.image_encoder.parameters()).grad.view(-1)[0] = 0.5
    next(network.head.parameters()).grad.view(-1)[:2] = torch.tensor([3.0, 4.0])
    task.configure_gradient_clipping(None, 1.0)
    norms = {name: sum(float(p.grad.pow(2).sum()) for p in part.parameters()) for name, part in network.parts().items()}
    assert norms == pytest.approx(dict.fromkeys(norms, 0) | {"picture_head": 1, "image_encoder": 0.25, "head": 1}, 1e-4)


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    synthesize(tmp_path / "scenes", 6, seed=5, size=(64, 96), progress=False)
    (tmp_path / "scenes" / "one.txt").write_text("00001D\n00002N\n")
    still = ["--data.scale=[1,1]", "--data.flip=0", "--data.photometric=0", "--data.modality_dropout=0"]
    still += ["--data.rare_crop=0", "--data.rare_sampling=0", "--model.head.dropout=0", "--train.ema_decay=0.9"]
    same = ["--data.train_split=one", "--data.val_split=one", f"{LEAK}=true", "--train.lr=1e-2"]
    same.append("--data.absent_classes=true")  # two scenes do not show every class
    out = run(
        tmp_path / "scenes", tmp_path / "run", *still, *same, "--train.max_steps=160", "--train.validate_every=80"
    )
    rows = list(csv.DictReader((out / "logs" / "csv" / "metrics.csv").open()))
    losses = [float(row["loss/segmentation"]) for row in rows if row.get("loss/segmentation")]
    assert losses[-1] < losses[0] / 3  # the fusion loss has no zero to go to: one picture cannot equal both
    assert results(out)[2][-1]["val/miou"] > 60


def test_a_leak_is_refused_unless_told_otherwise(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = (scenes / "train.txt").read_text().split()[0]
    (scenes / "leaky.txt").write_text(f"{(scenes / 'val.txt').read_text()}{shared}\n")
    config = ["train", "--config", str(CONFIGS / "debug.yaml")]
    argv = [*config, *flags(scenes, tmp_path / "run", "--data.val_split=leaky", "--train.max_steps=1")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert shared in error
    assert not (tmp_path / "run").exists()
    assert main([*argv, LEAK, "true"]) == 0


def test_one_split_for_both_and_pictures_the_start_has_seen_are_refused(
    scenes: Path, unbroken: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^data\.val_split: 'train' is data\.train_split, too"):
        run(scenes, tmp_path / "one", "--data.val_split=train")
    seen, new = ((scenes / f"{name}.txt").read_text().split() for name in ("train", "val"))
    (scenes / "rest.txt").write_text("\n".join(new))
    (scenes / "known.txt").write_text(seen[0])
    start = [f"--model.start_from={unbroken / 'final'}", "--data.train_split=rest", "--data.val_split=known"]
    with pytest.raises(InputError, match=r"^data\.val_split: 1 pictures were seen by .*final"):
        run(scenes, tmp_path / "two", *start)
    assert not (tmp_path / "two").exists()


def test_classes_of_a_yaml_must_be_those_of_the_data(scenes: Path, tmp_path: Path) -> None:
    names = ["unlabeled", "person", "car", *Config().model.classes[3:]]
    with pytest.raises(InputError, match=r"^model\.classes: class 1 is 'person', in the data it is 'car'; remove"):
        run(scenes, tmp_path / "run", f"--model.classes={json.dumps(names)}")


def test_a_validation_picture_that_is_too_small_is_told_at_the_start(tmp_path: Path) -> None:
    synthesize(tmp_path / "scenes", 8, seed=5, size=(48, 128), progress=False)
    with pytest.raises(InputError, match=r"^data\.val_split: \d+[DN] has 48x128 pixels, expected at least 64 a side"):
        run(tmp_path / "scenes", tmp_path / "run")


def test_training_on_a_test_picture_is_refused_too(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = (scenes / "test.txt").read_text().split()[0]
    (scenes / "greedy.txt").write_text(f"{(scenes / 'train.txt').read_text()}{tested}\n")
    config = ["train", "--config", str(CONFIGS / "debug.yaml")]
    argv = [*config, *flags(scenes, tmp_path / "run", "--data.train_split=greedy", "--train.max_steps=1")]
    assert main(argv) == 2
    assert f"test/{tested}" in capsys.readouterr().err
    # a label tells nothing of a leak, and a picture that is elsewhere has still a name
    half = shutil.copytree(scenes, tmp_path / "half")
    (half / "labels" / f"{tested}.png").unlink()
    (half / "train.txt").write_text((half / "greedy.txt").read_text())
    (half / "images" / f"{tested}.png").unlink()
    lists = {split: [Entry(id) for id in (half / f"{split}.txt").read_text().split()] for split in ("train", "val")}
    with pytest.raises(InputError, match=rf"'{tested}' is of the test split and of 'train'"):
        _refuse_leaks(DataConfig(root=str(half)), lists)
    assert "1 test pairs have no image here" in capsys.readouterr().err
    shutil.copy(scenes / "images" / f"{tested}.png", half / "images")
    lists = {"train": [Entry(tested, rgbt=half / "images" / f"{tested}.png")]}
    with pytest.raises(InputError, match=rf"test/{tested} = train/{tested}"):
        _refuse_leaks(DataConfig(root=str(half)), lists)


def test_a_flaw_of_the_test_split_does_not_end_its_comparison(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = (scenes / "test.txt").read_text().split()[:2]
    root = tmp_path / "pairs"
    for name in tested:
        pair = np.array(Image.open(scenes / "images" / f"{name}.png"))
        for part, array in (("visible", pair[:, :, :3]), ("infrared", pair[:, :, 3]), ("labels", pair[:, :, 3] * 0)):
            write_png(root / "test" / part / f"{name}.png", array)
    source = root / "test" / "visible"
    (root / "test" / "labels" / f"{tested[0]}.png").unlink()  # withheld
    lists = {"train": [Entry("other", visible=root / "test" / "visible" / f"{tested[0]}.png")]}
    with pytest.raises(InputError, match=rf"test/{tested[0]} = train/other"):
        _refuse_leaks(DataConfig(dataset="pairs", root=str(root)), lists)
    (root / "test" / "infrared" / f"{tested[1]}.png").unlink()
    with pytest.raises(InputError, match=rf"no infrared file for '{tested[1]}'.*compared with the test split"):
        _refuse_leaks(DataConfig(dataset="pairs", root=str(root)), lists)

    table = tmp_path / "pairs.csv"
    files = [source / f"{name}.png" for name in tested]
    table.write_text(f"visible,label,split\n{files[0]},gone.png,test\n{tmp_path}/gone.png,,test\n{files[1]},,train\n")
    lists = {"train": [Entry("gone", visible=files[1])], "val": [Entry(tested[0], visible=files[0])]}
    with pytest.raises(InputError, match="'gone' is of the test split and of 'train'"):
        _refuse_leaks(DataConfig(dataset="manifest", root=str(table)), lists)
    with pytest.raises(InputError, match=rf"test/{tested[0]} = val/{tested[0]}"):
        _refuse_leaks(DataConfig(dataset="manifest", root=str(table)), {"val": lists["val"]})
    table.write_text(f"visible,split\n{files[0]},val\n")  # no test pictures on this machine
    _refuse_leaks(DataConfig(dataset="manifest", root=str(table)), {"val": lists["val"]})


def test_what_another_run_left_is_not_lost(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    for name in ("best", "final"):
        shutil.copytree(unbroken / name, tmp_path / name / name)
        with pytest.raises(InputError, match=rf"{name}/{name}: holds the weights of another run, which would be lost"):
            run(scenes, tmp_path / name)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "settings.yaml").write_text("mine: precious")
    with pytest.raises(InputError, match=r"theirs/settings\.yaml: "):
        run(scenes, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "settings.yaml").read_text() == "mine: precious"
    for key in ("train.out", "data.root"):
        with pytest.raises(InputError, match=rf"^{key}: is empty, as of an unset shell variable"):
            run(scenes, tmp_path / "run", f"--{key}=")


def test_a_training_that_diverges_stops_in_one_line(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^train: the loss is (nan|inf) at step [12], so the training diverged; lower"
    ):
        run(scenes, tmp_path / "run", "--train.lr=1e30", "--train.warmup_steps=0")
    assert not (tmp_path / "run" / "best").exists()


def test_a_run_is_not_overwritten_and_its_settings_hold(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    before = (unbroken / "last.ckpt").stat().st_mtime_ns
    with pytest.raises(InputError, match="give --resume"):
        run(scenes, unbroken)
    with pytest.raises(InputError, match=r"^model.head.width, train.lr: differs from .*settings.yaml"):
        run(scenes, unbroken, "--train.lr=1", "--model.head.width=17", resume=True)
    with pytest.raises(InputError, match=r"no last.ckpt to resume from"):
        run(scenes, tmp_path / "new", resume=True)
    epochs = run(scenes, tmp_path / "epochs", "--train.max_steps=null", "--train.epochs=0.2", "--train.devices=1")
    by_epochs = ["--train.max_steps=null", "--train.epochs=0.2", "--train.devices=2"]
    with pytest.raises(InputError, match=r"^train\.devices x train\.num_nodes: differs"):
        run(scenes, epochs, *by_epochs, resume=True)
    assert (unbroken / "last.ckpt").stat().st_mtime_ns == before


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def test_a_run_does_not_go_on_with_other_pairs(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    moved = shutil.copytree(scenes, tmp_path / "moved")
    run(moved, tmp_path / "run", resume=True)  # the same pairs elsewhere
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    names = (moved / "train.txt").read_text().split()
    label = moved / "labels" / f"{names[0]}.png"
    changed = np.array(Image.open(label))
    changed[0, 0] = 1 - min(1, changed[0, 0])
    for file, content in ((moved / "train.txt", "\n".join(reversed(names)).encode()), (label, _png(changed))):
        kept = file.read_bytes()
        file.write_bytes(content)
        sources = r"data\.root, data\.extra_pairs, data\.extra_labels"
        with pytest.raises(InputError, match=rf"^{sources}: the pairs .* are not those"):
            run(moved, tmp_path / "run", resume=True)
        file.write_bytes(kept)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


def test_pairs_of_one_training_after_the_other_are_remembered_once(scenes: Path, tmp_path: Path) -> None:
    first = run(scenes, tmp_path / "first", "--train.max_steps=1") / "final"
    second = run(scenes, tmp_path / "second", "--train.max_steps=1", f"--model.start_from={first}") / "final"
    for read in (Fingerprints.read(folder) for folder in (first, second)):
        assert read is not None
        assert len(read.content) == len((scenes / "train.txt").read_text().split())


@pytest.mark.parametrize("asked", [{"devices": 0}, {"devices": "abc"}, {"accelerator": "gpuu"}, {"strategy": "ddq"}])
def test_devices_that_are_not_here_are_one_sentence(asked: dict[str, Any]) -> None:
    name, value = next(iter(asked.items()))
    with pytest.raises(InputError, match=rf"^train: .*{name} '?{value}'?.* cannot be used"):
        open_trainer(TrainConfig(**asked), 1, logger=False)


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).write_bytes(b"a part")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    (tmp_path / "last.ckpt").write_bytes(b"before")
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    with pytest.raises(InputError, match=r"last\.ckpt: cannot be written"):
        WholeFiles().save_checkpoint({}, tmp_path / "last.ckpt")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"last.ckpt": b"before"}


def test_an_out_that_cannot_be_made_is_told_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of somebody")
    with pytest.raises(InputError, match=r"file: cannot be written \(File exists\); choose another train\.out$"):
        run(tmp_path / "no data", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_bytes() == b"of somebody"
    with pytest.raises(InputError, match="no data"):  # a run that is refused later leaves no folder
        run(tmp_path / "no data", tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_extra_pairs_that_would_teach_nothing_are_refused(scenes: Path, tmp_path: Path) -> None:
    more = [draw_scene(9, number, (64, 64)) for number in range(2)]
    for name, scene in zip("xy", more, strict=True):
        write_png(tmp_path / "more" / "vi" / f"{name}.png", scene.visible)
        write_png(tmp_path / "more" / "ir" / f"{name}.png", scene.infrared)
    write_png(tmp_path / "guessed" / "x_labels.png", more[0].label.to(torch.uint8))
    settings = (f"--data.extra_pairs=[{tmp_path / 'more'}]", "--data.extra_share=1", "--loss.fusion_weight=0")
    for labels in ((), (f"--data.extra_labels=[{tmp_path / 'guessed'}]",)):
        first = "y" if labels else "x"
        with pytest.raises(
            InputError, match=rf"^data\.train_split, data\.extra_pairs: {2 - len(labels)} pairs .* \(first: {first}\)"
        ):
            run(scenes, tmp_path / "run", *settings, *labels)
    write_png(tmp_path / "guessed" / "y_labels.png", more[1].label.to(torch.uint8))
    out = run(
        scenes,
        tmp_path / "run",
        *settings,
        *labels,
        "--train.max_steps=null",
        "--train.epochs=1",
        "--train.batch_size=1",
    )
    line = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert line["loss/segmentation"] > 0  # every pair that was seen is one of the two
    assert line["step"] == len((scenes / "train.txt").read_text().split())  # and an epoch counts the others


def test_a_teacher_of_other_classes_is_learned_and_does_not_ship(
    scenes: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = tmp_path / "taught"
    settings = (f"--data.teacher_labels={taught}", "--data.teacher_classes=3")
    with pytest.raises(InputError, match=r"^data\.teacher_labels: .*taught has a label map ID\.png for none of \d+"):
        run(scenes, tmp_path / "run", *settings)
    first = (scenes / "train.txt").read_text().split()[0]
    write_png(taught / f"{first}.png", torch.full((96, 128), 2, dtype=torch.uint8))
    out = run(scenes, tmp_path / "run", *settings)
    assert "data.teacher_labels: 1 of " in capsys.readouterr().err
    rows = list(csv.DictReader((out / "logs" / "csv" / "metrics.csv").open()))
    assert any(float(row["loss/teacher"] or 0) > 0 for row in rows)
    assert results(out)[1].keys() == results(unbroken)[1].keys()
    run(scenes, out, *settings, resume=True)  # a finished run with the auxiliary head in its last.ckpt


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_damaged_checkpoint_is_one_sentence(content: bytes, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"last.ckpt: cannot be resumed from \(\w"):
        run(scenes, tmp_path, resume=True)


@pytest.mark.parametrize("content", ["model: {a: [\n", "model: 3\n"])
def test_damaged_settings_are_one_sentence(content: str, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"")
    (tmp_path / "settings.yaml").write_text(content)
    with pytest.raises(InputError, match=r"^[^\n]*settings\.yaml[^\n]*(is not YAML|model is int, expected)[^\n]*$"):
        run(scenes, tmp_path, resume=True)


@pytest.mark.parametrize("content", ['{"model.start_from": ', "[1]", ""])
def test_damaged_sources_are_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "sources.json").write_text(content)
    config = Config(train=TrainConfig(stage="picture", out=str(tmp_path)))
    assert require_same_sources(config, resume=False, data={}) == {}
    with pytest.raises(InputError, match=r"sources\.json: was not written by train; restore it, or"):
        require_same_sources(config, resume=True, data={})


def test_a_run_goes_on_with_the_validation_pictures_it_began_with_or_of_an_earlier_version(
    scenes: Path, unbroken: Path, tmp_path: Path
) -> None:
    root, out = shutil.copytree(scenes, tmp_path / "scenes"), shutil.copytree(unbroken, tmp_path / "run")
    first = (root / "val.txt").read_text().split()[0]
    picture = next(root.glob(f"*/{first}.png"))
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    with pytest.raises(InputError, match=r"^data\.val_split: val is not what was there under that name when"):
        run(root, out, resume=True)
    (out / "sources.json").unlink()
    run(root, out, resume=True)


def test_the_digests_of_the_data_change_with_rig_teacher_and_validation(scenes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(scenes, tmp_path / "scenes")
    row, found = find("mfnet"), entries("mfnet", root, "val")
    taught, rig = tmp_path / f"{found[0].id}.png", Rig((96, 128), (96, 128), np.eye(3))
    write_png(taught, torch.zeros(96, 128, dtype=torch.uint8))
    data = DataConfig(align="rig.json", teacher_labels=str(tmp_path))

    def digests(rig: Rig = rig) -> dict[str, Any]:
        learnt = PairDataset([replace(found[0], taught=taught)], row, align=Aligner(rig))
        return data_digests(data, learnt, PairDataset(found, row, align=Aligner(rig)))

    before = digests()
    assert before == digests()
    assert set(before) == {"data.align", "data.teacher_labels", "data.val_split"}
    assert set(data_digests(DataConfig(align="auto"), PairDataset([]), PairDataset([]))) == {"data.val_split"}
    other = digests(replace(rig, infrared_to_visible=np.diag([1.0, 1.0, 1.01])))
    assert {key for key in before if other[key] != before[key]} == {"data.align"}
    write_png(taught, torch.ones(96, 128, dtype=torch.uint8))
    assert {key for key, value in digests().items() if value != before[key]} == {"data.teacher_labels"}
    write_png(taught, torch.zeros(96, 128, dtype=torch.uint8))
    for file in (found[0].label, found[0].rgbt):
        assert file is not None
        kept = Path(file).read_bytes()
        write_png(file, np.flipud(np.asarray(Image.open(file))).copy())
        assert {key for key, value in digests().items() if value != before[key]} == {"data.val_split"}
        Path(file).write_bytes(kept)


def test_stage_1_goes_on_with_the_phi_it_began_with(unbroken: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "run", shutil.copytree(unbroken / "final", tmp_path / "start")
    file = tmp_path / "phi.safetensors"
    file.write_bytes(b"one")
    asked = Config(train=TrainConfig(stage="tokenizer", perceptual="encoder", out=str(out)))
    asked.model = replace(asked.model, start_from=str(checkpoint), sam_weights=str(file))
    asked.model.encoder = replace(asked.model.encoder, weights=str(file))
    vgg16 = replace(asked, train=replace(asked.train, perceptual="vgg16", perceptual_weights=str(file)))
    for config, names in (
        (asked, {"model.start_from", "model.encoder.weights", "model.sam_weights"}),
        (vgg16, {"train.perceptual_weights"}),
        (replace(asked, loss=replace(asked.loss, perceptual_weight=0.0)), set()),
    ):
        begun = require_same_sources(config, resume=False, data={})
        assert set(begun) == names
        for name in names:
            write_json(out / "sources.json", {**begun, name: "another"})
            with pytest.raises(InputError, match=rf"^{name}: .* is not what was there under that name when"):
                require_same_sources(config, resume=True, data={})
            write_json(out / "sources.json", {key: value for key, value in begun.items() if key != name})
            assert require_same_sources(config, resume=True, data={}) == begun  # of an earlier version


def test_a_damaged_history_is_told_before_the_first_step(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    out = shutil.copytree(unbroken, tmp_path / "run")
    whole = (out / "history.jsonl").read_text()
    for line in ('{"step": 4, "hou', '{"hours": 1}', "7"):
        (out / "history.jsonl").write_text(f"{whole}\n{line}\n")
        with pytest.raises(InputError, match=r"history\.jsonl: line 4 is damaged; expected JSON with a step"):
            run(scenes, out, resume=True)
    (out / "history.jsonl").write_text(f"\n{whole}\n")
    run(scenes, out, resume=True)  # empty lines say nothing
    assert [line["step"] for line in results(out)[2]] == [4, 8]


def test_what_was_asked_is_what_is_stored(scenes: Path, unbroken: Path) -> None:
    asked = read_settings(CONFIGS / "debug.yaml", *flags(scenes, unbroken))
    stored = yaml.safe_load((unbroken / "best" / "config.yaml").read_text())
    assert from_dict(ModelConfig, stored, "config.yaml") == asked.model == preset("debug")
    card = json.loads((unbroken / "best" / "training.json").read_text())
    assert card["config"] == json.loads(json.dumps(to_dict(asked)))
    assert read_settings(unbroken / "settings.yaml") == asked


def test_logs_name_every_loss_and_their_sum(unbroken: Path) -> None:
    rows = list(csv.DictReader((unbroken / "logs" / "csv" / "metrics.csv").open()))
    row = next(row for row in rows if row["loss/total"])
    terms = {k.removeprefix("loss/"): float(v) for k, v in row.items() if k.startswith("loss/")}
    total = terms.pop("total")
    assert set(terms) == {"segmentation", "fot", "prompt", "fusion", "commitment", "reconstruction"}
    assert sum(terms.values()) == pytest.approx(total, rel=1e-5)
    assert all(
        0 < line[f"val/usage_{name}"] <= 100 for line in results(unbroken)[2] for name in ("visible", "infrared")
    )
    assert not any(key.startswith("lr") for line in results(unbroken)[2] for key in line)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_parses_with_its_preset(file: Path) -> None:
    settings = read_settings(file)
    raw = yaml.safe_load(file.read_text())
    model = raw.get("model", {})
    # a file of overrides has no preset; its first lines name the file it is given with
    assert "preset" in model or "--config configs/" in file.read_text().partition("model:")[0]
    expected = to_dict(preset(model.get("preset", "tiny")))
    assert settings.model.encoder.source == model.get("encoder", {}).get("source", expected["encoder"]["source"])
    assert settings.train.out.startswith("runs/")


@pytest.mark.parametrize("name", ["mfnet_vit_h", "fmb_vit_h"])
def test_the_papers_settings(name: str) -> None:
    settings = read_settings(CONFIGS / f"{name}.yaml")
    optimisation = settings.train
    assert (optimisation.optimizer, optimisation.lr, optimisation.weight_decay) == ("adam", 1e-4, 1e-3)
    assert (optimisation.batch_size, optimisation.epochs, optimisation.max_steps) == (4, 100, None)
    assert (settings.model.encoder.source, settings.model.encoder.training) == ("facebook/sam-vit-huge", "frozen")
    assert settings.model.sam_weights == "facebook/sam-vit-huge"  # or the frozen encoder would be a random one
    assert (settings.model.fusion.kv_stride, len(settings.model.classes)) == (1, 15 if name == "fmb_vit_h" else 9)
