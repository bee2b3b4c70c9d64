"""Prediction: the Python class, the files the command writes, and every kind of bad input a user can hand it."""

import io
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fusionsam.inference.device
from conftest import build_debug
from fusionsam.cli.main import main
from fusionsam.config.schema import preset
from fusionsam.data.infrared import InfraredOptions, to_heat
from fusionsam.data.pairs import read_pair
from fusionsam.data.splits import Entry
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.inference.memory import FreeMemory
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import read_prompts
from fusionsam.inference.selection import every_pair
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import Prompts
from fusionsam.weights.checkpoint import save_checkpoint

H, W = 97, 131


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    network = FusionSAMNetwork(preset("debug")).eval()
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "small", network, {"commit": "abc", "step": 7})


@pytest.fixture(scope="module")
def model(weights):
    return FusionSAM.from_pretrained(weights, device="cpu")


@pytest.fixture
def pair(tmp_path):
    scene = draw_scene(5, 1, (H, W))
    visible, infrared = scene.visible.permute(1, 2, 0).numpy(), scene.infrared[0].numpy()
    Image.fromarray(visible).save(tmp_path / "v.png")
    Image.fromarray(infrared).save(tmp_path / "i.png")
    return visible, infrared


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def test_paths_pictures_arrays_and_tensors_are_the_same_pair(model, pair, tmp_path):
    visible, infrared = pair
    forms = [
        (tmp_path / "v.png", str(tmp_path / "i.png")),
        (Image.fromarray(visible), Image.fromarray(infrared)),
        (visible, infrared),
        (visible.astype(np.float32) / 255, np.repeat(infrared[..., None], 3, 2).astype(np.float64) / 255),
        (torch.from_numpy(visible).permute(2, 0, 1), torch.from_numpy(infrared)),
        ((tmp_path / "v.png").read_bytes(), io.BytesIO((tmp_path / "i.png").read_bytes())),
    ]
    first, *others = [model.predict(*form) for form in forms]
    assert first.labels.shape == (H, W)
    for other in others:
        np.testing.assert_array_equal(first.labels, other.labels)
        np.testing.assert_allclose(first.fused.astype(int), other.fused.astype(int), atol=1)


def test_lists_of_pictures_give_what_each_pair_gives(model, pair, tmp_path):
    visible, infrared = pair
    mirrored = np.ascontiguousarray(visible[:, ::-1]), np.ascontiguousarray(infrared[:, ::-1])
    alone = [model.predict(*pair), model.predict(*mirrored)]
    for other in (
        model.predict([tmp_path / "v.png", mirrored[0]], [str(tmp_path / "i.png"), mirrored[1]]),
        model.predict([visible, Image.fromarray(mirrored[0])], (infrared, mirrored[1])),
    ):
        assert [found.labels.tolist() for found in other] == [found.labels.tolist() for found in alone]
    (thermal,) = model.predict(None, [tmp_path / "i.png"])
    np.testing.assert_array_equal(thermal.labels, model.predict(None, infrared).labels)


@pytest.mark.parametrize("name", ["v.heic", "v.tif", "v.jpg"])
def test_a_file_in_memory_is_read_as_the_file(model, pair, tmp_path, name):
    if name == "v.heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    Image.fromarray(pair[0]).save(tmp_path / name)
    with (tmp_path / name).open("rb") as file:
        file.read(7)  # wherever it stands
        found = model.preprocess(file, None)[0]
    torch.testing.assert_close(found, model.preprocess(tmp_path / name, None)[0])


@pytest.mark.parametrize(
    ("visible", "infrared", "said"),
    [
        (b"", None, r"visible: is empty \(0 bytes\)"),
        (b"no picture", None, "visible: is not a readable image"),
        (None, io.BytesIO(b"\x89PNG\r\n\x1a\n broken"), "infrared: is not a readable image|infrared: damaged"),
        (io.StringIO("text"), None, "visible: the open file gives str, expected bytes"),
        ({"path": "v.png"}, None, "visible: found dict; expected a path, bytes, an open file"),
        ([[1, 2], [3]], None, "visible: rows of several lengths"),
        (["a.png"], ["b.png", "c.png"], "visible, infrared: 1 and 2 pictures; expected as many"),
        ([], [], "an empty list"),
        (["a.png"], "b.png", "one is a list of pictures and one a picture"),
        ([np.zeros((97, 131, 3), np.uint8), "missing.png"], None, "pair 2 of 2: missing.png: no such file"),
        ("v" * 5000 + ".png", None, "^v{200}: cannot be read .*check the path"),
        (None, "i" * 5000 + ".jpg", "^i{200}: cannot be read .*check the path"),
        (b"\0\0\0\x20ftypisom and a film", None, "visible: is not a readable image"),
    ],
)
def test_pictures_that_are_none_get_one_line(model, visible, infrared, said):
    with pytest.raises(InputError, match=said) as told:
        model.predict(visible, infrared)
    assert "\n" not in str(told.value)
    assert "fusionsam-" not in str(told.value)  # no name of a temporary file


def test_a_picture_that_ends_early_is_named(model, pair):
    stored = io.BytesIO()
    Image.fromarray(pair[0]).save(stored, format="PNG")
    for images, name in (((0, None), "visible"), ((None, 0), "infrared")):
        half = Image.open(io.BytesIO(stored.getvalue()[: len(stored.getvalue()) // 2]))
        with pytest.raises(InputError, match=f"{name}: damaged or truncated image"):
            model.predict(*(half if image == 0 else None for image in images))


def test_confidence_is_the_probability_of_the_chosen_class(model, pair):
    ready = model.preprocess(*pair)
    output = model.infer(*ready)
    result = model.postprocess(output)
    probability, labels = output.logits.softmax(1).max(1)
    np.testing.assert_array_equal(result.labels, labels[0].numpy())
    np.testing.assert_allclose(result.confidence, probability[0].numpy(), atol=1e-6)
    shares = [entry["share"] for entry in result.summary()["classes"].values()]
    assert sum(shares) == pytest.approx(100, abs=0.01)


def test_forms_that_would_be_misread_are_refused_or_understood(model, pair):
    visible, infrared = pair
    bgr = np.ascontiguousarray(visible[..., ::-1])
    np.testing.assert_array_equal(model.predict(bgr[..., ::-1], infrared).labels, model.predict(*pair).labels)
    holes = np.full((H, W), np.nan, np.float32)
    with pytest.raises(InputError, match="infrared"):
        model.predict(visible, holes)


def test_number_types_of_every_kind_are_read_and_bool_is_black_and_white(model, pair):
    visible, infrared = pair
    plain = model.preprocess(visible / np.float32(255), infrared / np.float32(255))
    for kind in (">f4", ">f8", "<f8", np.longdouble):
        for one, two in zip(plain, model.preprocess(*((v / 255).astype(kind) for v in pair)), strict=True):
            torch.testing.assert_close(one, two)
    assert torch.equal(model.preprocess(None, infrared.astype(">u2"))[1], model.preprocess(None, infrared * 1.0)[1])
    hot = infrared > 128
    wanted = torch.from_numpy(hot)[None, None].float()
    for picture in (hot, torch.from_numpy(hot), Image.fromarray(hot)):
        assert torch.equal(model.preprocess(None, picture)[1], wanted)
        assert torch.equal(model.preprocess(picture, None)[0], wanted.expand(-1, 3, -1, -1))
    assert np.array_equal(to_heat(hot).pixels, hot * np.uint8(255))
    premultiplied = model.preprocess(*[Image.new("La", (W, H), (90, 255))] * 2)
    assert all(bool((image == 90 / 255).all()) for image in premultiplied)
    for empty in (np.zeros((0, 0), np.uint8), torch.zeros(1, 0, 5), Image.new("L", (0, 5))):
        for name, given in (("infrared", (None, empty)), ("visible", (empty, None))):
            with pytest.raises(InputError, match=rf"^{name}: found shape \(.*\), which holds no pixel"):
                model.predict(*given)


def test_scales_masks_and_prompts_are_taken_as_arrays_or_refused_in_one_line(model, pair):
    labels = model.predict(*pair, scales=(1, 1.25)).labels
    for scales in (np.array([1, 1.25]), torch.tensor([1, 1.25])):
        assert np.array_equal(model.predict(*pair, scales=scales).labels, labels)
    assert np.array_equal(model.predict(*pair, scales=1.0).labels, model.predict(*pair).labels)
    for wrong in ("x", None, [[1.0]], [], 0.0):
        with pytest.raises(InputError, match=r"^scales .*expected factors above 0"):
            model.predict(*pair, scales=wrong)

    covered = np.ones((2, H, W), bool)
    covered[1, :, :40] = False
    wanted = model.predict(*pair, covered=torch.from_numpy(covered)).confidence
    for given in (covered, covered.astype(np.uint8)):
        assert np.array_equal(model.predict(*pair, covered=given).confidence, wanted)
        assert np.array_equal(model.encode(*pair, covered=given).predict().confidence, wanted)
    for wrong, said in ((covered[0], rf"shape \({H}, {W}\)"), (covered[:, :9], r"shape \(2, 9"), ("x", "str")):
        for entry in (model.predict, model.encode):
            with pytest.raises(InputError, match=f"^covered: found {said}"):
                entry(*pair, covered=wrong)

    mask = torch.randn(1, 1, 24, 32)
    one = model.predict(*pair, Prompts(mask=mask)).confidence
    assert np.array_equal(model.predict(*pair, Prompts(mask=mask.double().numpy())).confidence, one)
    with pytest.raises(InputError, match=r"^prompts\.mask: found torch\.int64, expected logits"):
        model.predict(*pair, Prompts(mask=mask.long()))
    points, on = np.array([[[600.0, 50]]], ">f8"), np.array([[1]])
    with pytest.raises(InputError, match=rf"^prompts\.points: 600, 50 lies outside of the picture of {W}x{H} pixels"):
        model.predict(*pair, Prompts(points, on))
    with pytest.raises(InputError, match=r"^prompts\.boxes: 600, 50 lies outside"):
        model.predict(*pair, Prompts(boxes=np.array([[[5.0, 5, 600, 50]]])))
    padded = Prompts(np.concatenate([points, points * 0 + 9], 1), np.array([[-1, 1]]))
    assert model.predict(*pair, padded).labels.shape == (H, W)  # padding may stand anywhere


def test_four_channel_files_are_both_images(model, pair, weights, tmp_path):
    Image.fromarray(np.dstack(pair), "RGBA").save(tmp_path / "four.png")
    assert predict("--rgbt", tmp_path / "four.png", "--out", tmp_path / "o", "--weights", weights) == 0
    expected = model.predict(*pair)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "o" / "four_labels.png")), expected.labels)
    assert predict("--rgbt", tmp_path / "four.png", "--visible", tmp_path / "v.png", "--out", tmp_path) == 2


def test_other_weights_of_the_same_name_are_not_taken_for_finished(pair, weights, tmp_path, capsys):
    torch.manual_seed(9)
    save_checkpoint(tmp_path / "small", FusionSAMNetwork(preset("debug")), {"commit": "abc", "step": 7})
    for folder in (weights, tmp_path / "small"):
        assert predict("--visible", tmp_path / "v.png", "--out", tmp_path / "o", "--weights", folder) == 0
        assert "1 pair " in capsys.readouterr().out


def test_deep_pictures_in_memory_are_read_as_files_are(model, pair, tmp_path):
    visible, infrared = pair
    counts = infrared.astype(np.uint16) * 13 + 21000
    counts[:30] = 0  # nodata
    celsius = np.where(counts > 0, counts / 100 - 200, np.nan).astype(np.float32)
    tifffile.imwrite(tmp_path / "counts.tif", counts)
    tifffile.imwrite(tmp_path / "celsius.tif", celsius)
    expected = model.preprocess(visible, tmp_path / "counts.tif")[1]
    assert expected.max() == 1
    forms = (counts, Image.fromarray(counts), torch.from_numpy(counts.astype(np.int32)), counts.astype(np.int64))
    for form in (*forms, tmp_path / "celsius.tif", celsius, Image.fromarray(celsius), torch.from_numpy(celsius)):
        torch.testing.assert_close(model.preprocess(None, form)[1], expected, atol=1.01 / 255, rtol=0)
    told = model.predict(visible, counts).input
    assert told["range"]["nodata"] == [0.0]
    assert told["range"]["low"] > 20000
    fixed = model.preprocess(None, counts, InfraredOptions(limits=(20000, 30000)))[1]
    torch.testing.assert_close(fixed[0, 0, 30:], torch.from_numpy((counts[30:] - 20000.0) / 10000), atol=0.003, rtol=0,
                               check_dtype=False)  # fmt: skip
    deep = np.full((H, W, 3), 4095, np.uint16)
    assert model.preprocess(deep, None)[0].min() == 1


def test_values_outside_of_every_range_are_refused_by_name(model, pair):
    with pytest.raises(InputError, match=r"visible: .*outside of \[0, 255\]"):
        model.predict(pair[0].astype(np.float32) - 300, None)
    with pytest.raises(InputError, match=r"visible: .*1 or 3 channels"):
        model.predict(np.zeros((H, W, 5), np.uint8), None)


def test_command_writes_what_python_gives(model, pair, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        predict("--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png", "--out", out, "--weights", weights)
        == 0
    )
    expected = model.predict(*pair)
    np.testing.assert_array_equal(np.array(Image.open(out / "v_labels.png")), expected.labels)
    np.testing.assert_array_equal(np.array(Image.open(out / "v_fused.png")), expected.fused)
    overlay = Image.open(out / "v_overlay.png")
    assert overlay.width >= W
    assert overlay.height > H  # the legend stands below
    stored = json.loads((out / "v.json").read_text())
    assert stored["weights"] == "small"
    assert stored["prompts"]["source"] == "self"
    assert stored["seconds"] > 0
    shown = expected.summary()["classes"]
    assert {k: v["share"] for k, v in stored["classes"].items()} == {k: v["share"] for k, v in shown.items()}
    assert not [p for p in out.iterdir() if "part" in p.name]


def test_folders_are_resumed_and_redone_only_when_asked(pair, weights, tmp_path, capsys):
    for side, image in zip(("a", "b"), pair, strict=True):
        (tmp_path / side).mkdir()
        for name in ("one", "two"):
            Image.fromarray(image).save(tmp_path / side / f"{name}.png")
    flags = ("--visible", tmp_path / "a", "--infrared", tmp_path / "b", "--out", tmp_path / "o", "--weights", weights)
    assert predict(*flags) == 0
    assert "2 pairs" in capsys.readouterr().out
    before = (tmp_path / "o" / "one_fused.png").stat().st_mtime_ns
    (tmp_path / "o" / "two.json").write_text("{")  # as a kill would leave an older version's file
    assert predict(*flags) == 0
    assert "1 pair " in capsys.readouterr().out
    assert (tmp_path / "o" / "one_fused.png").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "o" / "two.json").read_text())["name"] == "two"
    assert predict(*flags, "--prompts", "none") == 0
    assert "2 pairs" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "one.json").read_text())["prompts"]["source"] == "none"


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"v.json": b'{"shapes": []}'}, "v.json: was not written by predict"),
        ({"v.json": b"[1]"}, "v.json: was not written by predict"),
        ({"v.json": b'{"run": "abc"}'}, "v.json: was not written by predict"),
        ({"v.json": b'{"run": {"visible": 5}}'}, "v.json: was not written by predict"),
        ({"v_labels.png": b"somebody's labels"}, "v_labels.png: is there, and no v.json of ours"),
    ],
)
def test_files_of_other_people_are_not_overwritten_unless_asked(pair, weights, tmp_path, capsys, there, said):
    (tmp_path / "o").mkdir()
    for name, content in there.items():
        (tmp_path / "o" / name).write_bytes(content)
    flags = ("--visible", tmp_path / "v.png", "--out", tmp_path / "o", "--weights", weights)
    assert predict(*flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "choose another --out, or --overwrite" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == there
    assert predict(*flags, "--overwrite") == 0
    assert json.loads((tmp_path / "o" / "v.json").read_text())["name"] == "v"


def test_no_result_replaces_an_input(pair, weights, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    Image.fromarray(pair[0]).save(tmp_path / "d" / "a.png")
    Image.fromarray(pair[1]).save(tmp_path / "d" / "a_labels.png")
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    flags = ("--visible", tmp_path / "d" / "a.png", "--infrared", tmp_path / "d" / "a_labels.png")
    assert predict(*flags, "--out", tmp_path / "d", "--weights", weights, "--overwrite") == 2
    assert "a_labels.png: would be overwritten by a result of that name" in capsys.readouterr().err
    assert predict("--visible", tmp_path / "d", "--out", tmp_path / "e" / ".." / "d", "--weights", weights) == 2
    assert "is the folder of the inputs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before


def test_labels_to_train_with_leave_out_what_is_uncertain(pair, weights, tmp_path, capsys):
    flags = ("--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png", "--weights", weights)
    assert predict(*flags, "--out", tmp_path / "all", "--confidence-map") == 0
    labels = np.asarray(Image.open(tmp_path / "all" / "v_labels.png"))
    confidence = FusionSAM.from_pretrained(weights).predict(tmp_path / "v.png", tmp_path / "i.png").confidence
    middle = float(np.median(confidence))
    assert predict(*flags, "--out", tmp_path / "sure", "--min-confidence", middle) == 0
    kept = np.asarray(Image.open(tmp_path / "sure" / "v_labels.png"))
    np.testing.assert_array_equal(kept, np.where(confidence < middle, 255, labels))
    assert 0.3 < (kept == 255).mean() < 0.7
    told = json.loads((tmp_path / "sure" / "v.json").read_text())
    assert told["unknown_share"] + sum(found["share"] for found in told["classes"].values()) == pytest.approx(
        100, abs=0.01
    )
    assert told["unknown_share"] == pytest.approx(100 * (kept == 255).mean(), abs=0.01)
    overlays = [np.asarray(Image.open(tmp_path / name / "v_overlay.png"))[:H, :W] for name in ("all", "sure")]
    assert (overlays[0] != overlays[1]).any(-1)[kept == 255].any()  # nothing is drawn over what will not be taught
    # finished with another threshold is not finished
    capsys.readouterr()
    assert predict(*flags, "--out", tmp_path / "sure") == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sure" / "v_labels.png")), labels)
    assert predict(*flags, "--out", tmp_path / "sure", "--min-confidence", "1.5") == 2
    assert "--min-confidence 1.5: expected a probability" in capsys.readouterr().err
    assert predict(*flags, "--out", tmp_path / "film", "--video", "--min-confidence", "0.5") == 2
    assert "--min-confidence, --flip or --scales; leave them out" in capsys.readouterr().err


def test_views_average_probabilities_and_keep_the_picture(pair, weights, tmp_path, capsys):
    model = FusionSAM.from_pretrained(weights, device="cpu")
    model.temperature = 1.7
    images = model.preprocess(tmp_path / "v.png", tmp_path / "i.png")
    larger = [torch.nn.functional.interpolate(x, (146, 196), mode="bilinear", antialias=True) for x in images]
    parts = []
    for one, two in (images, larger):
        for mirrored in (False, True):
            logits = model.infer(*((x.flip(-1) if mirrored else x) for x in (one, two))).logits
            logits = torch.nn.functional.interpolate(logits, (H, W), mode="bilinear", align_corners=False)
            parts.append(((logits.flip(-1) if mirrored else logits) / 1.7).softmax(1)[0])
    mean = torch.stack(parts).mean(0)
    plain = model.predict(tmp_path / "v.png", tmp_path / "i.png")
    viewed = model.predict(tmp_path / "v.png", tmp_path / "i.png", scales=(1, 1.5), flip=True)
    np.testing.assert_allclose(viewed.confidence, mean.max(0).values.numpy(), atol=1e-5)
    sure = (mean.topk(2, 0).values.diff(dim=0)[0].abs() > 1e-4).numpy()
    np.testing.assert_array_equal(viewed.labels[sure], mean.argmax(0).numpy()[sure])
    np.testing.assert_array_equal(viewed.fused, plain.fused)
    assert (viewed.confidence != plain.confidence).any()
    flags = ("--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png", "--weights", weights)
    assert predict(*flags, "--out", tmp_path / "o") == 0
    assert predict(*flags, "--out", tmp_path / "o", "--scales", "1", "1.5", "--flip") == 0
    viewed = FusionSAM.from_pretrained(weights).predict(tmp_path / "v.png", tmp_path / "i.png", None, (1, 1.5), True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o" / "v_labels.png")), viewed.labels)
    turned = model.predict(tmp_path / "v.png", tmp_path / "i.png", scales=(1.5, 1), flip=True)
    np.testing.assert_array_equal(turned.fused, plain.fused)
    np.testing.assert_allclose(turned.confidence, mean.max(0).values.numpy(), atol=1e-5)
    alone = model.predict(tmp_path / "v.png", None, flip=True).confidence
    assert alone.shape == (H, W)
    assert (alone != model.predict(tmp_path / "v.png", None).confidence).any()
    for wrong, why in (("1 nan", "expected factors above 0"), ("1 5", "up to 4"), ("1.5", "give 1 with them")):
        assert predict(*flags, "--out", tmp_path / "o", "--scales", *wrong.split()) == 2
        assert why in capsys.readouterr().err
    limit = model.config.max_side / max(H, W)
    told = rf"^scales 4: enlarges {H}x{W} pixels beyond the {model.config.max_side} a side .* at most {limit:.3g}$"
    with pytest.raises(InputError, match=told):
        model.predict(tmp_path / "v.png", tmp_path / "i.png", scales=(1, 4))
    with pytest.raises(InputError, match="both None; give at least one"):
        model.predict(None, None)
    with pytest.raises(InputError, match="pixels of one view"):
        model.predict(
            tmp_path / "v.png", tmp_path / "i.png", Prompts(boxes=torch.tensor([[[1, 1, 9, 9.0]]])), flip=True
        )
    assert predict(*flags, "--out", tmp_path / "film", "--video", "--scales", "1.5") == 2
    assert "--flip or --scales; leave them out" in capsys.readouterr().err


def test_as_trained_leaves_out_what_calibrate_fitted(pair, weights, tmp_path, capsys):
    calibrated = tmp_path / "calibrated"
    calibrated.mkdir()
    for file in weights.iterdir():
        (calibrated / file.name).write_bytes(file.read_bytes())
    card = json.loads((calibrated / "training.json").read_text())
    card["class_offsets"] = {"offsets": {"person": 50.0}}
    (calibrated / "training.json").write_text(json.dumps(card))
    flags = ("--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png")
    maps = {}
    for name, source, more in (
        ("plain", weights, ()),
        ("with", calibrated, ()),
        ("without", calibrated, ("--as-trained",)),
    ):
        assert predict(*flags, "--weights", source, "--out", tmp_path / name, *more) == 0
        maps[name] = np.asarray(Image.open(tmp_path / name / "v_labels.png"))
    person = preset("debug").classes.index("person")
    assert (maps["with"] == person).all()
    np.testing.assert_array_equal(maps["without"], maps["plain"])
    assert predict(*flags, "--out", tmp_path / "x", "--as-trained", "--backend", "onnx") == 2
    assert "--as-trained: what calibrate fitted is inside an export" in capsys.readouterr().err


def test_a_file_of_four_channels_is_read_as_its_two_pictures_are(weights, tmp_path):
    sample = draw_scene(5, 2, (96, 128))
    heat = 255 - sample.infrared[0].numpy()
    rgbt = np.dstack([sample.visible.permute(1, 2, 0).numpy(), heat])
    Image.fromarray(rgbt).save(tmp_path / "four.png")
    Image.fromarray(rgbt[..., :3]).save(tmp_path / "v.png")
    Image.fromarray(heat).save(tmp_path / "i.png")
    one, two = (
        read_pair(Entry("x", rgbt=tmp_path / "four.png")),
        read_pair(Entry("x", tmp_path / "v.png", tmp_path / "i.png")),
    )
    assert torch.equal(one.infrared, two.infrared)
    assert torch.equal(one.infrared[0], torch.from_numpy(heat))  # 8 bits stay as they are
    assert one.facts["infrared"]["polarity"] == two.facts["infrared"]["polarity"]
    assert "polarity" in {notice.kind for notice in two.notices}
    assert {notice.kind for notice in one.notices} == {notice.kind for notice in two.notices}


def test_an_interrupted_rerun_leaves_the_earlier_results_and_nothing_else(pair, weights, tmp_path, monkeypatch):
    both = ("--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png")
    rest = ("--out", tmp_path / "o", "--weights", weights)
    assert predict(*both, *rest, "--confidence-map") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    write, written = Path.write_bytes, []

    def interrupted(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        assert predict(*both, *rest, "--as-trained", "--prompts", "none") == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before
    assert predict(*both[:2], *rest) == 2  # of the pair, which nothing would tell of
    assert predict(*both, *rest, "--as-trained", "--prompts", "none") == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    # the confidence map of the earlier run would not be of these pictures
    assert sorted(after) == ["v.json", "v_fused.png", "v_labels.png", "v_overlay.png"]
    assert json.loads(after["v.json"])["run"]["prompts"] == "none"


def test_a_run_killed_while_it_puts_results_in_their_places_goes_on(pair, weights, tmp_path, monkeypatch):
    flags = ("--visible", tmp_path / "v.png", "--out", tmp_path / "o", "--weights", weights)
    replace, moved = os.replace, []

    def killed(source, target):
        if target.parent == tmp_path / "o":
            if len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("fusionsam.inference.files.os.replace", killed)
        assert predict(*flags) == 130
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["v.json", "v_fused.png"]
    assert predict(*flags) == 0
    assert json.loads((tmp_path / "o" / "v.json").read_text())["classes"]


def test_prompts_are_as_the_weights_were_configured_unless_asked(pair, tmp_path):
    config = preset("debug")
    config.prompts.mode = "none"
    save_checkpoint(tmp_path / "mute", FusionSAMNetwork(config), {})
    flags = ("--visible", tmp_path / "v.png", "--out", tmp_path / "o", "--weights", tmp_path / "mute")
    for more, source in (([], "none"), (["--prompts", "self"], "self")):
        assert predict(*flags, *more) == 0
        assert json.loads((tmp_path / "o" / "v.json").read_text())["prompts"]["source"] == source


def test_only_what_is_whole_and_of_these_files_counts_as_done(pair, weights, tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pair[0]).save(tmp_path / folder / "v.png")
    for folder in ("one", "two"):
        os.utime(tmp_path / folder / "v.png", (1, 1))  # as an archive unpacks them: equal size and time
    rest = ("--out", tmp_path / "o", "--weights", weights)
    assert predict("--visible", tmp_path / "one", *rest) == 0
    (tmp_path / "o" / "v_labels.png").unlink()
    assert predict("--visible", tmp_path / "one", *rest) == 0
    assert "1 pair " in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "o" / "v_labels.png").is_file()
    assert predict("--visible", tmp_path / "two", *rest) == 2
    error = capsys.readouterr().err
    assert f"is of {tmp_path / 'one' / 'v.png'}, not of {tmp_path / 'two' / 'v.png'}" in error
    assert predict("--visible", tmp_path / "two", *rest, "--overwrite") == 0


@pytest.mark.parametrize("left_out", ["--visible", "--infrared"])
def test_one_modality_may_be_left_out(pair, weights, tmp_path, left_out):
    both = {"--visible": tmp_path / "v.png", "--infrared": tmp_path / "i.png"}
    del both[left_out]
    ((flag, path),) = both.items()
    assert predict(flag, path, "--out", tmp_path / "o", "--weights", weights) == 0
    fused = np.array(Image.open(tmp_path / "o" / f"{path.stem}_fused.png")).astype(int)
    assert fused.shape == (H, W, 3)
    if left_out == "--visible":
        assert np.abs(fused - fused.mean(-1, keepdims=True)).max() <= 1  # nothing can have given it colour


def test_user_prompts_from_a_file_steer_and_are_recorded(pair, weights, tmp_path):
    file = tmp_path / "clicks.json"
    file.write_text(json.dumps({"v": {"points": [[60, 40], [3, 5]], "labels": [1, 0], "boxes": [[20, 20, 90, 80]]}}))
    assert (
        predict(
            "--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png", "--out", tmp_path / "o",
            "--weights", weights, "--prompts", file,
        )
        == 0
    )  # fmt: skip
    stored = json.loads((tmp_path / "o" / "v.json").read_text())["prompts"]
    assert stored == {
        "source": "user", "points": [[60.0, 40.0], [3.0, 5.0]], "labels": [1, 0], "boxes": [[20.0, 20.0, 90.0, 80.0]]
    }  # fmt: skip
    file.write_bytes(
        '\ufeff{"Straße": {"points": [[6, 4]]}}'.encode()
    )  # UTF-8 whatever the locale, as Windows saves it
    call = f"read_prompts(Path({str(file)!r}), 'Stra\\xdfe', (9, 9))"
    code = f"from fusionsam.inference.prompts import *; print({call}.points)"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "6., 4." in told.stdout


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ('{"points": []}', "expected points and labels, or boxes"),
        ('{"points": [[1, 2, 3]]}', "2 numbers each"),
        ('{"points": [["a", 2]]}', "2 numbers each"),
        ('{"points": [[500, 2]]}', "outside of its 131x97"),
        ('{"boxes": [[-1, 0, 5, 5]]}', "outside of its 131x97"),
        ('{"points": [[1, 2]], "labels": [2]}', "one 0 or 1"),
        ('{"points": [[1, 2]], "labels": 1}', "one 0 or 1"),
        ('{"points": [[1, 2]], "labels": [[1]]}', "one 0 or 1"),
        ('{"boxes": [[9, 9, 5, 5]]}', "x0 <= x1"),
        ('{"other": {"points": [[1, 2]]}}', "no prompts for 'v'"),
        ('{"points": [[1, 2]], "label": [1]}', "expected points"),
    ],
)
def test_bad_prompt_files(tmp_path, content, complaint):
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(InputError, match=complaint):
        read_prompts(file, "v", (H, W))


def test_prompts_object_through_python(model, pair):
    own = Prompts(points=torch.tensor([[[60.0, 40.0]]]), point_labels=torch.tensor([[1]]), source="user")
    assert model.predict(*pair, prompts=own).prompts.source == "user"
    assert model.predict(*pair, prompts="none").prompts.points is None


def test_prompts_as_a_dictionary_are_those_of_a_file(model, pair):
    given = {"points": [[60, 40]], "boxes": [[10, 20, 80, 90]]}
    found = model.predict(*pair, prompts=given).prompts
    assert (found.source, found.points.tolist(), found.boxes.tolist()) == ("user", [[[60, 40]]], [[[10, 20, 80, 90]]])
    arrays = {"points": np.array([[60, 40]]), "labels": np.array([1]), "boxes": np.array([[10, 20, 80, 90]])}
    batch = Prompts(np.array([[[60.0, 40.0]]]), np.array([[1]]), np.array([[[10.0, 20, 80, 90]]]))
    expected = model.predict(*pair, prompts=given).labels
    for same in (arrays, batch, {"points": ((60, 40),), "labels": (1,), "boxes": [np.array([10, 20, 80, 90])]}):
        np.testing.assert_array_equal(model.predict(*pair, prompts=same).labels, expected)
    with pytest.raises(InputError, match="prompts: points of this pair lie outside of its 131x97 pixels"):
        model.predict(*pair, prompts={"points": [[60, 97]]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (7, "prompts: found int; expected self, none"),
        ([[60, 40]], "prompts: found list; expected"),
        (Prompts(points=[[[1.0, 2.0]]], point_labels=torch.tensor([[1]])), r"prompts\.points: found list, expected a"),
        (
            Prompts(torch.tensor([[[1.0, float("nan")]]]), torch.tensor([[1]])),
            r"prompts\.points: holds values that are",
        ),
        (Prompts(boxes=torch.full((1, 1, 4), float("inf"))), r"prompts\.boxes: holds values that are"),
        (Prompts(torch.ones(2, 1, 2), torch.ones(2, 1, dtype=torch.long)), "2 rows of prompts for 1"),
        (Prompts(torch.ones(1, 1, 2), torch.full((1, 1), 7)), r"prompts\.point_labels: found 7"),
    ],
)
def test_prompts_that_are_none_are_refused(model, pair, given, said):
    with pytest.raises(InputError, match=said):
        model.predict(*pair, prompts=given)


def test_bfloat16_gives_nearly_the_same_and_is_recorded(pair, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fusionsam.inference.device, "knows_bfloat16", lambda device: False)
    files = ["--visible", tmp_path / "v.png", "--infrared", tmp_path / "i.png"]
    common = [*files, "--weights", weights, "--device", "cpu", "--out", tmp_path / "o"]
    assert predict(*common) == 0
    run = json.loads((tmp_path / "o" / "v.json").read_text())["run"]
    assert "precision" not in run
    assert "bfloat16" not in capsys.readouterr().err
    assert predict(*common, "--precision", "bf16") == 0  # other settings: it is not taken for finished
    assert "this cpu has no instructions for bfloat16; fp32 takes less time" in capsys.readouterr().err
    assert json.loads((tmp_path / "o" / "v.json").read_text())["run"] == {**run, "precision": "bf16"}
    one, two = (FusionSAM.from_pretrained(weights, device="cpu", precision=p) for p in ("fp32", "bf16"))
    exact, near = (model.predict(tmp_path / "v.png", tmp_path / "i.png") for model in (one, two))
    assert near.confidence.dtype == np.float32
    assert near.prompts.mask.dtype == torch.float32
    assert (exact.labels == near.labels).mean() > 0.97
    assert 0 < np.abs(exact.confidence - near.confidence).max() < 0.1
    session = two.encode(tmp_path / "v.png", tmp_path / "i.png")
    np.testing.assert_array_equal(session.predict().labels, near.labels)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"precision": "fp16"}, "precision fp16: is for GPUs; on a CPU take bf16 or fp32"),
        ({"precision": "int4"}, "precision 'int4': expected fp32, bf16, fp16"),
        ({"precision": "bf16", "backend": "onnx"}, "precision bf16: is torch's"),
    ],
)
def test_precisions_that_are_none_are_refused(weights, more, said):
    with pytest.raises(InputError, match=said):
        FusionSAM.from_pretrained(weights, device="cpu", **more)


def test_a_misspelt_backend_is_not_pytorch(weights):
    with pytest.raises(InputError, match="backend 'onxx': expected torch or onnx"):
        FusionSAM.from_pretrained(weights, "cpu", "onxx")


def test_a_pil_picture_is_upright_as_its_file(model, pair, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pair[0]).save(tmp_path / "turned.png", exif=exif)
    from_file = model.predict(tmp_path / "turned.png", None)
    assert from_file.labels.shape == (W, H)
    np.testing.assert_array_equal(model.predict(Image.open(tmp_path / "turned.png"), None).fused, from_file.fused)
    with pytest.raises(InputError, match="visible: 4 channels that are no transparency"):
        model.predict(Image.fromarray(np.dstack(pair), "RGBA"), None)


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def bad_inputs():
    def write(name, content):
        def make(folder):
            (folder / name).write_bytes(content)
            return folder / name

        return make

    def truncated(folder):
        whole = (folder / "v.png").read_bytes()
        (folder / "half.png").write_bytes(whole[: len(whole) // 2])
        return folder / "half.png"

    def other_size(folder):
        Image.new("RGB", (W + 2, H)).save(folder / "wide.png")
        return folder / "wide.png"

    def five_channels(folder):
        tifffile.imwrite(
            folder / "five.tif", np.zeros((5, H, W), np.uint8), photometric="minisblack", planarconfig="separate"
        )
        return folder / "five.tif"

    def tiny(folder):
        Image.new("RGB", (20, 20)).save(folder / "tiny.png")
        return folder / "tiny.png"

    return [
        pytest.param(lambda folder: folder / "gone.png", ["gone.png", "no such file"], id="missing"),
        pytest.param(write("text.png", b"this is text\n"), ["text.png"], id="text"),
        pytest.param(write("empty.png", b""), ["empty.png", "0 bytes"], id="empty"),
        pytest.param(truncated, ["half.png"], id="truncated"),
        pytest.param(other_size, ["wide.png", "differ"], id="sizes differ"),
        pytest.param(five_channels, ["five.tif", "5"], id="five channels"),
        pytest.param(write("bomb.png", png_header(30000, 30000)), ["bomb.png", "900000000"], id="huge header"),
        pytest.param(tiny, ["64"], id="too small"),
    ]


@pytest.mark.parametrize(("make", "said"), bad_inputs())
def test_bad_images_get_one_line_and_exit_code_2(pair, weights, tmp_path, capsys, make, said):
    path = make(tmp_path)
    flags = ["--visible", path, "--out", tmp_path / "o", "--weights", weights]
    if path.name not in ("tiny.png",):
        flags += ["--infrared", tmp_path / "i.png"]
    assert predict(*flags) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "Traceback" not in error
    for part in said:
        assert part in error
    assert not list((tmp_path / "o").glob("*")) if (tmp_path / "o").exists() else True


def test_sixteen_bit_and_palette_images_work(pair, weights, tmp_path):
    visible, infrared = pair
    Image.fromarray(visible).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(infrared.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    out = tmp_path / "o"
    assert (
        predict(
            "--visible",
            tmp_path / "palette.png",
            "--infrared",
            tmp_path / "deep.png",
            "--out",
            out,
            "--weights",
            weights,
        )
        == 0
    )
    fused = np.array(Image.open(out / "palette_fused.png"))
    assert fused.std() > 5  # neither clipped to white nor black


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (lambda f: ["--visible", f / "a", "--infrared", f / "b", "--stop-on-error"], ["lone"]),
        (lambda f: ["--visible", f / "a", "--infrared", f / "i.png"], ["one is a folder and one a file"]),
        (lambda f: [], ["--visible", "--infrared"]),
        (lambda f: ["--visible", f / "v.png", "--prompts", "guess"], ["guess", "self"]),
        (lambda f: ["--visible", f / "v.png", "--weights", f / "b"], ["weights", "model.safetensors"]),
        (lambda f: ["--visible", f / "v.png", "--out", f / "v.png" / "sub"], ["v.png", "another --out"]),
        (lambda f: ["--visible", f / "v.png", "--device", "abacus"], ["abacus"]),
        (lambda f: ["--visible", f / "v.png", "--prompts", f / "i.png"], ["i.png", "not JSON"]),
        (lambda f: ["--visible", f / "v.png", "--prompts", "[" * 300], ["File name too long"]),
        (lambda f: ["--visible", f / "v.png", "--device", "meta"], ["device 'meta': not usable here"]),
        (lambda f: ["--visible", f / "v.png", "--fps", "3"], ["--fps", "--video"]),
        (lambda f: ["--visible", f / "v.png", "--frame", "infrared"], ["--frame infrared: is of --align"]),
        (lambda f: ["--visible", f / "v.png", "--no-refine"], ["--no-refine: is of --align"]),
        (lambda f: ["--radiometric", f / "empty", "--align", f / "r.json"], ["r.json: radiometric files", "maker"]),
        (lambda f: ["--rgbt", f / "nope.png"], ["nope.png: no such file or folder"]),
        (lambda f: ["--visible", f / ("n" * 300)], ["File name too long"]),
        (lambda f: ["--visible", ""], ["--visible: an empty path was given"]),
        (lambda f: ["--visible", f / "empty"], ["empty: holds no image (.png"]),
        (lambda f: ["--rgbt", f / "empty"], ["empty: holds no image (.png"]),
        (lambda f: ["--visible", f / "broken"], ["gone.png: cannot be read (No such file"]),
        (lambda f: ["--visible", f / "loop"], ["loop.png: cannot be read (Too many levels"]),
        (lambda f: ["--visible", f / "pipe.png"], ["pipe.png: is a pipe or a device, expected an image file"]),
        (lambda f: ["--infrared", f / "pipe.jpg"], ["pipe.jpg: is a pipe or a device, expected an image file"]),
        (lambda f: ["--radiometric", f / "pipe.jpg"], ["pipe.jpg: is a pipe or a device, expected an image file"]),
        (lambda f: ["--radiometric", f / "empty"], ["empty: holds no radiometric JPEG (.jpg, .jpeg)"]),
        (lambda f: ["--visible", f / "film.mp4"], ["film.mp4: is not a readable image", "give --video for films"]),
        (lambda f: ["--visible", f / "v.png", "--weights", f / "v.png"], ["v.png: a file; give a checkpoint folder"]),
        (lambda f: ["--manifest", f / "film.mp4"], ["columns ['xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...']; expected visible"]),
        (lambda f: ["--manifest", f / "bad.parquet"], ["bad.parquet: not readable as Parquet", "or give a CSV"]),
        (lambda f: ["--visible", f / "linked", "--out", f / "linked"], ["linked: is the folder of the inputs"]),
    ],
)
def test_impossible_requests_get_one_line_and_exit_code_2(pair, weights, tmp_path, capsys, arrange, said):
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        Image.fromarray(pair[0]).save(tmp_path / side / "both.png")
    Image.fromarray(pair[0]).save(tmp_path / "a" / "lone.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "pipe.jpg"):
        os.mkfifo(tmp_path / name)  # nobody writes into it, so that opening it would wait for ever
    for name in ("film.mp4", "bad.parquet"):
        (tmp_path / name).write_bytes(b"x" * 10_000)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "l.png").symlink_to(tmp_path / "a" / "lone.png")
    flags = arrange(tmp_path)
    for flag, value in (("--out", tmp_path / "o"), ("--weights", weights)):
        if flag not in flags:
            flags += [flag, value]
    assert predict(*flags) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for part in said:
        assert part in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration", {"temperature": "x"}),
        ("calibration", {"temperature": 0}),
        ("calibration", [1]),
        ("class_offsets", {"offsets": {"car": None}}),
        ("class_offsets", {"offsets": {"car": float("nan")}}),
    ],
)
def test_a_calibration_that_is_none_is_refused_in_one_line(pair, weights, tmp_path, capsys, key, value):
    copy = shutil.copytree(weights, tmp_path / "copy")
    card = json.loads((copy / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps({**card, key: value}))
    assert predict("--visible", tmp_path / "v.png", "--weights", copy, "--out", tmp_path / "o") == 2
    assert "copy/training.json: its calibration or class_offsets hold no finite numbers" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "shape", "missing", "extra", "config", "nan"])
def test_damaged_checkpoints_are_refused_in_one_line(pair, weights, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in weights.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "fusion.cross_domain.merge.weight"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "nan":
        save_file({**tensors, name: tensors[name] * float("nan")}, path)
    elif damage == "shape":
        save_file({**tensors, name: tensors[name][:3].contiguous()}, path)
    elif damage == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, path)
    elif damage == "extra":
        save_file({**tensors, "surplus": torch.zeros(2)}, path)
    else:
        (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("max_side", "max_sid"))
    assert predict("--visible", tmp_path / "v.png", "--out", tmp_path / "o", "--weights", copy) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    told = {"cut": "copy", "extra": "surplus", "config": "max_sid", "nan": f"{name} holds nan or infinity (1 such"}
    assert told.get(damage, name) in error


def test_a_pair_of_files_is_named_after_the_visible_one(tmp_path, pair):
    (entry,) = every_pair(tmp_path / "v.png", tmp_path / "i.png")
    assert entry.id == "v"
    assert entry.infrared == tmp_path / "i.png"


def test_installed_command_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fusionsam", "predict", "--visible", str(tmp_path / "no.png"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no.png" in done.stderr


def test_a_session_gives_what_predict_gives_for_every_kind_of_prompt():
    model = FusionSAM(build_debug(), "debug", {})
    pair = torch.rand(3, 67, 83), torch.rand(1, 67, 83)
    session = model.encode(*pair)
    points, labels = np.array([[[31.0, 17.0]]], np.float32), np.array([[1]])
    same = {"points": [[31, 17]], "labels": [1]}
    for prompts in (None, "none", same, Prompts(points, labels), Prompts(*map(torch.from_numpy, (points, labels)))):
        one, two = session.predict(prompts), model.predict(*pair, prompts=prompts)
        assert np.array_equal(one.labels, two.labels)
        assert np.array_equal(one.confidence, two.confidence)
        assert np.array_equal(one.fused, two.fused)
    assert session.size == (67, 83)
    assert session.nbytes >= 3 * 67 * 83 * 4
    with pytest.raises(InputError, match=r"^prompts\.points: found list, expected a tensor or an array"):
        session.predict(Prompts([[1, 2]], labels))


def test_a_small_scale_keeps_the_shape_of_a_long_pair():
    seen = []
    model = FusionSAM(build_debug(), "debug", {})
    infer = model.infer
    model.infer = lambda one, two, *rest: seen.append(one.shape[2:]) or infer(one, two, *rest)
    visible = torch.rand(1, 3, 128, 384)
    output = model.infer_views(visible, None, scales=(0.25,))
    assert seen == [(64, 192)]  # 32 x 96 would be below the least side: both sides grow by the same factor
    # without scale 1 everything is still of the pair's own size, as postprocess needs
    found = model.postprocess(output)
    assert found.labels.shape == found.fused.shape[:2] == (128, 384)
    assert float(output.prompts.boxes[..., 2].max()) <= 384


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees memory in its own way")
def test_memory_that_lies_free_between_other_memory_goes_back_to_the_system(model, pair, monkeypatch):
    def resident() -> int:
        """Anonymous memory of this process, MiB."""
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) // 1024

    def in_pieces() -> list[np.ndarray]:
        """200 MB of small arrays, of which every twentieth is kept."""
        return [np.ones(100_000, np.uint8) for _ in range(2000)][::20]

    monkeypatch.setattr("fusionsam.inference.memory._kept", False)  # a command of another test may have asked to keep
    kept = in_pieces()
    held = resident()
    monkeypatch.setattr(model, "_free_memory", FreeMemory(every=1e6))
    model.predict(*pair)
    model.predict(*pair)
    assert resident() > held - 50
    monkeypatch.setattr(model, "_free_memory", FreeMemory(every=0))
    model.predict(*pair)
    model.predict(*pair)
    assert resident() < held - 100
    assert len(kept) == 100


def test_what_does_not_fit_into_the_memory_is_told_in_one_line(model, pair, monkeypatch):
    for error, told in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shapes do not fit"), False),
    ):

        def full(*_: object, error: RuntimeError = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(model.network, "forward", full)
        with pytest.raises(InputError if told else RuntimeError, match="memory of cpu" if told else "shapes"):
            model.predict(*pair)


def test_grey_values_from_0_to_1_are_read_as_a_person_asks(model):
    heat = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    for form in (heat, torch.from_numpy(heat)):
        black = model.preprocess(None, form, InfraredOptions(polarity="black"))[1]
        torch.testing.assert_close(black[0, 0], torch.from_numpy(1 - heat), atol=1 / 255, rtol=0)
        half = model.preprocess(None, form, InfraredOptions(limits=(0.5, 1.0)))[1]
        torch.testing.assert_close(half[0, 0], torch.from_numpy((heat - 0.5).clip(0) * 2), atol=1 / 255, rtol=0)
