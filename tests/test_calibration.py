"""The temperature is the one the labels were drawn with, offsets undo a shift; figures are of pairs not fitted on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusionsam.calibration import (
    calibration,
    collect,
    count_error,
    fit_temperature,
    halves,
    negative_log_likelihood,
    store,
    stride,
)
from fusionsam.checkpoint import as_trained, load_network, save_checkpoint, shift_classes
from fusionsam.class_offsets import GRID, PRESENT, _counts_by_offset, class_offsets, confusion, fit_offsets
from fusionsam.cli import main
from fusionsam.data.dataset import open_split
from fusionsam.data.synthetic import synthesize
from fusionsam.metrics import CalibrationError
from fusionsam.predict import FusionSAM
from fusionsam.structures import InputError, Pixels


def drawn(temperature: float, pairs: int = 6, pixels: int = 4001, seed: int = 0) -> list[Pixels]:
    """Labels drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(pairs):
        logits = 3 * torch.randn(pixels, 5, generator=generator)
        label = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
        found.append(Pixels(logits, label))
    return found


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature):
    pixels = drawn(temperature)
    found = fit_temperature(pixels)
    assert found == pytest.approx(temperature, rel=0.05)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4000))
    whole = [Pixels(torch.cat([p.logits for p in pixels]), torch.cat([p.label for p in pixels]))]
    near = [t for t in grid if abs(t / found - 1) < 0.1]
    best = min(near, key=lambda t: negative_log_likelihood(whole, float(t)))
    assert found == pytest.approx(best, rel=4e-3)


def test_calibration_lowers_the_error_of_an_overconfident_network_and_hardly_touches_a_calibrated_one():
    over, right = calibration(drawn(2.5)), calibration(drawn(1.0))
    assert over["ece_before"] > 15
    assert over["ece_after"] < 2.5
    assert over["nll_after"] < over["nll_before"]
    assert abs(right["ece_after"] - right["ece_before"]) < 1


def test_each_half_is_scored_with_the_temperature_of_the_other():
    one, two = halves(6, seed=3)
    pixels: list[Pixels] = [None] * 6  # type: ignore[list-item]
    for places, temperature in ((one, 2.0), (two, 0.5)):
        for place, part in zip(places, drawn(temperature, len(places)), strict=True):
            pixels[place] = part
    values = calibration(pixels, seed=3)
    assert values["temperatures_of_halves"] == pytest.approx([2.0, 0.5], rel=0.08)
    by_hand = CalibrationError()
    count_error([pixels[i] for i in two], values["temperatures_of_halves"][0], by_hand)
    count_error([pixels[i] for i in one], values["temperatures_of_halves"][1], by_hand)
    assert values["ece_after"] == pytest.approx(100 * by_hand.value())
    # halves that want opposite temperatures are worse off with each other's: the figure shows it
    assert values["ece_after"] > values["ece_before"]


@pytest.mark.parametrize("count", [2, 7, 26])
def test_halves_are_disjoint_and_complete(count):
    one, two = halves(count, seed=1)
    assert sorted([*one, *two]) == list(range(count))
    assert abs(len(one) - len(two)) <= 1
    assert halves(count, seed=1) == (one, two)


def test_stride_keeps_the_limit():
    assert stride([(480, 640)] * 10, 10 * 480 * 640) == 1
    assert stride([(480, 640)] * 10, 10 * 480 * 640 - 1) == 2
    assert stride([(480, 640)] * 26, 100_000) == 9  # 7,987,200 / 81 = 98,607


def test_fewer_than_two_pairs_are_refused():
    with pytest.raises(InputError, match="1 pairs; expected at least 2"):
        calibration(drawn(1.0, 1))
    with pytest.raises(InputError, match="no labelled pixel"):
        fit_temperature([Pixels(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))])


def test_the_stored_temperature_changes_confidences_and_the_ece_of_reports_but_no_label(tmp_path: Path, make_debug):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {"step": 7})
    before = FusionSAM.from_pretrained(weights, "cpu")
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root)]
    reports = []
    for out in ("plain", "calibrated"):
        assert main(["evaluate", *given, "--out", str(tmp_path / out), "--bootstrap", "0"]) == 0
        reports.append(json.loads((tmp_path / out / "report.json").read_text()))
        if out == "plain":
            assert main(["calibrate", *given]) == 0
    card = json.loads((weights / "training.json").read_text())
    values = card["calibration"]
    assert card["step"] == 7
    after = FusionSAM.from_pretrained(weights, "cpu")
    assert after.temperature == values["temperature"] != 1
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["ece"] == pytest.approx(values["ece_before"], abs=0.05)  # logits are kept in float16
    # the confidence of predict is the softmax of the logits over the temperature
    data = open_split("mfnet", root, "val")
    sample = data[0]
    plain, scaled = (model.predict(sample.visible, sample.infrared) for model in (before, after))
    assert (plain.labels == scaled.labels).all()
    expected = (collect(before, data)[0].logits.float() / values["temperature"]).softmax(1).max(1)[0]
    assert scaled.confidence.ravel() == pytest.approx(expected.numpy(), abs=2e-3)
    assert np.abs(plain.confidence - scaled.confidence).max() > 1e-3


def shifted(by: float, pairs: int = 5, seed: int = 0) -> list[Pixels]:
    """Logits whose greatest is the label's in nine of ten pixels, then class 2's raised by `by`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(pairs):
        logits = torch.randn(3000, 4, generator=generator)
        label = torch.where(torch.rand(3000, generator=generator) < 0.9, logits.argmax(1), 0)
        found.append(Pixels(logits + torch.tensor([0, 0, by, 0]), label))
    return found


def test_offsets_take_back_a_shift_of_the_logits():
    offsets = fit_offsets(shifted(1.5))
    assert offsets[0] == 0
    assert offsets[2] == pytest.approx(-1.5, abs=0.26)
    assert offsets[[1, 3]].abs().max() <= 0.5
    values = class_offsets(shifted(1.5), list("abcd"))
    assert values["miou_after"] > values["miou_before"] + 5
    assert values["offsets"]["c"] == offsets[2]
    assert len(values["offsets_without_block"]) == 5


def test_every_offset_is_counted_as_if_it_were_the_only_one_tried():
    pixels = [Pixels((8 * part.logits).round() / 8, part.label) for part in shifted(0.5)]  # ties included
    start = torch.tensor([0.0, 0.5, -0.25, 0.0])
    counted = _counts_by_offset(pixels, start, 1)
    for place in (0, 3, 8, 16):
        tried = start.clone()
        tried[1] = GRID[place] + 1e-4  # a tie goes to the class that is moved
        assert torch.equal(counted[place], confusion(pixels, tried))


def test_the_gain_is_that_on_blocks_that_offsets_were_not_fitted_on():
    opposite = [part for by in (1.5, -1.5) for part in shifted(by, pairs=1)]
    values = class_offsets(opposite, list("abcd"))
    assert values["miou_after"] < values["miou_before"] - 5
    own = PRESENT(sum(confusion([part], fit_offsets([part])) for part in opposite)).miou
    assert own > values["miou_before"] + 5


def test_a_class_that_no_pair_shows_keeps_its_logits():
    pixels = [Pixels(part.logits, part.label.where(part.label != 3, 0)) for part in shifted(0.0)]
    assert fit_offsets(pixels)[3] == 0
    with pytest.raises(InputError, match="1 pairs; expected at least 2"):
        class_offsets(pixels[:1], list("abcd"))
    with pytest.raises(InputError, match="no labelled pixel"):
        fit_offsets([Pixels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))])


def test_offsets_enter_the_weights_and_reports_on_their_pairs_say_so(tmp_path: Path, make_debug, capsys):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    network = make_debug()
    with torch.no_grad():
        network.head.mlp[-1].bias[8] += 100.0
        network.head.mlp[-1].weight[0] = network.head.mlp[-1].weight[8]  # unlabeled is one offset behind bump
        network.head.mlp[-1].bias[0] = network.head.mlp[-1].bias[8] - 0.3
    weights = save_checkpoint(tmp_path / "weights", network, {"step": 7}, half=True)
    before = load_file(weights / "model.safetensors")
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root)]
    assert main(["calibrate", *given, "--class-offsets", "--dry-run"]) == 0
    assert all(torch.equal(t, before[n]) for n, t in load_file(weights / "model.safetensors").items())
    assert main(["calibrate", *given, "--class-offsets"]) == 0
    after = load_file(weights / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.mlp.6.bias"]
    card = json.loads((weights / "training.json").read_text())
    offsets = torch.tensor(list(card["class_offsets"]["offsets"].values()))
    assert offsets[8] < 0
    expected = before["head.mlp.6.bias"].float() + offsets
    assert after["head.mlp.6.bias"].dtype == torch.float16
    assert after["head.mlp.6.bias"].float() == pytest.approx(expected, abs=0.05)
    assert (card["step"], "temperature" in card["calibration"]) == (7, True)
    assert main(["evaluate", *given, "--out", str(tmp_path / "out"), "--bootstrap", "0"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["title"].endswith("class offsets fitted on these pairs")
    assert "were fitted on these pairs" in report["notes"][-1]
    assert report["miou"] > card["class_offsets"]["miou_before"] + 1
    capsys.readouterr()
    assert main(["calibrate", *given, "--class-offsets"]) == 2
    assert "has offsets already" in capsys.readouterr().err
    argv = ["robustness", *given, "--conditions", "full", "--bootstrap", "0", "--out", str(tmp_path / "robustness")]
    assert main(argv) == 0
    assert "were fitted on these pairs" in capsys.readouterr().out


def test_a_checkpoint_as_it_was_trained(tmp_path: Path, make_debug):
    card = {"step": 7, "val": {"val/miou": 3.0}}
    trained = save_checkpoint(tmp_path / "trained", make_debug(), card)
    (trained / "training_fingerprints.json").write_text("[]")
    with pytest.raises(InputError, match="were not calibrated"):
        as_trained(trained, tmp_path / "out")
    calibrated = Path(shutil.copytree(trained, tmp_path / "calibrated"))
    offsets = torch.linspace(-2, 2, 9)
    shift_classes(calibrated, offsets)
    names = load_network(trained)[0].config.classes
    store(calibrated, class_offsets={"offsets": dict(zip(names, offsets.tolist(), strict=True))}, calibration={})
    found = as_trained(calibrated, tmp_path / "out")
    tensors = [load_file(folder / "model.safetensors") for folder in (trained, found)]
    assert all(torch.allclose(tensor, tensors[1][name], atol=1e-6) for name, tensor in tensors[0].items())
    assert load_network(found)[1].items() >= card.items()
    assert not {"class_offsets", "calibration"} & load_network(found)[1].keys()
    assert (found / "training_fingerprints.json").exists()


def test_offsets_that_gain_nothing_are_not_kept(tmp_path: Path, make_debug, capsys, monkeypatch):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    before = load_file(weights / "model.safetensors")
    monkeypatch.setattr("fusionsam.class_offsets.GRID", torch.zeros(1))
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root)]
    assert main(["calibrate", *given, "--class-offsets"]) == 0
    assert "no offset is used" in capsys.readouterr().out
    assert all(torch.equal(t, before[n]) for n, t in load_file(weights / "model.safetensors").items())
    assert "class_offsets" not in json.loads((weights / "training.json").read_text())


def test_a_dry_run_leaves_the_checkpoint(tmp_path: Path, make_debug, capsys):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    before = (weights / "training.json").read_bytes()
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root), "--dry-run"]
    assert main(["calibrate", *given]) == 0
    assert (weights / "training.json").read_bytes() == before
    assert "ECE" in capsys.readouterr().out
    assert main(["calibrate", *given, "--seed", "-1"]) == 2
    assert "--seed: -1; expected at least 0" in capsys.readouterr().err
