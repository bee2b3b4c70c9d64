"""Each layout is read from a fake tree; shared images are found however they were disguised."""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fusionsam.cli.data import table
from fusionsam.config.datasets import CATALOG, find
from fusionsam.data.check import check
from fusionsam.data.dataset import LabelledPairs, open_labelled_split, open_split, read_sample
from fusionsam.data.fingerprints import fingerprint
from fusionsam.data.images import write_png
from fusionsam.data.leaks import leaks, require_no_leak
from fusionsam.data.splits import Entry, entries, pair_entries
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError

SIZE = (96, 128)


def _write_pair(folder: Path, names: tuple[str, str, str], id: str, index: int) -> None:
    scene = draw_scene(0, index, SIZE)
    write_png(folder / names[0] / f"{id}.png", scene.visible)
    write_png(folder / names[1] / f"{id}.png", scene.infrared.expand(3, -1, -1))
    write_png(folder / names[2] / f"{id}.png", scene.label.to(torch.uint8))


@pytest.fixture
def mfnet(tmp_path) -> Path:
    synthesize(tmp_path / "mfnet", 10, 0, size=SIZE, progress=False)
    return tmp_path / "mfnet"


def test_catalogue_rows_are_consistent():
    for row in CATALOG.values():
        assert len(row.classes) == len(row.palette) == len(set(row.palette))
        assert all(0 < index < len(row.classes) for index in row.foreground)
    with pytest.raises(InputError, match="choose one of mfnet, msrs, fmb"):
        find("kitti")


def test_mfnet_lists_named_lists_and_flips(mfnet):
    (mfnet / "mine.txt").write_text("00001D\n00002N_flip\n\n")
    first, flipped = entries("mfnet", mfnet, "mine")
    assert first.id == "00001D"
    assert flipped.mirrored
    mirrored, plain = read_sample(flipped), read_sample(Entry("00002N", rgbt=flipped.rgbt, label=flipped.label))
    assert torch.equal(mirrored.visible, plain.visible.flip(-1))
    assert torch.equal(mirrored.infrared, plain.infrared.flip(-1))
    assert torch.equal(mirrored.label, plain.label.flip(-1))
    shutil.copy(mfnet / "images/00003D.png", mfnet / "images/00002N_flip.png")  # a file of its own comes first
    shutil.copy(mfnet / "labels/00003D.png", mfnet / "labels/00002N_flip.png")
    assert not entries("mfnet", mfnet, "mine")[1].mirrored


def test_mfnet_errors_name_what_is_missing(mfnet, tmp_path):
    for content, split, said in (
        ("", "empty", "split 'empty' of 'mfnet' is empty"),
        ("99999D\n", "absent", "lists '99999D'"),
        ("00001D\n00001D\n", "twice", "more than once"),
    ):
        (mfnet / f"{split}.txt").write_text(content)
        with pytest.raises(InputError, match=said):
            entries("mfnet", mfnet, split)
    with pytest.raises(InputError, match=r"no such list for split 'nope'.*train"):
        entries("mfnet", mfnet, "nope")
    os.remove(mfnet / "labels/00001D.png")
    with pytest.raises(InputError, match="no label file"):
        entries("mfnet", mfnet, "train")
    with pytest.raises(InputError, match="no such folder"):
        entries("mfnet", tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("fmb", ("Visible", "Infrared", "Label")),
        ("msrs", ("vi", "ir", "Segmentation_labels")),
        ("pst900", ("rgb", "thermal", "labels")),
    ],
)
def test_split_folders_and_the_held_out_validation(dataset, names, tmp_path):
    for index in range(40):
        for name in names:
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name / f"{index:05d}.png").write_bytes(b"x")
    _write_pair(tmp_path / "test", names, "00077", 2)
    train, val, both = (
        [entry.id for entry in entries(dataset, tmp_path, split)] for split in ("train", "val", "trainval")
    )
    assert not set(train) & set(val)
    assert sorted(train + val) == both == [f"{index:05d}" for index in range(40)]
    assert 1 <= len(val) <= 9
    # By the hash of the id alone: other images do not move an image from one side to the other.
    for name in names:
        os.remove(tmp_path / "train" / name / f"{train[0]}.png")
    assert [entry.id for entry in entries(dataset, tmp_path, "val")] == val
    (entry,) = entries(dataset, tmp_path, "test")
    scene = draw_scene(0, 2, SIZE)
    sample = read_sample(entry)
    assert torch.equal(sample.visible, scene.visible)
    assert torch.equal(sample.infrared, scene.infrared)
    assert torch.equal(sample.label, scene.label)


def test_pairs_by_stem_lists_and_missing_partners(tmp_path):
    for index in range(3):
        _write_pair(tmp_path, ("visible", "infrared", "labels"), f"n{index}", index)
    assert [entry.id for entry in entries("pairs", tmp_path, "all")] == ["n0", "n1", "n2"]
    (tmp_path / "mine.txt").write_text("n2\n")
    assert [entry.id for entry in entries("pairs", tmp_path, "mine")] == ["n2"]
    alone = pair_entries(tmp_path / "visible", None)
    assert [entry.infrared for entry in alone] == [None] * 3
    os.remove(tmp_path / "infrared/n1.png")
    with pytest.raises(InputError, match=r"infrared: no infrared file for 'n1' \(1 of 3 lack it\)"):
        entries("pairs", tmp_path, "all")
    with pytest.raises(InputError, match="split 'train'"):
        entries("pairs", tmp_path, "train")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifests(kind, tmp_path):
    _write_pair(tmp_path, ("v", "i", "l"), "one", 0)
    _write_pair(tmp_path, ("v", "i", "l"), "two", 1)
    rows = [
        {"visible": "v/one.png", "infrared": "i/one.png", "label": "l/one.png", "split": "train"},
        {"visible": "v/two.png", "infrared": "i/two.png", "label": "", "split": "val"},
    ]
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    classes = tmp_path / "classes.yaml"
    row = find("mfnet")
    classes.write_text(
        f"classes: {list(row.classes)}\npalette: {[list(c) for c in row.palette]}\nforeground: [car, 2]\n"
    )
    train = open_split("manifest", path, "train", classes)
    assert train.row.foreground == (1, 2)
    assert torch.equal(train[0].label, draw_scene(0, 0, SIZE).label)
    (val,) = entries("manifest", path, "val", classes)
    assert val.label is None
    assert len(entries("manifest", path, "all")) == 2
    with pytest.raises(InputError, match=r"split 'test' is empty; the column split holds train, val"):
        entries("manifest", path, "test")
    os.remove(tmp_path / "v/two.png")
    with pytest.raises(InputError, match=r"visible file .*two.png does not exist"):
        entries("manifest", path, "val")


def test_a_manifest_header_may_hold_spaces(tmp_path):
    _write_pair(tmp_path, ("v", "i", "l"), "one", 0)
    (tmp_path / "m.csv").write_text("visible, infrared, label, split\nv/one.png, i/one.png, l/one.png, test\n")
    (entry,) = entries("manifest", tmp_path / "m.csv", "test")
    assert (entry.infrared, entry.label) == (tmp_path / "i/one.png", tmp_path / "l/one.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_manifests_of_any_spreadsheet_are_read(separator, encoding, tmp_path):
    _write_pair(tmp_path, ("v", "i", "l"), "one", 0)
    rows = [["RGB", "thermal", "Mask", "split"], ["v/one.png", "i/one.png", "l/one.png", "test"]]
    text = "\r\n".join(separator.join(row) for row in rows)
    data = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-bom" else text.encode(encoding)
    (tmp_path / "m.csv").write_bytes(data)
    (entry,) = entries("manifest", tmp_path / "m.csv", "test")
    assert (entry.visible, entry.infrared, entry.label) == tuple(tmp_path / part / "one.png" for part in "vil")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("visible,thermal,ir,split\n", "columns 'thermal' and 'ir' both mean 'infrared'"),
        ("visible,rgb,split\n", "columns 'visible' and 'rgb' both mean 'visible'"),
        ("visible,weather,split\nv/one.png,rain,Train\nv/one.png,sun,train\n", "split is 'Train' in some rows"),
    ],
)
def test_a_manifest_whose_words_would_be_passed_over_is_refused(text, said, tmp_path):
    _write_pair(tmp_path, ("v", "i", "l"), "one", 0)
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        entries("manifest", tmp_path / "m.csv", "train")


@pytest.mark.parametrize("id", ["seq/one", "../one", ".."])
def test_an_id_of_a_manifest_that_is_no_file_name_is_refused(id, tmp_path):
    _write_pair(tmp_path, ("v", "i", "l"), "one", 0)
    (tmp_path / "m.csv").write_text(f"visible,id\nv/one.png,{id}\n")
    with pytest.raises(InputError, match=rf"m\.csv: row 1 of split 'all': id '{id}' is no file name"):
        entries("manifest", tmp_path / "m.csv", "all")


def test_a_table_with_pictures_in_the_place_of_paths_is_refused_in_a_short_line(tmp_path):
    rows = [{"visible": {"bytes": b"\x89PNG" * 5000, "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub.parquet")
    (tmp_path / "long.csv").write_text("visible\n" + "x" * 5000)
    for name, said in (("hub.parquet", "column 'visible' holds struct"), ("long.csv", "does not exist")):
        with pytest.raises(InputError, match=said) as caught:
            entries("manifest", tmp_path / name, "all")
        assert len(str(caught.value)) < 500


def test_a_file_name_that_no_report_can_hold_is_refused_where_it_is_read(tmp_path):
    _write_pair(tmp_path, ("visible", "infrared", "labels"), "n", 0)
    (tmp_path / "visible" / "n.png").rename(tmp_path / "visible" / os.fsdecode(b"f\xfc.png"))
    with pytest.raises(InputError, match=r"visible: the file name 'f.udcfc\.png' is not UTF-8; rename it"):
        entries("pairs", tmp_path, "all")


def test_folders_are_known_in_any_case_and_lists_may_name_files(tmp_path):
    for index in range(2):
        _write_pair(tmp_path, ("RGB", "Thermal", "LABELS"), f"n{index}", index)
    (tmp_path / "mine.txt").write_text("n1.JPG\nn0.tif\n")
    first, second = entries("pairs", tmp_path, "mine")
    assert (first.id, second.id) == ("n1", "n0")
    assert (first.visible.parent.name, first.infrared.parent.name, first.label.parent.name) == (
        "RGB",
        "Thermal",
        "LABELS",
    )


def test_colour_labels_pass_the_leak_guard(tmp_path):
    _write_pair(tmp_path, ("visible", "infrared", "labels"), "n", 0)
    write_png(tmp_path / "labels" / "n.png", np.zeros((*SIZE, 3), np.uint8))
    assert len(fingerprint("all", entries("pairs", tmp_path, "all")).content) == 1


def test_equal_stems_outside_of_the_manifests_folder_get_ids_of_their_own(tmp_path):
    for part in ("a", "b", "c"):
        _write_pair(tmp_path / part, ("v", "i", "l"), "one", 0)
    (tmp_path / "lists").mkdir()
    rows = [tmp_path / "a/v/one.png", tmp_path / "b/i/one.png", "../c/l/one.png"]
    (tmp_path / "lists/m.csv").write_text("\n".join(["visible", *map(str, rows)]))
    found = entries("manifest", tmp_path / "lists/m.csv", "all")
    assert [entry.id for entry in found] == ["one", "i__one", "l__one"]


def test_a_list_may_begin_with_a_byte_order_mark(mfnet):
    (mfnet / "mine.txt").write_bytes(b"\xef\xbb\xbf00001D\r\n00002N\r\n")
    assert [entry.id for entry in entries("mfnet", mfnet, "mine")] == ["00001D", "00002N"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such class file"),
        ("[1, 2", "not readable as YAML"),
        ("klasses: [a]\npalette: [[0, 0, 0]]", "expected the keys classes and palette"),
        ("classes: [a, b]\npalette: [[0, 0, 0]]", "must hold 2 colours .*; found 1"),
        ("classes: [a, b, c]\npalette: [[0, 0, 0], [1, 1, 1], [0, 0, 0]]", "a and c have one colour"),
        ("classes: [a]\npalette: [[0, 0, 256]]", "must hold 1 colours"),
        ("classes: [a, a]\npalette: [[0, 0, 0], [1, 1, 1]]", "each once"),
        ("classes: [a]\npalette: [[0, 0, 0]]\nforeground: [z]", "foreground"),
        ("classes: [a]\npalette: [[0, 0, 0]]\nforeground: [.inf]", "foreground"),
        ("classes: [2020-99-99]\npalette: [[0, 0, 0]]", "not readable as YAML"),
    ],
)
def test_bad_class_files(content, said, tmp_path):
    path = tmp_path / "classes.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        find("pairs", path)
    assert "\n" not in str(caught.value)


def test_bad_pairs_are_refused_and_all_reported_by_check(mfnet):
    label = np.array(Image.open(mfnet / "labels/00001D.png"))
    label[0, :2] = (9, 77)
    write_png(mfnet / "labels/00001D.png", label)
    write_png(mfnet / "labels/00002N.png", label[3:])
    (mfnet / "images/00003D.png").write_bytes(b"")
    data = open_split("mfnet", mfnet, "train")
    with pytest.raises(InputError, match=r"00001D.png: label ids \[9, 77\] are outside of 0..8"):
        data[0]
    with pytest.raises(InputError, match=r"00002N: sizes differ: .*96x128.*93x128"):
        data[1]
    report = check("mfnet", mfnet, ("train", "val"), progress=False)
    assert not report["ok"]
    assert [item["id"] for item in report["bad_labels"]] == ["00001D"]
    assert [item["id"] for item in report["size_mismatches"]] == ["00002N"]
    assert [item["id"] for item in report["unreadable"]] == ["00003D"]
    assert report["splits"]["train"]["pairs"] == 6


def _disguised(kind: str, source: Entry, folder: Path) -> Entry:
    """A copy of a pair under another name, in separate files."""
    sample = read_sample(source)
    images = []
    for array in (sample.visible, sample.infrared):
        pixels = array.numpy()[0] if array.shape[0] == 1 else array.numpy().transpose(1, 2, 0)
        image = Image.fromarray(pixels)
        width, height = image.size
        if "mirrored" in kind:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "border" in kind:
            x, y = round(0.05 * width), round(0.05 * height)
            image = image.crop((x, y, width - x, height - y))
        if "left" in kind:
            image = image.crop((round(0.05 * width), 0, width, height))
        if "half size" in kind:
            image = image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
        images.append(image)
    suffix = "jpg" if "jpeg" in kind else "png"
    paths = [folder / f"{part}.{suffix}" for part in ("visible", "infrared")]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"quality": 60} if suffix == "jpg" else {}))
    return Entry("another name", *paths)


@pytest.mark.parametrize(
    ("kind", "found_as"),
    [
        ("copy", "content"),
        ("mirrored", "mirrored"),
        ("jpeg", "perceptual"),
        ("jpeg mirrored", "perceptual"),
        ("border crop", "perceptual"),
        ("border crop jpeg mirrored", "perceptual"),
        ("left crop", "perceptual"),
        ("half size", "perceptual"),
    ],
)
def test_disguised_copies_are_found(kind, found_as, tmp_path):
    synthesize(tmp_path / "a", 6, 1, size=(240, 320), progress=False)
    everything = [entry for split in ("train", "val", "test") for entry in entries("mfnet", tmp_path / "a", split)]
    train = everything[:4]
    for index in (0, 1):  # a day scene and a night scene
        copy = _disguised(kind, train[index], tmp_path / f"b{index}")
        (found,) = leaks({"train": train, "val": [everything[4], copy]})
        assert (found.kind, found.first_id, found.second_id) == (found_as, train[index].id, "another name")
    with pytest.raises(InputError, match=r"share 1 images: train/00002N = val/another name"):
        require_no_leak({"train": train, "val": [copy]})


def test_one_look_alike_in_a_long_split_is_mentioned_and_a_copied_split_refused(tmp_path, capsys):
    synthesize(tmp_path / "a", 11, 1, size=(240, 320), progress=False)
    everything = [entry for split in ("train", "val", "test") for entry in entries("mfnet", tmp_path / "a", split)]
    train, others = everything[:5], everything[5:]
    copies = [replace(_disguised("border crop", e, tmp_path / e.id), id=f"copy {e.id}") for e in train[:2]]
    require_no_leak({"train": train, "val": [*others, copies[0]]})  # 1 of 7 is below a fifth, and 1 of 5 is not above
    assert "1 look-alikes" in capsys.readouterr().err
    with pytest.raises(InputError, match="share 2 images"):
        require_no_leak({"train": train, "val": [*others, *copies]})  # 2 of 8 is not
    for names in (("test", "train"), ("train", "test")):  # the smaller one is a copy, in whatever order they come
        splits = {"test": copies[:1], "train": [*others, train[0]]}
        with pytest.raises(InputError, match="share 1 images"):
            require_no_leak({name: splits[name] for name in names})


def test_leaks_by_id_and_by_flipped_id(mfnet):
    (mfnet / "again.txt").write_text("00002N\n")
    (mfnet / "flips.txt").write_text("00001D_flip\n")
    found = leaks({name: entries("mfnet", mfnet, name) for name in ("train", "again", "flips")})
    assert [(leak.kind, leak.first_id, leak.second_id) for leak in found] == [
        ("id", "00002N", "00002N"),
        ("id", "00001D", "00001D_flip"),
    ]
    shared = check("mfnet", mfnet, ("train", "again"), progress=False)["shared"]
    assert [item["ids"] for item in shared] == [["00002N", "00002N"]]


@pytest.mark.parametrize("mirrored", [False, True])
def test_one_of_two_equal_modalities_is_told_and_refused_only_in_numbers(mirrored, mfnet, tmp_path, capsys):
    """A frozen thermal frame recurs in official splits; a split made of another's visible images does not."""
    train, others = (entries("mfnet", mfnet, split) for split in ("train", "test"))
    reworked = []
    for source in train[:2]:
        sample = read_sample(source)
        visible = sample.visible.flip(-1) if mirrored else sample.visible
        entry = Entry(f"x {source.id}", tmp_path / f"v{source.id}.png", tmp_path / f"i{source.id}.png")
        write_png(entry.visible, visible)
        write_png(entry.infrared, draw_scene(5, len(reworked), SIZE).infrared)
        reworked.append(entry)
    (found,) = leaks({"train": train, "test": [reworked[0]]})
    assert (found.kind, found.first_id, found.second_id) == ("partial", train[0].id, reworked[0].id)
    many = [*others, *entries("mfnet", mfnet, "val")]
    assert len(many) == 4
    require_no_leak({"train": train, "test": [*many, reworked[0]]})  # 1 of 5 is a fifth, not more
    assert "1 look-alikes across the splits" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"share 2 images: .*one modality is equal"):
        require_no_leak({"train": train, "test": [*many, *reworked]})  # 2 of 6 is more


def test_the_only_modality_known_of_both_decides_alone(mfnet, tmp_path):
    (source, *_) = entries("mfnet", mfnet, "train")
    sample = read_sample(source)
    write_png(tmp_path / "v.png", sample.visible)
    write_png(tmp_path / "black.png", torch.zeros_like(sample.infrared))
    for infrared in (None, tmp_path / "black.png"):
        (found,) = leaks({"train": [source], "test": [Entry("x", tmp_path / "v.png", infrared)]})
        assert found.kind == "content"


def test_check_notes_stray_look_alikes_and_complains_of_many(tmp_path):
    synthesize(tmp_path / "a", 11, 1, size=(240, 320), progress=False)
    everything = [entry for split in ("train", "val", "test") for entry in entries("mfnet", tmp_path / "a", split)]
    copies = [replace(_disguised("jpeg", e, tmp_path / e.id), id=f"copy {e.id}") for e in everything[:2]]
    for entry in (*everything, *copies):
        sample = read_sample(entry)
        write_png(tmp_path / "p/visible" / f"{entry.id}.png", sample.visible)
        write_png(tmp_path / "p/infrared" / f"{entry.id}.png", sample.infrared)
    lists = {"train": everything[:5], "one": [*everything[5:], copies[0]], "two": [*everything[5:], *copies]}
    for name, members in lists.items():
        (tmp_path / "p" / f"{name}.txt").write_text("\n".join(entry.id for entry in members))
    stray = check("pairs", tmp_path / "p", ("train", "one"), progress=False)
    assert stray["ok"]
    assert stray["shared"] == []
    assert [(item["kind"], item["ids"][1]) for item in stray["look_alikes"]] == [("perceptual", copies[0].id)]
    assert "no problems found\nlook-alikes across splits (a note, no problem): 1\n  train" in table(stray)
    many = check("pairs", tmp_path / "p", ("train", "two"), progress=False)
    assert not many["ok"]
    assert [item["ids"][1] for item in many["shared"]] == [copy.id for copy in copies]
    assert many["look_alikes"] == []


def test_check_compares_the_splits_of_own_pairs_without_being_told_their_names(tmp_path):
    for split, name, seed in (("train", "0001", 0), ("train", "0002", 1), ("val", "0009", 1)):
        _write_pair(tmp_path / "p" / split, ("visible", "infrared", "labels"), name, seed)
    report = check("pairs", tmp_path / "p", progress=False)
    assert {name: split["pairs"] for name, split in report["splits"].items()} == {"train": 2, "val": 1}
    assert (report["ok"], report["errors"]) == (False, [])
    assert report["shared"][0]["ids"] == ["0002", "0009"]
    _write_pair(tmp_path / "q", ("visible", "infrared", "labels"), "0001", 0)
    assert list(check("pairs", tmp_path / "q", progress=False)["splits"]) == ["all"]


def test_equal_names_in_different_folders_are_no_leak(tmp_path):
    for index, part in enumerate(("a", "b")):
        _write_pair(tmp_path / part, ("visible", "infrared", "labels"), "0001", index * 2)
    assert leaks({part: entries("pairs", tmp_path / part, "all") for part in ("a", "b")}) == []


def test_different_scenes_are_no_leak(tmp_path):
    synthesize(tmp_path / "s", 40, 3, size=(120, 160), progress=False)
    found = leaks({split: entries("mfnet", tmp_path / "s", split) for split in ("train", "val", "test")})
    assert found == []


def test_real_recordings_blocks_are_no_leak_but_a_neighbouring_copy_is(tmp_path):
    data = Path(os.environ.get("FUSIONSAM_DATA", Path(__file__).parents[1] / "../shared/data")) / "mfnet156"
    if not data.is_dir():
        pytest.skip(f"needs the real MFNet pairs in {data} (set FUSIONSAM_DATA)")
    splits = {name: entries("mfnet", data, name) for name in ("train", "val")}
    require_no_leak(splits)
    copies = [_disguised("border crop jpeg mirrored", entry, tmp_path / entry.id) for entry in splits["val"][::5]]
    found = leaks({"train": copies, "val": splits["val"]})
    assert [leak.second_id for leak in found] == [entry.id for entry in splits["val"][::5]]


def test_labelled_pairs_have_a_label_each_or_say_which_lacks_one(tmp_path):
    for part in ("visible", "labels"):
        (tmp_path / part).mkdir()
        for name in ("a", "b"):
            write_png(
                tmp_path / part / f"{name}.png", np.zeros((64, 65) if part == "labels" else (64, 65, 3), np.uint8)
            )
    (tmp_path / "classes.yaml").write_text("classes: [x, y]\npalette: [[0, 0, 0], [1, 1, 1]]\n")
    data = open_labelled_split("pairs", tmp_path, "all", tmp_path / "classes.yaml")
    assert [sample.label.shape for sample in data] == [(64, 65)] * 2
    assert torch.equal(data.label(1), data[1].label)
    bare = LabelledPairs([replace(data.entries[0], label=None)], data.row)
    for read in (bare.__getitem__, bare.label):
        with pytest.raises(InputError, match=r"^a: has no label"):
            read(0)
    with pytest.raises(InputError, match="no classes of its own; give --class-file"):
        open_labelled_split("pairs", tmp_path, "all")
