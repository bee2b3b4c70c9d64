"""Data that would teach or show the wrong thing without a word: labels, unread cameras, coloured and inverted heat."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fusionsam.config.datasets import find
from fusionsam.data import palettes
from fusionsam.data.check import check
from fusionsam.data.dataset import PairDataset, read_sample
from fusionsam.data.images import read_heat
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.label_faults import require_teachable
from fusionsam.data.pairing import pair_folders
from fusionsam.data.polarity import DOUBTFUL, white_hot_score
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError

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


@pytest.mark.parametrize(
    ("ids", "said"),
    [([0, 255], "hold 0 and 255 alone.*labels_map: {255: 1}"), ([0], "every labelled pixel is of class 'background'")],
)
def test_labels_that_teach_one_class_are_refused_with_the_mend(ids, said, scene, tmp_path):
    root = _root(tmp_path, scene, ids)
    with pytest.raises(InputError, match=said):
        _refusal(root)
    report = check("pairs", root, ["train"], root / "two.yaml", progress=False)
    assert not report["ok"]
    assert len(report["label_faults"]) == 1
    assert report["absent_classes"] == [{"split": "train", "class": "person"}]


def test_the_mend_of_the_message_works(scene, tmp_path):
    root = _root(tmp_path, scene, [0, 255])
    with (root / "two.yaml").open("a") as file:
        file.write("labels_map: {255: 1}\n")
    _refusal(root)
    (entry,) = entries("pairs", root, "train", root / "two.yaml")
    assert read_sample(entry, find("pairs", root / "two.yaml")).label.unique().tolist() == [0, 1]
    assert check("pairs", root, ["train"], root / "two.yaml", progress=False)["ok"]
    (root / "two.yaml").write_text((root / "two.yaml").read_text().replace("255: 1", "255: 7"))
    with pytest.raises(InputError, match=r"labels_map: found \{255: 7\}"):
        find("pairs", root / "two.yaml")


def test_lossy_labels_are_refused(scene, tmp_path):
    with pytest.raises(InputError, match="lossy"):
        _refusal(_root(tmp_path, scene, [0, 1], suffix="jpg"))


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
    with pytest.raises(InputError, match=r"with \{id\} once"):
        pair_folders(tmp_path, tmp_path, ("rgb", "th"))
    with pytest.raises(InputError, match="no file fits"):
        pair_folders(tmp_path, tmp_path, ("{id}_v", "{id}_t"))


def test_names_of_two_unicode_forms_are_one(scene, tmp_path):
    for folder, name in (("v", "stra\u00dfe-\u00fc"), ("i", "stra\u00dfe-u\u0308")):
        (tmp_path / folder).mkdir()
        Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / folder / f"{name}.png")
    (entry,) = pair_folders(tmp_path / "v", tmp_path / "i").entries
    assert entry.id == "stra\u00dfe-\u00fc"


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
    assert {"coloured infrared", "exchanged cameras"} <= {kind for kind, _ in sample.notices}
    twice = read_sample(Entry("x", visible=tmp_path / "photo.png", infrared=tmp_path / "photo.png"))
    assert "one picture twice" in {kind for kind, _ in twice.notices}


def test_one_camera_turned_by_exif_is_told(scene, tmp_path):
    picture = Image.fromarray(scene.visible.permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "v.jpg", exif=exif)
    Image.fromarray(scene.infrared[0].numpy()).save(tmp_path / "i.png")
    sample = read_sample(Entry("x", visible=tmp_path / "v.jpg", infrared=tmp_path / "i.png"))
    assert [kind for kind, _ in sample.notices if kind == "one camera turned"]
    assert sample.input["visible"]["orientation"] == 3


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
