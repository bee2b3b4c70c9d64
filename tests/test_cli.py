"""The command line: quick help, one line for bad input, honest exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionsam.cli import main as cli
from fusionsam.cli.main import main
from fusionsam.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fusionsam.cli.main import main; main(['--help']); main(['--version']); main(['trian'])\n"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy', 'timm', 'PIL', 'yaml', 'jsonargparse'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "LOADED []"
    assert "train" in answer.stdout
    assert answer.stderr == (
        f"fusionsam: error: no command 'trian' (did you mean train?); choose one of {', '.join(cli.COMMANDS)}\n"
    )


def test_predicting_a_pair_imports_nothing_of_other_commands(tmp_path: Path) -> None:
    for name, size in (("v.png", (64, 64, 3)), ("i.png", (64, 64))):
        Image.fromarray(np.full(size, 99, np.uint8)).save(tmp_path / name)
    argv = ["predict", "--visible", str(tmp_path / "v.png"), "--infrared", str(tmp_path / "i.png")]
    others = ["lightning", "peft", "torchmetrics", "onnx", "onnxruntime", "openvino", "ray", "pyarrow", "pandas"]
    others += [
        "sklearn",
        "matplotlib",
        "gradio",
        "fastapi",
        "jsonargparse",
        "av",
        "transformers",
    ]
    code = (
        "import sys; from fusionsam.cli.main import main\n"
        f"assert main({[*argv, '--out', str(tmp_path / 'out')]}) == 0\n"
        f"print('LOADED', sorted({{*{others}}} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.stdout.splitlines()[-1:] == ["LOADED []"], answer.stderr[-2000:]


def test_memory_is_kept_where_the_library_can() -> None:
    code = (
        "from fusionsam.inference.memory import FreeMemory, keep_memory; free = FreeMemory(every=0); free()\n"
        "before = free(); print(before == keep_memory(), free(), len(bytes(10**8)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "True False 100000000\n", answer.stderr


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("fusionsam: error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["synth", "--oot", "x"], "unknown flag --oot (did you mean --out?)"),
        (["synth", "--out", "x", "--pairs", "3", "--size", "9"], "--size: found '9', expected HEIGHTxWIDTH"),
        (["synth", "--out", "x", "--pairs", "0"], "pairs: 0; expected at least 1"),
        (["synth", "--out", "x", "--pairs", "many"], "--pairs: invalid int value: 'many'"),
        (["synth", "--out", "x"], "required: --pairs"),
        (["data", "check", "--dataset", "mfnet"], "required: --root"),
        (["data", "check", "--dataset", "mfnets", "--root", "x"], "dataset 'mfnets' is not known"),
        (["info", "--preset", "tyni"], "preset 'tyni' is not known; choose one of debug, tiny"),
        (["info", "--weights", "nowhere"], "weights nowhere: no such folder"),
        (["train", "--train.lrr", "3"], "unknown setting train.lrr; did you mean train.lr?"),
        (["train", "--model.fusion.hads=3"], "unknown setting model.fusion.hads; did you mean model.fusion.heads?"),
        (["train", "--train.lr", "fast"], "train.lr: Expected a float. Got value: fast"),
        (["train", "--train.max_steps", "1.5"], "train.max_steps: Expected one of int, null. Got value: 1.5"),
        (["train", "--data.crop", "[64]"], "data.crop: Expected a tuple with 2 elements"),
        (["train", "--model.fusion.heads", "7"], "model.fusion.heads: 7 does not divide model.tokenizer.dim 64"),
        (["train", "--model.preset", "tyni"], "preset 'tyni' is not known"),
        (["train", "--config", "nowhere.yaml"], "--config: nowhere.yaml cannot be read"),
        (["train", "--config"], "--config: expected"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {lrr: 1}", "unknown setting train.lrr; did you mean train.lr?"),
        ("model: {tokenizer: {dims: 8}}", "unknown setting model.tokenizer.dims; did you mean model.tokenizer.dim?"),
        ("modle: {}", "unknown setting modle; did you mean model?"),
        ("data: 7", "data is int, expected a mapping"),
        ("- 1", "the file is list, expected a mapping"),
        ("train: {lr: fast}", "train.lr"),
        ("train: [", "is not YAML"),
        ("# nothing yet", "bad.yaml is empty; expected settings"),
    ],
)
def test_bad_yaml_is_named_by_full_key(
    text: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    assert expected in one_line(capsys)


def test_flags_win_over_yaml_over_preset_and_print_config_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fusionsam.config.datasets import CATALOG
    from fusionsam.config.load import read_settings
    from fusionsam.config.schema import preset

    file = tmp_path / "own.yaml"
    file.write_text("model: {preset: debug, tokenizer: {dim: 24}, head: {width: 11}}\ndata: {dataset: fmb}\n")
    flags = ["--model.head.width", "13", "--model.encoder.dims=[8,16,16,40]", "--train.lr", "1e-5"]
    assert main(["train", "--config", str(file), *flags, "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    settings = read_settings(file, *flags)
    assert read_settings(printed) == settings
    assert (settings.model.tokenizer.dim, settings.model.head.width, settings.train.lr) == (24, 13, 1e-5)
    assert settings.model.encoder.dims == (8, 16, 16, 40)
    assert settings.model.tokenizer.codebook_size == preset("debug").tokenizer.codebook_size
    row = CATALOG["fmb"]
    assert (tuple(settings.model.classes), tuple(settings.model.palette)) == (row.classes, row.palette)
    assert tuple(settings.model.foreground) == row.foreground
    switched = read_settings(file, "--model.preset", "tiny")  # the flag's preset, the file's keys on top of it
    assert switched.model.tokenizer.codebook_size == preset("tiny").tokenizer.codebook_size
    assert switched.model.tokenizer.dim == 24


def test_class_file_names_the_classes(tmp_path: Path) -> None:
    from fusionsam.config.load import parse_settings
    from fusionsam.config.schema import preset

    file = tmp_path / "own.yaml"
    file.write_text("classes: [sea, boat]\npalette: [[0, 0, 9], [200, 0, 0]]\n")
    flags = ["--data.dataset", "pairs", "--data.class_file", str(file)]
    model = parse_settings("fusionsam train", flags).settings.model
    assert (model.classes, model.palette, model.foreground) == (["sea", "boat"], [(0, 0, 9), (200, 0, 0)], [1])
    # without a preset it is the one that is named, so that --model.start_from tiny fits
    assert model.preset == "tiny"
    assert model.tokenizer == preset("tiny").tokenizer


def test_help_of_train_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--resume" in text
    assert "Moving average of the weights that is evaluated and shipped; 0 = off." in text


def test_interrupt_is_130_and_a_programming_error_is_not_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(error: BaseException) -> int:
        def raising(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(cli, "run", raising)
        return main([])

    assert answer(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "fusionsam: interrupted\n"
    assert answer(InputError("a.png: found\ntwo lines")) == 2
    assert capsys.readouterr().err == "fusionsam: error: a.png: found two lines\n"
    assert answer(PermissionError(13, "Permission denied", "/a/b")) == 2
    said = "fusionsam: error: /a/b: Permission denied; check the path and its permissions\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ValueError, match="a bug"):
        answer(ValueError("a bug"))
    with pytest.raises(OSError, match="no file"):
        answer(OSError("no file in it"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_without_room_is_one_line() -> None:
    for words in (["--help"], ["--version"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "fusionsam", *words]
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == 2
        assert ended.stderr.splitlines() == [
            "fusionsam: error: the output cannot be written (No space left on device); make room for it"
        ]


def test_a_terminated_command_cleans_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Path] = []

    def waiting(argv: list[str]) -> int:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            left.extend(tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return 0

    monkeypatch.setattr(cli, "run", waiting)
    assert main([]) == 143
    assert left
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capsys.readouterr().err == ""


def test_info_counts_a_frozen_encoder_and_lists_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import SamConfig, SamModel, SamVisionConfig

    assert main(["info", "--preset", "vit_h"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    huge = SamVisionConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16,
                           global_attn_indexes=[7, 15, 23, 31], mlp_dim=5120)  # fmt: skip
    with torch.device("meta"):
        vision = SamModel(SamConfig(vision_config=huge.to_dict())).vision_encoder
    assert rows["image_encoder"] == [f"{sum(p.numel() for p in vision.parameters()):,}", "frozen"]
    counts = {name: int(rows[name][0].replace(",", "")) for name in ("tokenizer", "fusion", "picture_head",
              "image_encoder", "prompt_encoder", "mask_decoder", "head", "all")}  # fmt: skip
    assert counts.pop("all") == sum(counts.values())
    assert rows["2"] == ["person", "#404000", "yes"]
    assert rows["0"] == ["unlabeled", "#000000"]


def test_synth_then_check_then_a_mirrored_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "scenes"
    assert main(["synth", "--out", str(root), "--pairs", "5", "--seed", "11", "--size", "67x89"]) == 0
    check = ["data", "check", "--dataset", "mfnet", "--root", str(root), "--json", str(tmp_path / "a" / "report.json")]
    capsys.readouterr()
    assert main(check) == 0
    text = capsys.readouterr().out
    assert "67x89" in text
    assert "no problems found" in text
    first = (root / "train.txt").read_text().split()[0]
    for kind in ("images", "labels"):
        image = np.asarray(Image.open(root / kind / f"{first}.png"))[:, ::-1]
        Image.fromarray(np.ascontiguousarray(image)).save(root / kind / "copied.png")
    with (root / "val.txt").open("a") as file:
        file.write("copied\n")
    assert main(check) == 1
    text = capsys.readouterr().out
    assert "shared between splits: 1" in text
    assert f"train {first} = val copied" in text
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["ok"] is False
    assert report["splits"]["val"]["pairs"] == 2
    assert main([*check[:5], str(tmp_path / "nowhere")]) == 2
