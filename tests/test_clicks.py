"""The protocol of interactive segmentation, worked by hand, and `fusionsam clicks` from end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fusionsam.data.fingerprints import Fingerprints, fingerprint
from fusionsam.data.splits import entries
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation import clicks
from fusionsam.evaluation.click_options import ClicksOptions
from fusionsam.evaluation.click_report import Measured, grouped_interval, scores, table
from fusionsam.evaluation.clicks import Lines, measure
from fusionsam.metrics.interaction import (
    Click,
    clicks_needed,
    iou,
    iou_after,
    next_click,
    objects,
    simulate,
)
from fusionsam.types import Notice, Sample


@pytest.fixture
def square():
    truth = np.zeros((11, 13), bool)
    truth[2:9, 3:10] = True
    return truth, np.ones_like(truth)


def test_the_first_click_is_the_centre_and_later_ones_the_middle_of_the_largest_error(square):
    truth, valid = square
    assert next_click(np.zeros_like(truth), truth, valid) == Click(6, 5, True)
    assert next_click(truth, truth, valid) is None
    half = truth.copy()
    half[2:9, 7:10] = False  # 7 x 3 missing, deepest in its middle column
    assert next_click(half, truth, valid) == Click(8, 3, True)
    spilt = truth.copy()
    spilt[:, 10:] = True  # 11 x 3 surplus at the picture's edge, which is an edge like any other
    assert next_click(spilt, truth, valid) == Click(11, 1, False)
    assert next_click(spilt, truth, valid, [Click(11, 1, False)]) == Click(11, 2, False)
    unknown = valid.copy()
    unknown[:, 10:] = False
    assert next_click(spilt, truth, unknown) is None


def test_a_perfect_answer_takes_one_click_and_no_answer_takes_all(square):
    truth, valid = square
    assert simulate(lambda clicks: truth, truth, valid, 10, 0.85) == [1.0]
    asked = []

    def never(clicks):
        asked.append(list(clicks))
        return np.zeros_like(truth)

    ious = simulate(never, truth, valid, 7, 0.85)
    assert ious == [0.0] * 7
    assert [len(clicks) for clicks in asked] == list(range(1, 8))
    assert len(set(asked[-1])) == 7  # no pixel is clicked twice
    grown = [np.zeros_like(truth), truth & (np.arange(13) < 8), truth]
    assert simulate(lambda clicks: grown[len(clicks) - 1], truth, valid, 10, 0.85) == [0.0, pytest.approx(5 / 7), 1.0]


def test_clicks_needed_and_iou_after_are_read_off_the_curve():
    curve = [0.3, 0.82, 0.7, 0.9]
    assert clicks_needed(curve, 0.8, 10) == (2, True)
    assert clicks_needed(curve, 0.85, 10) == (4, True)
    assert clicks_needed(curve, 0.95, 10) == (10, False)
    assert [iou_after(curve, n) for n in (1, 3, 5)] == [0.3, 0.7, 0.9]
    nothing = np.zeros((2, 2), bool)
    assert iou(nothing, nothing, ~nothing) == 1


def test_objects_are_connected_regions_of_one_class_large_enough():
    label = np.zeros((6, 8), int)
    label[0:2, 0:2] = 2
    label[2:4, 2:4] = 2  # touches by a corner: one region of 8
    label[0:2, 6:8] = 2
    label[5, :] = 3
    label[4, 7] = 255
    found = [(one.class_id, one.pixels) for one in objects(label, 4)]
    assert found == [(2, 8), (2, 4), (3, 8)]
    assert [one.pixels for one in objects(label, 5)] == [8, 8]


def test_intervals_resample_recordings_not_objects():
    values = np.repeat([1.0, 3.0], 50)
    one_each = grouped_interval(values, np.arange(100), 2000, 0)
    assert 1.7 < one_each[0] < 2 < one_each[1] < 2.3
    assert grouped_interval(values, np.repeat([0, 1], 50), 2000, 0) == [1.0, 3.0]  # two recordings know no better
    assert grouped_interval(values, np.zeros(100, int), 2000, 0) is None


def test_the_figures_of_four_objects_worked_by_hand():
    curves = {
        "visible": [[0.9], [0.5, 0.81], [0.1] * 10, [0.2, 0.84, 0.86]],
        "fused": [[0.9], [0.9], [0.8], [0.1] * 10],
    }
    ids, classes = ["00001D", "00020D", "00040N", "00042N"], [1, 2, 1, 1]
    measured = [
        Measured(id, kind, 500, {name: curves[name][i] for name in curves})
        for i, (id, kind) in enumerate(zip(ids, classes, strict=True))
    ]
    values = scores(measured, ["none", "car", "person"], 10, {"00040N": "r", "00042N": "r"}, 200, 0)
    rows = values["groups"]
    assert list(rows) == ["all", "day", "night", "car", "person"]
    assert rows["day"]["pictures"]["visible"]["noc80"] == 1.5
    assert rows["night"]["pictures"]["visible"]["noc80"] == 6
    assert rows["night"]["pictures"]["visible"]["noc85"] == 6.5
    assert rows["night"]["pictures"]["visible"]["not_reached80"] == 50
    assert rows["all"]["pictures"]["fused"]["iou1"] == pytest.approx(67.5)
    assert rows["all"]["pictures"]["visible"]["iou3"] == pytest.approx(100 * (0.9 + 0.81 + 0.1 + 0.86) / 4)
    assert rows["night"]["difference"]["fused - visible"]["noc80"] == -0.5
    assert rows["night"]["recordings"] == 1
    assert [one["ids"] for one in values["recordings"]] == [["00001D"], ["00020D"], ["00040N", "00042N"]]
    shown = table({**values, "title": "t", "most": 10})
    assert [row.cells[0] for row in shown.rows[:2]] == ["visible", "fused"]
    assert all("fewer than 20 objects" in row.notes for row in shown.rows)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    root = tmp_path_factory.mktemp("street") / "data"
    synthesize(root, 10, seed=3, size=(71, 97), progress=False)
    return root


def test_a_run_that_was_killed_goes_on_and_gives_the_same_figures(sam, street, tmp_path):
    config = ClicksOptions(
        dataset="mfnet", root=street, out=tmp_path / "a", sam=str(sam[1]), images=("visible", "infrared"),
        min_pixels=200, most=5, bootstrap=50, device="cpu",
    )  # fmt: skip
    part = measure(replace(config, pairs=1))
    assert any("1 pairs drawn of 2" in note for note in part["notes"])
    whole = measure(config)
    assert part["n_objects"] < whole["n_objects"]
    assert set(whole["groups"]["all"]["pictures"]) == {"visible", "infrared"}
    for row in whole["groups"].values():
        for picture in row["pictures"].values():
            assert 1 <= picture["noc80"] <= picture["noc85"] <= 5
    lines = (tmp_path / "a/objects.jsonl").read_text()
    (tmp_path / "a/objects.jsonl").write_text(lines[:-9])  # killed amid the last line
    again = measure(config)
    unlike = {"seconds"}
    assert {k: v for k, v in again.items() if k not in unlike} == {k: v for k, v in whole.items() if k not in unlike}
    assert (tmp_path / "a/objects.jsonl").read_text() == lines
    assert json.loads((tmp_path / "a/clicks.json").read_text())["groups"] == whole["groups"]
    with pytest.raises(InputError, match="measured with another choose, most"):
        measure(replace(config, most=6, choose="best"))
    (tmp_path / "a/objects.jsonl").unlink()
    with pytest.raises(InputError, match=r"clicks\.json: is there without objects\.jsonl, and would be lost"):
        measure(config)
    best = measure(replace(config, out=tmp_path / "b", choose="best"))
    first = best["groups"]["all"]["pictures"]["visible"]["iou1"]
    assert first >= whole["groups"]["all"]["pictures"]["visible"]["iou1"]


def test_what_was_guessed_of_the_files_is_told_of_pairs_measured_earlier_too(tmp_path, capsys):
    pairs = [Sample(id, None, None, notices=[Notice("polarity", "looks black-hot", "--polarity black")]) for id in "ab"]
    pairs.append(Sample("c", None, None))
    data = SimpleNamespace(entries=pairs)

    def opened():
        return Lines(tmp_path, "clicks", "objects.jsonl", {}, lambda row: Measured(**row))

    first = opened()
    assert first.left(data, [0, 1, 2]) == [0, 1, 2]
    first.add(pairs[0], [])
    assert "a: looks black-hot (fusionsam predict: --polarity black)" in capsys.readouterr().err
    again = opened()
    assert again.left(data, [0, 1, 2]) == [1, 2]
    for pair in pairs[1:]:
        again.add(pair, [])
    assert again.notices.lines() == ["input files: polarity: 2 of 3 pairs"]


def test_pairs_that_the_sam_was_trained_on_are_refused(sam, street, tmp_path):
    folder = shutil.copytree(sam[1], tmp_path / "sam")
    config = ClicksOptions(
        dataset="mfnet", root=street, out=tmp_path / "out", sam=str(folder), images=("visible",), min_pixels=200,
        most=5, bootstrap=0, device="cpu", pairs=1,
    )  # fmt: skip
    assert any("nothing tells what the SAM" in note for note in measure(config)["notes"])
    fingerprint("street", entries("mfnet", street, "val")).write(folder)
    with pytest.raises(InputError, match=r"2 of its 2 pictures are in the training split: sam \(fingerprints\)"):
        measure(replace(config, out=tmp_path / "other"))


def test_the_sam_that_ships_tells_what_it_was_trained_on():
    assert len(Fingerprints.read(Path(clicks.locate_sam("sam")).parent).content) == 67


def test_a_run_does_not_go_on_with_other_pictures_of_the_same_names(sam, street, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(street, root)
    config = ClicksOptions(
        dataset="mfnet", root=root, out=tmp_path / "out", sam=str(sam[1]), images=("visible",), min_pixels=200, most=5,
        bootstrap=0, device="cpu", pairs=1,
    )  # fmt: skip
    measure(config)
    label = next((root / "labels").glob(f"{(root / 'val.txt').read_text().split()[0]}*"))
    with Image.open(label) as stored:
        Image.fromarray(np.zeros_like(np.asarray(stored))).save(label)
    with pytest.raises(InputError, match="measured with another files_sha256"):
        measure(config)


def test_a_run_does_not_go_on_with_another_sam_or_other_meanings_of_ids(sam, street, tmp_path, monkeypatch):
    folder = shutil.copytree(sam[1], tmp_path / "sam")
    config = ClicksOptions(
        dataset="mfnet", root=street, out=tmp_path / "out", sam=str(folder), images=("visible",), min_pixels=200,
        most=5, bootstrap=0, device="cpu", pairs=1,
    )  # fmt: skip
    measure(config)
    split = clicks.open_labelled

    def mapped(plain):
        data = split(plain)
        data.row = replace(data.row, labels_map={2: 1})
        return data

    with monkeypatch.context() as patch:
        patch.setattr(clicks, "open_labelled", mapped)
        with pytest.raises(InputError, match="measured with another labels_map;"):
            measure(config)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match="measured with another sam_sha256;"):
        measure(config)


@pytest.mark.parametrize(
    "text",
    [
        "", "no json\n", '{"settings": []}\n', '{"settings": null}\n', '{"settings": {}}\nno json\n', "\xff\n",
        '{"settings": {}}\n{"id": "a"}\n', '{"settings": {}}\n{"id": "a", "objects": [{"other": 1}]}\n',
    ],
)  # fmt: skip
def test_lines_in_another_form_are_one_line_and_stay(tmp_path, text):
    path = tmp_path / "objects.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not ours to read"):
        Lines(tmp_path, "clicks", path.name, {}, lambda row: Measured(**row))
    assert path.read_bytes() == text.encode("latin-1")


def test_what_steering_does_not_look_at_is_refused():
    given = {"dataset": "mfnet", "root": "data", "out": "out", "steer": True}
    ClicksOptions(**given, images=["visible", "infrared", "fused"])
    with pytest.raises(InputError, match=r"--steer: .* leave out --images, --most"):
        ClicksOptions(**given, images=["visible"], most=50)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"most": 3}, "--most: found 3; expected at least 5"),
        ({"min_pixels": 0}, "--min-pixels"),
        ({"images": ()}, "--images: found none"),
        ({"min_pixels": 10**6}, "lower --min-pixels"),
    ],
)
def test_options_that_cannot_be_are_one_line(sam, street, tmp_path, wrong, words):
    given = {"dataset": "mfnet", "root": street, "out": tmp_path, "sam": str(sam[1]), "device": "cpu"}
    with pytest.raises(InputError, match=words):
        measure(ClicksOptions(**{**given, "images": ("visible",), **wrong}))
