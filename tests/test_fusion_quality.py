from __future__ import annotations

import csv
import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fusionsam.config.load import read_settings
from fusionsam.config.schema import Config, LossConfig, TrainConfig, preset
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import of_training
from fusionsam.data.splits import pair_entries
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation import fusion as fusion_quality
from fusionsam.evaluation import fusion_report
from fusionsam.evaluation.options import FusionMetricsOptions
from fusionsam.evaluation.simple_fusions import FUSIONS
from fusionsam.inference import files as predict_files
from fusionsam.inference.options import PredictOptions
from fusionsam.io import digest
from fusionsam.metrics.contrast import contrast, surrounded
from fusionsam.metrics.fusion import METRICS, fusion_metrics, luma
from fusionsam.models.color import luma as torch_luma
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.distill_task import DistillTask, distill_task, swapped
from fusionsam.training.losses import fusion_measures
from fusionsam.training.run import train
from fusionsam.types import Batch
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import load_network, read_card, save_checkpoint
from fusionsam.weights.ship import ship

CONFIGS = Path(__file__).parent.parent / "configs"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three scenes of 67 x 83, their infrared, and fused pictures: the visible one darkened."""
    root = tmp_path_factory.mktemp("pairs")
    for index in range(3):
        sample = draw_scene(5, index, (67, 83))
        visible = sample.visible.numpy().transpose(1, 2, 0)
        save(root / f"visible/p{index}.png", visible)
        save(root / f"infrared/p{index}.png", sample.infrared[0].numpy())
        save(root / f"darker/p{index}.png", visible // 2)
    return root


def folders(root):
    return root / "visible", root / "infrared"


def measured(visible, infrared, out, workers=1, **more):
    given = FusionMetricsOptions(visible=visible, infrared=infrared, out=out, workers=workers, **more)
    return fusion_quality.run(given)


def strict(path):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_json_holds_the_means_of_the_csv_and_the_csv_what_each_picture_scores(pairs, tmp_path):
    measured(*folders(pairs), tmp_path, fused=[pairs / "darker"])
    rows = rows_of(tmp_path / "fusion_metrics.csv")
    assert [(row["method"], row["image"]) for row in rows] == [
        (method, f"p{index}") for method in ("darker", *FUSIONS) for index in range(3)
    ]
    found = strict(tmp_path / "fusion_metrics.json")
    for method, scores in found.items():
        own = [row for row in rows if row["method"] == method]
        assert scores.pop("images") == len(own) == 3
        assert scores == {m: pytest.approx(np.mean([float(row[m]) for row in own]), rel=1e-12) for m in METRICS}
    visible, infrared, darker = (
        np.asarray(Image.open(pairs / f"{part}/p1.png")) for part in ("visible", "infrared", "darker")
    )
    average = FUSIONS["average"](visible.transpose(2, 0, 1), infrared[None])
    for method, picture in (("darker", darker), ("average", average)):
        row = next(row for row in rows if row["method"] == method and row["image"] == "p1")
        wanted = fusion_metrics(luma(visible), infrared, luma(picture))
        assert {m: float(row[m]) for m in METRICS} == wanted


def test_an_infinite_psnr_is_null_in_the_json(tmp_path):
    # PSNR of a picture that equals both sources
    table = {"ours": {"a": scores(PSNR=np.inf, EN=2.0), "b": scores(PSNR=30.0, EN=5.0)}, "sum": {"a": scores(EN=1.0)}}
    found = fusion_report.write(tmp_path, table)
    assert strict(tmp_path / "fusion_metrics.json")["ours"] == {**scores(EN=3.5), "PSNR": None, "images": 2}
    assert [row["PSNR"] for row in rows_of(tmp_path / "fusion_metrics.csv")] == ["inf", "30.0", "0.0"]
    assert fusion_report.ranks(found, "PSNR") == {"ours": 1, "sum": 2}


def test_several_processes_score_as_one_does(pairs, tmp_path):
    for workers in (1, 2):
        measured(*folders(pairs), tmp_path / str(workers), fused=[pairs / "darker"], workers=workers)
    for name in ("fusion_metrics.csv", "fusion_metrics.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_is_guessed_of_infrared_files_is_told_and_kept(pairs, tmp_path, capsys):
    for index in range(2):
        for part in ("visible", "darker"):
            save(tmp_path / f"{part}/p{index}.png", np.asarray(Image.open(pairs / f"{part}/p{index}.png")))
        save(tmp_path / f"infrared/p{index}.png", np.asarray(Image.open(pairs / f"infrared/p{index}.png")) // 8 + 60)
    told = "input files: low contrast: 2 of 2 pairs"
    assert told in measured(*folders(tmp_path), tmp_path / "out", fused=[tmp_path / "darker"], baselines=False)
    said = capsys.readouterr().err
    assert "p0: the infrared picture uses the grey values" in said
    assert "(fusionsam predict: --" in said  # it has none of its own
    assert strict(tmp_path / "out/fusion_metrics_run.json")["notes"] == [told]


def test_a_checkpoint_scores_as_the_pictures_that_predict_writes_from_it(pairs, tmp_path):
    torch.manual_seed(0)
    ours = str(save_checkpoint(tmp_path / "ours", FusionSAMNetwork(preset("debug")), {}))
    visible, infrared = folders(pairs)
    given = {"visible": visible, "infrared": infrared, "out": tmp_path / "written", "weights": ours, "device": "cpu"}
    predict_files.run(PredictOptions(**given))
    text = measured(
        *folders(pairs), tmp_path / "out", fused=[tmp_path / "written"], weights=[ours], baselines=False, device="cpu",
        command="fusionsam fusion-metrics --weights ours",
    )  # fmt: skip
    told = strict(tmp_path / "out/fusion_metrics_run.json")
    assert (told["command"], told["n_images"]) == ("fusionsam fusion-metrics --weights ours", 3)
    assert told["weights_sha256"] == {"ours": digest(tmp_path / "ours" / "model.safetensors")}
    (tmp_path / "out/fusion_metrics_run.json").write_text("[]")
    with pytest.raises(InputError, match=r"fusion_metrics_run\.json: was not written by fusion-metrics"):
        measured(*folders(pairs), tmp_path / "out", fused=[tmp_path / "written"])
    found = strict(tmp_path / "out/fusion_metrics.json")
    assert list(found) == ["ours", "written"]
    assert found["ours"] == found["written"]
    assert "rank of ours among 2: EN 1, MI 1" in text


def scores(**given):
    return {metric: given.get(metric, 0.0) for metric in METRICS}


def test_pairs_that_the_weights_learned_from_are_told(pairs, tmp_path):
    torch.manual_seed(0)
    folder = save_checkpoint(tmp_path / "ours", FusionSAMNetwork(preset("debug")), {})
    entries = pair_entries(*folders(pairs))
    known = "at least a part of it was trained on"
    assert known not in measured(*folders(pairs), tmp_path / "one", weights=[str(folder)], baselines=False)
    of_training(PairDataset(entries[:2])).write(folder)
    text = measured(*folders(pairs), tmp_path / "two", weights=[str(folder)], baselines=False)
    assert f"ours: {known} 2 of these 3 pairs" in text


def test_places_by_hand():
    values = {
        "a": scores(VIF=0.5, Nabf=0.3),
        "b": scores(VIF=0.9, Nabf=0.3),
        "c": scores(VIF=0.5, Nabf=0.1),
        "d": scores(VIF=0.4, Nabf=0.7),
    }
    assert fusion_report.ranks(values, "VIF") == {"a": 2, "b": 1, "c": 2, "d": 4}
    assert fusion_report.ranks(values, "Nabf") == {"a": 2, "b": 2, "c": 1, "d": 4}  # lower is better
    lines = fusion_report.as_text(values, {"a": 7, "b": 7, "c": 7, "d": 7}, ["c"]).splitlines()
    column = 2 + METRICS.index("VIF")
    assert [line.split()[column] for line in lines[1:5]] == ["0.5000+", "0.9000*", "0.5000+", "0.4000"]
    assert [line.split()[-1] for line in lines[1:5]] == ["0.3000+", "0.3000+", "0.1000*", "0.7000"]
    assert lines[1].split()[:2] == ["a", "7"]
    assert "rank of c among 4" in lines[-1]
    assert "VIF 2" in lines[-1]
    assert "Nabf 1" in lines[-1]


@pytest.mark.parametrize(("side", "baselines", "advice"), [(40, False, "at least 41"), (63, True, "--no-baselines")])
def test_small_pictures_are_refused_by_name(tmp_path, side, baselines, advice):
    for name, size in (("a", 71), ("b", side)):
        for part in ("visible", "infrared", "fused"):
            save(tmp_path / part / f"{name}.png", np.full((size, 73), 9, np.uint8))
    with pytest.raises(InputError, match=rf"visible/b\.png: {side}x73.*{advice}"):
        measured(*folders(tmp_path), tmp_path / "out", fused=[tmp_path / "fused"], baselines=baselines)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    for part in ("visible", "infrared", "fused"):
        save(tmp_path / part / "a.png", np.full((67, 73), 9, np.uint8))
    (tmp_path / "out").write_text("in the way")
    monkeypatch.setattr(fusion_quality, "measure_all", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"out: cannot be written \(File exists\)"):
        measured(*folders(tmp_path), tmp_path / "out", fused=[tmp_path / "fused"])


@pytest.mark.parametrize("part", ["infrared", "fused"])
def test_a_picture_of_another_size_is_refused_by_name(tmp_path, part):
    for other in ("visible", "infrared", "fused"):
        save(tmp_path / other / "a.png", np.full((67, 71 + (other == part)), 9, np.uint8))
    with pytest.raises(InputError, match=rf"{part}/a\.png: 67x72.*67x71"):
        measured(*folders(tmp_path), tmp_path / "out", fused=[tmp_path / "fused"])


def test_fused_pictures_are_found_by_either_name_and_never_guessed(tmp_path):
    for name in ("a", "b_fused", "b_labels", "b_overlay"):
        save(tmp_path / f"{name}.png", np.zeros((3, 3), np.uint8))
    found = fusion_quality.fused_files(tmp_path, ["a", "b"])
    assert {id: path.name for id, path in found.items()} == {"a": "a.png", "b": "b_fused.png"}
    with pytest.raises(InputError, match="no fused picture for 'c'"):
        fusion_quality.fused_files(tmp_path, ["a", "c"])
    save(tmp_path / "b.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(InputError, match=r"both b\.png and b_fused\.png"):
        fusion_quality.fused_files(tmp_path, ["b"])


def test_methods_of_one_name_are_told_apart():
    assert fusion_quality.method_names(["runs/x/best", "runs/y/best", "tiny"]) == ["x/best", "y/best", "tiny"]
    for sources in (["a/best", "a/best"], ["runs/average"]):
        with pytest.raises(InputError, match="rename"):
            fusion_quality.method_names(sources)


def test_objects_are_measured_against_the_ring_around_them(pairs, tmp_path):
    labels = tmp_path / "labels"
    for index in range(3):
        label = np.zeros((67, 83), np.uint8)
        label[20:40, 30:40], label[0:3, 0:3] = 2, 2  # the second is too small to count
        save(labels / f"p{index}.png", label)
        heat = np.full((67, 83), 40, np.uint8)
        heat[20:40, 30:40] = 140 + index
        save(tmp_path / f"infrared/p{index}.png", heat)
        save(tmp_path / f"half/p{index}.png", np.stack([heat // 2] * 3, -1))
    text = measured(
        pairs / "visible", tmp_path / "infrared", tmp_path / "out", fused=[tmp_path / "half"], labels=labels,
        label_id=2, baselines=False,
    )  # fmt: skip
    row = strict(tmp_path / "out/fusion_metrics.json")["half"]["object_contrast"]
    assert row == {
        "objects": 3,
        "fused": pytest.approx(50.333, abs=0.01),
        "infrared": 101,
        "ratio": pytest.approx(0.498, abs=1e-3),
    }
    assert "half: 50.3 of 101.0, 0.50 (3 objects)" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label_id": 2}, "--labels and --label-id go together"),
        ({"labels": "infrared"}, "--labels and --label-id go together"),
        ({"labels": "none", "label_id": 2}, "no label map for 'p0'"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line(pairs, tmp_path, more, message):
    save(tmp_path / "none/p7.png", np.zeros((67, 83), np.uint8))
    places = {"infrared": pairs / "infrared", "none": tmp_path / "none"}
    given = {key: places.get(value, value) for key, value in more.items()}
    with pytest.raises(InputError, match=message):
        measured(*folders(pairs), tmp_path / "out", fused=[pairs / "darker"], **given)


def test_a_ring_leaves_out_other_objects_and_what_is_not_valid():
    mask = np.zeros((60, 60), bool)
    mask[20:30, 20:30] = mask[20:30, 34:44] = True
    valid = np.ones_like(mask)
    valid[:18] = False
    first, second = surrounded(mask, valid)
    assert not (first.ring & mask).any()
    assert not first.ring[:18].any()
    assert first.ring[25, 10:17].all()  # 3 to 10 pixels to the left; the object begins at 20
    assert not first.ring[25, 18:20].any()
    grey = np.where(mask, 90.0, 40.0)
    grey[20:30, 34:44] = 10.0
    assert contrast(grey, [first, second]) == [50.0, 30.0]
    assert surrounded(np.zeros((9, 9), bool)) == []


# -- training of the picture head -----------------------------------------------------------------------------------


def redraw(street, weights, out, *more):
    return read_settings(
        CONFIGS / "picture.yaml", f"--model.start_from={weights}", f"--data.root={street}", "--data.crop=[64,96]",
        "--train.batch_size=2", "--train.max_steps=4", "--train.validate_every=2", "--train.accelerator=cpu",
        "--data.workers=0", f"--train.out={out}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """MFNet's layout, and a checkpoint."""
    root = tmp_path_factory.mktemp("street")
    synthesize(root / "data", 10, seed=3, size=(96, 128), progress=False)
    torch.manual_seed(0)
    save_checkpoint(root / "start", FusionSAMNetwork(preset("debug")), {"seed": 7, "val": {"miou": 1.0}})
    return root


def unlabelled(root):
    """Six pairs in two folders, four to train and two to validate on."""
    for index in range(6):
        sample = draw_scene(8, index, (96, 128))
        save(root / f"visible/p{index}.png", sample.visible.numpy().transpose(1, 2, 0))
        save(root / f"infrared/p{index}.png", sample.infrared.numpy()[0])
    for split, ids in (("train", "p0 p1 p2 p3"), ("val", "p4 p5")):
        (root / f"{split}.txt").write_text(ids.replace(" ", "\n"))
    return root


def test_the_picture_head_alone_learns_without_a_label_and_resumes_to_the_same_bits(street, tmp_path, monkeypatch):
    own, weights = unlabelled(tmp_path / "data"), street / "start"
    before = load_network(street / "start")[0].state_dict()
    out = train(redraw(own, weights, tmp_path / "run", "--data.dataset=pairs"), command="a test")
    network, card = load_network(out / "final")
    after = network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("picture_head.") for name in moved)
    assert card["seed"] == 7  # of the network; the picture's own card lies in it
    assert card["picture"]["step"] == 4
    assert {"val/VIF", "val/Qabf", "val/SSIM", "val/SCD", "val/measures"} == set(card["picture"]["val"])

    original = DistillTask.training_step

    def killed(self, batch, index):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return original(self, batch, index)

    more = ["--data.dataset=pairs", "--train.checkpoint_minutes=0"]
    halves = redraw(own, weights, tmp_path / "halves", *more)
    monkeypatch.setattr(DistillTask, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(halves, command="a test")
    monkeypatch.setattr(DistillTask, "training_step", original)
    train(halves, resume=True, command="a test")
    again = load_network(tmp_path / "halves" / "final")[0].state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_a_run_whose_teacher_is_another_by_now_does_not_go_on(street, tmp_path):
    teacher = shutil.copytree(street / "start", tmp_path / "teacher")
    own = unlabelled(tmp_path / "data")
    more = ["--data.dataset=pairs", "--train.distill=[picture_head]", f"--train.teacher={teacher}"]
    config = distil(own, street / "start", tmp_path / "run", *more)
    train(config, command="a test")
    train(config, resume=True, command="a test")
    network, card = load_network(teacher)
    network.head.requires_grad_(False).mlp[0].bias += 1
    save_checkpoint(teacher, network, card)
    with pytest.raises(
        InputError, match=r"^train\.teacher: .*teacher is not what was there under that name when .*run began"
    ):
        train(config, resume=True, command="a test")


def test_pairs_that_cannot_teach_a_picture_are_told_before_the_first_step(street, tmp_path):
    own = unlabelled(tmp_path / "data")
    more = ["--data.dataset=pairs"]
    one = unlabelled(tmp_path / "one")
    shutil.rmtree(one / "infrared")
    with pytest.raises(InputError, match=r"data.train_split.*4 pairs have one picture \(first: p0\)"):
        train(redraw(one, street / "start", tmp_path / "run", *more))
    for part in ("visible", "infrared"):
        path = own / part / "p4.png"
        Image.open(path).crop((0, 0, 70, 50)).save(path)
    with pytest.raises(InputError, match="p4 has 50x70 pixels"):
        train(redraw(own, street / "start", tmp_path / "run", *more))


def test_measures_without_any_weight_are_refused(street, tmp_path):
    none = [f"--loss.{name}_weight=0" for name in ("vif", "qabf", "ssim", "scd")]
    with pytest.raises(InputError, match=r"loss\.scd_weight: all 0, so nothing would be learned"):
        train(redraw(street / "data", street / "start", tmp_path / "run", *none))


def test_a_redrawn_checkpoint_has_no_scores_of_the_picture_before(street):
    start = load_network(street / "start")[0]
    save_checkpoint(street / "scored", start, {"seed": 7, "val": {"miou": 1.0}, "calibration": {"temperature": 2.0}})
    config = redraw(street / "data", street / "scored", street / "none")
    assert distill_task(config, 1)[1].keys() & {"val", "calibration", "seed"} == {"seed"}


def test_a_new_picture_head_takes_the_place_of_the_stored_one_and_the_card_tells_of_both(street, tmp_path, capsys):
    first = train(redraw(street / "data", street / "start", tmp_path / "first"), command="one")
    config = redraw(
        street / "data", first / "final", tmp_path / "second", "--train.new_picture_head=true",
        "--model.fusion.picture_stride=2", "--model.fusion.picture_width=6", "--model.fusion.heads=4",
    )  # fmt: skip
    network, card = load_network(train(config, command="two") / "final")
    start = load_network(street / "start")[0]
    assert (network.picture_head.stride, network.picture_head.mix.out_channels) == (2, 6)
    shape = {"picture_stride": 2, "picture_width": 6, "picture_dilations": config.model.fusion.picture_dilations}
    wanted = replace(start.config.fusion, **shape)
    assert network.config.fusion == wanted  # all else is the stored network's
    capsys.readouterr()
    train(redraw(street / "data", first / "final", tmp_path / "kept", "--model.fusion.picture_stride=4"))
    assert "the picture head stays as" in (line := capsys.readouterr().err)
    assert "picture_stride 2" in line
    shipped = read_card(ship(tmp_path / "second" / "final", tmp_path / "shipped"))[1]["picture"]
    assert (shipped["started_from"], shipped["earlier"]["started_from"]) == ("first/final", "start")
    assert "config" not in shipped.keys() | shipped["earlier"].keys()
    told = card["picture"]
    assert (told["command"], told["earlier"]["command"]) == ("two", "one")
    assert told["config"]["model"]["fusion"]["heads"] == start.config.fusion.heads
    assert told["config"]["model"]["start_from"] == str(first / "final")
    pair = torch.rand(1, 3, 70, 83), torch.rand(1, 1, 70, 83)
    with torch.no_grad():
        assert network.eval()(*pair).fused.shape == (1, 3, 70, 83)


def test_the_measures_are_of_the_picture_that_the_network_draws(street):
    network = load_network(street / "start")[0].eval()
    network.config.max_side = 64
    task = DistillTask(network, deepcopy(network), Config(train=TrainConfig(stage="picture")), 1)
    visible, infrared = torch.rand(1, 3, 96, 128), torch.rand(1, 1, 96, 128)
    covered = torch.ones(1, 2, 96, 128, dtype=torch.bool)
    covered[:, 1, :, :40] = False
    batch = Batch(visible, infrared, None, torch.ones(1, 2, dtype=torch.bool), ["a"], covered)
    with torch.no_grad():
        _, found = task.terms(network, batch)
        fused = network(visible, infrared, covered=covered).fused
    filled = torch.where(covered[:, 1:], infrared, torch_luma(visible))
    wanted = fusion_measures(torch_luma(fused), torch_luma(visible), filled)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


def test_a_teacher_with_other_codebooks_teaches_no_latents(street, tmp_path):
    network, card = load_network(street / "start")
    network.tokenizer.quantizers[0].codebook.normal_()
    other = save_checkpoint(tmp_path / "other", network, card)
    config = distil(street / "data", street / "start", tmp_path / "run", f"--train.teacher={other}")
    config.loss.class_maps_weight = 1
    with pytest.raises(InputError, match=r"other: has other codebooks than .*start, so its latents are none of ours"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_network_is_its_own_best_pupil(street):
    network = load_network(street / "start")[0].eval()
    config = Config(train=TrainConfig(stage="distill"), loss=LossConfig(class_maps_weight=2.0))
    task = DistillTask(network, deepcopy(network), config, 1)
    covered = torch.ones(2, 2, 70, 90, dtype=torch.bool)
    covered[0, 1, :, :30] = False
    images = torch.rand(2, 3, 70, 90), torch.rand(2, 1, 70, 90)
    batch = Batch(*images, None, torch.ones(2, 2, dtype=torch.bool), ["a", "b"], covered)
    terms, found = task.terms(network, batch)
    assert float(terms["latents"]) == 0
    assert found["codes"].tolist() == [1, 1]
    for name in ("brightness", "class_maps"):
        assert float(terms[name]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        network.tokenizer.encoders[1].out.bias += 0.5
        network.image_encoder.backbone.get_parameter(next(iter(network.image_encoder.backbone.state_dict()))).mul_(1.5)
    terms, _ = task.terms(network, batch)
    assert float(terms["latents"]) > 0
    assert float(terms["class_maps"]) > 1e-5


def test_cameras_change_places_where_asked():
    visible, infrared = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    one, two = swapped(visible, infrared, torch.tensor([False, True]))
    assert torch.equal(one[0], visible[0])
    assert torch.equal(two[0], infrared[0])
    assert torch.equal(one[1], infrared[1].expand(3, -1, -1))
    assert np.allclose(two[1, 0].numpy(), luma(visible[1].numpy()), atol=1e-6)


def test_the_measures_rise_and_brightness_is_held_where_it_is_asked_for(street, tmp_path):
    def after(name, *more):
        fast = ["--train.max_steps=40", "--train.validate_every=20", "--train.lr=0.01", "--train.ema_decay=0"]
        out = train(redraw(street / "data", street / "start", tmp_path / name, *fast, *more))
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        return load_network(out / "final")[0], lines

    free, lines = after("free", "--loss.brightness_weight=0")
    assert lines[-1]["val/measures"] > lines[0]["val/measures"]
    held, _ = after("held", "--loss.brightness_weight=300")
    pair = [torch.rand(1, channels, 96, 128) for channels in (3, 1)]
    start = load_network(street / "start")[0]
    was, loose, tight = (F.avg_pool2d(net.eval()(*pair).fused.detach(), 32) for net in (start, free, held))
    assert (tight - was).abs().mean() < (loose - was).abs().mean()


def test_class_maps_are_held_where_it_is_asked_for(street, tmp_path):
    start = load_network(street / "start")[0].eval()
    torch.manual_seed(0)
    pair = [torch.rand(2, channels, 96, 128) for channels in (3, 1)]

    def moved(name, weight):
        """How far the class probabilities are from the start's after 30 steps of a new picture head."""
        more = ["--train.max_steps=30", "--train.validate_every=30", "--train.lr=0.02", "--train.ema_decay=0"]
        new = ["--train.new_picture_head=true", "--loss.brightness_weight=0", f"--loss.class_maps_weight={weight}"]
        out = train(redraw(street / "data", street / "start", tmp_path / name, *more, *new))
        (line,) = [json.loads(one) for one in (out / "history.jsonl").read_text().splitlines()]
        assert ("val/class_maps" in line) == bool(weight)
        with torch.no_grad():
            maps = [net.eval()(*pair).logits.softmax(1) for net in (start, load_network(out / "final")[0])]
        return float((maps[0] - maps[1]).abs().mean())

    assert moved("held", 1e5) < moved("free", 0)


def distil(street, weights, out, *more):
    return redraw(street, weights, out, "--train.stage=distill", *more)


SMALLER = (
    "--train.new_encoders=true", "--model.tokenizer.encoder_width=6", "--model.tokenizer.separable=2",
    "--train.distill=[tokenizer]", "--train.ema_decay=0",
)  # fmt: skip


def test_smaller_encoders_learn_the_latents_of_a_teacher_and_nothing_else_moves(street, tmp_path):
    own, (start, card) = unlabelled(tmp_path / "data"), load_network(street / "start")
    for quantizer in start.tokenizer.quantizers:
        quantizer.codebook.normal_(std=0.2)  # an untrained one has no codes to tell apart
    teacher = save_checkpoint(tmp_path / "teacher", start, card)
    fast = ["--train.max_steps=60", "--train.validate_every=30", "--train.lr=0.01", "--data.dataset=pairs"]
    out = train(distil(own, teacher, tmp_path / "run", *SMALLER, *fast), command="first")
    network, card = load_network(out / "final")
    settings = replace(start.config.tokenizer, encoder_width=6, separable=2)
    assert network.config == replace(start.config, tokenizer=settings)
    before, after = start.state_dict(), network.state_dict()
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    assert all(name.startswith("tokenizer.encoders.") for name in (before.keys() | after.keys()) - same)
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["val/latents"] < 0.95 * lines[0]["val/latents"] < 0.95  # 1: as good as their mean
    assert 0 < lines[-1]["val/codes"] < 1
    assert {name for name in lines[-1] if name.startswith("val/")} == {"val/latents", "val/codes", "val/measures"}
    assert card["distill"]["command"] == "first"
    assert card["seed"] == 7
    assert "distill" in read_card(ship(out / "final", tmp_path / "shipped"))[1]

    # its picture and its class maps are then held to the first network's, not to its own
    more = ["--train.distill=[image_encoder]", f"--train.teacher={teacher}", "--loss.class_maps_weight=1"]
    second = train(distil(own, out / "final", tmp_path / "second", *more, "--data.dataset=pairs"), command="second")
    taught, card = load_network(second / "final")
    moved = {name for name, tensor in taught.state_dict().items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(name.startswith("image_encoder.") for name in moved)
    (first, *_) = [json.loads(line) for line in (second / "history.jsonl").read_text().splitlines()]
    assert first["val/class_maps"] > 0
    assert card["distill"]["earlier"]["command"] == "first"
    with pytest.raises(InputError, match=r"encoder_width: 0, model\.tokenizer\.separable: 0, but .* has 6, 2; make"):
        build_network(replace(preset("debug"), start_from=str(second / "final")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--train.distill=[]",), "train.distill: empty, so nothing would learn"),
        (
            ("--train.distill=[picture_head]", "--train.new_encoders=true"),
            "train.new_encoders: true, but tokenizer does",
        ),
        (("--train.distill=[image_encoder]",), "loss.class_maps_weight: 0, but image_encoder of train.distill learns"),
        (
            ("--train.stage=segmentation", "--train.teacher=tiny"),
            "train.teacher: tiny, but train.stage is segmentation",
        ),
        (("--train.distill=[tokenizer]", "--train.teacher=tiny"), "train.teacher tiny: has model.max_side 1024, "),
        (
            ("--train.new_encoders=true", "--train.stage=picture"),
            "train.new_encoders: true, but train.stage is picture",
        ),
        (("--train.distill=[tokenizer]", "--train.stage=picture"), "train.distill: ['tokenizer'], but train.stage is"),
        (("--train.freeze_tokenizer=true",), "train.freeze_tokenizer: true, but train.stage is distill, which keeps"),
        (("--model.tokenizer_weights=tiny",), "model.tokenizer_weights: tiny, but train.stage is distill, which keeps"),
        (("--train.teacher=",), "train.teacher: is empty"),
    ],
)
def test_settings_by_which_nothing_can_be_taught_are_one_line(street, tmp_path, flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        train(distil(street / "data", street / "start", tmp_path / "run", *flags))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.start_from=null", "model.start_from: none"),
        ("--data.crop=[32,64]", "at least 64 a side"),
        ("--model.steering.width=8", "keeps the steering"),
    ],
)
def test_settings_that_cannot_train_the_picture_are_one_line(street, tmp_path, flag, words):
    with pytest.raises(InputError, match=words):
        train(redraw(street / "data", street / "start", tmp_path / "run", flag))
