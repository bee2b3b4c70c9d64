"""What `fusionsam predict` may replace, what counts as finished, and what is refused before the first pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from conftest import build_debug
from fusionsam.alignment.rig import Rig
from fusionsam.cli.main import main
from fusionsam.inference import archive, onnx
from fusionsam.inference.batch import FAILURES, SOME_FAILED
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.results import masked
from fusionsam.types import Prompts
from fusionsam.weights.checkpoint import save_checkpoint
from test_data_radiometric import dji_file, flir_counts, flir_file

SIDE = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "small", build_debug(), {"commit": "abc", "step": 7})


@pytest.fixture
def predict(weights, tmp_path, capsys):
    """Calls the command; exit code, and stderr with stdout."""

    def call(*flags):
        code = main(["predict", "--weights", str(weights), "--device", "cpu", *map(str, flags)])
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return call


def picture(path: Path, shape: tuple[int, ...] = (SIDE, SIDE, 3), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def radiometric(path: Path, make=flir_file) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return make(path, flir_counts())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(answer: tuple[int, str], *said: str) -> None:
    code, text = answer
    assert code == 2, text
    assert len([line for line in text.splitlines() if line.startswith("fusionsam: error:")]) == 1
    for part in said:
        assert part in text


# -- temperatures are results --------------------------------------------------------------------------------------


def test_a_temperature_map_replaces_neither_an_input_nor_a_file_of_somebody_elses(predict, tmp_path):
    folder, theirs = tmp_path / "in", tmp_path / "theirs"
    radiometric(folder / "a.jpg")
    picture(folder / "b.png")
    tifffile.imwrite(folder / "a_celsius.tif", np.zeros((SIDE, SIDE), np.float32))
    (folder / "m.csv").write_text("radiometric,visible,infrared,id\na.jpg,,,a\n,b.png,a_celsius.tif,b\n")
    before = contents(folder)
    answer = predict("--manifest", folder / "m.csv", "--out", folder, "--celsius")
    refused(answer, "a_celsius.tif: would be overwritten by a result of that name")
    assert contents(folder) == before
    theirs.mkdir()
    (theirs / "a_celsius.tif").write_bytes(b"somebody's")
    refused(predict("--radiometric", folder / "a.jpg", "--celsius", "--out", theirs), "a_celsius.tif: is there, and no")
    (folder / "m.csv").write_text("radiometric\na.jpg\n")
    refused(predict("--manifest", folder / "m.csv", "--celsius", "--out", theirs), "a_celsius.tif: is there, and no")
    assert contents(theirs) == {"a_celsius.tif": b"somebody's"}


def test_a_temperature_map_is_part_of_what_is_finished_and_goes_with_its_picture(predict, tmp_path):
    out = tmp_path / "o"
    flags = ("--radiometric", radiometric(tmp_path / "r/x.jpg"), "--celsius", "--out", out)
    assert predict(*flags)[0] == 0
    warm = (out / "x_celsius.tif").read_bytes()
    assert "1 of 1 pairs were already done" in predict(*flags)[1]
    (out / "x_celsius.tif").unlink()
    assert predict(*flags)[1].endswith(f"1 pair -> {out}\n")
    assert (out / "x_celsius.tif").read_bytes() == warm
    radiometric(tmp_path / "r/x.jpg", dji_file)  # another picture of that name, without constants
    assert predict(*flags)[0] == 0
    assert json.loads((out / "x.json").read_text())["celsius"] is None
    assert not (out / "x_celsius.tif").exists()
    assert "1 of 1 pairs were already done" in predict(*flags)[1]  # there are no degrees to write


def test_temperatures_are_of_the_labels_that_are_written(predict, tmp_path):
    flags = ("--radiometric", radiometric(tmp_path / "x.jpg"), "--confidence-map")
    assert predict(*flags, "--out", tmp_path / "all")[0] == 0
    middle = np.median(np.asarray(Image.open(tmp_path / "all/x_confidence.png"))) / 255
    (tmp_path / "m.csv").write_text("radiometric\nx.jpg\n")
    for out, given in (("one", flags[:2]), ("table", ("--manifest", tmp_path / "m.csv"))):
        assert predict(*given, "--min-confidence", middle, "--out", tmp_path / out)[0] == 0
        told = json.loads((tmp_path / out / "x.json").read_text())
        assert told["unknown_share"] > 10
        assert told["celsius"]["classes"].keys() == told["classes"].keys()
    one, table = (json.loads((tmp_path / out / "x.json").read_text()) for out in ("one", "table"))
    assert one["celsius"] == table["celsius"]
    whole = json.loads((tmp_path / "all/x.json").read_text())
    assert one["celsius"]["classes"] != whole["celsius"]["classes"]


def test_what_a_person_named_is_never_unknown():
    confidence = np.full((8, 9), 0.5, np.float32)
    named = Prompts(
        points=torch.tensor([[[2.4, 5.0], [4.0, 4.0], [8.6, 7.0]]]),
        point_labels=torch.ones(1, 3, dtype=torch.long),
        point_classes=torch.tensor([[1, -1, 0]]),
    )
    labels = np.ones((8, 9), np.uint8)
    found, told = masked(Prediction(np.zeros((8, 9, 3), np.uint8), labels, confidence, named, ["a", "b"], [], 0.0), 0.9)
    assert np.argwhere(found.labels != 255).tolist() == [[5, 2], [7, 8]]
    assert told["unknown_share"] == pytest.approx(100 * 70 / 72, abs=1e-3)


# -- results of other pictures -------------------------------------------------------------------------------------


def test_results_of_pictures_of_another_camera_are_not_replaced_unless_asked(predict, tmp_path):
    out = tmp_path / "o"
    four = picture(tmp_path / "z1/k.png", (SIDE, SIDE, 4))
    visible, infrared = picture(tmp_path / "z2/k.png", seed=1), picture(tmp_path / "z3/k.png", (SIDE, SIDE), 2)
    assert predict("--rgbt", four, "--out", out)[0] == 0
    before = contents(out)
    for flag, path in (("--visible", visible), ("--infrared", infrared)):
        refused(predict(flag, path, "--out", out), f"k.json: is of {four}, not of {path}; choose another --out, or")
        assert contents(out) == before
    assert predict("--visible", visible, "--out", out, "--overwrite")[0] == 0
    refused(predict("--infrared", infrared, "--out", out), f"is of {visible}, not of {infrared}")
    assert predict("--visible", visible, "--infrared", infrared, "--out", out)[0] == 0  # the same picture, and one more
    first, second = radiometric(tmp_path / "ra/x.jpg"), radiometric(tmp_path / "rb/x.jpg")
    assert predict("--radiometric", first, "--out", out)[0] == 0
    refused(predict("--radiometric", second, "--out", out), f"x.json: is of {first}, not of {second}")


def test_results_of_an_earlier_version_are_known(predict, tmp_path):
    flags = ("--visible", picture(tmp_path / "k.png"), "--out", tmp_path / "o")
    assert predict(*flags)[0] == 0
    told = json.loads((tmp_path / "o/k.json").read_text())
    del told["run"]["radiometric"]
    (tmp_path / "o/k.json").write_text(json.dumps(told))
    assert "1 of 1 pairs were already done" in predict(*flags)[1]
    told["run"] = {key: value for key, value in told["run"].items() if key != "visible"}
    (tmp_path / "o/k.json").write_text(json.dumps(told))  # tells of no picture
    assert predict(*flags)[1].endswith(f"1 pair -> {tmp_path / 'o'}\n")


# -- a table made anew ---------------------------------------------------------------------------------------------


def test_a_table_made_anew_leaves_nothing_of_the_old_one(predict, tmp_path, monkeypatch):
    radiometric(tmp_path / "r.jpg")
    for number, name in enumerate("abc"):
        picture(tmp_path / f"{name}.png", seed=number)
    manifest, out = tmp_path / "m.csv", tmp_path / "o"
    rows = ["radiometric,visible,id", "r.jpg,,r", ",a.png,a", ",b.png,b"]
    manifest.write_text("\n".join(rows))
    flags = ("--manifest", manifest, "--shard", 1, "--out")
    assert predict(*flags, out, "--celsius", "--confidence-map")[0] == 0
    (out / "mine.txt").write_text("kept")
    (out / "other_labels.png").write_text("kept")
    stored = contents(out)
    # b is no longer listed, but its picture is an input of another row
    manifest.write_text("\n".join([*rows[:3], ",o/b_fused.png,d"]))
    with monkeypatch.context() as patch:  # killed between the files and the table
        remove = archive.Folder.remove
        patch.setattr(archive.Folder, "remove", lambda self, name: remove(self, name) if "part" not in name else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(*flags, out, "--overwrite")
    refused(predict(*flags, out), "is there, and no results/_run.json of ours tells of it")
    assert predict(*flags, out, "--overwrite")[0] == 0
    assert predict(*flags, tmp_path / "fresh")[0] == 0
    kept = {name: stored[name] for name in ("mine.txt", "other_labels.png", "b_fused.png")}
    assert contents(out).keys() == contents(tmp_path / "fresh").keys() | kept.keys()
    assert {name: contents(out)[name] for name in kept} == kept


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_link_to_nothing_is_a_pair_that_failed(predict, tmp_path):
    for number in range(3):
        picture(tmp_path / f"v/q{number}.png", seed=number)
    (tmp_path / "v/q1.png").unlink()
    (tmp_path / "v/q1.png").symlink_to("/nope.png")
    flags = ("--visible", tmp_path / "v", "--out", tmp_path / "o")
    for _ in range(2):
        assert predict(*flags)[0] == SOME_FAILED
        assert (tmp_path / "o" / FAILURES).read_text().splitlines()[1:] == [
            f"q1,{tmp_path}/v/q1.png: cannot be read (No such file or directory); check the path"
        ]
        assert sorted(path.name for path in (tmp_path / "o").glob("*.json")) == ["q0.json", "q2.json"]
    refused(predict(*flags, "--stop-on-error"), "q1.png: cannot be read")


def test_a_name_too_long_for_its_results_is_listed_and_the_rest_done(predict, tmp_path):
    long = "n" * 245
    for name in ("a", long):
        picture(tmp_path / f"v/{name}.png")
    flags = ("--visible", tmp_path / "v", "--out", tmp_path / "o")
    assert predict(*flags)[0] == SOME_FAILED
    assert (tmp_path / "o/a.json").is_file()
    (listed,) = (tmp_path / "o" / FAILURES).read_text().splitlines()[1:]
    assert "has 245 bytes, expected at most 240" in listed
    refused(predict("--visible", tmp_path / f"v/{long}.png", "--out", tmp_path / "p"), "has 245 bytes")


def test_the_one_whole_pair_of_a_folder_is_listed_too_where_it_is_damaged(predict, tmp_path):
    picture(tmp_path / "v/a.png")
    picture(tmp_path / "v/lone.png")
    (tmp_path / "i").mkdir()
    (tmp_path / "i/a.png").write_bytes(b"damaged")
    flags = ("--visible", tmp_path / "v", "--infrared", tmp_path / "i", "--out", tmp_path / "o")
    assert predict(*flags)[0] == SOME_FAILED
    listed = (tmp_path / "o" / FAILURES).read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in listed] == ["lone", "a"]


# -- options that are wrong for every pair -------------------------------------------------------------------------


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompts", "bad.json"], "bad.json: not JSON"),
        (["--prompts", "odd.json"], "odd.json: labels of every pair must be one 0 or 1"),
        (["--prompts", "strangers.json"], "strangers.json: holds no prompts for 'p0' or any other pair"),
        (["--prompts", "points.json", "--flip"], "yours are pixels of one view"),
        (["--prompts", "points.json", "--scales", "1", "1.5"], "yours are pixels of one view"),
        (["--prompts", "named.json"], "named.json: names a class; these weights have no steering"),
        (["--prompts", "of_p1.json"], "of_p1.json: names a class; these weights have no steering"),
        (["--scales", "1", "40"], "expected factors above 0 and up to 4"),
        (["--scales", "1", "nan"], "expected factors above 0 and up to 4"),
        (["--align", "maker"], "--align maker: is for radiometric files, and none was given"),
    ],
)
def test_options_that_no_pair_can_be_done_with_are_refused_before_any(
    predict, tmp_path, monkeypatch, table, flags, said
):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        picture(tmp_path / f"v/p{number}.png", seed=number)
    Path("m.csv").write_text("visible\nv/p0.png\nv/p1.png\n")
    named = {"points": [[9, 9]], "classes": ["person"]}
    for name, content in {
        "bad.json": "{",
        "odd.json": json.dumps({"points": [[9, 9]], "labels": [7]}),
        "strangers.json": json.dumps({"x": {"points": [[9, 9]]}}),
        "points.json": json.dumps({"points": [[9, 9]]}),
        "named.json": json.dumps(named),
        "of_p1.json": json.dumps({"p1": named}),
    }.items():
        Path(name).write_text(content)
    given = ("--manifest", "m.csv") if table else ("--visible", "v")
    refused(predict(*given, "--out", "o", *flags), said)
    assert not Path("o").exists()


def test_patterns_of_names_are_of_folders_alone(predict, tmp_path):
    pair = ("--visible", picture(tmp_path / "a_rgb.png"), "--infrared", picture(tmp_path / "a_th.png", (SIDE, SIDE)))
    answer = predict(*pair, "--match", "{id}_rgb", "{id}_th", "--out", tmp_path / "o")
    refused(answer, "--match {id}_rgb {id}_th: is of folders")


def test_an_exported_model_tells_where_it_was_given_the_other_cameras_pixels(weights, predict, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "load", lambda *_: (build_debug(), "debug", {}))  # an export takes minutes
    monkeypatch.setattr(onnx, "files", lambda _: [weights / "config.yaml"])
    matrix = np.array([[1.0, 0, 20], [0, 1, 0], [0, 0, 1]])
    Rig((SIDE, SIDE), (SIDE, SIDE), matrix).write(tmp_path / "rig.json")
    picture(tmp_path / "v/a.png")
    picture(tmp_path / "i/a.png", (SIDE, SIDE))
    (tmp_path / "m.csv").write_text("visible,infrared\nv/a.png,i/a.png\n")
    common = ("--backend", "onnx", "--align", tmp_path / "rig.json", "--no-refine")
    pair = ("--visible", tmp_path / "v", "--infrared", tmp_path / "i")
    for name, given in (("o", pair), ("t", ("--manifest", tmp_path / "m.csv"))):
        code, text = predict(*given, *common, "--out", tmp_path / name)
        assert code == 0
        assert text.count("what a camera does not reach is taken from the other one") == 1
        told = json.loads((tmp_path / name / "a.json").read_text())
        assert told["alignment"]["filled"] is True
        assert told["alignment"]["covered"] < 1
        assert "--backend torch uses the token of a missing camera there" in told["input"]["notices"][-1]
    code, text = predict("--video", *pair, *common, "--out", tmp_path / "film")
    assert (code, "taken from the other one" in text) == (0, True)
    assert json.loads((tmp_path / "film/v_overlay.json").read_text())["filled"] is True
    (tmp_path / "click.json").write_text(json.dumps({"points": [[9, 9]], "classes": ["person"]}))
    refused(predict(*pair, *common, "--prompts", tmp_path / "click.json", "--out", tmp_path / "c"),
            "names a class; exported models take no clicks that name a class")  # fmt: skip


# -- what a result tells of how it was made --------------------------------------------------------------------------


def test_a_rig_that_was_not_used_is_told_of(predict, tmp_path):
    rig = tmp_path / "rig.json"
    rig.write_text(json.dumps(Rig((SIDE, SIDE), (SIDE, SIDE), np.eye(3)).as_dict()))
    one, two = picture(tmp_path / "v.png"), picture(tmp_path / "i.png", (SIDE, SIDE))
    both = ("--visible", one, "--infrared", two)
    for name, given in (("alone", both[:2]), ("heat", both[2:])):
        code, said = predict(*given, "--align", rig, "--out", tmp_path / name)
        assert code == 0, said
        assert "the rig was not used" in said
        (told,) = (json.loads(path.read_text()) for path in (tmp_path / name).glob("*.json"))
        assert told["alignment"] == {"applied": False}
        assert any("the rig was not used" in notice for notice in told["input"]["notices"])
    assert "the rig was not used" not in predict(*both, "--align", rig, "--out", tmp_path / "both")[1]


def test_a_confidence_map_is_a_setting_of_its_own(predict, tmp_path):
    given = ("--visible", picture(tmp_path / "v.png"), "--out", tmp_path / "o", "--prompts", "none", "--confidence-map")
    assert predict(*given)[0] == 0
    run = json.loads((tmp_path / "o" / "v.json").read_text())["run"]
    assert (run["prompts"], run["confidence_map"]) == ("none", True)
