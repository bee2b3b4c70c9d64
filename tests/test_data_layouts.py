"""The trees of folders that public data sets have, drawn here in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionsam.cli.main import main
from fusionsam.data.check import check
from fusionsam.data.pairing import pair_folders
from fusionsam.data.splits import entries, layout_line, tell_layout
from fusionsam.errors import InputError
from fusionsam.inference.selection import every_pair

TREES = {
    "LLVIP's": ["visible/train/010001.jpg", "infrared/train/010001.jpg", "visible/test/190001.jpg",
                "infrared/test/190001.jpg"],
    "KAIST's": ["set00/V000/visible/I00000.jpg", "set00/V000/lwir/I00000.jpg", "set00/V001/visible/I00000.jpg",
                "set00/V001/lwir/I00000.jpg"],
    "FLIR ADAS 2's": ["video_rgb_test/data/video-A-frame-000001-x.jpg", "video_thermal_test/data/video-B-frame-2.jpg"],
    "FLIR ADAS 1's": ["train/RGB/FLIR_00001.jpg", "train/thermal_8_bit/FLIR_00001.jpeg",
                      "train/thermal_16_bit/FLIR_00001.tiff", "train/Annotated_thermal_8_bit/FLIR_00001.jpeg"],
    "M3FD's": ["Vis/00001.png", "Ir/00001.png"],
}  # fmt: skip
IDS = {
    "LLVIP's": {"train": ["010001"], "test": ["190001"], "all": ["010001", "190001"]},
    "KAIST's": {"all": ["set00__V000__I00000", "set00__V001__I00000"]},
    "FLIR ADAS 2's": {"test": ["video-B-frame-2"]},
    "FLIR ADAS 1's": {"train": ["FLIR_00001"]},
    "M3FD's": {"all": ["00001"]},
}


def draw(root: Path, files: list[str]) -> Path:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 80), 10 * number, np.uint8)).save(root / file)
    if any("video_rgb" in file for file in files):
        names = {"video-A-frame-000001-x.jpg": "video-B-frame-2.jpg"}
        (root / "rgb_to_thermal_vid_map.json").write_text(json.dumps(names))
    return root


@pytest.mark.parametrize("name", TREES)
def test_every_split_has_its_pairs_and_none_of_another_camera(name, tmp_path):
    root = draw(tmp_path, TREES[name])
    for split, ids in IDS[name].items():
        found = entries("pairs", root, split)
        assert [entry.id for entry in found] == ids
        for entry in found:
            assert None not in (entry.visible, entry.infrared)
            paths = [str(path.relative_to(root)) for path in (entry.visible, entry.infrared)]
            assert set(paths) <= set(TREES[name])
            assert "16" not in paths[1]
            assert "Annotated" not in paths[1]
            assert ("rgb" in paths[0].lower()) or paths[0].lower().count("vis")


@pytest.mark.parametrize("name", ["LLVIP's", "KAIST's", "FLIR ADAS 2's"])
def test_what_was_recognised_is_said(name, tmp_path):
    root = draw(tmp_path, TREES[name])
    assert layout_line("pairs", root).startswith(f"{root}: read as {name} layout, ")
    (root / "stray").mkdir()
    Image.new("L", (70, 80)).save(root / "stray" / "x.png")
    assert "left aside: 1 pictures (1 in stray)" in layout_line("pairs", root).replace(f"{root}/", "")


def test_pictures_in_folders_beside_pictures_are_told_of(tmp_path, capsys):
    flat = ["visible/a.png", "infrared/a.png"]
    root = draw(tmp_path, [*flat, "visible/night/b.png", "visible/night/late/c.png", "infrared/night/b.png"])
    assert [entry.id for entry in entries("pairs", root, "all")] == ["a"]
    tell_layout("pairs", root)
    told = capsys.readouterr().err
    assert f"{root / 'visible'}: 2 pictures in folders of it are not read, because others lie directly in it" in told
    assert f"{root / 'infrared'}: 1 pictures in folders of it are not read" in told
    report = check("pairs", root)
    assert [each["problem"] for each in report["unread"]] == [False, False]
    assert report["ok"]
    capsys.readouterr()
    tell_layout("pairs", draw(tmp_path / "plain", flat))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", TREES)
def test_predict_takes_the_root_for_both_cameras(name, tmp_path):
    root = draw(tmp_path, TREES[name])
    found = pair_folders(root, root)
    assert {entry.id for entry in found.entries} == {id for ids in IDS[name].values() for id in ids}
    assert len(found.aside) == 1
    assert f"read as {name} layout" in found.aside[0]
    if name == "FLIR ADAS 1's":
        assert "left aside: 2 pictures" in found.aside[0]


def test_two_trees_of_other_names_are_paired_by_the_paths_below_them(tmp_path):
    draw(tmp_path, ["cam0/a/1.png", "cam1/a/1.png", "cam0/b/1.png", "cam1/b/1.png", "cam0/c/2.png"])
    found = pair_folders(tmp_path / "cam0", tmp_path / "cam1")
    assert [entry.id for entry in found.entries] == ["a__1", "b__1"]
    assert list(found.alone) == ["c__2"]
    (only,) = pair_folders(draw(tmp_path / "one", ["visible/train/x.png", "infrared/train/x.png"]), None).entries
    assert (only.visible.parent.parent.name, only.infrared) == ("visible", None)


def test_paths_and_names_that_make_one_id_are_refused(tmp_path):
    root = draw(tmp_path, [f"{camera}/{name}.png" for camera in ("vi", "ir") for name in ("d/a/x", "d/b/x", "d/a__x")])
    said = "d/a__x and d/a/x would both be named 'd__a__x' in the results; rename one of them"
    with pytest.raises(InputError, match=said):
        pair_folders(root, root)
    with pytest.raises(InputError, match=said):
        entries("pairs", root, "all")
    (root / "vi/d/b/x.png").rename(root / "vi/d/b/\udcff.png")
    with pytest.raises(InputError, match=r"the file name 'vi/d/b/.udcff\.png' is not UTF-8; rename it"):
        pair_folders(root, root)


def test_a_tree_that_lacks_a_partner_or_has_a_broken_map_is_one_line(tmp_path):
    root = draw(tmp_path / "l", [*TREES["LLVIP's"], "visible/train/010002.jpg"])
    with pytest.raises(InputError, match=r"no infrared file for '010002' \(1 of 2 lack one\)"):
        entries("pairs", root, "train")
    with pytest.raises(InputError, match="available here: all, test, train"):
        entries("pairs", root, "val")
    root = draw(tmp_path / "f", TREES["FLIR ADAS 2's"])
    (root / "rgb_to_thermal_vid_map.json").write_text("[1]")
    with pytest.raises(InputError, match="is no map of names"):
        entries("pairs", root, "test")


def test_check_prints_the_layout(tmp_path, capsys):
    root = draw(tmp_path / "l", TREES["LLVIP's"])
    assert main(["data", "check", "--dataset", "pairs", "--root", str(root)]) in (0, 1)
    told = capsys.readouterr().out
    assert f"{root}: read as LLVIP's layout, 2 pairs (1 of test, 1 of train)" in told
    assert "not read" not in told


def test_a_list_names_pairs_of_a_tree(tmp_path):
    root = draw(tmp_path / "k", TREES["KAIST's"])
    (root / "mine.txt").write_text("set00__V001__I00000\n")
    (entry,) = entries("pairs", root, "mine")
    assert entry.infrared == root / "set00/V001/lwir/I00000.jpg"


def test_trees_of_an_absolute_and_a_relative_path_are_paired(tmp_path, monkeypatch):
    draw(tmp_path / "cam0", ["visible/a.png"])
    draw(tmp_path / "cam1", ["infrared/a.png"])
    monkeypatch.chdir(tmp_path)
    found = pair_folders(Path("cam0"), tmp_path / "cam1")
    assert [(entry.visible, entry.infrared) for entry in found.entries] == [
        (Path("cam0/visible/a.png"), tmp_path / "cam1/infrared/a.png")
    ]


def test_other_commands_find_the_pairs_that_predict_finds(tmp_path, capsys):
    draw(tmp_path, ["visible/train/x.png", "infrared/train/x.png"])
    (only,) = every_pair(tmp_path, tmp_path)
    assert (only.visible, only.infrared) == (tmp_path / "visible/train/x.png", tmp_path / "infrared/train/x.png")
    assert "1 pairs" in capsys.readouterr().err
    draw(tmp_path, ["flat/v/a.png", "flat/v/b.png", "flat/i/a.png"])
    with pytest.raises(InputError, match=r"no infrared file for 'b'.*1 of 2 pairs lack a file.*or remove the rest"):
        every_pair(tmp_path / "flat/v", tmp_path / "flat/i")
    with pytest.raises(InputError, match="no picture was given; give --visible and --infrared"):
        every_pair(None, None)
    with pytest.raises(InputError, match="holds both images"):
        every_pair(tmp_path, None, tmp_path)
