"""The benchmark: what it counts is true, and what it is asked for is checked."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from conftest import build_debug
from fusionsam.cli.main import main
from fusionsam.evaluation import speed, speed_models, speed_report
from fusionsam.weights.checkpoint import save_checkpoint


def row(size, *seconds):
    return speed.Row(speed.OURS, size, 1, list(seconds), 1.0, 100.0, 1)


def test_growth_is_the_slope_of_log_time_over_log_pixels():
    rows = [row((height, 2 * height), 3.0 * height**3) for height in (64, 128, 320)]
    assert speed.exponent(rows) == pytest.approx(1.5, abs=1e-5)
    assert speed.exponent(rows[:1]) is None
    large = replace(row((640, 1280), 1.0), reduced=True)  # costs what a smaller one does
    assert speed.exponent([*rows, large]) == pytest.approx(1.5, abs=1e-5)


def test_stages_have_an_exponent_and_a_share_of_the_peak_of_their_own():
    rows = [row((height, height), height / 64) for height in (64, 128)]
    for one, share in zip(rows, (0.5, 1.0), strict=True):
        one.stages, one.stage_gflop, one.peak_gflops = {"fusion": share, "head": 0.0}, {"fusion": 3.0}, 30.0
    # four times the pixels, and 0.5 -> 2 s
    assert speed.exponent(rows, "fusion") == pytest.approx(1.0, abs=1e-5)
    assert speed.exponent(rows, "head") is None
    assert rows[0].share_of_peak("fusion") == pytest.approx(3.0 / 0.5 / 30.0)
    assert rows[0].share_of_peak("head") is None
    table = speed_report.as_markdown(
        [replace(one, stages=dict.fromkeys(speed.STAGES, 0.0) | one.stages) for one in rows]
    )
    assert "| fusion | 50 % / 20 % | 100 % / 5 % | 1.00 |" in table
    assert "| all |  |  | 0.50 |" in table


def test_a_table_tells_times_as_multiples_of_ours_in_the_same_run():
    other = speed.Row("two_streams", (64, 128), 1, [2.0, 3.0, 7.0], 5.0, 200.0, 2_000_000)
    table = speed_report.as_markdown([row((64, 128), 2.0), other])
    assert "| FusionSAM | 1.00 | 1.00-1.00 |" in table
    assert "| 1.50 | 0.67-2.33 | 5.0 | 200 | 2.0 |" in table
    assert "| model | time, FusionSAM = 1 |" in table


def test_without_ours_the_first_model_is_the_unit_by_its_name(tmp_path):
    rows = [speed.Row(name, (64, 128), 1, [2.0], 5.0, 200.0, 2) for name in ("sam2_tiny", "segformer_b2")]
    name = speed_models.MODELS["sam2_tiny"][0]
    assert f"| model | time, {name} = 1 |" in speed_report.as_markdown(rows)
    assert f"time, {name} = 1 (1 thread)" in speed_report.plot(rows, tmp_path / "b.svg").read_text()


def test_peak_memory_is_in_megabytes_on_either_system(monkeypatch):
    class Used:
        ru_maxrss = 3 * 2**20

    monkeypatch.setattr(speed.resource, "getrusage", lambda who: Used)
    monkeypatch.setitem(speed.MODELS, "none", ("none", lambda of: (None, lambda: None)))
    of = speed.Setting((64, 96), torch.get_num_threads(), "tiny", None)
    for system, wanted in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(speed.sys, "platform", system)
        assert speed.measure("none", of, 1).peak_mb == wanted


def test_the_command_measures_and_writes_what_it_measured(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "w", build_debug(), {})
    flags = [
        "--models",
        "fusionsam",
        "two_streams",
        "--sizes",
        "64x96",
        "--runs",
        "2",
        "--plot",
        str(tmp_path / "b.svg"),
    ]
    assert main(["benchmark", "--weights", str(folder), "--out", str(tmp_path / "b.json"), *flags]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    ours, other = found["rows"]
    assert len(ours["seconds"]) == 2
    assert 0 < sum(ours["stages"].values()) <= 1.05
    # what the stages compute is what the whole computes
    assert sum(ours["stage_gflop"].values()) == pytest.approx(ours["gflop"], rel=0.05)
    assert ours["peak_gflops"] > 0
    assert "two-stream FPN" in (tmp_path / "b.svg").read_text()
    assert str(tmp_path / "b.svg") in found["command"]  # by which the next run knows its own plot
    # a convolution of known size: the counter takes a multiply and an add as two
    stem = 2 * 3 * 9 * 32 * 32 * 48 * 2 / 1e9
    assert other["gflop"] > stem
    assert other["parameters"] == sum(p.numel() for p in speed_models.TwoStreams().parameters())
    assert (tmp_path / "b.md").read_text() in capsys.readouterr().out + "\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--models", "resnet"], "--models resnet: not known; choose among fusionsam"),
        (["--models", "onnx"], "onnx at 480x640: needs fusionsam.onnx of a folder that fusionsam export wrote"),
        (["--onnx", "nowhere"], "--onnx nowhere: no fusionsam.onnx in it"),
        (["--plot", "x.jpg"], "--plot x.jpg: expected a name that ends in .png or .svg"),
        (["--sizes", "640"], "--sizes 640: expected HEIGHTxWIDTH"),
        (["--runs", "0"], "--runs 0: expected 1 to 1000"),
        (["--out", "x.md"], "--out x.md: expected a name that ends in .json"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, told, tmp_path, capsys):
    assert main(["benchmark", "--out", str(tmp_path / "b.json"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "benchmark", lambda *given: pytest.fail("measured"))
    (tmp_path / "file").touch()
    (tmp_path / "a.md").write_text("by hand")
    (tmp_path / "b.json").write_text('{"rows": []}')
    (tmp_path / "mine.svg").write_text("by hand")
    record = {"exponents": {}, "machine": {}, "rows": [], "command": "fusionsam benchmark --out c.json"}
    (tmp_path / "c.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    for out in ("d.json", "c.json"):
        assert main(["benchmark", "--out", out, "--plot", "mine.svg"]) == 2
        assert f"mine.svg: is there, and {out} tells of no such plot; choose another --plot" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags, told in (
        (["--out", "file/b.json"], "file: cannot be written"),
        (["--out", "a.json"], "a.md: is there, and no a.json of ours tells of it; choose another --out"),
        (["--out", "b.json"], "b.json: was not written by benchmark; choose another --out"),
        (["--plot", "b.svg"], "pip install 'fusionsam[report]', or leave out --plot"),
    ):
        assert main(["benchmark", *flags]) == 2
        assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "b.json", "c.json", "file", "mine.svg"]
    assert (tmp_path / "mine.svg").read_text() == "by hand"


def test_two_streams_see_both_images():
    torch.manual_seed(0)
    network = speed_models.TwoStreams("mobilenetv2_050").eval()
    visible, infrared = torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96)
    with torch.no_grad():
        base = network(visible, infrared)
        assert base.shape == (1, 9, 16, 24)
        assert not torch.allclose(base, network(visible, 1 - infrared), atol=1e-6)
        assert not torch.allclose(base, network(1 - visible, infrared), atol=1e-6)
