"""A batch: the list of pairs that failed, and what a restart does after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import build_debug
from fusionsam.cli.main import main
from fusionsam.errors import InputError
from fusionsam.inference.batch import FAILURES, SOME_FAILED, Failures
from fusionsam.weights.checkpoint import save_checkpoint

SIDE = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "small", build_debug(), {"commit": "abc", "step": 7})


def _pairs(root: Path, count: int, damaged: set[int]) -> list[str]:
    """Folders v and i below `root`; the infrared pictures numbered `damaged` are cut short. Returns predict's flags."""
    rng = np.random.default_rng(0)
    for camera, shape in (("v", (SIDE, SIDE, 3)), ("i", (SIDE, SIDE))):
        (root / camera).mkdir(parents=True)
        for number in range(count):
            path = root / camera / f"{number:04}.png"
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
            if camera == "i" and number in damaged:
                path.write_bytes(path.read_bytes()[:200])
    return ["--visible", str(root / "v"), "--infrared", str(root / "i")]


def _listed(out: Path) -> list[str]:
    lines = (out / FAILURES).read_text().splitlines()
    assert lines[0] == "pair,reason"
    return [line.split(",")[0] for line in lines[1:]]


def test_a_failure_is_added_behind_the_others_and_nothing_is_written_twice(tmp_path):
    failures, before = Failures(tmp_path, {"a", "b", "c"}), b""
    for name in ("a", "b", "c"):
        failures.add(name, f"{name}: is\nbroken, see")
        now = (tmp_path / FAILURES).read_bytes()
        assert now.startswith(before)  # so that ten thousand failures are ten thousand lines, not their sum
        assert now[len(before) :].endswith(f'{name},"is broken, see"\n'.encode())
        before = now
    assert before.count(b"\n") == 4
    assert failures.close(5) == SOME_FAILED
    assert (tmp_path / FAILURES).read_bytes() == before


def test_a_restart_keeps_what_is_still_to_be_done_and_drops_what_succeeds(tmp_path):
    first = Failures(tmp_path, {"a", "b", "c", "d"})
    for name in ("a", "b", "c"):
        first.add(name, "broken")  # then the process is killed: no close
    second = Failures(tmp_path, {"b", "c", "d"}, done={"a"})  # a was done by somebody in between
    assert _listed(tmp_path) == ["b", "c"]
    second.add("c", "broken")
    assert _listed(tmp_path) == ["b", "c"]  # listed already
    second.add("d", "new")
    assert _listed(tmp_path) == ["b", "c", "d"]
    second.close(1)
    assert _listed(tmp_path) == ["c", "d"]  # b was tried, and succeeded
    third = Failures(tmp_path, {"c", "d"})
    third.add("c", "another reason")
    assert _listed(tmp_path) == ["c", "d", "c"]
    Failures(tmp_path, {"c", "d"})
    assert (tmp_path / FAILURES).read_text() == "pair,reason\nc,another reason\nd,new\n"
    assert Failures(tmp_path, {"c", "d"}).close(2) == 0
    assert not (tmp_path / FAILURES).exists()


def test_other_pairs_leave_the_list_of_a_batch(tmp_path):
    Failures(tmp_path, {"a", "b"}).add("a", "broken")
    assert Failures(tmp_path, {"x"}, done={"y"}).close(1) == 0
    assert _listed(tmp_path) == ["a"]
    assert Failures(tmp_path, {"a"}).close(1) == 0
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_last_line_that_a_full_disk_cut_is_not_taken_for_one(tmp_path, cut):
    failures = Failures(tmp_path, {"a", "b"})
    failures.add("a", "broken")
    failures.add("b", "broken")
    (tmp_path / FAILURES).write_bytes((tmp_path / FAILURES).read_bytes()[:-cut])
    Failures(tmp_path, {"a", "b"})
    assert _listed(tmp_path) == ["a"]
    (tmp_path / FAILURES).write_bytes(b"pair,rea")
    Failures(tmp_path, {"a", "b"}).add("a", "broken")
    assert _listed(tmp_path) == ["a"]


@pytest.mark.parametrize("content", [b"name;why\n1;2\n", b"\xff\xfe", b"pair,reason\na,b,c\n", b"pair"])
def test_a_list_of_somebody_elses_is_not_replaced(tmp_path, content):
    (tmp_path / FAILURES).write_bytes(content)
    if content == b"pair":  # the beginning of ours
        Failures(tmp_path, set())
        return
    with pytest.raises(InputError, match="was not written by predict; choose another --out, or move it"):
        Failures(tmp_path, {"a"})
    assert (tmp_path / FAILURES).read_bytes() == content


def test_a_batch_goes_on_lists_what_failed_and_tries_only_that_again(weights, tmp_path, capsys):
    given = _pairs(tmp_path, 5, {1, 3})
    argv = ["predict", *given, "--weights", str(weights), "--out", str(tmp_path / "o"), "--device", "cpu"]
    assert main(argv) == SOME_FAILED
    assert _listed(tmp_path / "o") == ["0001", "0003"]
    assert "failed: 2, done: 3 pairs" in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("*_*")}
    for camera in ("v", "i"):
        (tmp_path / camera / "0001.png").write_bytes((tmp_path / camera / "0000.png").read_bytes())
    assert main(argv) == SOME_FAILED
    assert _listed(tmp_path / "o") == ["0003"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for camera in ("v", "i"):
        (tmp_path / camera / "0003.png").unlink()
    capsys.readouterr()
    assert main(argv) == 0  # nobody knows whether it was given up, or belongs to another folder
    assert _listed(tmp_path / "o") == ["0003"]
    assert "failures.csv: still lists 1 pairs that this run was not about" in capsys.readouterr().err


def killed_and_restarted(root: Path, weights: Path, count: int, damaged: set[int], after: int) -> None:
    """Predict `count` pairs, kill the process once `after` results are there, run it again, and hold the outcome to
    what was promised."""
    given, out = _pairs(root, count, damaged), root / "o"
    argv = [sys.executable, "-m", "fusionsam", "predict", *given, "--weights", str(weights), "--out", str(out)]
    first = subprocess.Popen([*argv, "--device", "cpu"], stderr=subprocess.DEVNULL)
    while len(list(out.glob("*_overlay.png"))) < after:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(max(0.02, count / 10000))  # listing thousands of results takes time from the process that makes them
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")
            if json.loads(path.read_text()).get("run")}  # fmt: skip
    assert after // 2 < len(done) < count
    early = _listed(out) if (out / FAILURES).exists() else []
    assert {int(name) for name in early} <= damaged
    second = subprocess.run([*argv, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert second.returncode == SOME_FAILED, second.stderr[-500:]
    assert f"{len(done)} of {count} pairs were already done" in second.stdout
    good = sorted(set(range(count)) - damaged)
    assert sorted(int(path.stem) for path in out.glob("????.json")) == good
    for ending in ("fused", "labels", "overlay"):
        assert sorted(int(path.name[:4]) for path in out.glob(f"*_{ending}.png")) == good
    assert sorted(int(name) for name in _listed(out)) == sorted(damaged)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert not list(out.glob(".*"))


def test_a_batch_that_was_killed_is_finished_without_touching_what_was_done(weights, tmp_path):
    killed_and_restarted(tmp_path, weights, 16, {2, 13}, after=5)


KILLED = """
import os, signal, sys
from fusionsam.cli.main import main
moves, replace = [], os.replace
def move(*paths):
    moves.append(paths)
    if len(moves) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = move
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moved", [6, 8, 10])  # five a pair: before the second pair's first, in the middle, at the last
def test_a_kill_leaves_nothing_that_the_restart_does_not_remove(weights, tmp_path, moved):
    argv = ["predict", *_pairs(tmp_path, 3, set()), "--weights", str(weights), "--device", "cpu", "--out"]
    out, unbroken = tmp_path / "o", tmp_path / "unbroken"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(moved), *argv, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = out.glob(".*")
    assert main([*argv, str(unbroken)]) == 0
    assert main([*argv, str(out)]) == 0
    assert not left.exists()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in unbroken.iterdir())
    for path in unbroken.glob("*.png"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_five_thousand_pairs_of_which_fifty_are_damaged_survive_a_kill(weights, tmp_path):
    damaged = set(np.random.default_rng(1).choice(5000, 50, replace=False).tolist())
    killed_and_restarted(tmp_path, weights, 5000, damaged, after=2500)
