"""Data that would teach or show the wrong thing without a word: labels, unread cameras, coloured and inverted heat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fusionsam.cli import train as train_command
from fusionsam.cli.main import run as run_command
from fusionsam.cli.options import parse as parse_options
from fusionsam.config.datasets import find
from fusionsam.data import palettes
from fusionsam.data.check import check
from fusionsam.data.dataset import PairDataset, read_sample
from fusionsam.data.fingerprints import of_training
from fusionsam.data.images import read_heat
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.label_faults import require_teachable
from fusionsam.data.manifests import read_manifest
from fusionsam.data.pairing import pair_folders
from fusionsam.data.polarity import DOUBTFUL, white_hot_score
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.evaluation.options import EvaluateConfig
from fusionsam.evaluation.run import open_labelled

H, W = 97, 131


@pytest.fixture(scope="module")
def scene():
    return draw_scene(5, 1, (H, W))


def _root(tmp_path, scene, ids, camera="infrared", suffix="png"):
    """One training pair whose label holds `ids` in stripes."""
    label = np.resize(np.repeat(np.array(ids, np.uint8), 7), (H, W)).astype(np.uint8)
    for part, array in (
        ("rgb", scene.visible.permute(1, 2, 0).numpy()), (camera, scene.infrared[0].numpy()), ("labels", label),
    ):  # fmt: skip
        folder = tmp_path / "train" / part
        folder.mkdir(parents=True)
        ending = suffix if part == "labels" else "png"
        Image.fromarray(array).save(folder / f"a.{ending}")
    (tmp_path / "two.yaml").write_text("classes: [background, person]\npalette: [[0,0,0],[220,20,60]]\n")
    return tmp_path


def _refusal(root):
    row = find("pairs", root / "two.yaml")
    require_teachable(PairDataset(entries("pairs", root, "train", root / "two.yaml"), row), row, root)


def test_what_was_guessed_of_training_files_is_said(scene, tmp_path, capsys):
    root = _root(tmp_path, scene, [0, 1])
    path = root / "train" / "infrared" / "a.png"
    Image.fromarray(palettes.table("rainbow")[np.asarray(Image.open(path))]).save(path)
    where = ["--dataset", "pairs", "--root", str(root), "--class-file", str(root / "two.yaml")]
    assert run_command(["data", "check", *where, "--splits", "train"]) == 0
    told = capsys.readouterr().out
    assert "what was guessed of the files, or is odd about them (a note): " in told
    assert "red was taken for hot, by the look of the scene" in told
    of_training(PairDataset(entries("pairs", root, "train", root / "two.yaml"), find("pairs", root / "two.yaml")))
    assert capsys.readouterr().err.startswith("a: ")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([0, 255], "hold 0 and 255 alone.*--labels-map 255:1"),
        ([0], "every labelled pixel is of class 'background'.*--labels-map ID:1"),
    ],
)
def test_labels_that_teach_one_class_are_refused_with_the_mend(ids, said, scene, tmp_path):
    root = _root(tmp_path, scene, ids)
    with pytest.raises(InputError, match=said):
        _refusal(root)
    report = check("pairs", root, ["train"], root / "two.yaml", progress=False)
    assert not report["ok"]
    assert len(report["label_faults"]) == 1
    assert report["absent_classes"] == []  # the fault says it


@pytest.mark.parametrize(
    ("ids", "classes", "said"),
    [
        ([1, 2], "a b c", "no pixel has id 0 .class 'a'.*count from 1, give --labels-map 1:0 2:1 3:2,"),
        ([1, 2, 3], "a b c", r"label ids \[3\] are outside of 0..2.*from 1, give --labels-map 1:0 2:1 3:2; else give "
         "--ignore 3"),
        ([0, 1, 9], "a b c", r"label ids \[9\].*; give --ignore 9 or --labels-map 9:CLASS"),
        ([0, 1], "a b c d", "classes 'c', 'd' without a pixel in the training split.*--labels-map ID:2, take it out"),
    ],
)  # fmt: skip
def test_ids_that_are_not_the_classes_stop_train_and_are_found_by_check(ids, classes, said, scene, tmp_path):
    root = _root(tmp_path, scene, ids)
    names = classes.split()
    palette = [[index, 0, 0] for index in range(len(names))]
    (root / "two.yaml").write_text(f"classes: [{', '.join(names)}]\npalette: {palette}\n")
    with pytest.raises(InputError, match=said) as refused:
        _refusal(root)
    assert "\n" not in str(refused.value)
    report = check("pairs", root, ["train"], root / "two.yaml", progress=False)
    assert not report["ok"]
    assert len(report["label_faults"]) + len(report["bad_labels"]) == 1


@pytest.mark.parametrize(
    ("ids", "flags", "found"),
    [
        ([0, 255], ["--labels-map", "255:1"], [0, 1]),
        ([1, 2], ["--labels-map", "1:0", "2:1"], [0, 1]),
        ([0, 1, 9, 77], ["--ignore", "9", "77"], [0, 1, 255]),
        ([0, 9, 7], ["--ignore", "9", "--labels-map", "7:1"], [0, 1, 255]),
    ],
)
def test_the_flags_of_the_messages_mend_the_labels_of_train_check_and_evaluate(ids, flags, found, scene, tmp_path):
    root = _root(tmp_path, scene, ids)
    files = ["--data.dataset=pairs", f"--data.root={root}", f"--data.class_file={root / 'two.yaml'}"]
    data = train_command.parse("train", [*files, *flags]).settings.data
    mapped = find("pairs", root / "two.yaml").with_labels_map(data.labels_map)
    (entry,) = entries("pairs", root, "train", root / "two.yaml")
    assert read_sample(entry, mapped).label.unique().tolist() == found
    require_teachable(PairDataset([entry], mapped), mapped, root)
    extra = replace(entry, extra=True)  # its label map is a prediction, in the classes' own ids
    if ids == [0, 255]:
        assert read_sample(extra, mapped).label.unique().tolist() == [0, 255]
    where = ["--dataset", "pairs", "--root", str(root), "--class-file", str(root / "two.yaml")]
    assert run_command(["data", "check", *where, "--splits", "train", *flags]) == 0
    assert run_command(["data", "check", *where, "--splits", "train"]) == 1
    typed = parse_options(EvaluateConfig, "evaluate", [*where, "--split", "train", "--weights", "tiny", *flags])
    assert open_labelled(typed)[0].label.unique().tolist() == found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--labels-map", "255"], "--labels-map 255: expected FROM:TO"),
        (["--labels-map", "255:1", "--ignore", "255"], "id 255 is given twice"),
        (["--labels-map", "a:1"], "--labels-map a:1: expected FROM:TO"),
        (["--ignore", "x"], "--ignore: invalid int value: 'x'"),
        (["--labels-map"], "--labels-map: expected at least one argument"),
    ],
)
def test_a_map_that_is_none_is_one_line(flags, said):
    with pytest.raises(InputError, match=said):
        train_command.parse("train", flags)


def test_a_map_to_no_class_is_one_line_and_an_absent_class_can_be_allowed(scene, tmp_path):
    root = _root(tmp_path, scene, [0, 1])
    row = find("pairs", root / "two.yaml")
    with pytest.raises(InputError, match="--labels-map: 9:2: there is no class 2; expected a class id, 0 to 1"):
        row.with_labels_map({9: 2})
    more = replace(row, classes=("a", "b", "c"))
    data = PairDataset(entries("pairs", root, "train", root / "two.yaml"), more)
    with pytest.raises(InputError, match=r"--data\.absent_classes true"):
        require_teachable(data, more, root)
    require_teachable(data, more, root, absent_classes=True)


def test_the_mend_of_the_message_works(scene, tmp_path):
    root = _root(tmp_path, scene, [0, 255])
    with (root / "two.yaml").open("a") as file:
        file.write("labels_map: {255: 1}\n")
    _refusal(root)
    (entry,) = entries("pairs", root, "train", root / "two.yaml")
    assert read_sample(entry, find("pairs", root / "two.yaml")).label.unique().tolist() == [0, 1]
    assert check("pairs", root, ["train"], root / "two.yaml", progress=False)["ok"]
    (root / "two.yaml").write_text((root / "two.yaml").read_text().replace("255: 1", "255: 7"))
    with pytest.raises(InputError, match=r"two.yaml: labels_map: 255:7: there is no class 7"):
        find("pairs", root / "two.yaml")


def test_lossy_labels_are_refused(scene, tmp_path):
    root = _root(tmp_path, scene, [0, 1], suffix="jpg")
    with pytest.raises(InputError, match=r"lossy form .1 such files.*save labels as PNG .no --labels-map"):
        _refusal(root)
    assert not check("pairs", root, ["train"], root / "two.yaml", progress=False)["ok"]
    with pytest.raises(InputError, match="lossy form"):
        open_labelled(EvaluateConfig("pairs", root, "train", class_file=root / "two.yaml", weights=["tiny"]))


@pytest.mark.parametrize("camera", ["lwir", "TIR", "thermal", "ir", "T"])
def test_usual_names_of_the_infrared_folder_are_read(camera, scene, tmp_path):
    (entry,) = entries("pairs", _root(tmp_path, scene, [0, 1], camera), "train")
    assert entry.infrared is not None


def test_a_camera_in_a_folder_of_another_name_is_told(scene, tmp_path):
    root = _root(tmp_path, scene, [0, 1], "camera2")
    with pytest.raises(InputError, match=r"camera2: 1 pictures are not read.*call it infrared"):
        _refusal(root)
    assert not check("pairs", root, ["train"], root / "two.yaml", progress=False)["ok"]


def test_patterns_pair_files_also_of_one_folder_and_nothing_is_left_out_in_silence(scene, tmp_path):
    heat = scene.infrared[0].numpy()
    for name in ("01_rgb.png", "01_th.png", "02_rgb.png", "notes.txt", "film.mp4"):
        (tmp_path / name).write_text("") if name[-3:] in ("txt", "mp4") else Image.fromarray(heat).save(tmp_path / name)
    found = pair_folders(tmp_path, tmp_path, ("{id}_rgb", "{id}_th.png"))
    assert [(e.id, e.visible.name, e.infrared.name) for e in found.entries] == [("01", "01_rgb.png", "01_th.png")]
    assert list(found.alone) == ["02"]
    assert found.aside == [f"{tmp_path}: left aside, no pictures: 1 .mp4, 1 .txt"] or "1 .txt, 1 .mp4" in found.aside[0]
    Image.fromarray(heat).save(tmp_path / "03_RGB.png")
    aside = pair_folders(tmp_path, tmp_path, ("{id}_rgb", "{id}_th")).aside
    assert aside[1:] == [f"{tmp_path}: left aside, of no pattern of --match: 1 files, the first 03_RGB.png"]
    with pytest.raises(InputError, match=r"with \{id\} once"):
        pair_folders(tmp_path, tmp_path, ("rgb", "th"))
    with pytest.raises(InputError, match="no file fits"):
        pair_folders(tmp_path, tmp_path, ("{id}_v", "{id}_t"))


def test_patterns_of_one_folder_divide_its_files(scene, tmp_path):
    for name in ("a.png", "a.jpg", "a_th.png", "b.png", "b.jpg", "b_th.png"):
        Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    for match, names in (
        (("{id}.jpg", "{id}_th"), ["a.jpg", "a_th.png", "b.jpg", "b_th.png"]),
        (("{id}.png", "{id}_th"), ["a.png", "a_th.png", "b.png", "b_th.png"]),
        (("{id}.jpg", "{id}.PNG"), ["a.jpg", "a.png", "b.jpg", "b.png"]),
    ):
        found = pair_folders(tmp_path, tmp_path / "link", match).entries
        assert [path.name for entry in found for path in (entry.visible, entry.infrared)] == names
    with pytest.raises(InputError, match=r"are both the visible file of 'a'; put the ending into the pattern"):
        pair_folders(tmp_path, tmp_path, ("{id}", "{id}_th"))


def test_names_of_two_unicode_forms_are_one(scene, tmp_path):
    for folder, name in (("v", "stra\u00dfe-\u00fc"), ("i", "stra\u00dfe-u\u0308")):
        (tmp_path / folder).mkdir()
        Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / folder / f"{name}.png")
    (entry,) = pair_folders(tmp_path / "v", tmp_path / "i").entries
    assert entry.id == "stra\u00dfe-\u00fc"
    table = tmp_path / "m.csv"
    for header, row in (("visible", "v/stra\u00dfe-\u00fc.png"), ("id,infrared", "u\u0308,i/stra\u00dfe-u\u0308.png")):
        table.write_text(f"{header}\n{row}\n")
        (read,), (listed,) = entries("manifest", table, "all"), read_manifest(str(table), ())
        assert read.id == listed.id == ("\u00fc" if "id" in header.split(",") else "stra\u00dfe-\u00fc")


# -- colours and polarity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in palettes.KNOWN if name not in palettes.EITHER_WAY])
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_every_palette_is_known_and_turned_back_into_heat(name, form, scene, tmp_path):
    heat = scene.infrared[0].numpy()
    Image.fromarray(palettes.table(name)[heat]).save(tmp_path / f"x.{form}", quality=92)
    read = read_heat(tmp_path / f"x.{form}")
    assert read.facts["palette"]["how"] == "found"
    assert np.corrcoef(read.pixels.ravel(), heat.ravel())[0, 1] > (0.99 if form == "png" else 0.93)
    assert np.abs(read.pixels.astype(int) - heat).mean() < (1 if form == "png" else 8)
    assert read.notices[0].kind == "palette"
    grey = read_heat(tmp_path / f"x.{form}", InfraredOptions(palette="none")).pixels
    np.testing.assert_allclose(grey, np.asarray(Image.open(tmp_path / f"x.{form}").convert("L")), atol=1)


@pytest.mark.parametrize("name", ["inferno", "magma", "plasma", "viridis", "turbo", "coolwarm", "hot"])
def test_tables_are_those_of_matplotlib(name):
    colormaps = pytest.importorskip("matplotlib").colormaps
    public = colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255
    assert np.abs(palettes.table(name) - public).max() < 9
    assert np.abs(palettes.table(name) - public).mean() < 2


def test_rainbows_take_the_direction_of_the_scene_and_say_so(tmp_path):
    heat = np.asarray(draw_scene(5, 1, (H, W)).infrared[0].numpy())
    heat = heat if white_hot_score(heat) > 0 else 255 - heat
    for way, values in (("white", heat), ("black", 255 - heat)):
        Image.fromarray(palettes.table("rainbow")[values]).save(tmp_path / "x.png")
        read = read_heat(tmp_path / "x.png")
        assert read.facts["polarity"]["hot"] == way
        assert np.corrcoef(read.pixels.ravel(), heat.ravel())[0, 1] > 0.97
        assert "direction of a rainbow" in [notice.kind for notice in read.notices]


def test_a_photograph_given_as_infrared_is_told(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(colours).resize((W, H), Image.Resampling.BICUBIC))
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    sample = read_sample(Entry("x", visible=tmp_path / "grey.png", infrared=tmp_path / "photo.png"))
    assert {"coloured infrared", "exchanged cameras"} <= {kind for kind, *_ in sample.notices}
    twice = read_sample(Entry("x", visible=tmp_path / "photo.png", infrared=tmp_path / "photo.png"))
    assert "one picture twice" in {kind for kind, *_ in twice.notices}


def test_one_camera_turned_by_exif_is_told(scene, tmp_path):
    picture = Image.fromarray(scene.visible.permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "v.jpg", exif=exif)
    Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / "i.png")
    sample = read_sample(Entry("x", visible=tmp_path / "v.jpg", infrared=tmp_path / "i.png"))
    assert [kind for kind, *_ in sample.notices if kind == "one camera turned"]
    assert sample.input["visible"]["orientation"] == 3


def test_sizes_that_differ_are_told_with_the_turn_that_made_them_differ(scene, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene.visible.permute(1, 2, 0).numpy()).save(tmp_path / "v.jpg", exif=exif)
    Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / "i.png")
    with pytest.raises(InputError, match=rf"v\.jpg is {W}x{H} after its orientation 6, .*i\.png is {H}x{W} .*--align"):
        read_sample(Entry("x", visible=tmp_path / "v.jpg", infrared=tmp_path / "i.png"))


def test_polarity_is_obeyed_and_its_score_changes_sign(scene, tmp_path):
    heat = scene.infrared[0].numpy()
    assert white_hot_score(heat) == pytest.approx(-white_hot_score(255 - heat), abs=0.2)
    Image.fromarray(255 - heat).save(tmp_path / "x.png")
    read = read_heat(tmp_path / "x.png", InfraredOptions(polarity="black"))
    np.testing.assert_array_equal(read.pixels, heat)
    assert read.facts["polarity"] == {"hot": "black", "how": "given"}
    plain = read_heat(tmp_path / "x.png")
    told = "polarity" in [notice.kind for notice in plain.notices]
    assert told == (white_hot_score(255 - heat) < DOUBTFUL)
    with pytest.raises(InputError, match="expected white, black or auto"):
        InfraredOptions(polarity="grey")
