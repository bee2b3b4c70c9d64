"""What the command line writes: in terminals that lack a letter, in log files, and of wrong values."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionsam import io as files
from fusionsam.cli.main import main
from fusionsam.training.callbacks import StepLines, step_bar


def test_a_name_that_the_terminal_lacks_degrades(tmp_path: Path) -> None:
    out = tmp_path / "ünï"
    command = [sys.executable, "-m", "fusionsam", "synth", "--out", str(out), "--pairs", "1", "--size", "64x64"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rb"\xfcn\xef" in done.stdout
    assert (out / "train.txt").exists()
    done = subprocess.run([*command[:5], str(tmp_path / "ö" / "x.yaml"), "--pairs", "x"], env=environment,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 2
    done = subprocess.run(
        [sys.executable, "-m", "fusionsam", "info", "--weights", "nö"],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(rb"fusionsam: error: weights n\xf6: no such folder")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_and_the_last(clock: list[float]) -> None:
    log = io.StringIO()
    for _ in files.LineProgress(range(90), desc="scoring", file=log, mininterval=0, miniters=1):
        clock[0] += 3
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert len(lines) == 90 * 3 // 60 + 1
    assert all(line.startswith("scoring: ") for line in lines)
    assert "90/90" in lines[-1]


def test_a_terminal_gets_a_bar_that_is_redrawn_and_a_log_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown, redrawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", shown)
        for _ in files.progress_bar(range(3), desc="scoring"):
            pass
        assert ("\r" in shown.getvalue()) is redrawn
        assert "3/3" in shown.getvalue()


def test_a_training_tells_its_steps_on_lines(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    bar = step_bar(1000)
    assert isinstance(bar, StepLines)
    steps = bar.init_train_tqdm()
    steps.reset(10)
    for number in range(1, 11):
        clock[0] += 31
        steps.n = number
        steps.refresh()
    steps.close()
    assert "\r" not in log.getvalue()
    assert 5 <= len(log.getvalue().splitlines()) <= 6
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not isinstance(step_bar(1000), StepLines)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--train.stage", "both"],
            "train.stage: Expected one of 'segmentation', 'tokenizer', 'steering', 'picture', 'distill'. Got",
        ),
        (["--data.class_file="], "data.class_file: is empty, as of an unset shell variable"),
        (["--data.crop", "[64]"], "data.crop: Expected a tuple with 2 elements"),
    ],
)
def test_wrong_settings_read_as_english(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    assert told in capsys.readouterr().err


def test_the_shape_in_an_error_is_the_one_that_was_given() -> None:
    import numpy as np

    from fusionsam.errors import InputError
    from fusionsam.inference.predictor import FusionSAM

    with pytest.raises(InputError, match=r"visible: found shape \(70, 83, 5\), expected .* \(H,W,C\)"):
        FusionSAM.preprocess(np.zeros((70, 83, 5), np.uint8), None)
    with pytest.raises(InputError, match=r"infrared: found shape \(2, 70, 83\), expected .* \(C,H,W\)"):
        FusionSAM.preprocess(None, torch.zeros(2, 70, 83))
