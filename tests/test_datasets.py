"""A data set is one row of the catalogue: nothing else is edited. Classes and colours are judged at every door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fusionsam.cli.main import main
from fusionsam.config.datasets import CATALOG, DatasetRow, find
from fusionsam.config.schema import ModelConfig, preset, to_dict
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.weights.checkpoint import read_checkpoint

CONFIG = Path(__file__).parents[1] / "configs" / "debug.yaml"
ALLEY = DatasetRow(
    name="alley",
    classes=("street", "cart", "walker"),
    palette=((0, 0, 0), (9, 200, 30), (250, 1, 77)),
    foreground=(1, 2),
    layout="split_folders",
    folders={"visible": ("day",), "infrared": ("heat",), "label": ("truth",)},
    splits=("train", "test"),
)


@pytest.fixture
def alley(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set that nobody has heard of: synthetic pairs in folders and with classes of its own."""
    monkeypatch.setitem(CATALOG, "alley", ALLEY)
    drawn, root = tmp_path / "drawn", tmp_path / "alley"
    lists = synthesize(drawn, 6, seed=3, size=(64, 96), progress=False)
    ids = [id for name in ("train", "val", "test") for id in lists[name]]
    for number, id in enumerate(ids):
        split = root / ("test" if number < 2 else "train")
        pair = np.asarray(Image.open(drawn / "images" / f"{id}.png"))
        label = np.asarray(Image.open(drawn / "labels" / f"{id}.png")) % 3
        for folder, array in (("day", pair[..., :3]), ("heat", pair[..., 3]), ("truth", label)):
            (split / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array)).save(split / folder / f"{id}.png")
    return root


def test_a_new_row_is_trained_on_checked_and_scored(
    alley: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dataset", "alley", "--root", str(alley)]
    assert main(["data", "check", *where, "--splits", "train", "test"]) == 0
    assert "% walker" in capsys.readouterr().out
    out = tmp_path / "run"
    data = [f"--data.root={alley}", "--data.dataset=alley", "--data.val_split=test", "--data.crop=[64,64]"]
    steps = ["--train.max_steps=1", "--train.validate_every=1", "--train.accelerator=cpu", f"--train.out={out}"]
    assert main(["train", "--config", str(CONFIG), *data, *steps]) == 0
    trained = read_checkpoint(out / "final")[1]
    assert (tuple(trained.classes), tuple(trained.foreground)) == (ALLEY.classes, ALLEY.foreground)
    scored = ["--split", "test", "--weights", str(out / "final"), "--out", str(tmp_path / "scored"), "--bootstrap", "5"]
    capsys.readouterr()
    assert main(["evaluate", *where, *scored]) == 0
    assert "walker" in capsys.readouterr().out
    for command in (["evaluate", "--help"], ["data", "check", "--help"]):
        assert main(command) == 0
        assert "alley" in capsys.readouterr().out


def test_an_unknown_data_set_lists_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data.dataset", "ally"]) == 2
    assert "dataset 'ally' is not known; choose one of mfnet, msrs" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"model\.palette: must hold 9 colours"):
        ModelConfig(palette=[(0, 0, 256), *ModelConfig().palette[1:]])


IMPOSSIBLE = [
    (["sea", "sea"], [[0, 0, 0], [1, 1, 1]], "classes: 'sea' stands there twice"),
    (["sea", "the\nland"], [[0, 0, 0], [1, 1, 1]], r"classes: 'the\nland'; expected a name on one line"),
    (["sea", " land"], [[0, 0, 0], [1, 1, 1]], "classes: ' land'; expected a name on one line, without blanks"),
    (["sea", "boat"], [[0, 0, 0], [0, 0, 0]], "palette: sea and boat have one colour, [0, 0, 0]"),
    (["sea", "boat"], [[0, 0, 0], [0, 0, 256]], "palette: must hold 2 colours [r, g, b] of 0-255, one a class; found"),
    (["sea", "boat"], [[0, 0, 0], [0, 0, -1]], "palette: must hold 2 colours"),
    (
        [f"c{i}" for i in range(256)],
        [[i, 0, 0] for i in range(256)],
        "classes: 256 of them; expected up to 255, label maps hold one byte a pixel",
    ),
]


@pytest.mark.parametrize(("classes", "palette", "told"), IMPOSSIBLE)
def test_impossible_classes_and_colours_are_refused_at_every_door(
    classes: list[str], palette: list[list[int]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(yaml.safe_dump({"classes": classes, "palette": palette}))
    with pytest.raises(InputError) as caught:
        find("pairs", file)
    assert str(caught.value).startswith(f"{file}: {told}")
    with pytest.raises(InputError) as caught:
        ModelConfig(classes=classes, palette=[tuple(c) for c in palette], foreground=[1])  # type: ignore[misc]
    assert str(caught.value).startswith(f"model.{told}")
    yaml_file = tmp_path / "train.yaml"
    yaml_file.write_text(yaml.safe_dump({"model": {"classes": classes, "palette": palette, "foreground": [1]}}))
    assert main(["train", "--config", str(yaml_file)]) == 2
    assert told in capsys.readouterr().err


def test_255_classes_are_taken() -> None:
    names = [f"c{i}" for i in range(255)]
    config = ModelConfig(classes=names, palette=[(i, 0, 0) for i in range(255)], foreground=[254])
    assert to_dict(config)["classes"] == names
    assert preset("tiny").palette == ModelConfig().palette
