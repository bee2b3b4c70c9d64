"""The temperature is the one the labels were drawn with, offsets undo a shift; figures are of pairs not fitted on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusionsam.cli.main import main
from fusionsam.config.schema import preset
from fusionsam.data.dataset import open_split
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation.calibrate import (
    calibration,
    collect,
    count_error,
    fit_temperature,
    negative_log_likelihood,
    store,
    stride,
)
from fusionsam.evaluation.logit_adjustment import (
    GRID,
    PRESENT,
    _counts_by_offset,
    blocks,
    but,
    class_offsets,
    confusion,
    fit_offsets,
)
from fusionsam.evaluation.report_files import read
from fusionsam.evaluation.tables.sources import Scored
from fusionsam.inference.predictor import FusionSAM
from fusionsam.metrics.segmentation import CalibrationError
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.callbacks import _keep_calibration
from fusionsam.types import Pixels
from fusionsam.weights.checkpoint import load_network, save_checkpoint


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


def test_each_block_is_scored_with_what_was_fitted_on_the_others():
    pixels = [part for temperature in (2.0, 0.5) for part in drawn(temperature, 1)]
    values = calibration(pixels)
    assert values["temperatures_without_block"] == pytest.approx([0.5, 2.0], rel=0.08)
    by_hand = CalibrationError()
    for part, temperature in zip(pixels, values["temperatures_without_block"], strict=True):
        count_error([part], temperature, by_hand)
    assert values["ece_after"] == pytest.approx(100 * by_hand.value())
    # blocks that want opposite temperatures are worse off with each other's: the figure shows it
    assert values["ece_after"] > values["ece_before"]
    # and so do offsets that help their own block alone
    offsets = [torch.tensor([0, by, 0, 0, 0.0]) for by in (1.0, -1.0)]
    own = [Pixels(part.logits - offset, part.label) for part, offset in zip(pixels, offsets, strict=True)]
    undone, twice = (calibration(own, torch.zeros(5), without) for without in (offsets, offsets[::-1]))
    assert undone["nll_before"] == pytest.approx(values["nll_before"], rel=1e-5)
    assert twice["nll_after"] > undone["nll_after"]


@pytest.mark.parametrize("count", [2, 7, 26])
def test_blocks_are_consecutive_disjoint_and_complete(count):
    found = blocks(count)
    assert [place for block in found for place in block] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert but([Pixels(torch.zeros(place, 1), torch.zeros(0)) for place in range(count)], found[0])[0].logits.shape[
        0
    ] == len(found[0])


def test_a_block_without_a_label_counts_for_nothing():
    blank = Pixels(torch.zeros(0, 5, dtype=torch.half), torch.zeros(0, dtype=torch.long))
    with_it, without = (calibration([*drawn(2.0, 2), *more]) for more in ([blank], []))
    assert with_it["nll_after"] == pytest.approx(without["nll_after"])


def test_stride_keeps_the_limit():
    assert stride([(480, 640)] * 10, 10 * 480 * 640) == 1
    assert stride([(480, 640)] * 10, 10 * 480 * 640 - 1) == 2
    assert stride([(480, 640)] * 26, 100_000) == 9  # 7,987,200 / 81 = 98,607


def test_pictures_of_several_sizes_are_thinned_together(tmp_path, make_debug, monkeypatch):
    for side, count in ((64, 5), (256, 9)):
        synthesize(tmp_path / str(side), count, seed=1, size=(side, side), progress=False)
    first, others = (open_split("mfnet", tmp_path / name, "train") for name in ("64", "256"))
    first.entries = [first.entries[0], *others.entries]
    monkeypatch.setattr("fusionsam.evaluation.calibrate.stride", lambda sizes: stride(sizes, 20_000))
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    pixels = collect(FusionSAM.from_pretrained(weights, "cpu"), first)
    assert len(pixels) == 6
    assert sum(len(one.label) for one in pixels) <= 20_000


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
    pair = [
        f"--rgbt={next((root / 'images').glob('*.png'))}",
        "--weights",
        str(weights),
        "--out",
        str(tmp_path / "out"),
    ]
    predicted = []
    for out in ("plain", "calibrated"):
        assert main(["predict", *pair]) == 0  # a pair that is done, by another calibration
        predicted.append(next((tmp_path / "out").glob("*.json")).read_text())
        assert main(["evaluate", *given, "--out", str(tmp_path / out), "--bootstrap", "0"]) == 0
        reports.append(json.loads((tmp_path / out / "report.json").read_text()))
        if out == "plain":
            assert main(["calibrate", *given]) == 0
    shares = [json.loads(text)["classes"] for text in predicted]
    assert [c["share"] for c in shares[0].values()] == [c["share"] for c in shares[1].values()]
    assert shares[0] != shares[1]
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


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Weights whose bump is one offset ahead of unlabeled, calibrated with --class-offsets, and the scenes for it."""
    folder = tmp_path_factory.mktemp("calibrated")
    synthesize(folder / "scenes", 20, seed=11, size=(64, 96), progress=False)
    torch.manual_seed(3)
    network = FusionSAMNetwork(preset("debug")).eval()
    with torch.no_grad():
        last = network.head.mlp[-1]
        last.bias[8] += 100.0
        last.weight[0] = last.weight[8]
        last.bias[0] = last.bias[8] - 0.3
    weights = save_checkpoint(folder / "weights", network, {"step": 7}, half=True)
    before = (weights / "model.safetensors").read_bytes()
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(folder / "scenes")]
    assert main(["calibrate", *given, "--class-offsets", "--dry-run"]) == 0
    assert "class_offsets" not in card_of(weights)
    assert main(["calibrate", *given, "--class-offsets"]) == 0
    assert (weights / "model.safetensors").read_bytes() == before
    return weights, given


def card_of(weights: Path) -> dict[str, Any]:
    return json.loads((weights / "training.json").read_text())


def scored(out: Path, *argv: str) -> dict[str, Any]:
    assert main(["evaluate", *argv, "--bootstrap", "0", "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def test_offsets_are_in_the_logits_unless_left_out(calibrated):
    weights, _ = calibrated
    card = card_of(weights)
    offsets = torch.tensor(list(card["class_offsets"]["offsets"].values()))
    assert offsets[8] < 0
    assert (card["step"], "temperature" in card["calibration"]) == (7, True)
    moved, plain = (load_network(weights, with_them)[0].head.mlp[-1].bias for with_them in (True, False))
    torch.testing.assert_close(moved, plain + offsets)
    assert not {"class_offsets", "calibration"} & load_network(weights, calibrated=False)[1].keys()


def test_reports_on_the_pairs_of_a_calibration_say_so(calibrated, tmp_path, capsys):
    weights, given = calibrated
    before = card_of(weights)["class_offsets"]["miou_before"]
    fitted, plain = scored(tmp_path / "fitted", *given), scored(tmp_path / "plain", *given, "--as-trained")
    assert fitted["title"].endswith("class offsets fitted on these pairs")
    assert ["fitted on" in note for note in fitted["notes"]] == [True, True]
    assert fitted["miou"] > before + 1
    assert plain["title"].endswith("as trained")
    assert plain["notes"] == []
    assert plain["miou"] == pytest.approx(before, abs=0.2)
    labels = [Scored(tmp_path, read(tmp_path / name)).label for name in ("fitted", "plain")]
    assert labels[0].endswith("class offsets fitted on these pairs")
    assert labels[1].endswith("as trained")

    # a list that shares pairs with theirs
    root = Path(given[-1])
    (root / "some.txt").write_text("\n".join((root / "val.txt").read_text().split()[:1]) + "\n")
    capsys.readouterr()
    argv = ["robustness", *given, "--conditions", "full", "--bootstrap", "0", "--split", "some", "--out"]
    tables = []
    for name, more in (("fitted", []), ("plain", ["--as-trained"])):
        assert main([*argv, str(tmp_path / name), *more]) == 0
        out = capsys.readouterr().out
        assert ("1 of these 1 pairs are of those that the class offsets were fitted on" in out) == (name == "fitted")
        assert (f"{weights}, as trained" in out) == (name == "plain")
        tables.append(json.loads((tmp_path / name / "robustness.json").read_text())["conditions"]["full"]["miou"])
    assert tables[0] != tables[1]

    # other pairs of the same names are others
    other = tmp_path / "other"
    synthesize(other, 20, seed=12, size=(64, 96), progress=False)
    assert set(scored(tmp_path / "else", *given[:-1], str(other))["fitted"].values()) == {0}


def test_of_several_checkpoints_each_report_tells_of_its_own(calibrated, tmp_path):
    weights, given = calibrated
    plain = Path(shutil.copytree(weights, tmp_path / "plain"))
    (plain / "training.json").write_text("{}")
    both = scored(tmp_path / "both", given[0], str(plain), *given[1:])
    reports = [json.loads((tmp_path / "both" / f"checkpoint_{n}" / "report.json").read_text()) for n in (1, 2)]
    pairs = len((Path(given[-1]) / "val.txt").read_text().split())
    assert [report["fitted"]["class_offsets"] for report in reports] == [0, pairs]
    # and the mean, whichever comes first
    assert both["fitted"]["class_offsets"] == pairs
    assert any("class offsets were fitted on" in note for note in both["notes"])
    assert "class offsets fitted on these pairs" in both["title"]


def test_label_maps_are_told_of_who_made_them(calibrated, tmp_path, capsys):
    weights, given = calibrated
    assert main(["predict", "--rgbt", f"{given[-1]}/images", *given[:2], "--out", str(tmp_path / "maps")]) == 0
    maps = ["--predictions", str(tmp_path / "maps"), "--predicted-by", str(weights), "--allow-partial"]
    assert ["fitted on" in note for note in scored(tmp_path / "scored", *given[2:], *maps)["notes"]] == [True]
    assert main(["evaluate", *given[2:], *maps, "--as-trained", "--out", str(tmp_path / "scored")]) == 2
    assert "--flip and --precision need --weights" in capsys.readouterr().err


def test_calibrating_again_measures_the_same(calibrated, tmp_path):
    weights = Path(shutil.copytree(calibrated[0], tmp_path / "weights"))
    given = ["--weights", str(weights), *calibrated[1][2:]]
    before = card_of(weights)
    for more in ([], ["--class-offsets"]):  # a temperature alone knows the offsets of the other blocks, too
        assert main(["calibrate", *given, *more]) == 0
        for key in ("calibration", "class_offsets"):
            assert {**card_of(weights)[key], "command": ""} == {**before[key], "command": ""}


def test_offsets_that_gain_nothing_are_not_kept(tmp_path: Path, make_debug, capsys, monkeypatch):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    before = load_file(weights / "model.safetensors")
    monkeypatch.setattr("fusionsam.evaluation.logit_adjustment.GRID", torch.zeros(1))
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root)]
    assert main(["calibrate", *given, "--class-offsets"]) == 0
    assert "no offset is used" in capsys.readouterr().out
    assert all(torch.equal(t, before[n]) for n, t in load_file(weights / "model.safetensors").items())
    assert "class_offsets" not in json.loads((weights / "training.json").read_text())


def test_labels_of_one_class_calibrate_nothing(calibrated, tmp_path, capsys):
    weights, given = calibrated
    before = (weights / "training.json").read_bytes()
    ids = ["--ignore", *map(str, range(1, 9))]
    assert main(["calibrate", *given, *ids]) == 2
    assert "know one class alone, which tells nothing of confidence" in capsys.readouterr().err
    assert (weights / "training.json").read_bytes() == before


def test_a_resumed_training_keeps_a_calibration_of_the_same_weights_alone(calibrated, tmp_path, capsys):
    weights, _ = calibrated
    again = shutil.copytree(weights, tmp_path / "again")
    store(again, calibration=None, class_offsets=None)
    _keep_calibration(weights, again)
    assert card_of(again)["class_offsets"] == card_of(weights)["class_offsets"]
    store(again, calibration=None, class_offsets=None)
    (again / "model.safetensors").write_bytes(b"other")
    _keep_calibration(weights, again)
    assert "class_offsets" not in card_of(again)
    assert "has other weights now, so what calibrate fitted" in capsys.readouterr().err
    _keep_calibration(tmp_path / "none", again)


def test_a_dry_run_leaves_the_checkpoint(tmp_path: Path, make_debug, capsys):
    root = tmp_path / "scenes"
    synthesize(root, 20, seed=11, size=(64, 96), progress=False)
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    before = (weights / "training.json").read_bytes()
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root), "--dry-run"]
    assert main(["calibrate", *given]) == 0
    assert (weights / "training.json").read_bytes() == before
    assert "ECE" in capsys.readouterr().out
