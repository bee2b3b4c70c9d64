"""Every row of the tables in docs/how-to/files.md: the file is drawn here, read, and held to what the row says.

A row without a test fails, and so does a test without a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fusionsam.cli import train as train_command
from fusionsam.config.datasets import find
from fusionsam.data import palettes
from fusionsam.data.dataset import PairDataset, read_sample
from fusionsam.data.images import read_heat, read_visible, read_visible_facts, write_png
from fusionsam.data.infrared import Heat, InfraredOptions
from fusionsam.data.label_faults import require_teachable
from fusionsam.data.polarity import DOUBTFUL, white_hot_score
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from test_data_radiometric import dji_file, flir_counts, flir_file

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "files.md"
H, W = 97, 131
SCENE = draw_scene(5, 1, (H, W))
VISIBLE = SCENE.visible.permute(1, 2, 0).numpy()
HEAT = SCENE.infrared[0].numpy()
COUNTS = (21000 + 16 * HEAT.astype(np.uint16) + np.arange(W, dtype=np.uint16) % 16).astype(np.uint16)
ROWS: dict[str, Callable[[Path], None]] = {}


def rows() -> list[str]:
    """The first cell of every row of the page's tables but the one of figures."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    kinds = [table.splitlines() for table in tables if not table.startswith("| form |")]
    return [line.strip("|").split("|")[0].strip() for table in kinds for line in table[2:]]


def row(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Marks the test of the row that begins with `name`."""

    def mark(function: Callable[[Path], None]) -> Callable[[Path], None]:
        ROWS[name] = function
        return function

    return mark


def test_every_row_has_a_test_and_every_test_a_row():
    assert len(rows()) == len(set(rows())) > 20
    assert set(rows()) == set(ROWS)


@pytest.mark.parametrize("name", rows())
def test_the_row_is_true(name, tmp_path):
    assert name in ROWS, f"{PAGE.name}: the row {name!r} has no test here"
    ROWS[name](tmp_path)


def kinds(heat: Heat) -> list[str]:
    return [notice.kind for notice in heat.notices]


def close(pixels: np.ndarray, expected: np.ndarray, most: float) -> None:
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < most


def stretched() -> np.ndarray:
    low, high = np.percentile(COUNTS.astype(np.float32), (0.5, 99.5))
    return ((COUNTS - low) / (high - low) * 255).clip(0, 255).round()


# -- infrared ----------------------------------------------------------------------------------------------------


@row("8 bits, grey (PNG, JPEG, TIFF, BMP, WebP, HEIC)")
def _grey(folder):
    for form, options, most in (
        ("png", {}, 0.01), ("jpg", {"quality": 95}, 3), ("tif", {}, 0.01), ("bmp", {}, 0.01),
        ("webp", {"lossless": 1}, 1),
    ):  # fmt: skip
        Image.fromarray(HEAT).save(folder / f"x.{form}", **options)
        read = read_heat(folder / f"x.{form}")
        close(read.pixels, HEAT, most)
        assert "range" not in read.facts
    try:
        import pillow_heif
    except ImportError:
        for name in ("x.heic", "x.jpg", "x"):  # telephones and servers give it other names
            (folder / name).write_bytes(b"\0\0\0\x18ftypheic and a picture")
            with pytest.raises(InputError, match=r"fusionsam\[heic\]"):
                read_heat(folder / name)
    else:
        pillow_heif.register_heif_opener()
        Image.fromarray(HEAT).convert("RGB").save(folder / "x.heic", quality=95)
        close(read_heat((folder / "x.heic").rename(folder / "x")).pixels, HEAT, 4)
    flat = (HEAT // 8 + 100).astype(np.uint8)
    write_png(folder / "flat.png", flat)
    assert "low contrast" in kinds(read_heat(folder / "flat.png"))
    assert np.ptp(read_heat(folder / "flat.png", InfraredOptions(limits="auto")).pixels) == 255


@row("16 bits, grey (PNG, TIFF), counts of any camera")
def _counts(folder):
    Image.fromarray(COUNTS).save(folder / "x.png")
    tifffile.imwrite(folder / "x.tif", COUNTS)
    for file in ("x.png", "x.tif"):
        read = read_heat(folder / file)
        close(read.pixels, stretched(), 0.6)
        assert {"low", "high", "left_out_percent", "grey_levels"} <= set(read.facts["range"])
    Image.fromarray((COUNTS >> 8) << 8).save(folder / "few.png")
    assert "few grey levels" in kinds(read_heat(folder / "few.png"))


@row("float TIFF, degrees Celsius")
def _celsius(folder):
    tifffile.imwrite(folder / "x.tif", (COUNTS / 100 - 200).astype(np.float32))
    read = read_heat(folder / "x.tif")
    close(read.pixels, stretched(), 1)
    assert read.facts["range"]["low"] == pytest.approx(np.percentile(COUNTS / 100 - 200, 0.5), abs=0.1)


@row("nodata (GDAL's tag, NaN, a border of 0, 65535, -9999, -32768)")
def _nodata(folder):
    plain = stretched()
    celsius = (COUNTS / 100 - 200).astype(np.float32)
    for name, array, value in (
        ("0", COUNTS, 0), ("65535", COUNTS, 65535), ("-32768", COUNTS.astype(np.int16), -32768),
        ("nan", celsius, np.nan), ("-9999", celsius, -9999), ("gdal", celsius, 5.0),
    ):  # fmt: skip
        tags = [(42113, "s", 0, "5", True)] if name == "gdal" else []
        tifffile.imwrite(folder / "x.tif", np.pad(array, 30, constant_values=value), extratags=tags)
        read = read_heat(folder / "x.tif")
        close(read.pixels[30:-30, 30:-30], plain, 4)
        assert (read.pixels[:25] == 0).all()
        assert read.facts["range"]["left_out_percent"] > 40
        assert "range" in kinds(read)


@row("saturated rows, a fire, dead pixels")
def _far(folder):
    plain = stretched()
    for what in ("rows", "fire", "pixels"):
        array = COUNTS.copy()
        if what == "rows":
            array[10:12] = 65535
        elif what == "fire":
            array[40:50, 50:76] = 50000 + np.arange(26) * 10
        else:
            array[::20, ::20] = 65535
        Image.fromarray(array).save(folder / "x.png")
        read = read_heat(folder / "x.png")
        untouched = array == COUNTS
        close(read.pixels[untouched], plain[untouched], 4)
        assert ("range" in kinds(read)) == (read.facts["range"]["left_out_percent"] >= 1)


@row("16 bits, colour PNG")
def _deep_colour(folder):
    write_16_bit_rgb(folder / "x.png", np.repeat(COUNTS[..., None], 3, 2))
    close(read_heat(folder / "x.png").pixels, stretched(), 1)


def write_16_bit_rgb(path: Path, array: np.ndarray) -> None:
    """PIL writes none."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = array.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@row("coloured by a known palette")
def _palette(folder):
    write_png(folder / "x.png", palettes.table("ironbow")[HEAT])
    read = read_heat(folder / "x.png")
    close(read.pixels, HEAT, 1)
    assert (read.facts["palette"]["name"], read.facts["palette"]["how"]) == ("ironbow", "found")
    assert "mean colour error" in read.notices[0].text


@row("a rainbow")
def _rainbow(folder):
    heat = HEAT if white_hot_score(HEAT) > 0 else 255 - HEAT
    write_png(folder / "x.png", palettes.table("rainbow")[255 - heat])
    read = read_heat(folder / "x.png")
    assert read.facts["polarity"]["how"] == "guessed by the scene"
    assert "direction of a rainbow" in kinds(read)
    assert np.corrcoef(read.pixels.ravel(), heat.ravel())[0, 1] > 0.97
    decided = read_heat(folder / "x.png", InfraredOptions(polarity="white"))
    assert np.corrcoef(decided.pixels.ravel(), heat.ravel())[0, 1] < -0.97


@row("coloured otherwise, a photograph")
def _photograph(folder):
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((W, H)))
    write_png(folder / "photo.png", photo)
    write_png(folder / "grey.png", np.asarray(Image.fromarray(photo).convert("L")))
    sample = read_sample(Entry("x", visible=folder / "grey.png", infrared=folder / "photo.png"))
    close(sample.infrared[0].numpy(), np.asarray(Image.fromarray(photo).convert("L")), 1)
    assert {"coloured infrared", "exchanged cameras"} <= {kind for kind, *_ in sample.notices}


@row("black-hot")
def _black_hot(folder):
    said = []
    for shown in (HEAT, 255 - HEAT):  # one of the two looks black-hot
        write_png(folder / "x.png", shown)
        read = read_heat(folder / "x.png")
        np.testing.assert_array_equal(read.pixels, shown)
        said.append("polarity" in kinds(read))
        assert said[-1] == (white_hot_score(shown) < DOUBTFUL)
        np.testing.assert_array_equal(
            read_heat(folder / "x.png", InfraredOptions(polarity="black")).pixels, 255 - shown
        )
    assert said.count(True) <= 1


@row("radiometric JPEG of FLIR or DJI")
def _radiometric(folder):
    read = read_heat(flir_file(folder / "f.jpg", flir_counts()))
    assert np.corrcoef(read.pixels.ravel(), flir_counts().ravel())[0, 1] > 0.999
    told = read.facts["radiometric"]
    assert (told["camera"], told["counts"][0]) == ("Draft", int(flir_counts().min()))
    assert len(told["celsius"]) == 2
    assert read_heat(dji_file(folder / "d.jpg", flir_counts())).facts["radiometric"]["maker"] == "DJI"


# -- visible -----------------------------------------------------------------------------------------------------


@row("8 bits")
def _eight(folder):
    write_png(folder / "x.png", VISIBLE)
    np.testing.assert_array_equal(read_visible(folder / "x.png").permute(1, 2, 0).numpy(), VISIBLE)
    write_png(folder / "grey.png", VISIBLE[..., 0])
    assert all((channel.numpy() == VISIBLE[..., 0]).all() for channel in read_visible(folder / "grey.png"))
    write_png(folder / "alpha.png", np.dstack([VISIBLE, np.full((H, W), 255, np.uint8)]))
    np.testing.assert_array_equal(read_visible(folder / "alpha.png").permute(1, 2, 0).numpy(), VISIBLE)


@row("16 bits, grey or colour")
def _sixteen(folder):
    deep = VISIBLE.astype(np.uint16) * 257
    write_16_bit_rgb(folder / "x.png", deep)
    read, facts = read_visible_facts(folder / "x.png")
    np.testing.assert_array_equal(read.permute(1, 2, 0).numpy(), VISIBLE)
    assert facts["bits"] == 16
    Image.fromarray(deep[..., 0]).save(folder / "grey.png")
    np.testing.assert_array_equal(read_visible(folder / "grey.png")[1].numpy(), VISIBLE[..., 0])


@row("10 or 12 bits in a file of 16")
def _twelve(folder):
    for bits in (10, 12):
        write_16_bit_rgb(folder / "x.png", VISIBLE.astype(np.uint16) << (bits - 8))
        read, facts = read_visible_facts(folder / "x.png")
        np.testing.assert_array_equal(read.permute(1, 2, 0).numpy(), VISIBLE)
        assert facts["bits"] == bits


@row("EXIF or TIFF orientation")
def _turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(VISIBLE).save(folder / "v.png", exif=exif)
    write_png(folder / "i.png", HEAT)
    sample = read_sample(Entry("x", visible=folder / "v.png", infrared=folder / "i.png"))
    np.testing.assert_array_equal(sample.visible.permute(1, 2, 0).numpy(), VISIBLE[::-1, ::-1])
    assert "one camera turned" in [kind for kind, *_ in sample.notices]


@row("the same picture twice")
def _twice(folder):
    write_png(folder / "v.png", VISIBLE)
    sample = read_sample(Entry("x", visible=folder / "v.png", infrared=folder / "v.png"))
    np.testing.assert_array_equal(sample.visible.permute(1, 2, 0).numpy(), VISIBLE)
    assert "one picture twice" in [kind for kind, *_ in sample.notices]


# -- labels ------------------------------------------------------------------------------------------------------


def _teachable(
    folder: Path, ids: list[int], *flags: str, classes: int = 2, form: str = "png", camera: str = "ir"
) -> None:
    """Raises what `fusionsam train` says of one pair whose label holds `ids`."""
    label = np.resize(np.repeat(np.array(ids, np.uint8), 7), (H, W)).astype(np.uint8)
    for part, array in (("rgb", VISIBLE), (camera, HEAT), ("labels", label)):
        (folder / part).mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / part / f"a.{form if part == 'labels' else 'png'}")
    names = [f"c{index}" for index in range(classes)]
    palette = [[index, 0, 0] for index in range(classes)]
    (folder / "classes.yaml").write_text(f"classes: [{', '.join(names)}]\npalette: {palette}\n")
    files = ["--data.dataset=pairs", f"--data.root={folder}", f"--data.class_file={folder / 'classes.yaml'}"]
    data = train_command.parse("train", [*files, *flags]).settings.data
    chosen = find("pairs", folder / "classes.yaml").with_labels_map(data.labels_map)
    require_teachable(PairDataset(entries("pairs", folder, "all"), chosen), chosen, folder, data.absent_classes)


@row("masks of 0 and 255 alone (255 is ignored)")
def _masks(folder):
    with pytest.raises(InputError, match="--labels-map 255:1"):
        _teachable(folder, [0, 255])
    _teachable(folder, [0, 255], "--labels-map", "255:1")


@row("ids that count from 1")
def _from_one(folder):
    with pytest.raises(InputError, match="--labels-map 1:0 2:1"):
        _teachable(folder, [1, 2])
    _teachable(folder, [1, 2], "--labels-map", "1:0", "2:1")


@row("an id that no class has")
def _strange(folder):
    with pytest.raises(InputError, match="--ignore 9 or --labels-map 9:CLASS"):
        _teachable(folder, [0, 1, 9])
    _teachable(folder, [0, 1, 9], "--ignore", "9")
    _teachable(folder, [0, 9], "--labels-map", "9:1")


@row("a class without a pixel in the training split")
def _absent(folder):
    with pytest.raises(InputError, match=r"'c2' without a pixel.*--labels-map ID:2.*--data\.absent_classes true"):
        _teachable(folder, [0, 1], classes=3)
    _teachable(folder, [0, 1], "--data.absent_classes=true", classes=3)
    _teachable(folder, [0, 1, 7], "--labels-map", "7:2", classes=3)


@row("a lossy file (JPEG, WebP)")
def _lossy(folder):
    for form in ("jpg", "webp"):
        (folder / form).mkdir()
        with pytest.raises(InputError, match="save labels as PNG"):
            _teachable(folder / form, [0, 1], form=form)


@row("a camera whose folder has a name that is not known")
def _unread(folder):
    with pytest.raises(InputError, match=r"camera2: 1 pictures are not read.*call it infrared"):
        _teachable(folder, [0, 1], camera="camera2")
