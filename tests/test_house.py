"""The house rules: what the README shows works, what ships is what it says, files keep their places."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fusionsam.cli.main import COMMANDS, main
from fusionsam.config.schema import preset
from fusionsam.evaluation.run import EvaluateConfig, evaluate
from fusionsam.weights.checkpoint import CARD, WEIGHTS, locate, read_checkpoint, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for page in [*PAGES, ROOT / "Makefile"]:
        text = page.read_text() if page.name == "Makefile" else "\n".join(blocks(page, "sh"))
        for line in text.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\s|/)fusionsam ([a-z-]+)(.*)", line)
            if match:
                found.append((match[1], match[2]))
    return found


def test_readme_python_runs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].fused.shape == (480, 640, 3)
    assert set(np.unique(names["out"].labels)) <= set(range(9))
    assert (tmp_path / "overlay.png").stat().st_size > 1000


@pytest.mark.parametrize(("command", "rest"), shown_commands())
def test_commands_and_flags_in_the_docs_exist(command, rest, capsys):
    assert command in COMMANDS
    flags = re.findall(r"(--[a-z][\w.-]*\w)", rest)
    words = [command, *re.findall(r"^ ([a-z]+)(?= --|$)", rest)]
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    missing = [flag for flag in flags if flag not in text]
    assert not missing


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_import_is_silent_and_light():
    code = "import sys, fusionsam; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_tracked_file_names_a_machine_or_outweighs_the_limit():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.exists():
            continue
        assert path.stat().st_size < 40 * 2**20, name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ".cff", ""}:
            assert not re.search(r"/(?:work|root|home)/", path.read_text(errors="ignore")), name


class TestShippedCheckpoint:
    def test_is_half_precision_below_40_mb_and_tells_its_origin(self):
        assert "tiny" in shipped()
        folder = locate("tiny")
        assert (folder / WEIGHTS).stat().st_size < 40e6
        with safe_open(folder / WEIGHTS, "pt") as file:
            kinds = {str(file.get_tensor(name).dtype) for name in file.keys() if "num_batches" not in name}  # noqa: SIM118
        assert "torch.float32" not in kinds
        card = json.loads((folder / CARD).read_text())
        assert {"command", "commit", "seed", "step", "hours", "val"} <= set(card)
        page = (folder / "README.md").read_text()
        for subject in ("Data", "Split", "Hours", "Seed", "Command", "Limits"):
            assert subject.lower() in page.lower()

    def test_is_what_the_preset_of_its_name_builds(self):
        # so that all of it is taken over by --model.start_from with --model.preset alone
        assert read_checkpoint("tiny")[1] == preset("tiny")

    def test_keeps_its_promise_on_real_pairs(self, data_root):
        root = data_root / "mfnet156"
        if not root.is_dir():
            pytest.skip(f"no real MFNet pairs at {root}")
        report = evaluate(EvaluateConfig("mfnet", root, "val", weights=["tiny"], bootstrap=0)).to_dict()
        assert report["prompts"] == "self"
        assert report["miou"] >= 60
        assert min(report["per_class_iou"][name] for name in ("car", "person", "bike")) > 40
