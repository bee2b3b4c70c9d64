"""Radiometric files: drawn here byte by byte, and the seven real ones against flyr and ExifTool where they are."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from conftest import build_debug
from fusionsam.alignment.geometry import centre, similarity
from fusionsam.alignment.maker import MakerAligner
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.cli.main import main
from fusionsam.data.dataset import read_sample
from fusionsam.data.image_files import image_size
from fusionsam.data.images import read_heat, write_png
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.planck import Planck
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.rigs import fit, open_aligner
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.inference.celsius import class_temperatures
from fusionsam.inference.inputs import read_inputs
from fusionsam.page.session import read_pair as read_for_page
from fusionsam.weights.checkpoint import save_checkpoint

FUZZ = Path(__file__).parents[1] / "benchmarks" / "radiometric_fuzz.py"
H, W = 97, 131
PLANCK = Planck(17837.5, 1450.4, 1.0, -1143.0, 0.0123328, emissivity=0.95)
READ_BY_FLYR = ("FLIR", "FLIR_AX8", "FLIR_E40", "FLIR_B60")


def flir_counts() -> np.ndarray:
    rows, columns = np.mgrid[:H, :W]
    return (14000 + 20 * rows + 30 * columns).astype(np.uint16)


def _camera() -> bytes:
    data = bytearray(0x400)
    struct.pack_into("<H", data, 0, 2)
    floats = {
        0x20: PLANCK.emissivity, 0x24: 1.0, 0x28: 293.15, 0x2C: 293.15, 0x30: 293.15, 0x34: 1.0, 0x3C: 0.5,
        0x58: PLANCK.r1, 0x5C: PLANCK.b, 0x60: PLANCK.f, 0x70: PLANCK.alpha1, 0x74: PLANCK.alpha2, 0x78: PLANCK.beta1,
        0x7C: PLANCK.beta2, 0x80: PLANCK.x, 0x30C: PLANCK.r2,
    }  # fmt: skip
    for place, value in floats.items():
        struct.pack_into("<f", data, place, value)
    struct.pack_into("<i", data, 0x308, int(PLANCK.o))
    data[0xD4:0xD9] = b"Draft"
    return bytes(data)


def _records(counts: np.ndarray, packed: bool, visible: np.ndarray | None) -> dict[int, bytes]:
    head = struct.pack("<HHH", 2, W, H) + bytes(26)
    picture = io.BytesIO()
    if packed:  # the bytes of a pixel exchanged, as FLIR writes them
        Image.fromarray(counts.byteswap()).save(picture, "PNG")
    found = {1: head + (picture.getvalue() if packed else counts.tobytes()), 0x20: _camera()}
    if visible is not None:
        file = io.BytesIO()
        Image.fromarray(visible).save(file, "JPEG", quality=95)
        found[0x0E] = struct.pack("<HHH", 3, *visible.shape[1::-1]) + bytes(26) + file.getvalue()
        found[0x2A] = struct.pack("<f6h", 1.25, 4, -2, 0, W - 1, 0, H - 1)
    return found


def flir_file(path, counts, packed=True, visible=None, order=">", piece=20000):
    """A JPEG with FLIR's records in APP1 segments of `piece` bytes."""
    records = _records(counts, packed, visible)
    place = 64 + 32 * len(records)
    directory, body = b"", b""
    for kind, record in records.items():
        directory += struct.pack(order + "HHIIIIIII", kind, 0, 0, 0, place + len(body), len(record), 0, 0, 0)[:32]
        body += record
    head = b"FFF\0" + bytes(16) + struct.pack(order + "III", 101, 64, len(records)) + bytes(32)
    data = head + directory + body
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 10) + b"FLIR\0\x01" + bytes([index, len(pieces) - 1]) + part
        for index, part in enumerate(pieces)
    )
    return _with_segments(path, segments)


def dji_file(path, counts):
    """A JPEG with bare counts in APP3 segments."""
    data = counts.astype("<u2").tobytes()
    pieces = [data[start : start + 65000] for start in range(0, len(data), 65000)]
    return _with_segments(path, b"".join(b"\xff\xe3" + struct.pack(">H", len(part) + 2) + part for part in pieces))


def _with_segments(path, segments):
    preview = io.BytesIO()
    Image.new("RGB", (W, H), (200, 30, 90)).save(preview, "JPEG")
    path.write_bytes(preview.getvalue()[:2] + segments + preview.getvalue()[2:])
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [True, False])
def test_flir_files_give_counts_temperatures_and_the_camera(packed, order, tmp_path):
    path = flir_file(tmp_path / "x.jpg", flir_counts(), packed, order=order)
    assert is_radiometric(path)
    file = read_radiometric(path)
    np.testing.assert_array_equal(file.counts, flir_counts())
    assert (file.maker, file.camera, file.visible) == ("FLIR", "Draft", None)
    np.testing.assert_allclose(file.celsius(), PLANCK.celsius(flir_counts()), atol=1e-3)


def test_a_black_body_has_the_temperature_that_its_counts_were_made_of():
    body = Planck(17837.5, 1450.4, 1.0, -1143.0, 0.0123328, distance=0.0)
    for celsius in (-20.0, 0.0, 36.6, 120.0):
        counts = np.array([[round(body._counts(celsius))]], np.uint16)
        assert body.celsius(counts)[0, 0] == pytest.approx(celsius, abs=0.05)
    assert not Planck(0, 0, 0, 0, 0).usable()


def test_dji_files_give_counts(tmp_path):
    path = dji_file(tmp_path / "x.JPG", flir_counts())
    file = read_radiometric(path)
    np.testing.assert_array_equal(file.counts, flir_counts())
    assert file.celsius() is None


def test_the_visible_picture_is_laid_by_the_makers_own_numbers(tmp_path):
    visible = np.zeros((240, 320, 3), np.uint8)
    visible[:, :, 0] = np.arange(240)[:, None]
    visible[:, :, 1] = np.arange(320)[None] // 2
    path = flir_file(tmp_path / "x.jpg", flir_counts(), visible=visible)
    file = read_radiometric(path)
    assert file.alignment.to_dict()["Real2IR"] == 1.25
    box = file.alignment.box((240, 320), (H, W))
    assert box[0] == pytest.approx(160 + 4 - 128)
    sample = read_sample(Entry("x", radiometric=path))
    assert sample.visible.shape[1:] == sample.infrared.shape[1:] == (round(box[3] - box[1]), round(box[2] - box[0]))
    column = sample.visible[1, 50].float()
    assert column[0] == pytest.approx(box[0] / 2, abs=3)
    assert column[-1] == pytest.approx(box[2] / 2, abs=3)
    assert sample.input["infrared"]["radiometric"]["maker"] == "FLIR"


def test_a_scale_that_no_camera_has_asks_for_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fusionsam.data.pairs.LARGEST", 200)
    path = flir_file(tmp_path / "x.jpg", flir_counts(), visible=np.zeros((240, 320, 3), np.uint8))
    with pytest.raises(InputError, match="lies over 256x190 pixels of its visible one; expected 1 to 200 a side"):
        read_sample(Entry("x", radiometric=path))


def test_a_manifest_takes_radiometric_files_among_pairs(tmp_path):
    flir_file(tmp_path / "f.jpg", flir_counts(), visible=np.zeros((240, 320, 3), np.uint8))
    Image.new("L", (W, H), 9).save(tmp_path / "i.png")
    table = tmp_path / "pairs.csv"
    table.write_text("rjpeg;thermal;split\nf.jpg;;train\n;i.png;train\n")
    first, second = entries("manifest", table, "train")
    assert (first.id, first.radiometric, first.infrared) == ("f", tmp_path / "f.jpg", None)
    assert (second.id, second.radiometric, second.infrared) == ("i", None, tmp_path / "i.png")
    assert read_sample(first).visible is not None
    table.write_text("radiometric,infrared\nf.jpg,i.png\n")
    with pytest.raises(InputError, match="row 1 of split 'all' names a radiometric file, which holds both pictures"):
        entries("manifest", table, "all")


def test_predict_writes_temperatures_of_a_manifest_too(tmp_path, capsys):
    weights = save_checkpoint(tmp_path / "w", build_debug(), {"commit": "abc", "step": 7})
    flir_file(tmp_path / "f.jpg", flir_counts())
    (tmp_path / "pairs.csv").write_text("radiometric\nf.jpg\n")
    argv = ["predict", "--manifest", str(tmp_path / "pairs.csv"), "--weights", str(weights), "--device", "cpu"]
    assert main([*argv, "--celsius", "--out", str(tmp_path / "o")]) == 0
    told = json.loads((tmp_path / "o" / "f.json").read_text())
    celsius = PLANCK.celsius(flir_counts())
    assert told["celsius"]["all"]["min"] == pytest.approx(float(celsius.min()), abs=0.01)
    assert set(told["celsius"]["classes"]) == set(told["classes"])
    np.testing.assert_allclose(tifffile.imread(tmp_path / "o" / "f_celsius.tif"), celsius, atol=1e-3)


def test_the_page_takes_a_radiometric_file_alone_in_either_area(tmp_path):
    path = str(flir_file(tmp_path / "f.jpg", flir_counts(), visible=np.zeros((240, 320, 3), np.uint8)))
    expected = read_sample(Entry("x", radiometric=path))
    for areas in ((path, None), (None, path)):
        pair, _ = read_for_page(*areas)
        visible, infrared = pair.visible, pair.infrared
        assert torch.equal(visible, expected.visible)
        assert torch.equal(infrared, expected.infrared)
    whole = flir_file(tmp_path / "whole.jpg", flir_counts(), packed=False).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:5000])
    with pytest.raises(InputError, match=r"^radiometric image cut\.jpg: "):
        read_for_page(None, str(tmp_path / "cut.jpg"))


def test_what_the_maker_wrote_is_refined_where_the_edges_agree_better(tmp_path):
    scene = draw_scene(5, 6, (240, 320))
    off = Warp(Rig((240, 320), (240, 320), similarity(1.03, 1.0, centre((240, 320)), (165.5, 113.5))))(scene.infrared)
    pair = MakerAligner()(scene.visible, off.image)
    assert pair.told["refined"]
    assert pair.told["score"] > pair.told["maker_score"] + 0.05
    inner = (slice(None), slice(30, -30), slice(30, -30))

    def error(infrared):
        return (infrared[inner].float() - scene.infrared[inner].float()).abs().mean()

    assert error(pair.infrared) < 0.5 * error(off.image)
    assert not pair.covered[1].all()
    as_it_is = MakerAligner()(scene.visible, scene.infrared)
    assert not as_it_is.told["refined"]
    assert torch.equal(as_it_is.infrared, scene.infrared)
    write_png(tmp_path / "v.png", scene.visible)
    plain = Entry("x", visible=tmp_path / "v.png", infrared=tmp_path / "v.png")
    with pytest.raises(InputError, match="no radiometric file"):
        read_sample(plain, align=MakerAligner())
    with pytest.raises(InputError, match="--align maker"):
        open_aligner("auto", lambda: fit([Entry("x", radiometric=tmp_path / "x.jpg")]))


def test_temperatures_follow_the_pixels_that_were_moved(tmp_path):
    path = flir_file(tmp_path / "x.jpg", flir_counts())
    celsius = read_radiometric(path).celsius()
    labels = np.zeros((H, W), np.uint8)
    labels[10:20, 10:30] = 1
    prediction = SimpleNamespace(labels=labels, classes=["nothing", "one"])
    found = class_temperatures(celsius, prediction, [[1, 0, 4], [0, 1, 0], [0, 0, 1]])
    assert found["classes"]["one"]["mean"] == pytest.approx(float(celsius[10:20, 6:26].mean()), abs=0.01)


def test_given_as_infrared_the_counts_are_read_not_the_coloured_preview(tmp_path):
    path = flir_file(tmp_path / "x.jpg", flir_counts())
    read = read_heat(path)
    assert read.facts["kind"] == "counts"
    assert np.corrcoef(read.pixels.ravel(), flir_counts().ravel())[0, 1] > 0.999
    fixed = read_heat(path, InfraredOptions(limits=(20.0, 60.0)))
    assert fixed.facts["kind"] == "degrees Celsius"
    expected = ((PLANCK.celsius(flir_counts()) - 20) / 40 * 255).clip(0, 255)
    np.testing.assert_allclose(fixed.pixels, expected, atol=1)


@pytest.mark.parametrize("draw", [flir_file, dji_file])
@pytest.mark.parametrize("name", ["infrared", "x.png"])
def test_a_radiometric_file_is_known_by_its_content_whatever_its_name(draw, name, tmp_path):
    path = draw(tmp_path / name, flir_counts())
    usual = read_heat(draw(tmp_path / "x.jpg", flir_counts()))
    assert is_radiometric(path)
    assert image_size(path, as_infrared=True) == usual.pixels.shape
    assert read_heat(path).facts == usual.facts == read_inputs(None, path.read_bytes()).facts
    np.testing.assert_array_equal(read_heat(path).pixels, usual.pixels)
    with pytest.raises(InputError, match=f"^{path}: .*131x97 pixels inside"):  # judged before it is decoded
        image_size(path, 5000, as_infrared=True)


def test_the_file_says_what_is_hot_whatever_polarity_is_asked_for(tmp_path):
    path = flir_file(tmp_path / "x.jpg", flir_counts())
    usual, asked = read_heat(path), read_heat(path, InfraredOptions(polarity="black"))
    np.testing.assert_array_equal(asked.pixels, usual.pixels)
    assert asked.facts["polarity"] == {"hot": "white", "how": "file"}
    (notice,) = [each for each in asked.notices if each.kind == "polarity of the file"]
    assert "--polarity black was not applied" in notice.option


def fuzzed(root, cases, tmp_path):
    """The report of benchmarks/radiometric_fuzz.py on the files of a folder."""
    report = tmp_path / "report.json"
    words = [sys.executable, FUZZ, "--root", root, "--cases", cases, "--out", report]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    assert found["faults"] == []
    assert done.returncode == 0, done.stderr
    assert found["read"] + found["refused_in_one_line"] == cases
    return found


def test_damaged_files_are_refused_in_one_line_or_read(tmp_path):
    root = tmp_path / "whole"
    root.mkdir()
    visible = np.random.default_rng(4).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    flir_file(root / "packed.jpg", flir_counts(), visible=visible)
    flir_file(root / "plain.jpg", flir_counts(), packed=False, order="<")
    dji_file(root / "dji.jpg", flir_counts())
    found = fuzzed(root, 105, tmp_path)
    assert found["refused_in_one_line"] > 20
    assert found["read"] > 20


@pytest.mark.slow
def test_five_hundred_damaged_real_files_are_refused_in_one_line_or_read(data_root, tmp_path):
    found = fuzzed(_real(data_root, "FLIR").parent, 500, tmp_path)
    assert len(found["files"]) == 7
    assert found["rss_mb"]["peak"] < found["rss_mb"]["before"] + 1024
    assert found["refused_in_one_line"] > 100


@pytest.mark.parametrize("changed", [{"b": 1e38}, {"x": 0.0, "alpha2": 1e38}, {"alpha1": -1e38}, {"distance": 1e38}])
def test_constants_that_are_no_cameras_give_no_temperature(changed):
    assert PLANCK.usable()
    assert not replace(PLANCK, **changed).usable()


def test_counts_beyond_the_law_are_left_out_of_what_is_told(tmp_path):
    counts = flir_counts()
    counts[:50] = 0
    told = read_radiometric(flir_file(tmp_path / "x.jpg", counts)).facts()
    celsius = PLANCK.celsius(counts)
    assert np.isnan(celsius).sum() == 50 * W
    assert told["celsius"] == pytest.approx([np.nanmin(celsius), np.nanmax(celsius)], abs=0.01)
    counts[:] = 0
    assert "celsius" not in read_radiometric(flir_file(tmp_path / "x.jpg", counts)).facts()


def test_a_file_of_many_empty_segments_is_not_walked_to_its_end(tmp_path):
    path = flir_file(tmp_path / "x.jpg", flir_counts())
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe0\0\2" * 5000 + data[2:])
    assert not is_radiometric(path)
    with pytest.raises(InputError, match="holds no radiometric data"):
        read_radiometric(path)


def test_a_line_of_heat_asks_for_no_picture_beyond_what_the_network_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("fusionsam.data.pairs.LARGEST", 200)
    monkeypatch.setattr("fusionsam.data.pairs.SMALLEST", 190)
    path = flir_file(tmp_path / "x.jpg", flir_counts())
    with pytest.raises(InputError, match="holds 131x97 pixels of heat, 262x194 at a size that the network takes"):
        read_sample(Entry("x", radiometric=path))


def test_an_ordinary_jpeg_is_no_radiometric_file(tmp_path):
    Image.new("RGB", (W, H)).save(tmp_path / "x.jpg")
    assert not is_radiometric(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="holds no radiometric data"):
        read_radiometric(tmp_path / "x.jpg")


def _real(data_root, name):
    path = data_root / "rjpeg" / f"{name}.jpg"
    if not path.is_file():
        pytest.skip(f"no real radiometric files at {path.parent}")
    return path


@pytest.mark.parametrize("name", READ_BY_FLYR)
def test_real_files_have_the_temperatures_of_flyr(name, data_root):
    flyr = pytest.importorskip("flyr")
    path = _real(data_root, name)
    np.testing.assert_allclose(read_radiometric(path).celsius(), flyr.unpack(str(path)).celsius, atol=1e-3)


@pytest.mark.parametrize("name", [*READ_BY_FLYR, "DJI_XT2", "DJI_M30T", "DJI_M2EA"])
def test_real_files_have_the_counts_of_exiftool(name, data_root):
    if shutil.which("exiftool") is None:
        pytest.skip("no exiftool here (Debian's libimage-exiftool-perl)")
    path = _real(data_root, name)
    tag = "-ThermalData" if name in ("DJI_M30T", "DJI_M2EA") else "-RawThermalImage"
    raw = subprocess.run(["exiftool", "-b", tag, str(path)], capture_output=True, check=True).stdout
    file = read_radiometric(path)
    if tag == "-ThermalData":
        expected = np.frombuffer(raw, "<u2").reshape(file.counts.shape)
    else:
        with Image.open(io.BytesIO(raw)) as image:
            expected = np.asarray(image).astype(np.uint16)
            expected = expected.byteswap() if image.format == "PNG" else expected
    np.testing.assert_array_equal(file.counts, expected)


def test_the_xt2_agrees_with_the_temperature_in_its_own_metadata(data_root):
    celsius = read_radiometric(_real(data_root, "DJI_XT2")).celsius()
    assert celsius[250:262, 314:326].mean() == pytest.approx(34, abs=1)  # XMP CentralTemperature
