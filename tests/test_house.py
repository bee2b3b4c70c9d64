"""The house rules: what README and docs show works, what ships is what it says, files keep their places."""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from fusionsam.cli.main import COMMANDS, main
from fusionsam.config.schema import Config, SteeringConfig, preset, to_dict
from fusionsam.evaluation.run import EvaluateConfig, evaluate
from fusionsam.evaluation.tables import results
from fusionsam.weights.checkpoint import CARD, WEIGHTS, locate, read_checkpoint, shipped

ROOT = Path(__file__).parents[1]
LOG = sorted((ROOT / "docs" / "log").glob("*.md"))
"""The diary: its commands are those of older commits."""
DOCS = [page for page in sorted((ROOT / "docs").glob("**/*.md")) if page not in LOG]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", *DOCS]
MAKEFILES = [ROOT / "Makefile", *sorted((ROOT / "experiments").glob("*/Makefile"))]
PYTHON_THAT_RUNS = ["README.md", "first-pair.md"]
"""Pages whose Python runs as it stands; elsewhere it needs files of the reader and is compiled."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shell_of(page: Path) -> list[str]:
    text = page.read_text() if page in MAKEFILES else "\n".join(blocks(page, "sh"))
    return text.replace("\\\n", " ").splitlines()


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for page in [*PAGES, *MAKEFILES]:
        for line in shell_of(page):
            match = re.search(r"(?:^|\s|/)fusionsam ([a-z-]+)(.*)", line.split(" #")[0])
            if match:
                found.append((match[1], match[2]))
    return sorted(set(found))


def shown_scripts() -> list[tuple[str, str]]:
    found = set()
    for page in [*PAGES, *MAKEFILES, ROOT / "experiments" / "README.md"]:
        for line in shell_of(page):
            found |= set(re.findall(r"python ((?:examples|benchmarks|experiments)/\S+\.py)(.*)", line.split(" #")[0]))
    for script in sorted((ROOT / "examples").glob("*.py")):  # what their docstrings show
        lines = ast.get_docstring(ast.parse(script.read_text()))
        found |= set(re.findall(r"python (examples/\S+\.py)(?!`)(.*)", re.sub(r" +#.*", "", lines or "")))
    return sorted(found)


def run_shell(block: str) -> None:
    """What a block of the shell does, in this process: `fusionsam` commands, and texts that go to python or a file."""
    while block.strip():
        if heredoc := re.match(r"\s*(?:python -|cat > (\S+)) <<'(\w+)'\n(.*?)\n\2\n", block, re.DOTALL):
            if heredoc[1]:
                Path(heredoc[1]).write_text(heredoc[3] + "\n")
            else:
                exec(compile(heredoc[3], "<shell>", "exec"), {})
            block = block[heredoc.end() :]
            continue
        line, _, block = block.lstrip().partition("\n")
        name, *words = shlex.split(line, comments=True)
        assert (name, main(words)) == ("fusionsam", 0), line


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder with a copy of the examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestCodeBlocks:
    def test_readme_is_short_and_its_python_runs(self, elsewhere):
        page = ROOT / "README.md"
        assert page.stat().st_size <= 6000
        assert re.search(r"<!-- figures -->\n.*\n<!-- /figures -->", page.read_text(), re.DOTALL)
        (code,) = blocks(page, "python")
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["out"].fused.shape == (480, 640, 3)
        assert set(np.unique(names["out"].labels)) <= set(range(9))
        assert (elsewhere / "overlay.png").stat().st_size > 1000

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_python_json_and_yaml_of_the_docs_hold(self, page, elsewhere):
        for code in blocks(page, "python"):
            compiled = compile(code, name_of(page), "exec")
            if page.name in PYTHON_THAT_RUNS and page.name != "README.md":
                exec(compiled, {})
        for text in blocks(page, "json"):
            json.loads(text)
        for text in blocks(page, "yaml"):
            yaml.safe_load(text)

    def test_the_page_on_alignment_runs_from_end_to_end(self, elsewhere):
        page = ROOT / "docs" / "how-to" / "align.md"
        for block in blocks(page, "sh"):
            if "../shared" not in block:  # pictures that not everybody has
                run_shell(block)
        (code,) = blocks(page, "python")
        names: dict = {}
        exec(compile(code, name_of(page), "exec"), names)
        assert names["result"].fused.shape == (240, 320, 3)
        assert not names["pair"].covered[1].all()
        told = json.loads((elsewhere / "out" / "mine" / "00001D.json").read_text())
        assert told["alignment"]["rig"] == json.loads((elsewhere / "mine" / "rig.json").read_text())["digest"]

    def test_no_block_lacks_its_language_but_listings_of_files(self):
        known = {"sh", "python", "json", "yaml", ""}
        for page in PAGES:
            fences = re.findall(r"(?m)^```(.*)$", page.read_text())
            assert len(fences) % 2 == 0, page
            assert set(fences[::2]) <= known, (page, set(fences[::2]) - known)

    @pytest.mark.parametrize(("command", "rest"), shown_commands())
    def test_commands_and_flags_in_the_docs_exist(self, command, rest, capsys):
        assert command in COMMANDS
        flags = re.findall(r"(--[a-z][\w.-]*\w)", rest)
        words = [command, *re.findall(r"^ ([a-z]+)(?= --|$)", rest)]
        assert main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        missing = [flag for flag in flags if flag not in text]
        assert not missing

    @pytest.mark.parametrize(("script", "rest"), shown_scripts())
    def test_scripts_and_their_flags_exist(self, script, rest, capsys):
        text = (ROOT / script).read_text()
        own = [flag for flag in re.findall(r"(--[a-z][\w-]*)(?=[ =\n]|$)", rest) if "." not in flag]
        unknown = [flag for flag in own if f'"{flag}"' not in text]
        handed = [word for word in rest.split() if word in COMMANDS] if "main(sys.argv[2:])" in text else []
        for command in handed[:1]:  # a script that runs a command with something changed
            assert main([command, "--help"]) == 0
            told = capsys.readouterr().out
            unknown = [flag for flag in unknown if flag not in told]
        assert unknown == []

    def test_make_targets_in_the_docs_exist(self):
        targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
        assert {"setup", "demo", "test", "check", "docs", "bench"} <= targets
        for page in PAGES:
            text = "\n".join([*blocks(page, "sh"), *re.findall(r"`([^`\n]+)`", page.read_text())])
            named = set(re.findall(r"(?m)^make ([a-z-]+)\b(?! *=)", text)) - {"-f"}
            assert named <= targets, (page, named - targets)
            for file in re.findall(r"make -f (\S+)", text):
                assert (ROOT / file).is_file() or "NAME" in file, (page, file)

    def test_ci_calls_recipes_of_the_makefile_on_every_promised_python(self):
        text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
        jobs = yaml.safe_load(text)["jobs"]
        targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
        assert {"check", "test", "docs"} <= set(re.findall(r"run: make ([a-z-]+)", text)) <= targets
        promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
        assert jobs["test"]["strategy"]["matrix"]["python"] == promised

    def test_settings_named_in_the_docs_exist(self):
        def names(values, prefix=""):
            for key, value in values.items():
                yield prefix + key
                if isinstance(value, dict):
                    yield from names(value, f"{prefix}{key}.")

        known = set(names(to_dict(Config())))
        for page in PAGES:
            named = re.findall(r"`(?:--)?((?:model|data|loss|train)\.[a-z_.]*[a-z_])[^`]*`", page.read_text())
            named = [name for name in named if not name.endswith((".py", ".yaml", ".txt", ".safetensors"))]
            assert [name for name in named if name not in known] == [], page

    def test_every_command_has_a_row(self):
        rows = (ROOT / "docs" / "reference" / "commands.md").read_text()
        assert [name for name in COMMANDS if f"| `fusionsam {name}" not in rows] == []

    def test_links_between_pages_lead_somewhere(self):
        for page in [*PAGES, *LOG, locate("tiny") / "README.md", ROOT / "results" / "tables.md"]:
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
                assert (page.parent / target).exists(), f"{name_of(page)} -> {target}"

    @pytest.mark.parametrize("page", [*PAGES, *LOG, locate("tiny") / "README.md"], ids=lambda page: page.name)
    def test_a_row_has_a_cell_for_each_heading(self, page):
        cells = 0
        for line in re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines():
            found = re.sub(r"`[^`]*`", "", line).count("|") if line.startswith("|") else 0
            assert not (cells and found) or found == cells, line
            cells = found

    def test_the_tables_on_clicks_have_the_figures_of_their_reports(self):
        page = (ROOT / "docs" / "how-to" / "clicks.md").read_text()
        gain = "{:+.1f} ({:+.1f} to {:+.1f})".format
        steered = json.loads((ROOT / "results" / "steering" / "steering.json").read_text())["groups"]
        for name, row in zip(("all", "below 80 before", "day", "night"), steered.values(), strict=False):
            cells = [str(row["objects"]), *(f"{row[f'iou{clicks}']:.1f}" for clicks in (0, 1, 3, 5))]
            cells += [gain(row[f"gain{clicks}"], *row[f"gain{clicks}_interval"]) for clicks in (1, 3)]
            assert f"| {name} | {' | '.join(cells)} |" in page
        clicked = json.loads((ROOT / "results" / "clicks_fused_82" / "clicks.json").read_text())["groups"]
        for name in ("day", "night"):
            row = clicked[name]["pictures"]["fused"]
            cells = [
                str(clicked[name]["objects"]),
                "{:.2f} ({:.2f} to {:.2f})".format(row["noc80"], *row["noc80_interval"]),
            ]
            cells += [f"{row['not_reached80']:.0f} %", *(f"{row[f'iou{clicks}']:.1f}" for clicks in (1, 3, 5))]
            assert f"| {name} | {' | '.join(cells)} |" in page


class TestExamples:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """Runs a script of `examples` with its arguments; what it prints."""

        def call(script, *words):
            monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
            return capsys.readouterr().out

        return call

    def test_predict_writes_two_pictures_of_each_pair(self, elsewhere, run):
        run("predict.py", "examples/pairs/visible", "examples/pairs/infrared")
        written = {path.name for path in (elsewhere / "out" / "predicted").iterdir()}
        assert written == {f"{pair}_{kind}.png" for pair in ("day", "night") for kind in ("fused", "overlay")}

    def test_fine_tune_scores_what_it_trained(self, tmp_path, run):
        told = run("fine_tune.py", "--rehearse", "--steps", "2", "--out", tmp_path / "run")
        assert re.search(r"on mfnet/val: mIoU [\d.]+ \(present\)", told.splitlines()[-1])
        assert (tmp_path / "run" / "final" / WEIGHTS).is_file()

    @pytest.mark.slow  # three minutes, most of them torch.onnx's; test_export.py has the same files
    def test_onnx_without_torch_gives_the_labels_of_python(self, elsewhere, make_debug, run):
        pytest.importorskip("onnxruntime")
        from fusionsam.export.onnx import write
        from fusionsam.inference.predictor import FusionSAM

        network = make_debug()
        write(network, elsewhere / "onnx")
        pair = [elsewhere / "examples/pairs" / kind / "night.png" for kind in ("visible", "infrared")]
        small = [elsewhere / f"{number}.png" for number in range(2)]
        for source, target in zip(pair, small, strict=True):
            Image.open(source).resize((160, 128)).save(target)
        text = (ROOT / "examples" / "onnx_without_torch.py").read_text()
        assert not re.search(r"^(import|from) (torch|fusionsam)", text, re.MULTILINE)
        images = ["--visible", small[0], "--infrared", small[1]]
        run("onnx_without_torch.py", "--model", "onnx/fusionsam.onnx", *images, "--out", "out")
        ours = FusionSAM(network, "debug", {}).predict(*small).labels
        theirs = np.asarray(Image.open(elsewhere / "out" / "labels.png"))
        assert np.mean(ours == theirs) > 0.999

    def test_notebook_runs(self, elsewhere, monkeypatch):
        if not (importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel")):
            pytest.skip("needs nbclient and ipykernel (pip install '.[dev]')")
        import nbformat
        from nbclient import NotebookClient

        monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
        notebook = nbformat.read(elsewhere / "examples" / "quickstart.ipynb", as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), "keep outputs out of git"
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
        shown = [kind for cell in notebook.cells for o in cell.get("outputs", []) for kind in o.get("data", {})]
        assert shown.count("image/png") == 4


def test_tables_are_what_the_command_makes_of_the_reports():
    made = results.listing(ROOT / "results")
    assert (ROOT / "results" / "tables.md").read_text() == made, "run `make tables`"


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
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".mk", ".cff", ""}:
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
        # so that all of it is taken over by --model.start_from with --model.preset alone, but steering, which is not
        assert replace(read_checkpoint("tiny")[1], steering=SteeringConfig()) == preset("tiny")

    def test_keeps_its_promise_on_real_pairs(self, data_root):
        root = data_root / "mfnet417"
        if not root.is_dir():
            pytest.skip(f"no real MFNet pairs at {root}")
        report = evaluate(EvaluateConfig("mfnet", root, "val26", weights=["tiny"], bootstrap=0)).to_dict()
        assert report["prompts"] == "self"
        assert report["miou"] >= 60
        assert min(report["per_class_iou"][name] for name in ("car", "person", "bike")) > 40


def test_the_public_names_are_these_and_each_is_documented():
    """Removing or renaming a public name breaks somebody's code: this list changes with a line in CHANGELOG.md."""
    import fusionsam

    names = [
        "Config", "FusionSAM", "InputError", "ModelConfig", "Prediction", "Prompts", "Report", "Rig", "Session",
        "__version__", "evaluate", "load_config", "preset", "train",
    ]  # fmt: skip
    assert sorted(fusionsam.__all__) == sorted(names)
    assert set(names) <= set(dir(fusionsam))
    for name in set(names) - {"__version__"}:
        assert getattr(fusionsam, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Tensor'"):
        fusionsam.Tensor  # noqa: B018
