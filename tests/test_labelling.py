"""Drawings and the folder they are kept in: nothing is lost, undo gives back what was there."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import shlex
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.geometry import rescaling
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.cli.main import main
from fusionsam.config.load import parse_settings
from fusionsam.data.images import write_png
from fusionsam.data.labelling.drawing import Drawing, apply, cropped, from_runs, to_runs, to_values
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.splits import entries, pair_entries
from fusionsam.errors import InputError
from fusionsam.server.labelling.training import training_command
from fusionsam.server.labelling.workspace import OPEN, Workspace, readings
from fusionsam.weights.checkpoint import CONFIG, WEIGHTS

H, W = 11, 13
NAMES, PALETTE = ["none", "car", "person", "pole"], [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def nothing():
    raise AssertionError


def paint(mask, number=0, class_id=1, **more):
    return {"kind": "paint", **cropped(mask), "object": number, "class": class_id, **more}


@given(arrays(np.bool_, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_runs_are_the_mask(mask):
    np.testing.assert_array_equal(from_runs(to_runs(mask), *mask.shape), mask)
    part = cropped(mask)
    x, y, w, h = part["box"]
    again = np.zeros_like(mask)
    again[y : y + h, x : x + w] = from_runs(part["runs"], h, w)
    np.testing.assert_array_equal(again, mask)


@given(arrays(np.uint16, st.tuples(st.integers(0, 5), st.integers(1, 7)), elements=st.integers(0, 3)))
def test_values_are_the_array(values):
    sent = to_values(values)
    assert np.repeat(sent[::2], sent[1::2]).reshape(values.shape).tolist() == values.tolist()


masks = arrays(np.bool_, (H, W))
changes = st.one_of(
    st.builds(lambda m, n, c, k: ("paint", m, n, c, k), masks, st.integers(0, 4), st.integers(1, 3), st.booleans()),
    st.builds(lambda m: ("erase", m), masks),
    st.builds(lambda n, c: ("class", n, c), st.integers(1, 4), st.integers(1, 3)),
    st.builds(lambda n: ("delete", n), st.integers(1, 4)),
    st.just(("clear",)),
    st.builds(lambda m: ("propose", m.astype(np.uint8)), masks),
)


@given(st.lists(changes, max_size=8))
def test_undo_goes_back_to_every_state_and_redo_forward_again(steps):
    drawing = Drawing.empty((H, W))
    states = [(drawing.instances.copy(), dict(drawing.classes))]
    for step in steps:
        if step[0] == "paint":
            asked = paint(step[1], step[2], step[3], keep=step[4])
        elif step[0] == "erase":
            asked = {"kind": "erase", "object": 0, **cropped(step[1])}
        elif step[0] == "class":
            asked = {"kind": "class", "object": step[1], "class": step[2]}
        else:
            asked = {"kind": step[0], "object": step[1] if step[0] == "delete" else 0}
        if asked["object"] and asked["object"] not in drawing.classes:
            with pytest.raises(InputError, match="is not there"):
                apply(drawing, asked, nothing)
            np.testing.assert_array_equal(drawing.instances, states[-1][0])
            continue
        apply(drawing, asked, lambda step=step: step[1])
        assert set(np.unique(drawing.instances)) - {0} == set(drawing.classes)
        states.append((drawing.instances.copy(), dict(drawing.classes)))
    for wanted, kind in [*((s, "undo") for s in states[-2::-1]), *((s, "redo") for s in states[1:])]:
        apply(drawing, {"kind": kind}, nothing)
        np.testing.assert_array_equal(drawing.instances, wanted[0])
        assert drawing.classes == wanted[1]


def test_paint_erase_and_keep_worked_by_hand():
    drawing = Drawing.empty((2, 4))
    left, right = np.array([[1, 1, 1, 0]] * 2, bool), np.array([[0, 0, 1, 1]] * 2, bool)
    assert apply(drawing, paint(left, class_id=2), nothing) == {"box": [0, 0, 3, 2], "object": 1}
    assert apply(drawing, paint(right, class_id=3, keep=True), nothing)["object"] == 2
    assert drawing.instances.tolist() == [[1, 1, 1, 2]] * 2
    assert drawing.labels.tolist() == [[2, 2, 2, 3]] * 2
    apply(drawing, paint(right, number=2, class_id=3), nothing)
    assert drawing.labels.tolist() == [[2, 2, 3, 3]] * 2
    assert drawing.objects() == [
        {"id": 1, "class": 2, "pixels": 4, "box": [0, 0, 2, 2]},
        {"id": 2, "class": 3, "pixels": 4, "box": [2, 0, 2, 2]},
    ]
    apply(drawing, {"kind": "erase", **cropped(left)}, nothing)
    assert drawing.labels.tolist() == [[0, 0, 0, 3]] * 2
    assert list(drawing.classes) == [2]
    assert drawing.clicks == 4


BAD = [
    ({"kind": "fly"}, "found kind 'fly'"),
    ({}, "found kind"),
    ({"kind": "undo"}, "nothing to undo"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": [4], "class": -1}, "class is '-1'"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": [4], "class": 1.5}, "class is '1.5'"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": [3], "class": 1}, "add up to the box's 2x2"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": ["a"], "class": 1}, "add up"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": [10**30], "class": 1}, "add up"),
    ({"kind": "paint", "box": [12, 0, 2, 2], "runs": [4], "class": 1}, "expected it inside of 13x11"),
    ({"kind": "paint", "box": [-1, 0, 2, 2], "runs": [4], "class": 1}, "expected it inside"),
    ({"kind": "paint", "box": [0, 0, 2.0, 2], "runs": [4], "class": 1}, "whole pixels"),
    ({"kind": "paint", "box": "0", "runs": [4], "class": 1}, "box is missing"),
    ({"kind": "paint", "box": [0, 0, 2, 2], "runs": [0, 4], "object": 7, "class": 1}, "object 7: is not there"),
    ({"kind": "delete", "object": 3}, "object 3: is not there"),
    ({"kind": "class", "object": 3, "class": 1}, "object 3: is not there"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_a_bad_change_is_one_line_and_changes_nothing(change, words):
    drawing = Drawing.empty((H, W))
    with pytest.raises(InputError, match=words) as caught:
        apply(drawing, change, nothing)
    assert "\n" not in str(caught.value)
    assert not drawing.instances.any()
    assert (drawing.classes, drawing.revision, drawing.clicks) == ({}, 0, 0)


@pytest.fixture
def pairs(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        write_png(tmp_path / f"vi/p{number}.png", rng.integers(0, 255, (H, W, 3), np.uint8))
        write_png(tmp_path / f"ir/p{number}.png", rng.integers(0, 255, (H, W), np.uint8))
    return pair_entries(tmp_path / "vi", tmp_path / "ir")


def drawn():
    drawing = Drawing.empty((H, W))
    y, x = np.mgrid[:H, :W]
    apply(drawing, paint((x < 5) & (y < 4), class_id=1), nothing)
    apply(drawing, paint((x > 7) & (y > 6), class_id=3), nothing)
    apply(drawing, paint((x == 6), class_id=1), nothing)
    return drawing


def test_what_was_saved_is_read_back_and_listed_for_training(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE, who="ann")
    assert [folder.progress[entry.id].status for entry in pairs] == ["todo"] * 3
    drawing = drawn()
    folder.save(pairs[1], drawing, "paint", object=3)
    drawing.unsure = drawing.done = True
    folder.save(pairs[1], drawing, "done")
    again = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    assert [again.progress[entry.id].status for entry in pairs] == ["todo", "done", "todo"]
    read = again.open(pairs[1])
    np.testing.assert_array_equal(read.instances, drawing.instances)
    assert (read.classes, read.unsure, read.done, read.clicks) == (drawing.classes, True, True, 3)
    label = np.asarray(Image.open(tmp_path / "out/labels/p1.png"))
    np.testing.assert_array_equal(label, drawing.labels)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [(line["who"], line["pair"], line["action"]) for line in log] == [
        ("ann", "p1", "paint"),
        ("ann", "p1", "done"),
    ]
    listed = list(csv.DictReader((tmp_path / "out/manifest.csv").open()))
    assert [row["id"] for row in listed] == ["p1"]
    (entry,) = entries("manifest", tmp_path / "out/manifest.csv", listed[0]["split"], tmp_path / "out/classes.yaml")
    assert entry.visible.samefile(pairs[1].visible)
    assert entry.label.samefile(tmp_path / "out/labels/p1.png")


def test_a_kill_while_writing_leaves_what_was_there(pairs, tmp_path, monkeypatch):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    folder.save(pairs[0], drawn(), "paint")
    before = folder.instances_path("p0").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.save(pairs[0], Drawing.empty((H, W)), "clear")
    assert folder.instances_path("p0").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out/instances").iterdir()) == ["p0.png"]


def recording(folder, *ids):
    for number, id in enumerate(ids):
        write_png(folder / f"vi/{id}.png", np.full((H, W, 3), len(folder.name) + number, np.uint8))
        write_png(folder / f"ir/{id}.png", np.zeros((H, W), np.uint8))
    return pair_entries(folder / "vi", folder / "ir")


def done(entry, folder):
    drawing = drawn()
    drawing.done = True
    folder.save(entry, drawing, "done")


def listed(out):
    return [row["id"] for row in csv.DictReader((out / "manifest.csv").open())]


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_finished_pairs_stay_listed_while_others_are_labelled(pairs, tmp_path):
    out = tmp_path / "out"
    done(pairs[0], LabelFolder(out, pairs, NAMES, PALETTE))
    others = recording(tmp_path / "second", "q0", "q1")
    folder = LabelFolder(out, others, NAMES, PALETTE)
    assert listed(out) == ["p0"]
    done(others[1], folder)
    LabelFolder(out, pairs[1:], NAMES, PALETTE)  # a part of the first, as for an export
    assert listed(out) == ["p0", "q1"]
    found = [
        one
        for split in ("train", "val")
        for one in entries("manifest", out / "manifest.csv", split, out / "classes.yaml")
    ]
    assert sorted(one.id for one in found) == ["p0", "q1"]
    assert next(one for one in found if one.id == "p0").infrared.samefile(pairs[0].infrared)
    for kind in ("instances", "labels"):
        (out / kind / "p0.png").unlink()
    LabelFolder(out, others, NAMES, PALETTE)
    assert listed(out) == ["q1"]


def rewrite(path, change):
    """Every row of a manifest as a person changes it."""
    rows = [change(row) for row in csv.DictReader(path.open())]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")  # as a spreadsheet saves it
        writer.writeheader()
        writer.writerows(rows)


def test_splits_and_columns_of_a_person_stay_in_the_manifest(pairs, tmp_path):
    out = tmp_path / "out"
    for entry in pairs[:2]:
        done(entry, LabelFolder(out, pairs, NAMES, PALETTE))
    rewrite(out / "manifest.csv", lambda row: {**row, "split": "test", "sequence": "s" + row["id"], "weather": "fog"})
    others = recording(tmp_path / "second", "q0")
    done(others[0], LabelFolder(out, others, NAMES, PALETTE))
    folder = LabelFolder(out, pairs, NAMES, PALETTE)
    drawing = folder.open(pairs[1])
    for drawing.done in (False, True):  # taken back to be mended, and done again
        folder.save(pairs[1], drawing, "mark")
    rows = {row["id"]: row for row in csv.DictReader((out / "manifest.csv").open())}
    assert {id: (row["split"], row["sequence"], row["weather"]) for id, row in rows.items()} == {
        "p0": ("test", "sp0", "fog"),
        "p1": ("test", "sp1", "fog"),
        "q0": ("val", "", ""),
    }


@pytest.mark.parametrize("kept", [("labels", "manifest.csv", "classes.yaml"), ("labels",), ("manifest.csv",)])
def test_label_maps_of_others_are_refused_before_anything_is_written(pairs, tmp_path, kept):
    out = tmp_path / "out"
    done(pairs[0], LabelFolder(out, pairs, NAMES, PALETTE))
    for path in sorted(out.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_png(out / "instances/p0.png", np.zeros((H, W), np.uint8))  # not a drawing of ours either
    before = contents(out)
    with pytest.raises(
        InputError, match=r"out: holds label maps that label did not draw \(.*choose another --out"
    ) as caught:
        LabelFolder(out, pairs, NAMES, PALETTE)
    assert "\n" not in str(caught.value)
    assert contents(out) == before


def test_a_label_map_that_was_put_into_our_folder_is_not_replaced(pairs, tmp_path):
    out = tmp_path / "out"
    done(pairs[0], LabelFolder(out, pairs, NAMES, PALETTE))
    write_png(out / f"labels/{pairs[1].id}.png", np.ones((H, W), np.uint8))
    before = contents(out)
    with pytest.raises(InputError, match=rf"labels/{pairs[1].id}\.png: is there, and no drawing of it; remove it, or"):
        LabelFolder(out, pairs, NAMES, PALETTE)
    assert contents(out) == before
    LabelFolder(out, pairs[:1], NAMES, PALETTE)  # of a pair that is not labelled now


def test_what_a_class_file_says_besides_is_kept(pairs, tmp_path):
    out, given = tmp_path / "out", {"classes": NAMES, "palette": [list(color) for color in PALETTE]}
    more = {"foreground": ["car"], "labels_map": {2: 1, 255: 3}}  # 2 is person in what is drawn
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump({**given, **more}))
    command = ["label", "--visible", tmp_path / "vi", "--out", out, "--classes", tmp_path / "classes.yaml"]
    command = [*map(str, command), "--export"]
    assert main([*command, f"coco:{tmp_path / 'a.json'}"]) == 0
    stored = yaml.safe_load((out / "classes.yaml").read_text())
    assert stored == {**given, "foreground": ["car"], "labels_map": {255: 3}}
    by_hand = yaml.safe_dump({**stored, "foreground": [3]}) + "# mine\n"
    (out / "classes.yaml").write_text(by_hand)
    assert main([*command, f"coco:{tmp_path / 'b.json'}"]) == 0
    assert (out / "classes.yaml").read_text() == by_hand


@pytest.mark.parametrize("finished", [False, True])
def test_a_drawing_is_not_shown_on_another_picture_of_the_same_id(pairs, tmp_path, monkeypatch, finished):
    if finished:  # as earlier versions kept it: the manifest alone tells of the pictures
        monkeypatch.setattr(LabelFolder, "_pictures", lambda *_: {})
    out = tmp_path / "out"
    folder = LabelFolder(out, pairs, NAMES, PALETTE)
    done(pairs[0], folder) if finished else folder.save(pairs[0], drawn(), "paint")
    before = contents(out)
    for others in (recording(tmp_path / "second", "p0"), pair_entries(None, tmp_path / "second/ir")):
        with pytest.raises(InputError, match=r"'p0' was drawn on .*another picture; choose another --out") as caught:
            LabelFolder(out, others, NAMES, PALETTE)
        assert "\n" not in str(caught.value)
    assert contents(out) == before
    assert LabelFolder(out, pair_entries(tmp_path / "vi", None), NAMES, PALETTE).progress["p0"].objects == 3


def test_pictures_and_drawings_that_were_moved_are_gone_on_with(pairs, tmp_path):
    done(pairs[0], LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE))
    out = tmp_path / "far/away/out"
    shutil.copytree(tmp_path / "vi", tmp_path / "second/vi")
    shutil.move(tmp_path / "vi", tmp_path / "first/vi")
    shutil.move(tmp_path / "out", out)
    moved = pair_entries(tmp_path / "first/vi", None)
    assert LabelFolder(out, moved, NAMES, PALETTE).progress["p0"].done
    (row,) = csv.DictReader((out / "manifest.csv").open())
    assert (out / row["visible"]).samefile(moved[0].visible)
    done(moved[0], LabelFolder(out, moved, NAMES, PALETTE))
    write_png(moved[0].visible, np.zeros((H, W, 3), np.uint8))  # where it was, but brighter or darker now
    assert LabelFolder(out, moved, NAMES, PALETTE).progress["p0"].done


@pytest.mark.parametrize("earlier", [False, True])
def test_a_label_map_that_a_kill_left_behind_is_made_again(pairs, tmp_path, monkeypatch, earlier):
    out = tmp_path / "out"
    folder = LabelFolder(out, pairs, NAMES, PALETTE)
    label = out / "labels/p0.png"
    if earlier:
        folder.save(pairs[0], Drawing.empty((H, W)), "clear")
        os.utime(label, (1, 1))
    with monkeypatch.context() as killed:

        def once(part, path, replaced=os.replace):  # the drawing alone takes its place
            if os.path.dirname(path).endswith("labels"):
                raise KeyboardInterrupt
            replaced(part, path)

        killed.setattr("os.replace", once)
        with pytest.raises(KeyboardInterrupt):
            folder.save(pairs[0], drawn(), "paint")
    (out / "instances/odd.png").write_bytes(b"no png")
    with folder.alone():
        LabelFolder(out, pairs, NAMES, PALETTE)
        assert label.is_file() == earlier  # the server that runs is about to write it
    LabelFolder(out, pairs[1:], NAMES, PALETTE)
    np.testing.assert_array_equal(np.asarray(Image.open(label)), drawn().labels)
    label.write_bytes(b"as it was")
    LabelFolder(out, pairs, NAMES, PALETTE)
    assert label.read_bytes() == b"as it was"  # what is newer is not made again


def test_what_cannot_be_ours_is_one_line(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    path = folder.instances_path("p0")
    path.parent.mkdir()
    for content in (b"", b"no png"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no drawing of ours"):
            folder.open(pairs[0])
    write_png(path, np.zeros((H, W), np.uint8))
    with pytest.raises(InputError, match="no drawing of ours"):
        folder.open(pairs[0])
    folder.save(pairs[0], Drawing.empty((H, W + 1)), "x")
    with pytest.raises(InputError, match=r"was drawn on .*begin this pair anew"):
        folder.open(pairs[0])
    strange = Drawing(np.full((H, W), 2, np.uint16), {1: 1})
    folder.save(pairs[0], strange, "x")
    with pytest.raises(InputError, match="pixels of no object"):
        folder.open(pairs[0])
    with pytest.raises(InputError, match="labelled with other classes"):
        LabelFolder(tmp_path / "out", pairs, [*NAMES, "dog"], [*PALETTE, (9, 9, 9)])


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["pictures", "log"])
def test_a_change_that_cannot_be_saved_has_not_been(pairs, tmp_path, monkeypatch, fails):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    workspace = Workspace(folder, SeesDark(), None)
    left, right = (np.arange(W) < 5) & np.ones((H, 1), bool), (np.arange(W) > 8) & np.ones((H, 1), bool)
    seen = workspace.change(0, paint(left))["revision"]
    drawing, progress = workspace.pair(0).drawing.copy(), folder.progress["p0"]
    files = {path: content for path, content in contents(folder.out).items() if path.name != "log.jsonl"}
    with monkeypatch.context() as disk:
        disk.setattr("os.replace", full) if fails == "pictures" else disk.setattr(folder, "_log", tmp_path)
        for change in (paint(right, class_id=2), {"kind": "undo"}, {"kind": "mark", "done": True, "unsure": True}):
            with pytest.raises(InputError, match="cannot be written"):
                workspace.change(0, {**change, "revision": seen})
    again = workspace.pair(0).drawing
    np.testing.assert_array_equal(again.instances, drawing.instances)
    assert (again.classes, again.done, again.unsure) == (drawing.classes, False, False)
    assert (again.clicks, again.revision, folder.progress["p0"]) == (1, seen, progress)
    assert files == {path: content for path, content in contents(folder.out).items() if path.name != "log.jsonl"}
    assert len(workspace.change(0, {**paint(right, class_id=2), "revision": seen})["objects"]) == 2
    assert [len(workspace.change(0, {"kind": "undo"})["objects"]) for _ in range(2)] == [1, 0]
    workspace.close()


def test_a_page_of_an_earlier_opening_changes_nothing(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    first, second = (Workspace(folder, SeesDark(), None) for _ in range(2))
    seen = first.change(0, paint(np.ones((H, W), bool)))["revision"]
    second.change(0, paint(np.ones((H, W), bool)))  # as many changes
    with pytest.raises(InputError, match="opened anew or changed in another window; load the page again"):
        second.change(0, {"kind": "clear", "revision": seen})
    first.close(), second.close()


def test_a_second_server_is_kept_out_and_a_lock_left_behind_is_none(pairs, tmp_path):
    folder, other = (LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE) for _ in range(2))
    with folder.alone(), pytest.raises(InputError, match="labelled by another server"), other.alone():
        pass
    with other.alone():
        assert (tmp_path / "out/.lock").is_file()


class SeesDark:
    """As sure of a pixel as it is bright."""

    def __init__(self, folder=None, content="", **card):
        self.name, self.config, self.asked = "final", SimpleNamespace(classes=["none"]), 0
        self.folder, self.card = folder, card
        if folder is not None:
            folder.mkdir()
            for name in (WEIGHTS, CONFIG):
                (folder / name).write_text(content)

    def predict(self, visible, infrared, covered=None):
        self.asked += 1
        return SimpleNamespace(confidence=visible.float().mean(0).numpy() / 255)


def order(out, model, align=None):
    folder = LabelFolder(out, pair_entries(out.parent / "vi", None), NAMES, PALETTE)
    workspace = Workspace(folder, model, None, "uncertainty", align=align)
    workspace.close()
    return [row["id"] for row in workspace.describe()["pairs"]]


def test_the_least_sure_come_first_and_are_asked_once(tmp_path):
    for number, bright in enumerate((200, 50, 120)):
        write_png(tmp_path / f"vi/p{number}.png", np.full((H, W, 3), bright, np.uint8))
    model, out = SeesDark(tmp_path / "final"), tmp_path / "out"
    assert order(out, model) == ["p1", "p2", "p0"]
    assert list(json.loads((tmp_path / "out/uncertainty.json").read_text())["pairs"]) == ["p0", "p1", "p2"]
    write_png(tmp_path / "vi/p3.png", np.full((H, W, 3), 10, np.uint8))
    assert order(out, model) == ["p3", "p1", "p2", "p0"]
    assert model.asked == 4


def test_what_other_weights_or_another_rig_were_unsure_of_does_not_count(tmp_path):
    write_png(tmp_path / "vi/p0.png", np.full((H, W, 3), 9, np.uint8))
    rig = Aligner(Rig((H, W), (H, W), rescaling((H, W), (H, W))))
    models = [  # all of one name
        SeesDark(tmp_path / "first"),
        SeesDark(tmp_path / "second", "trained on"),
        SeesDark(tmp_path / "third", "trained on", calibration={"temperature": 2.0}),
    ]
    for model, align in [*((model, None) for model in models), (models[2], rig)]:
        before = model.asked
        order(tmp_path / "out", model, align)
        order(tmp_path / "out", model, align)
        assert model.asked == before + 1


def test_a_pair_that_could_not_be_read_is_tried_again(tmp_path):
    for number, bright in enumerate((200, 50)):
        write_png(tmp_path / f"vi/p{number}.png", np.full((H, W, 3), bright, np.uint8))
    whole = (tmp_path / "vi/p1.png").read_bytes()
    (tmp_path / "vi/p1.png").write_bytes(b"cut")
    model = SeesDark(tmp_path / "final")
    assert order(tmp_path / "out", model) == ["p0", "p1"]
    (tmp_path / "vi/p1.png").write_bytes(whole)
    assert order(tmp_path / "out", model) == ["p1", "p0"]
    assert model.asked == 2


def test_two_cameras_that_see_apart_are_labelled_in_the_visible_ones_pixels(tmp_path):
    rig = Rig((2 * H, 2 * W), (H, W), rescaling((H, W), (2 * H, 2 * W)))
    rig.write(tmp_path / "rig.json")
    heat = np.zeros((H, W), np.uint8)
    heat[3:6, 4:8] = 200
    write_png(tmp_path / "vi/p0.png", np.full((2 * H, 2 * W, 3), 9, np.uint8))
    write_png(tmp_path / "ir/p0.png", heat)
    pairs = pair_entries(tmp_path / "vi", tmp_path / "ir")
    with pytest.raises(InputError, match="give --align RIG"):
        LabelFolder(tmp_path / "without", pairs, NAMES, PALETTE).open(pairs[0])
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE, rig=tmp_path / "rig.json")
    aligner = Aligner(read_rig(tmp_path / "rig.json"), refine=False)
    workspace = Workspace(folder, SeesDark(), None, celsius=lambda path: heat, align=aligner)
    opened = workspace.pair(0)
    assert opened.drawing.instances.shape == opened.picture("infrared").shape == (2 * H, 2 * W)
    ys, xs = np.nonzero(opened.picture("infrared") > 100)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (6, 11, 8, 15)
    workspace.change(0, paint(opened.picture("infrared") > 100))
    (told,) = workspace.temperatures(0)["objects"]
    assert (told["area"], told["maximum"]) == (6 * 8, 200)
    x, y = told["hottest"]
    assert 6 <= y <= 11
    assert 8 <= x <= 15
    command = training_command(folder)
    config = parse_settings("train", shlex.split(command)[2:]).settings
    assert (config.data.align, config.data.dataset) == (str(tmp_path / "rig.json"), "manifest")


def test_the_next_pair_is_prepared_and_no_more_than_a_few_are_kept(tmp_path):
    for number in range(12):
        write_png(tmp_path / f"vi/p{number:02}.png", np.full((H, W, 3), number, np.uint8))
    folder = LabelFolder(tmp_path / "out", pair_entries(tmp_path / "vi", None), NAMES, PALETTE)
    model, encoded = SlowModel(), []
    model.go.set()
    workspace = Workspace(folder, model, SimpleNamespace(encode=lambda picture: encoded.append(picture.shape)))
    workspace.show(0)
    workspace._pool.submit(lambda: None).result(60)  # after what was to be prepared
    assert [int(image[0, 0, 0]) for image in model.asked] == [0, 1]
    assert len(encoded) == 3  # fused and visible of this pair, fused of the next
    gone = weakref.ref(workspace.pair(0))
    for index in range(1, 12):
        workspace.show(index)
        workspace._pool.submit(lambda: None).result(60)
    gc.collect()
    assert gone() is None
    assert len(workspace._open) == OPEN
    workspace.close()


class SlowModel:
    """Fuses when it is told to."""

    def __init__(self):
        self.name, self.config, self.go, self.asked = "slow", SimpleNamespace(classes=["none", "car"]), Event(), []

    def predict(self, visible, infrared, covered=None):
        self.asked.append(visible)
        assert self.go.wait(60)
        size = visible.shape[1:]
        return SimpleNamespace(fused=np.zeros((*size, 3), np.uint8), labels=np.ones(size, np.uint8))


def test_pictures_and_changes_do_not_wait_for_the_network_and_pairs_left_behind_never_reach_it(tmp_path):
    for number in range(OPEN + 3):
        write_png(tmp_path / f"vi/p{number}.png", np.full((H, W, 3), number, np.uint8))
        write_png(tmp_path / f"ir/p{number}.png", np.zeros((H, W), np.uint8))
    folder = LabelFolder(tmp_path / "out", pair_entries(tmp_path / "vi", tmp_path / "ir"), NAMES, PALETTE)
    model = SlowModel()
    workspace = Workspace(folder, model, SimpleNamespace(encode=lambda picture: picture))
    with ThreadPoolExecutor(OPEN + 3) as browser:
        try:
            fused = []
            for index in range(OPEN + 3):  # somebody who leafs through the folder
                assert workspace.show(index)["size"] == [H, W]
                fused.append(browser.submit(workspace.pair(index).picture, "fused"))
                assert workspace.pair(index).picture("visible")[0, 0, 0] == index
            whole = {"kind": "paint", **cropped(np.ones((H, W), bool)), "object": 0, "class": 1}
            assert workspace.change(OPEN + 2, whole)["objects"][0]["pixels"] == H * W
        finally:
            model.go.set()
        assert fused[-1].result(60).shape == (H, W, 3)
        waited = [future.exception(60) for future in fused]
        workspace.close()
    assert all("no longer open" in str(error) for error in waited if error is not None)
    assert len(model.asked) <= OPEN + 1  # the one that had begun, and those in memory
    assert waited[-OPEN:] == [None] * OPEN


def test_every_object_of_a_folder_tells_its_temperature(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    folder.save(pairs[0], drawn(), "paint")
    folder.save(pairs[1], drawn(), "paint")
    heat = np.arange(H * W, dtype=np.float32).reshape(H, W)
    found = readings(folder, lambda path: heat if path.stem == "p1" else None)
    assert [(one.picture, one.object, one.class_name, one.temperatures.maximum) for one in found] == [
        ("p1", 1, "car", 3 * W + 4),
        ("p1", 2, "pole", H * W - 1),
        ("p1", 3, "car", 10 * W + 6),
        ("p1", 0, "car", 10 * W + 6),
        ("p1", 0, "pole", H * W - 1),
    ]


def test_temperatures_of_two_cameras_that_see_apart_are_those_under_the_object(tmp_path, monkeypatch):
    moved = np.array(
        [[1.0, 0, 3], [0, 1, 2], [0, 0, 1]]
    )  # an infrared pixel is 3 to the right and 2 down in the visible picture
    Rig((H, W), (H, W), moved).write(tmp_path / "rig.json")
    (tmp_path / "classes.yaml").write_text(json.dumps({"classes": NAMES, "palette": PALETTE}))
    (pair,) = recording(tmp_path / "rec", "p0")
    folder = LabelFolder(tmp_path / "out", [pair], NAMES, PALETTE, rig=tmp_path / "rig.json")
    x, y = np.meshgrid(np.arange(W), np.arange(H))
    drawing = Drawing.empty((H, W))
    apply(drawing, paint((y == 4) & (x < 5)), nothing)
    folder.save(pair, drawing, "paint")
    monkeypatch.setattr("fusionsam.inference.temperatures.read_celsius", lambda _: (100 * y + x).astype(np.float32))
    command = ["label", "--visible", tmp_path / "rec/vi", "--infrared", tmp_path / "rec/ir", "--out", tmp_path / "out"]
    command += ["--classes", tmp_path / "classes.yaml", "--align", tmp_path / "rig.json"]
    assert main([*map(str, command), "--export-temperatures", str(tmp_path / "t.csv")]) == 0
    row = next(csv.DictReader((tmp_path / "t.csv").open()))
    assert (row["area"], row["unknown"]) == ("5", "3")  # infrared does not reach the first three columns
    assert (row["minimum_c"], row["maximum_c"]) == ("200.00", "201.00")


def test_a_table_of_temperatures_replaces_its_like_alone_and_tells_what_it_lacks(pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "classes.yaml").write_text(json.dumps({"classes": NAMES, "palette": PALETTE}))
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    for entry in pairs[:2]:
        folder.save(entry, drawn(), "paint")
    heat = np.zeros((H, W), np.float32)
    monkeypatch.setattr("fusionsam.inference.temperatures.read_celsius", lambda p: heat if p.stem == "p1" else None)
    command = ["label", "--visible", tmp_path / "vi", "--infrared", tmp_path / "ir", "--out", tmp_path / "out"]
    command += ["--classes", tmp_path / "classes.yaml", "--export-temperatures", tmp_path / "t.csv"]
    for _ in range(2):
        assert main([*map(str, command)]) == 0
        told = capsys.readouterr().out
        assert f"3 objects in {tmp_path / 't.csv'}" in told
        assert "1 of 2 labelled pairs have no temperatures" in told
    (tmp_path / "t.csv").write_text("measured by hand")
    assert main([*map(str, command)]) == 2
    assert "t.csv: is there, and is not what" in capsys.readouterr().err
    assert (tmp_path / "t.csv").read_text() == "measured by hand"


def test_the_page_is_told_every_objects_and_every_class_temperatures(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    folder.save(pairs[1], drawn(), "paint")
    heat, asked = np.arange(H * W, dtype=np.float32).reshape(H, W), []
    read = lambda path: (asked.append(path), heat if path.stem == "p1" else None)[1]  # noqa: E731
    workspace = Workspace(folder, SlowModel(), SimpleNamespace(), celsius=read)
    assert workspace.temperatures(0) == {"radiometric": False, "objects": [], "classes": []}
    told = workspace.temperatures(1)
    assert [(row["id"], row["class"], row["hottest"], row["area"]) for row in told["objects"]] == [
        (1, 1, (4, 3), 20),
        (2, 3, (12, 10), 20),
        (3, 1, (6, 10), 11),
    ]
    assert [(row["class"], row["coldest"], row["hottest"], row["area"]) for row in told["classes"]] == [
        (1, (0, 0), (6, 10), 31),
        (3, (8, 7), (12, 10), 20),
    ]
    assert workspace.temperatures(1) == told
    assert len(asked) == 2  # each file once
