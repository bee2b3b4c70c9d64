"""Synthetic scenes: reproducible, and neither modality suffices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusionsam.data import dataset
from fusionsam.data.check import check
from fusionsam.data.dataset import open_split
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError

SIZE = (240, 320)
PERSON = 2


def test_a_scene_is_a_function_of_seed_and_index():
    first, again, other = draw_scene(3, 5, SIZE), draw_scene(3, 5, SIZE), draw_scene(4, 5, SIZE)
    for name in ("visible", "infrared", "label"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.visible, other.visible)
    assert first.id == "00006N"


def test_people_are_warm_and_by_night_hardly_visible():
    warmer, darker = [], []
    for index in range(1, 24, 2):
        scene = draw_scene(0, index, SIZE)
        person = scene.label == PERSON
        if person.sum() < 30:
            continue
        rest = scene.label == 0
        warmer.append(float(scene.infrared[0][person].float().mean() - scene.infrared[0][rest].float().mean()))
        # Weber contrast in the visible image, against the background's own spread: a person does not stand out.
        light = scene.visible.float().mean(0)
        darker.append(float((light[person].mean() - light[rest].mean()).abs()))
    assert len(warmer) >= 5
    assert min(warmer) > 40
    assert sorted(darker)[len(darker) // 2] < 20


def test_ids_are_a_subset_and_every_class_occurs_somewhere():
    seen = torch.zeros(9, dtype=torch.bool)
    for index in range(30):
        label = draw_scene(1, index, (120, 160)).label
        assert int(label.min()) >= 0
        assert int(label.max()) <= 8
        seen[label.unique()] = True
    assert seen.all()


def test_written_scenes_are_a_sound_mfnet_folder_without_leaks(tmp_path):
    lists = synthesize(tmp_path / "s", 11, 7, size=(96, 128), progress=False)
    assert [len(lists[name]) for name in ("train", "val", "test")] == [7, 2, 2]
    assert sorted(lists["train_day"] + lists["train_night"]) == sorted(lists["train"])
    report = check("mfnet", tmp_path / "s", progress=False)
    assert report["ok"], report
    assert report["splits"]["train"]["sizes"] == {"96x128": 7}
    stored = open_split("mfnet", tmp_path / "s", "train")[1]
    drawn = draw_scene(7, 1, (96, 128))
    assert torch.equal(stored.visible, drawn.visible)
    assert torch.equal(stored.infrared, drawn.infrared)
    assert torch.equal(stored.label, drawn.label)


def test_other_data_is_not_overwritten(tmp_path):
    (tmp_path / "train.txt").write_text("00001D\n")
    with pytest.raises(InputError, match="holds other data"):
        synthesize(tmp_path, 2, 0, size=(96, 128), progress=False)
    assert (tmp_path / "train.txt").read_text() == "00001D\n"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_of_one_folder_are_of_one_seed_and_size_and_all_listed(tmp_path):
    synthesize(tmp_path / "s", 3, 1, size=(32, 40), progress=False)
    before = _files(tmp_path / "s")
    for pairs, seed, size in ((3, 2, (32, 40)), (3, 1, (40, 32)), (2, 1, (32, 40))):
        with pytest.raises(InputError) as caught:
            synthesize(tmp_path / "s", pairs, seed, size=size, progress=False)
        assert str(caught.value) == (
            f"{tmp_path / 's'}: holds 3 pairs of seed 1 and size [32, 40], asked for {pairs} of seed {seed} and size "
            f"{list(size)}; choose a new folder, so that no scenes are mixed"
        )
        assert _files(tmp_path / "s") == before
    (tmp_path / "s/labels/00002N.png").unlink()
    synthesize(tmp_path / "s", 3, 1, size=(32, 40), progress=False)
    assert _files(tmp_path / "s") == before
    lists = synthesize(tmp_path / "s", 5, 1, size=(32, 40), progress=False)
    assert sum(len(lists[name]) for name in ("train", "val", "test")) == 5
    synthesize(tmp_path / "new", 5, 1, size=(32, 40), progress=False)
    assert _files(tmp_path / "s") == _files(tmp_path / "new")


@pytest.mark.parametrize(
    "card", ["", "[]", "{", "\xff", "[" * 100_000, "{}", json.dumps({"seed": 0, "size": [32, 40]})]
)
def test_a_folder_with_a_broken_card_is_left_alone(card, tmp_path):
    (tmp_path / "synthetic.json").write_text(card, encoding="latin-1")
    with pytest.raises(InputError, match="choose a new folder"):
        synthesize(tmp_path, 2, 0, size=(32, 40), progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "synthetic.json"]


@pytest.mark.parametrize("size", [(31, 64), (64, 4097)])
def test_sizes_that_are_of_no_use_are_refused_before_anything_is_written(size, tmp_path):
    with pytest.raises(InputError, match=rf"size {size[0]}x{size[1]}: expected 32 to 4096 pixels a side"):
        synthesize(tmp_path / "s", 1, 0, size=size, progress=False)
    assert not (tmp_path / "s").exists()


def test_folders_that_cannot_be_looked_into_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="File name too long"):
        synthesize(tmp_path / ("x" * 300), 1, 0, size=(32, 40), progress=False)

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read any folder
    with pytest.raises(InputError, match=r"cannot be used \(Permission denied\); choose a new folder"):
        synthesize(tmp_path, 1, 0, size=(32, 40), progress=False)


def test_a_data_set_keeps_no_more_than_fits_and_reads_the_rest_again(tmp_path, monkeypatch):
    synthesize(tmp_path / "s", 7, 7, size=(64, 96), progress=False)
    size = 64 * 96
    monkeypatch.setattr(dataset, "CACHE", 2 * 5 * size + 100)  # 3 + 1 channels and the label, of two pairs
    kept, plain = (open_split("mfnet", tmp_path / "s", "train", cache=cache) for cache in (True, False))
    assert len(kept) > 2
    read = []
    real = dataset.read_sample
    monkeypatch.setattr(dataset, "read_sample", lambda entry, *rest: read.append(entry.id) or real(entry, *rest))
    for _ in range(2):
        for index in range(len(kept)):
            for name in ("visible", "infrared", "label"):
                assert torch.equal(getattr(kept[index], name), getattr(plain[index], name))
    ids = [entry.id for entry in kept.entries]
    by_kept = {name: read.count(name) - 6 for name in ids}  # the plain one read each of them three times, twice
    assert [by_kept[name] for name in ids[:2]] == [1, 1]
    assert by_kept[ids[2]] == 6
    assert torch.equal(kept.label(2), plain.label(2))
    assert read.count(ids[2]) == 12  # for a label alone no image is decoded
