"""`fusionsam data import`: annotations of other tools come back as the label maps they were made of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fusionsam.cli.main import main
from fusionsam.config.datasets import MFNET_CLASSES, MFNET_PALETTE, find
from fusionsam.data.dataset import open_labelled_split
from fusionsam.data.images import write_png
from fusionsam.data.label_files import read_label
from fusionsam.data.labelling.data_set import PART, READERS, import_labels
from fusionsam.data.labelling.exchange import Annotated, Region
from fusionsam.data.labelling.formats import FORMATS
from fusionsam.data.labelling.roboflow import original_stems
from fusionsam.data.pairing import pair_folders
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError

H, W = 97, 131
IDS = ("a", "b", "c")
NAMES = {"coco": "x.json", "coco-polygons": "x.json", "cvat": "x.xml", "labelme": "folder", "label-studio": "x.json"}


@pytest.fixture(scope="module")
def scenes():
    return {id: draw_scene(5, index, (H, W)) for index, id in enumerate(IDS)}


@pytest.fixture
def pairs(scenes, tmp_path):
    for id, scene in scenes.items():
        write_png(tmp_path / "v" / f"{id}.png", scene.visible)
        write_png(tmp_path / "i" / f"{id}.png", scene.infrared)
    return tmp_path


def annotated(scenes) -> list[Annotated]:
    """Every connected region as an object."""
    found = []
    for id, scene in scenes.items():
        label, regions = scene.label.numpy(), []
        for index in np.unique(label[label > 0]):
            parts, count = ndimage.label(label == index)
            regions += [Region.of(MFNET_CLASSES[index], parts == number) for number in range(1, count + 1)]
        found.append(Annotated(f"{id}.png", (H, W), regions))
    return found


def written(form: str, scenes, folder: Path) -> Path:
    """The scenes' labels as a file, or folder, of that form."""
    path = folder / NAMES.get(form, "folder")
    if form == "roboflow":
        for place, id in zip(("train", "train", "valid"), scenes, strict=True):
            write_png(
                path / place / f"{id}_png.rf.0a1b2c_mask.png", scenes[id].label.to(dtype=scenes[id].visible.dtype)
            )
            rows = [f"{index}, {'background' if not index else name}" for index, name in enumerate(MFNET_CLASSES)]
            (path / place / "_classes.csv").write_text("\n".join(["Pixel Value, Class", *rows]))
        return path
    if form == "labelme":
        path.mkdir()
    FORMATS[form].write(path, annotated(scenes), MFNET_CLASSES, MFNET_PALETTE)
    return path


def run(pairs: Path, annotations: Path, *more: str, out: str = "o") -> int:
    given = ["--visible", str(pairs / "v"), "--infrared", str(pairs / "i"), "--out", str(pairs / out)]
    return main(["data", "import", "--annotations", str(annotations), *given, *more])


class Ended:
    """A reader of COCO that is interrupted after `count` pictures."""

    def __init__(self, count: int) -> None:
        self.reader, self.count = READERS["coco"], count

    def read(self, path, size_of):
        for number, picture in enumerate(self.reader.read(path, size_of)):
            if number == self.count:
                raise KeyboardInterrupt
            yield picture


def contents(out: Path) -> dict[str, bytes]:
    """What a finished import consists of."""
    files = [path for path in out.rglob("*") if path.is_file() and PART not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def back(out: Path, id: str, classes: list[str]) -> np.ndarray:
    """A label map in MFNet's ids."""
    ids = read_label(out / "labels" / f"{id}.png").numpy()
    return np.array([0 if name == "background" else MFNET_CLASSES.index(name) for name in classes])[ids]


@pytest.mark.parametrize("form", [*NAMES, "roboflow"])
def test_what_was_annotated_comes_back_exactly_and_train_reads_it(form, scenes, pairs, capsys):
    assert run(pairs, written(form, scenes, pairs)) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 pairs labelled; classes: background, ")
    assert "--data.dataset manifest" in told
    out = pairs / "o"
    splits = {name: open_labelled_split("manifest", out / "manifest.csv", name, out / "classes.yaml")
              for name in ("train", "val")}  # fmt: skip
    assert sorted(entry.id for data in splits.values() for entry in data.entries) == list(IDS)
    classes = list(splits["train"].row.classes)
    assert set(classes) <= {"background", *MFNET_CLASSES}
    for id, scene in scenes.items():
        np.testing.assert_array_equal(back(out, id, classes), scene.label.numpy())
    assert splits["val"][0].label.shape == (H, W)
    if form == "roboflow":
        assert [entry.id for entry in splits["val"].entries] == ["c"]


def test_an_import_that_was_ended_goes_on_and_nothing_is_replaced_in_silence(scenes, pairs, capsys, monkeypatch):
    file = written("coco", scenes, pairs)
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "coco", Ended(2))
        assert run(pairs, file) == 130
    out = pairs / "o"
    assert not (out / "labels").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (out / PART / "labels").iterdir()}
    assert sorted(times) == ["a.png", "b.png"]
    assert run(pairs, file) == 0
    assert "3 pairs labelled, 2 of them from before" in capsys.readouterr().out
    assert {name: (out / "labels" / name).stat().st_mtime_ns for name in times} == times
    assert not (out / PART).exists()
    write_png(out / "labels" / "a.png", np.zeros((H, W), np.uint8))  # somebody goes on by hand
    assert run(pairs, file) == 0
    assert "was finished before" in capsys.readouterr().out
    assert not read_label(out / "labels" / "a.png").any()
    other = written("cvat", scenes, pairs)
    assert run(pairs, other) == 2
    assert "import.json: was made with another" in capsys.readouterr().err
    assert run(pairs, other, "--overwrite") == 0
    assert read_label(out / "labels" / "a.png").any()
    write_png(pairs / "mine" / "labels" / "a.png", np.zeros((H, W), np.uint8))
    assert run(pairs, file, out="mine") == 2
    assert "labels: is there, and no import.json of ours tells of it" in capsys.readouterr().err


@pytest.mark.parametrize("record", [None, '{"done": false}', "{"])
def test_a_folder_of_something_else_is_not_written_over_on_any_word(scenes, pairs, capsys, record):
    mine = pairs / "o" / "labels" / "a.png"
    write_png(mine, np.zeros((H, W), np.uint8))
    if record is not None:
        (pairs / "o" / "import.json").write_text(record)
    assert run(pairs, written("coco", scenes, pairs), "--overwrite") == 2
    told = capsys.readouterr().err
    assert "import.json" in told
    assert told.endswith("; choose another --out\n")
    assert not read_label(mine).any()
    assert not (pairs / "o" / "manifest.csv").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_label_maps_of_other_settings_are_not_gone_on_with(scenes, pairs, monkeypatch, finished):
    file, out = written("coco", scenes, pairs), pairs / "o"

    def imported(names, count, *more):
        classes = {"classes": names, "palette": [list(color) for color in MFNET_PALETTE]}
        (pairs / "classes.yaml").write_text(json.dumps(classes))
        with monkeypatch.context() as patch:
            patch.setitem(READERS, "coco", Ended(count))
            return run(pairs, file, "--class-file", str(pairs / "classes.yaml"), *more)

    before = list(MFNET_CLASSES)
    now = [before[0], *before[:0:-1]]
    assert imported(before, 9 if finished else 2) == (0 if finished else 130)
    standing = contents(out)
    anew = ["--overwrite"] if finished else []
    assert imported(now, 1, *anew) == 130
    assert contents(out) == standing
    assert [path.stem for path in (out / PART / "labels").iterdir()] == ["a"]
    assert imported(now, 9, *anew) == 0
    for id, scene in scenes.items():
        np.testing.assert_array_equal(back(out, id, now), scene.label.numpy())


def test_the_class_file_that_was_given_is_kept_whole(scenes, pairs):
    given = pairs / "classes.yaml"
    colors = [[index, 7, 9] for index in range(len(MFNET_CLASSES))]
    content = {"classes": MFNET_CLASSES, "palette": colors, "foreground": ["person", 1], "labels_map": {"200": 255}}
    given.write_text(json.dumps(content).replace('"200"', "200"))
    assert run(pairs, written("coco", scenes, pairs), "--class-file", str(given)) == 0
    assert find("pairs", pairs / "o" / "classes.yaml") == find("pairs", given)


def test_a_class_to_drop_that_no_object_has_is_told(scenes, pairs, capsys):
    file = written("coco", scenes, pairs)
    assert run(pairs, file, "--drop", "car", "Person") == 2
    told = capsys.readouterr().err
    assert "--drop Person: no object is of that class, met were " in told
    assert "car, " in told
    assert "person" in told
    assert not (pairs / "o" / "manifest.csv").exists()
    assert run(pairs, file, "--drop", "car", "person") == 0


def test_uploads_to_label_studio_are_told_as_of_no_pair_only_where_they_are(scenes, pairs, capsys):
    file = written("label-studio", scenes, pairs)
    tasks = json.loads(file.read_text())
    for task in tasks:
        task["data"] = {"note": "at night", "image": f"/data/upload/3/0a1b2c3d-{task['data']['image']}"}
    images = ("/data/upload/3/0a1b2c3d-y.png", "/data/upload/3/0a1b2c3d-z.png")
    others = [{"data": {"note": "at night", "image": image}, "annotations": [{"result": []}]} for image in images]
    file.write_text(json.dumps([*tasks, *others]))
    assert run(pairs, file) == 0
    told = capsys.readouterr().out
    assert "2 annotated pictures are of no pair, the first: 0a1b2c3d-y.png, 0a1b2c3d-z.png\n" in told


@pytest.mark.parametrize("form", ["label-studio", "coco"])
def test_an_import_that_fails_leaves_the_one_that_it_should_replace(form, scenes, pairs, capsys):
    assert run(pairs, written(form, scenes, pairs)) == 0
    before = contents(pairs / "o")
    bad = pairs / "bad.json"
    bad.write_text((pairs / "x.json").read_text().replace("c.png", "a.png"))
    for id in IDS:
        write_png(pairs / "w" / f"far{id}.png", np.zeros((H, W, 3), np.uint8))
    calls = {
        "none of them of a pair": (pairs / "x.json", "--visible", str(pairs / "w"), "--infrared", str(pairs / "w")),
        "--drop Person: no object is of that class": (pairs / "x.json", "--drop", "Person"),
        "annotates a.png twice": (bad,),
    }
    for said, (file, *more) in calls.items():
        assert run(pairs, file, *more, "--overwrite") == 2
        assert said in capsys.readouterr().err
        assert contents(pairs / "o") == before
    assert run(pairs, pairs / "x.json", "--drop", "person", "--overwrite") == 0
    assert not (pairs / "o" / PART).exists()


def test_a_kill_while_the_new_takes_the_place_of_the_old_is_made_good_by_the_same_command(scenes, pairs, monkeypatch):
    assert run(pairs, written("coco", scenes, pairs), "--drop", "person") == 0
    again, replace = (pairs, pairs / "x.json", "--overwrite"), os.replace

    def killed(at: str) -> None:
        def move(source, target):
            if Path(target).name == at:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("fusionsam.data.labelling.data_set.os", SimpleNamespace(replace=move, path=os.path))
            assert run(*again) == 130

    for at in ("old", "labels", "classes.yaml", "manifest.csv"):
        killed(at)
    assert run(*again) == 0
    made = contents(pairs / "o")
    assert run(pairs, pairs / "x.json", out="fresh") == 0
    assert made == contents(pairs / "fresh")


def test_other_pairs_are_another_import(scenes, pairs, capsys):
    file = written("coco", scenes, pairs)
    assert run(pairs, file) == 0
    before = contents(pairs / "o")
    for kind in "vi":
        shutil.copytree(pairs / kind, pairs / "other" / kind)
    write_png(pairs / "other" / "v" / "d.png", scenes["a"].visible)
    given = ["data", "import", "--annotations", str(file), "--out", str(pairs / "o"), "--visible"]
    for folders in (
        [str(pairs / "other" / "v"), "--infrared", str(pairs / "other" / "i")],
        [str(pairs / "v")],
        [str(pairs / "v"), "--infrared", str(pairs / "i"), "--class-file", str(pairs / "o" / "classes.yaml")],
    ):
        assert main([*given, *folders]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "import.json: was made with another " in told
        assert told.endswith("or --overwrite")
        assert contents(pairs / "o") == before
    record = json.loads(before["import.json"])
    old = {**record, "classes": None}
    del old["class file"], old["list of pairs"]
    (pairs / "o" / "import.json").write_text(json.dumps(old))
    assert run(pairs, file) == 2
    assert (
        "is of an earlier version, which did not note the class file and the list of pairs; choose"
        in capsys.readouterr().err
    )
    assert run(pairs, file, "--overwrite") == 0
    assert contents(pairs / "o") == before
    (pairs / "o" / "manifest.csv").unlink()
    assert run(pairs, file) == 2
    assert "classes.yaml or manifest.csv of a finished import is gone" in capsys.readouterr().err


def test_an_import_that_was_ended_does_not_go_on_with_other_pairs(scenes, pairs, monkeypatch):
    file = written("coco", scenes, pairs)
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "coco", Ended(2))
        assert run(pairs, file) == 130
    write_png(pairs / "o" / PART / "labels" / "a.png", np.full((H, W), 1, np.uint8))  # as if of another pair
    (pairs / "i" / "c.png").unlink()
    assert run(pairs, file) == 0
    assert sorted(path.stem for path in (pairs / "o" / "labels").iterdir()) == ["a", "b"]
    assert not read_label(pairs / "o" / "labels" / "a.png").numpy().all()


def test_tasks_that_nobody_annotated_teach_nothing(scenes, pairs, capsys):
    file = written("label-studio", scenes, pairs)
    one, two, three = json.loads(file.read_text())
    write_png(pairs / "v" / "d.png", scenes["a"].visible)
    write_png(pairs / "i" / "d.png", scenes["a"].infrared)
    two["annotations"] = []
    three["annotations"][0]["was_cancelled"] = True
    empty = {"data": {"image": "d.png"}, "annotations": [{"result": []}]}
    file.write_text(json.dumps([one, two, three, empty]))
    assert run(pairs, file) == 0
    told = capsys.readouterr().out
    assert "2 pairs are not annotated and were left out, the first: b, c" in told
    assert "1 pairs without an object: background alone" in told
    assert sorted(path.stem for path in (pairs / "o" / "labels").iterdir()) == ["a", "d"]
    assert [row.split(",")[0] for row in (pairs / "o" / "manifest.csv").read_text().split()] == ["id", "a", "d"]
    file.write_text(json.dumps([two, three]))
    assert run(pairs, file, out="none") == 2
    assert "annotates no picture; annotate some" in capsys.readouterr().err


def test_objects_and_classes_without_a_pixel_are_told(pairs, capsys):
    def one(id: int, kind: int, *corners: int) -> dict[str, object]:
        return {"id": id, "image_id": 0, "category_id": kind, "segmentation": [list(corners)]}

    square = (10, 10, 20, 10, 20, 20, 10, 20)
    content = {
        "images": [{"id": 0, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        "annotations": [one(1, 1, *square), one(2, 2, *square), one(3, 2, 5, 5, 5, 5, 5, 5)],
    }
    (pairs / "x.json").write_text(json.dumps(content))
    assert run(pairs, pairs / "x.json") == 0
    told = capsys.readouterr().out
    assert "2 objects have no pixel: of no area, or under objects drawn after them; " in told
    assert "; classes without a pixel: person\n" in told
    assert run(pairs, pairs / "x.json", "--drop", "person", out="cars") == 0
    assert "1 objects have no pixel: of no area, or under objects drawn after them\n" in capsys.readouterr().out


def test_what_is_left_out_is_counted(scenes, pairs, capsys):
    content = json.loads(written("coco", scenes, pairs).read_text())
    last = content["images"][2]["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != last]
    content["images"].append({"id": 99, "file_name": "elsewhere.png", "height": 5, "width": 5})
    (pairs / "x.json").write_text(json.dumps(content))
    write_png(pairs / "v" / "d.png", scenes["a"].visible)
    write_png(pairs / "i" / "d.png", scenes["a"].infrared[:, :90])
    write_png(pairs / "v" / "alone.png", scenes["a"].visible)
    assert run(pairs, pairs / "x.json", "--drop", "person") == 0
    told = capsys.readouterr()
    assert "1 annotated pictures are of no pair, the first: elsewhere.png" in told.out
    assert "1 pairs are not annotated and were left out, the first: d" in told.out
    assert "1 pairs without an object: background alone" in told.out
    assert "no infrared file for 'alone'" in told.err
    assert "person" not in told.out.splitlines()[0]


def test_classes_of_a_class_file_are_held_to(scenes, pairs, capsys):
    file = written("cvat", scenes, pairs)
    (pairs / "classes.yaml").write_text("classes: [background, person]\npalette: [[0,0,0],[9,9,9]]\n")
    assert run(pairs, file, "--class-file", str(pairs / "classes.yaml")) == 2
    told = capsys.readouterr().err
    assert "is not in the class file (background, person); add it there, or leave it out by --drop " in told
    others = {one.class_name for picture in annotated(scenes) for one in picture.regions} - {"person"}
    assert run(pairs, file, "--class-file", str(pairs / "classes.yaml"), "--drop", *others) == 0
    for id, scene in scenes.items():
        expected = (scene.label.numpy() == 2).astype(int)
        np.testing.assert_array_equal(read_label(pairs / "o" / "labels" / f"{id}.png").numpy(), expected)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{", "cannot be read as JSON"),
        ("x.json", '{"a": 1}', "is of no known form; expected coco, cvat"),
        ("x.xml", "<annotations>", "cannot be read as XML"),
        ("x.json", '{"images": [], "annotations": [], "categories": []}', "annotates no picture"),
        ("x.json", '{"images": [{"id": 1, "file_name": "z.png"}], "annotations": [], "categories": []}',
         "annotates 1 pictures (first: z.png), none of them of a pair (first: a)"),
        ("x.json", '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 7, "image_id": 1, '
         '"category_id": 1, "bbox": [1, 2, 3, 4]}], "categories": [{"id": 1, "name": "car"}]}',
         "annotation 7: no mask of 97x131"),
        ("x.json", '{"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "t/a.jpg"}], '
         '"annotations": [], "categories": []}', "t/a.jpg: is of pair 'a', as a.png is"),
        ("f/_classes.csv", "Pixel Value, Class\n0, background\n", "holds no *_mask.png"),
        ("f/_classes.csv", "nothing", "lists no class"),
        ("f/notes.txt", "", "holds neither _classes.csv nor .json files"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(pairs, capsys, name, content, said):
    (pairs / name).parent.mkdir(exist_ok=True)
    (pairs / name).write_text(content)
    assert run(pairs, pairs / name.split("/")[0]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (pairs / "o" / "manifest.csv").exists()


def test_a_value_that_roboflow_does_not_list_is_one_line(scenes, pairs):
    path = written("roboflow", scenes, pairs)
    Image.fromarray(np.full((H, W), 77, np.uint8)).save(path / "train" / "a_png.rf.0a1b2c_mask.png")
    entries = pair_folders(pairs / "v", pairs / "i").entries
    with pytest.raises(InputError, match=r"_mask\.png: value 77 is not in _classes\.csv"):
        import_labels(path, entries, pairs / "o")
    assert original_stems("0001_JPG.rf.ab.jpg") == ["0001_JPG.rf.ab", "0001_JPG", "0001"]
