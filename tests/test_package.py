"""The wheel and the sdist, as somebody gets them who has no copy of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*words: object, **change: str) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env={**os.environ, **change})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) that `make dist` would write, by the build backend of this environment where the index is away."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow  # builds twice, and installs
class TestDistribution:
    def test_index_would_take_both(self, built):
        pytest.importorskip("twine")
        assert run(sys.executable, "-m", "twine", "check", "--strict", *built).count("PASSED") == 2

    def test_wheel_holds_every_file_of_the_package_and_no_other(self, built):
        wheel, sdist = built
        tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True)
        if tracked.returncode:
            pytest.skip("not a git checkout")
        ours = {line.removeprefix("src/") for line in tracked.stdout.splitlines()}
        held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert ours == held
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "tests/test_package.py"} <= names
        assert not {name for name in names if name.startswith(("out/", "runs/", "dist/"))}

    def test_console_script_predicts_from_an_empty_environment(self, built, tmp_path):
        """As `pipx run` and `uvx` do it: an own environment, the wheel, the command. The dependencies, gigabytes,
        are lent by this environment, the package itself is not."""
        run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
        python = tmp_path / "venv" / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", built[0])
        script = python.with_name("fusionsam")
        assert "predict" in run(script, "--help", PYTHONPATH="")  # before any dependency is there
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "zz_lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        where = run(python, "-c", "import fusionsam; print(fusionsam.__file__)", PYTHONPATH="")
        assert where.startswith(str(site))
        for kind in ("visible", "infrared"):
            Image.open(ROOT / "examples" / "pairs" / kind / "night.png").resize((160, 128)).save(
                tmp_path / f"{kind}.png"
            )
        images = ["--visible", tmp_path / "visible.png", "--infrared", tmp_path / "infrared.png"]
        run(script, "predict", *images, "--out", tmp_path / "out", PYTHONPATH="")
        assert (tmp_path / "out" / "visible_labels.png").is_file()
