"""Objects in the files of other tools: round trips are exact to a pixel, files that those tools wrote are read, what
does not fit is one line and writes nothing."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO

from fusionsam.cli.main import main
from fusionsam.data.images import write_png
from fusionsam.data.labelling.drawing import Drawing
from fusionsam.data.labelling.exchange import Taken, export, into_folder, of_folder
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.labelling.formats import FORMATS, named
from fusionsam.data.labelling.label_studio import decode, encode
from fusionsam.data.labelling.polygons import from_polygons, to_polygons
from fusionsam.data.splits import pair_entries
from fusionsam.errors import InputError

H, W = 11, 13
NAMES, PALETTE = ["none", "car", "person", "pole"], [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
masks = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@pytest.fixture
def pairs(tmp_path):
    for number in range(3):
        write_png(tmp_path / f"vi/p{number}.png", np.full((H, W, 3), number, np.uint8))
        write_png(tmp_path / f"ir/p{number}.png", np.zeros((H, W), np.uint8))
    (tmp_path / "classes.yaml").write_text(json.dumps({"classes": NAMES, "palette": PALETTE}))
    return pair_entries(tmp_path / "vi", tmp_path / "ir")


def drawn():
    """A ring, a piece in its hole, an object of two parts that meet in a corner, one of a single pixel."""
    instances = np.zeros((H, W), np.uint16)
    instances[1:8, 2:9] = 1
    instances[3:6, 4:7] = 0
    instances[4, 5] = 2
    instances[8:10, 9:11] = 3
    instances[6:8, 11:13] = 3
    instances[10, 0] = 4
    return Drawing(instances, {1: 1, 2: 3, 3: 2, 4: 1})


@pytest.fixture
def folder(pairs, tmp_path):
    folder = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE)
    folder.save(pairs[0], drawn(), "paint")
    everywhere = np.arange(H * W, dtype=np.uint16).reshape(H, W) % 5
    folder.save(pairs[2], Drawing(everywhere, {1: 1, 2: 2, 3: 3, 4: 1}), "paint")
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_back_every_pixel_and_overwrites_nothing(folder, pairs, tmp_path, name):
    file = tmp_path / "exchanged"
    assert FORMATS[name].write(file, of_folder(folder), NAMES, PALETTE) == 8
    again = LabelFolder(tmp_path / "again", pairs, NAMES, PALETTE)
    assert into_folder(file, FORMATS[name], again) == Taken(8, 2, ())
    for entry in pairs:
        one, two = folder.open(entry), again.open(entry)
        np.testing.assert_array_equal(one.instances, two.instances)
        assert one.classes == two.classes
    with pytest.raises(InputError, match="'p0' has objects already"):
        into_folder(file, FORMATS[name], again)


@pytest.mark.parametrize("name", FORMATS)
def test_a_class_that_the_folder_lacks_and_another_size_write_nothing(folder, pairs, tmp_path, name):
    file = tmp_path / "exchanged"
    FORMATS[name].write(file, of_folder(folder), NAMES, PALETTE)
    fewer = LabelFolder(tmp_path / "fewer", pairs, NAMES[:3], PALETTE[:3])
    with pytest.raises(InputError, match=r"'pole' is not among the classes car, person$"):
        into_folder(file, FORMATS[name], fewer)
    for entry in pairs:
        write_png(entry.visible, np.zeros((H, W + 1, 3), np.uint8))
        write_png(entry.infrared, np.zeros((H, W + 1), np.uint8))
    other = LabelFolder(tmp_path / "other", pairs, NAMES, PALETTE)
    with pytest.raises(InputError, match="is 11x13, the pair 11x14"):
        into_folder(file, FORMATS[name], other)
    assert not (fewer.out / "instances").exists()
    assert not (other.out / "instances").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_anew_holds_no_object_that_was_deleted(folder, pairs, tmp_path, name):
    file = tmp_path / "exchanged"
    assert [count for count, _ in export([(FORMATS[name], file)], folder)] == [8]
    folder.save(pairs[0], Drawing.empty((H, W)), "delete")
    for _ in range(2):  # the second time, too, it is as it was written
        assert [count for count, _ in export([(FORMATS[name], file)], folder)] == [4]
    again = LabelFolder(tmp_path / "again", pairs, NAMES, PALETTE)
    assert into_folder(file, FORMATS[name], again) == Taken(4, 1, ())
    assert not again.progress["p0"].objects


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_that_nobody_labelled_is_not_exported_one_that_is_done_and_empty_is(pairs, tmp_path, capsys, name):
    folder, file = LabelFolder(tmp_path / "out", pairs, NAMES, PALETTE), tmp_path / "exchanged"
    unsure = Drawing.empty((H, W))
    unsure.unsure, unsure.clicks = True, 1
    for drawing, written in ((None, 0), (unsure, 0), (Drawing(np.zeros((H, W), np.uint16), done=True), 1)):
        if drawing is not None:
            folder.save(pairs[1], drawing, "mark")
        assert [picture.name for picture in of_folder(folder)] == ["p1.png"][:written]
    folder.save(pairs[0], drawn(), "paint")
    assert [count for count, _ in export([(FORMATS[name], file)], folder)] == [4]
    given = ["--visible", str(tmp_path / "vi"), "--infrared", str(tmp_path / "ir"), "--out", str(tmp_path / "set")]
    form = name.removesuffix("-polygons")
    assert main(["data", "import", "--annotations", str(file), "--format", form, *given]) == 0
    told = capsys.readouterr().out
    assert "2 pairs labelled; " in told
    assert "1 pairs are not annotated and were left out, the first: p2\n" in told
    assert "1 pairs without an object: background alone" in told
    assert sorted(path.stem for path in (tmp_path / "set/labels").iterdir()) == ["p0", "p1"]


def test_a_drawing_that_was_cut_is_told_not_exported_as_nothing(folder, pairs):
    path = folder.instances_path(pairs[0].id)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"p0\.png: is no drawing of ours"):
        list(of_folder(LabelFolder(folder.out, pairs, NAMES, PALETTE)))


def test_a_path_behind_a_colon_begins_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/nobody")
    assert named("coco:~/x.json", "--export") == (FORMATS["coco"], Path("/nobody/x.json"))


@settings(deadline=None)
@given(masks)
def test_polygons_are_the_mask_and_do_not_overlap(mask):
    polygons = to_polygons(mask)
    parts = [from_polygons([one], *mask.shape).astype(int) for one in polygons]
    np.testing.assert_array_equal(sum(parts, np.zeros(mask.shape, int)), mask)


def test_polygons_worked_by_hand():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert to_polygons(ring, 10, 20) == [
        [10, 20, 11, 20, 11, 23, 10, 23],
        [11, 20, 13, 20, 13, 23, 11, 23, 11, 22, 12, 22, 12, 21, 11, 21],
    ]
    assert to_polygons(np.zeros((2, 2), bool)) == []


@pytest.mark.parametrize("name", ["coco", "coco-polygons"])
def test_pycocotools_reads_what_was_written(folder, tmp_path, name):
    FORMATS[name].write(tmp_path / "coco.json", of_folder(folder), NAMES, PALETTE)
    read = COCO(str(tmp_path / "coco.json"))
    for image in read.loadImgs(read.getImgIds()):
        rows = read.loadAnns(read.getAnnIds(image["id"]))
        whole = np.zeros((H, W), int)
        for row in rows:
            mask = read.annToMask(row)
            assert mask.sum() == row["area"]
            whole[mask > 0] = row["category_id"]
        entry = next(entry for entry in folder.entries if entry.visible.name == image["file_name"])
        np.testing.assert_array_equal(whole, folder.open(entry).labels)
    assert {row["name"] for row in read.loadCats(read.getCatIds())} == set(NAMES[1:])
    if name == "coco-polygons":
        assert all(isinstance(row["segmentation"], list) for row in read.loadAnns(read.getAnnIds()))


def test_label_studios_code_is_what_its_own_library_makes_of_the_mask():
    """By `encode_rle` of label_studio_sdk 2.1.2 (converter/brush.py)."""
    mask = np.array([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]], bool)
    theirs = [0, 0, 0, 48, 57, 27, 252, 96, 22, 255, 237, 128, 91, 255, 156, 0]
    assert encode(mask) == theirs
    np.testing.assert_array_equal(decode(theirs, (3, 4)), mask)
    literal = "".join(["0" * 29 + "100", "00111", "0010", "0011", "0111", "1111", "0", "00", "011"])
    literal += "00000000" * 3 + "10000000"  # four values of their own, not one four times
    code = list(int(literal.ljust(104, "0"), 2).to_bytes(13, "big"))
    assert decode(code, (1, 1)).tolist() == [[True]]


@given(masks)
def test_label_studios_code_is_the_mask(mask):
    np.testing.assert_array_equal(decode(encode(mask), mask.shape), mask)


def square():
    wanted = np.zeros((H, W), int)
    wanted[3:7, 2:8] = 3
    return wanted


CORNERS = [[2.0, 3.0], [8.0, 3.0], [8.0, 7.0], [2.0, 7.0]]


def coco(segmentation, **change):
    image = {"id": 7, "file_name": "somewhere\\p1.jpg", "height": H, "width": W}
    one = {"id": 1, "image_id": 7, "category_id": 5, "segmentation": segmentation}
    return json.dumps({"images": [image], "annotations": [one], "categories": [{"id": 5, "name": "pole"}], **change})


def cvat(shapes, name="p1.png"):
    image = f'<image id="0" name="{name}" width="{W}" height="{H}">{shapes}</image>'
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{image}</annotations>'


def labelme(**shape):
    head = {"imagePath": "..\\vi\\p1.png", "imageHeight": H, "imageWidth": W, "imageData": None}
    return json.dumps({**head, "version": "5.0.1", "shapes": [{"label": "pole", "group_id": None, **shape}]})


def label_studio(kind, value, image="/data/upload/3/0a1b2c3d-p1.png", **more):
    row = {"id": "x", "type": kind, "original_width": W, "original_height": H, "value": {kind: ["pole"], **value}}
    return json.dumps([{"data": {"image": image}, "annotations": [{"result": [{**row, **more}]}]}])


def percent(points):
    return [[100 * x / W, 100 * y / H] for x, y in points]


def mask_png():
    content = io.BytesIO()
    Image.fromarray(np.ones((4, 6), bool)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


THEIRS = {
    "coco: polygon": ("coco", coco([np.ravel(CORNERS).tolist()])),
    "coco: two that overlap": ("coco", coco([[2, 3, 6, 3, 6, 7, 2, 7], [4, 3, 8, 3, 8, 7, 4, 7]])),
    "coco: plain counts": ("coco", coco({"size": [H, W], "counts": [25, 4, 7, 4, 7, 4, 7, 4, 7, 4, 7, 4, 59]})),
    "cvat: polygon": ("cvat", cvat('<polygon label="pole" points="2,3;8,3;8.0,7;2,7" z_order="0"/>')),
    "cvat: box": ("cvat", cvat('<box label="pole" xtl="2" ytl="3" xbr="8" ybr="7"/><tag label="night"/>')),
    "cvat: turned box": ("cvat", cvat('<box label="pole" xtl="3" ytl="2" xbr="7" ybr="8" rotation="90.0"/>')),
    "cvat: mask": ("cvat", cvat('<mask label="pole" rle="0, 24" left="2" top="3" width="6" height="4"/>')),
    "cvat: z order": (
        "cvat",
        cvat(
            '<box label="pole" xtl="2" ytl="3" xbr="8" ybr="7" z_order="2"/>'
            '<box label="car" xtl="3" ytl="4" xbr="5" ybr="6" z_order="1"/>'
        ),
    ),
    "labelme: polygon": ("labelme", labelme(points=CORNERS, shape_type="polygon")),
    "labelme: without a type": ("labelme", labelme(points=CORNERS)),
    "labelme: rectangle": ("labelme", labelme(points=[[8, 7], [2, 3]], shape_type="rectangle")),
    "labelme: mask": ("labelme", labelme(points=[[2, 3], [7, 6]], shape_type="mask", mask=mask_png())),
    "label-studio: polygon": ("label-studio", label_studio("polygonlabels", {"points": percent(CORNERS)})),
    "label-studio: local file": (
        "label-studio",
        label_studio("polygonlabels", {"points": percent(CORNERS)}, "/data/local-files/?d=my%20pairs/p1.png"),
    ),
    "label-studio: rectangle": (
        "label-studio",
        label_studio(
            "rectanglelabels",
            {"x": 200 / W, "y": 300 / H, "width": 600 / W, "height": 400 / H, "rotation": 0},
        ),
    ),
    "label-studio: turned rectangle": (
        "label-studio",
        label_studio(
            "rectanglelabels",
            {"x": 800 / W, "y": 300 / H, "width": 400 / W, "height": 600 / H, "rotation": 90},
        ),
    ),
    "label-studio: brush": ("label-studio", label_studio("brushlabels", {"rle": encode(square() > 0)})),
}


@pytest.mark.parametrize("case", THEIRS)
def test_files_of_other_tools_are_read(pairs, tmp_path, case):
    name, content = THEIRS[case]
    (tmp_path / "theirs").write_text(content)
    folder = LabelFolder(tmp_path / "new", pairs, NAMES, PALETTE)
    taken = into_folder(tmp_path / "theirs", FORMATS[name], folder)
    assert taken == Taken(1, 1, ())
    np.testing.assert_array_equal(folder.open(pairs[1]).labels, square())


def test_a_circle_and_a_picture_that_is_not_wanted(pairs, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many/a.json").write_text(labelme(points=[[6, 5], [6, 8]], shape_type="circle"))
    (tmp_path / "many/b.json").write_text(labelme(points=[[6, 5], [6, 8]], shape_type="point").replace("p1", "other"))
    folder = LabelFolder(tmp_path / "new", pairs, NAMES, PALETTE)
    assert into_folder(tmp_path / "many", FORMATS["labelme"], folder) == Taken(1, 1, ("../vi/other.png",))
    y, x = np.mgrid[:H, :W] + 0.5
    found, away = folder.open(pairs[1]).labels == 3, np.hypot(x - 6, y - 5)
    assert found[away < 2.7].all()  # pycocotools rounds slanted edges its own way
    assert not found[away > 3.3].any()


BAD = {
    "coco: no json": ("coco", "{", "cannot be read as JSON"),
    "coco: no images": ("coco", coco([], images=None), "is no COCO file; expected images"),
    "coco: a list as an id": ("coco", coco([], categories=[{"id": [1], "name": "car"}]), "numbers and names"),
    "coco: no category": ("coco", coco([], categories=[]), "category_id 5 is not listed"),
    "coco: two categories of one id": (
        "coco",
        coco([], categories=[{"id": 5, "name": "car"}, {"id": 5, "name": "pole"}]),
        "lists the id 5 twice in categories",
    ),
    "coco: two images of one id": (
        "coco",
        coco([], images=[{"id": 7, "file_name": "p0.png"}, {"id": 7, "file_name": "p1.png"}]),
        "lists the id 7 twice in images",
    ),
    "coco: an image that is not listed": (
        "coco",
        coco([np.ravel(CORNERS).tolist()]).replace('"image_id": 7', '"image_id": "7"'),
        r"annotation 1: image_id '7' is not listed; expected an id of images \(first: 7\)",
    ),
    "coco: other pictures": (
        "coco",
        coco([CORNERS]).replace("p1.jpg", "x.jpg"),
        r"pictures is of these pairs; .* 'p0'",
    ),
    "coco: nonsense counts": ("coco", coco({"size": [H, W], "counts": "%%"}), "annotation 1: no mask"),
    "coco: too few counts": ("coco", coco({"size": [H, W], "counts": [3]}), "annotation 1: no mask"),
    "coco: counts of another size": ("coco", coco({"size": [5, 5], "counts": "1"}), "annotation 1: no mask"),
    "coco: nothing": ("coco", coco(None), "annotation 1: no mask"),
    "coco: far corner": ("coco", coco([[0, 0, 1e9, 0, 1e9, 1e9]]), "far outside of 13x11"),
    "coco: nan": ("coco", coco([[0, 0, float("nan"), 0, 3, 3]]), "not finite"),
    "cvat: no xml": ("cvat", "<annotations>", "cannot be read as XML"),
    "cvat: another root": ("cvat", "<html/>", "is no CVAT file; found <html>"),
    "cvat: entities": ("cvat", '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "document type"),
    "cvat: video": ("cvat", "<annotations><track/></annotations>", "CVAT for images"),
    "cvat: points": ("cvat", cvat('<points label="pole" points="1,1"/>'), "has points, which covers no pixels"),
    "cvat: short rle": ("cvat", cvat('<mask label="car" rle="3" left="0" top="0" width="2" height="2"/>'), "add up"),
    "cvat: outside": ("cvat", cvat('<mask label="car" rle="4" left="12" top="0" width="2" height="2"/>'), "inside of"),
    "cvat: no number": ("cvat", cvat('<mask label="car" rle="4" left="x" top="0" width="2" height="2"/>'), "'x'"),
    "cvat: one corner": ("cvat", cvat('<polygon label="car" points="1,1"/>'), "three corners"),
    "labelme: no shapes": ("labelme", "{}", "is no file of labelme"),
    "labelme: line": ("labelme", labelme(points=[[1, 1], [2, 2]], shape_type="line"), "covers no pixels"),
    "labelme: no png": ("labelme", labelme(points=[[1, 1]], shape_type="mask", mask="bm8="), "cannot be read"),
    "labelme: outside": ("labelme", labelme(points=[[9, 9]], shape_type="mask", mask=mask_png()), "are outside of"),
    "labelme: no points": ("labelme", labelme(points="no"), "cannot be read"),
    "label-studio: minimal": ("label-studio", '[{"image": "p1.png"}]', "is no list of tasks"),
    "label-studio: key points": ("label-studio", label_studio("keypointlabels", {}), "cannot be read; expected"),
    "label-studio: another size": (
        "label-studio",
        label_studio("brushlabels", {"rle": []}, original_width=5),
        "is 11x5, the pair 11x13",
    ),
    "label-studio: short": ("label-studio", label_studio("brushlabels", {"rle": [0, 0]}), "ends too early"),
    "label-studio: bomb": ("label-studio", label_studio("brushlabels", {"rle": [255] * 9}), "expected 572"),
    "label-studio: numbers of annotations": (
        "label-studio",
        '[{"data": {"image": "p1.png"}, "annotations": [12]}]',
        "is no list of tasks",
    ),
    "label-studio: two annotations": (
        "label-studio",
        json.dumps([{"data": {"image": "p1.png"}, "annotations": [{"result": []}] * 2}]),
        "has 2 annotations; keep one",
    ),
    "label-studio: two classes": (
        "label-studio",
        label_studio("polygonlabels", {"points": percent(CORNERS), "polygonlabels": ["car", "pole"]}),
        "expected one class",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_one_line_and_writes_nothing(pairs, tmp_path, case):
    name, content, words = BAD[case]
    (tmp_path / "bad").write_text(content)
    folder = LabelFolder(tmp_path / "new", pairs, NAMES, PALETTE)
    with pytest.raises(InputError, match=words) as caught:
        into_folder(tmp_path / "bad", FORMATS[name], folder)
    assert "\n" not in str(caught.value)
    assert not (folder.out / "instances").exists()


def test_the_command_exchanges_every_format_named_on_it(folder, tmp_path, capsys):
    parts = ["--visible", str(tmp_path / "vi"), "--infrared", str(tmp_path / "ir")]
    parts += ["--classes", str(tmp_path / "classes.yaml"), "--out"]
    files = [f"{name}:{tmp_path / name}" for name in FORMATS]
    assert main(["label", *parts, str(folder.out), "--export", *files, "--export-coco", str(tmp_path / "c.json")]) == 0
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "coco").read_bytes()
    for name, file in zip(FORMATS, files, strict=True):
        assert main(["label", *parts, str(tmp_path / f"from-{name}"), "--import", file]) == 0
        taken, there = (out / "labels/p0.png" for out in (tmp_path / f"from-{name}", folder.out))
        np.testing.assert_array_equal(np.asarray(Image.open(taken)), np.asarray(Image.open(there)))
    capsys.readouterr()
    assert main(["label", *parts, str(folder.out), "--export", *files]) == 0  # as written: may be replaced
    changed = next((tmp_path / "labelme").glob("*.json"))
    changed.write_text("drawn by somebody")
    (tmp_path / "coco").unlink()
    assert main(["label", *parts, str(folder.out), "--export", *files]) == 2
    assert "labelme: is there, and is not what" in capsys.readouterr().err
    assert changed.read_text() == "drawn by somebody"
    assert not (tmp_path / "coco").exists()
    assert main(["label", *parts, str(folder.out), "--export", "coco:new", "coco:new"]) == 2
    assert "was given twice" in capsys.readouterr().err
    assert main(["label", *parts, str(folder.out), "--import", f"coco:{tmp_path / 'nosuch'}"]) == 2
    assert "nosuch: no such file; check the path" in capsys.readouterr().err
    assert main(["label", *parts, str(folder.out), "--export", "yolo:here"]) == 2
    assert "expected FORMAT:FILE, FORMAT being one of coco, coco-polygons, cvat" in capsys.readouterr().err
    for text in ("coco", "coco:", ":x"):
        with pytest.raises(InputError, match="expected FORMAT:FILE"):
            named(text, "--import")
