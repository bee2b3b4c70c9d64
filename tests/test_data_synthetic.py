"""Synthetic scenes: reproducible, and neither modality suffices."""

from __future__ import annotations

import pytest
import torch

from fusionsam.data.check import check
from fusionsam.data.dataset import open_split
from fusionsam.data.synthetic import draw_scene, synthesize
from fusionsam.structures import InputError

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
