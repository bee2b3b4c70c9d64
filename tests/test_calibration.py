"""The temperature is the one the labels were drawn with; the figure that is reported was not fitted on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionsam.calibration import (
    Pixels,
    calibration,
    collect,
    count_error,
    fit_temperature,
    halves,
    negative_log_likelihood,
    stride,
)
from fusionsam.checkpoint import save_checkpoint
from fusionsam.cli import main
from fusionsam.data.dataset import open_split
from fusionsam.data.synthetic import synthesize
from fusionsam.metrics import CalibrationError
from fusionsam.predict import FusionSAM
from fusionsam.structures import InputError


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
