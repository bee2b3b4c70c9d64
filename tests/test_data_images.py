"""Any file a person may hand in is either read with the right values or refused in one line."""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from fusionsam.data.image_files import image_size
from fusionsam.data.images import read_infrared, read_rgbt, read_visible, write_png
from fusionsam.data.label_files import read_label
from fusionsam.data.png16 import read_png16
from fusionsam.errors import InputError

H, W = 37, 53


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def _png(path: Path, width: int, height: int, pixels: bytes = b"\0" * 99, bits: int = 8, colour: int = 2) -> None:
    """`pixels`: rows, each behind a zero byte. `colour`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)))


def _tiff(path: Path, data: bytes, bits: int, compression: int, tile: int = 0, channels: int = 1) -> None:
    """64x64 pixels of `bits` a channel, in one strip or in one tile of `tile` a side, that hold `data`."""
    tags = {256: 64, 257: 64, 258: bits, 259: compression, 262: 1 if channels == 1 else 2, 277: channels}
    tags |= {322: tile, 323: tile, 324: 8, 325: len(data)} if tile else {273: 8, 278: 64, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + directory + bytes(4)
    )


def _bad(kind: str, folder: Path) -> Path:
    path = folder / "x.png"
    noise = np.random.default_rng(1).integers(0, 256, (H, W, 5), dtype=np.uint8)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture at all\n" * 20)
    elif kind == "truncated png":
        Image.fromarray(noise[:, :, :3]).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "truncated jpeg":
        path = folder / "x.jpg"
        Image.fromarray(noise[:, :, :3]).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "truncated tiff":
        path = folder / "x.tif"
        tifffile.imwrite(path, noise[:, :, 0].astype(np.uint16))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "bomb":
        _png(path, 30_000, 30_000)
    elif kind == "beyond our limit":
        _png(path, 6_000, 6_000)
    elif kind == "tiff bomb":
        path = folder / "x.tif"
        tifffile.imwrite(path, shape=(30_000, 30_000), dtype=np.uint8)
    elif kind == "deep tiff":  # 134 bytes that promise a volume of 20 TB
        path = folder / "x.tif"
        tags = [(256, 4, 100), (257, 4, 100), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
        tags += [(278, 4, 100), (279, 4, 20), (32997, 4, 2**30)]
        directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4))
    elif kind == "swelling strip":  # 20 kB that unpack to 20 MB where 8 kB are due
        _tiff(path := folder / "x.tif", zlib.compress(bytes(20 << 20), 9), 16, 8)
    elif kind == "huge tile":
        _tiff(path := folder / "x.tif", zlib.compress(bytes(64 << 20), 9), 16, 8, tile=8192)
    elif kind == "huge shallow tile":
        _tiff(path := folder / "x.tif", zlib.compress(bytes(64 << 20), 9), 8, 8, tile=8192)
    elif kind == "five channels":
        path = folder / "x.tif"
        tifffile.imwrite(path, noise, photometric="minisblack", planarconfig="contig")
    elif kind == "five pages":
        path = folder / "x.tif"
        tifffile.imwrite(path, noise.transpose(2, 0, 1), photometric="minisblack")
    elif kind == "complex":
        path = folder / "x.tif"
        tifffile.imwrite(path, noise[:, :, 0].astype(np.complex64))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "header only":
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


@pytest.mark.parametrize("reader", [read_visible, read_infrared, read_label])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("empty", "0 bytes"),
        ("text", "not a readable image"),
        ("truncated png", "truncated"),
        ("truncated jpeg", "truncated"),
        ("truncated tiff", "damaged"),
        ("bomb", "900000000"),
        ("beyond our limit", "6000x6000"),
        ("tiff bomb", "30000x30000"),
        ("deep tiff", "expected one image"),
        ("swelling strip", "unpacks to more"),
        ("huge tile", "tiles of 8192x8192"),
        ("huge shallow tile", "tiles of 8192x8192"),
        ("five channels", "5 channels"),
        ("five pages", "5 channels or pages"),
        ("complex", "complex numbers (complex64)"),
        ("pipe", "a pipe or a device"),
        ("header only", "x.png"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_them(kind, said, reader, tmp_path):
    path = _bad(kind, tmp_path)
    with pytest.raises(InputError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(path) in message
    assert said in message
    assert "\n" not in message


def test_visible_modes_give_the_colours_a_viewer_shows(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb).save(tmp_path / "a.bmp")
    tifffile.imwrite(tmp_path / "a.tif", rgb)
    on_off = np.where(rgb[..., 0] > 99, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, on_off])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([rgb, np.full((H, W), 77, np.uint8)])).save(tmp_path / "veil.png")
    tifffile.imwrite(tmp_path / "deep.tif", rgb.astype(np.uint16) * 256 + 77)
    tifffile.imwrite(tmp_path / "planar.tif", (rgb.astype(np.uint16) << 8).transpose(2, 0, 1), photometric="rgb")
    tifffile.imwrite(tmp_path / "float.tif", rgb.astype(np.float32) / 255)
    expected = torch.from_numpy(rgb).permute(2, 0, 1)
    for name in ("a.png", "a.bmp", "a.tif", "rgba.png", "veil.png", "deep.tif", "planar.tif", "float.tif"):
        assert torch.equal(read_visible(tmp_path / name), expected), name


def test_other_compressions_are_left_to_a_library_that_stops_at_the_strips_end(tmp_path, monkeypatch):
    _tiff(tmp_path / "x.tif", lzma.compress(bytes(20 << 20)), 16, 34925)
    monkeypatch.setattr("lzma.decompress", None)  # tifffile's way, which unpacks all there is
    assert read_infrared(tmp_path / "x.tif").shape == (1, 64, 64)


@pytest.mark.parametrize("tile", [None, (16, 32), (512, 512)])
def test_packed_tiffs_of_usual_tiles_are_read(tile, tmp_path, rgb):
    deep = rgb.astype(np.uint16) << 8
    tifffile.imwrite(tmp_path / "deep.tif", deep, compression="zlib", photometric="rgb", tile=tile)
    assert torch.equal(read_visible(tmp_path / "deep.tif"), torch.from_numpy(rgb).permute(2, 0, 1))


def test_palette_pictures_with_and_without_alpha_give_their_colours(tmp_path):
    index = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 7
    palette = np.random.default_rng(2).integers(0, 256, (7, 3), dtype=np.uint8)
    image = Image.fromarray(index, mode="P")
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "pa.png", transparency=bytes([0, 255, 30, 255, 255, 255, 255]))
    for name in ("p.png", "pa.png"):
        assert torch.equal(read_visible(tmp_path / name), torch.from_numpy(palette[index]).permute(2, 0, 1)), name
        assert torch.equal(read_label(tmp_path / name), torch.from_numpy(index).long()), name


def test_sixteen_bit_grey(tmp_path):
    ramp = np.linspace(7000, 9000, H * W).round().astype(np.uint16).reshape(H, W)
    Image.fromarray(ramp).save(tmp_path / "i.png")
    tifffile.imwrite(tmp_path / "i.tif", ramp)
    low, high = np.percentile(ramp, (0.5, 99.5))
    expected = (np.clip((ramp - low) / (high - low), 0, 1) * 255).round()
    for name in ("i.png", "i.tif"):
        infrared = read_infrared(tmp_path / name)
        assert infrared.dtype == torch.uint8
        np.testing.assert_allclose(infrared[0].numpy(), expected, atol=1)
        assert torch.equal(
            read_visible(tmp_path / name), torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1)
        )


@pytest.mark.parametrize("kind", ["rgb.png", "rgba.png", "grey and alpha.png", "rgb.tif"])
def test_colours_of_sixteen_bits_keep_their_low_byte_or_are_no_infrared(kind, tmp_path):
    path, ramp = tmp_path / kind, np.linspace(8000, 10700, 64 * 64).astype(">u2").reshape(64, 64, 1)
    channels, colour = {"rgb.png": (3, 2), "rgba.png": (4, 6), "grey and alpha.png": (2, 4), "rgb.tif": (3, 0)}[kind]
    pixels = np.repeat(ramp, channels, axis=2)
    if channels != 3:
        pixels[..., -1] = 65535  # opaque
    if kind == "rgb.tif":
        _tiff(path, lzma.compress(pixels.astype("<u2").tobytes()), 16, 34925, channels=3)
    else:
        _png(path, 64, 64, b"".join(b"\0" + row.tobytes() for row in pixels), 16, colour)
    high_bytes = torch.from_numpy((ramp[..., 0] >> 8).astype(np.uint8))
    assert torch.equal(read_visible(path), high_bytes.expand(3, -1, -1))
    if kind == "rgb.tif":
        with pytest.raises(InputError, match=rf"{kind}: a 16-bit file with colour or alpha.*; save it as one grey"):
            read_infrared(path)
    else:
        assert len(read_infrared(path).unique()) == 256  # of 11 high bytes
    with pytest.raises(InputError, match=rf"{kind}: a 16-bit file .*expected 4 channels of 8 bits; save it with 8"):
        read_rgbt(path)


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("kind", ["grey.png", "rgb.png", "grey.tif", "rgb.tif"])
def test_visible_pictures_of_ten_and_twelve_bits_use_the_bits_that_are_there(kind, bits, tmp_path, rgb):
    eight = rgb if kind.startswith("rgb") else rgb[..., 0]
    deep = (eight.astype(np.uint16) << (bits - 8)) + np.uint16(1)
    deep[0, 0] = 2**bits - 1
    if kind.endswith("tif"):
        tifffile.imwrite(tmp_path / kind, deep)
    else:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
        _png(tmp_path / kind, W, H, rows, 16, 2 if eight.ndim == 3 else 0)
    shown = np.broadcast_to(eight if eight.ndim == 3 else eight[..., None], (H, W, 3)).copy()
    shown[0, 0] = 255
    assert torch.equal(read_visible(tmp_path / kind), torch.from_numpy(shown).permute(2, 0, 1))


def _filtered(pixels: np.ndarray, kind: int) -> bytes:
    """Rows of bytes (H, W, pixel) behind PNG's filter `kind`, or one after the other with 5."""
    height, width, size = pixels.shape
    rows = []
    padded = np.zeros((height + 1, width + 1, size), int)
    padded[1:, 1:] = pixels
    for y in range(height):
        left, up, corner = padded[y + 1, :-1], padded[y, 1:], padded[y, :-1]
        near = left + up - corner
        a, b, c = abs(near - left), abs(near - up), abs(near - corner)
        paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
        used = y % 5 if kind == 5 else kind
        guess = [0, left, up, (left + up) // 2, paeth][used]
        rows.append(bytes([used]) + ((padded[y + 1, 1:] - guess) % 256).astype(np.uint8).tobytes())
    return b"".join(rows)


@pytest.mark.parametrize("kind", range(6))
def test_every_filter_of_a_deep_png_is_undone(kind, tmp_path):
    deep = np.random.default_rng(kind).integers(0, 65536, (13, 29, 3), dtype=np.uint16)
    pixels = np.frombuffer(deep.astype(">u2").tobytes(), np.uint8).reshape(13, 29, 6)
    _png(tmp_path / "x.png", 29, 13, _filtered(pixels, kind), 16, 2)
    np.testing.assert_array_equal(read_png16(tmp_path / "x.png", 10_000), deep)
    assert torch.equal(
        read_visible(tmp_path / "x.png"), torch.from_numpy((deep >> 8).astype(np.uint8)).permute(2, 0, 1)
    )
    with Image.open(tmp_path / "x.png") as image:  # PIL keeps the high bytes
        np.testing.assert_array_equal(np.asarray(image), deep >> 8)


def test_infrared_stretch_ignores_dead_pixels_and_nan(tmp_path):
    field = np.tile(np.linspace(20, 30, W, dtype=np.float32), (H, 1))
    field[0, 0], field[1, 1] = np.nan, 1e9
    tifffile.imwrite(tmp_path / "t.tif", field)
    infrared = read_infrared(tmp_path / "t.tif")[0]
    assert infrared[5, 0] == 0
    assert infrared[5, -1] == 255
    assert abs(int(infrared[5, W // 2]) - 127) <= 3


def test_infrared_of_three_channels(tmp_path, rgb):
    grey = rgb[..., 0]
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "equal.png")
    Image.fromarray(rgb).save(tmp_path / "colour.png")
    assert torch.equal(read_infrared(tmp_path / "equal.png")[0], torch.from_numpy(grey))
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read_infrared(tmp_path / "colour.png")[0].numpy(), luma, atol=0.51)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "mode", "compression"),
    [
        *((".tif", mode, packed) for mode in ("L", "RGB", "RGBA") for packed in (None, "tiff_lzw")),
        *((".tif", "I;16", packed) for packed in (None, "tiff_adobe_deflate", "tiff_lzw")),
        (".jpg", "RGB", None),
        (".png", "RGB", None),
    ],
)
def test_orientation_is_applied_to_pixels_and_size(suffix, mode, compression, orientation, tmp_path, rgb):
    picture = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(rgb)
    picture = picture if picture.mode == mode else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, turned = tmp_path / f"stored{suffix}", tmp_path / f"turned{suffix}"
    if suffix == ".tif":
        picture.save(stored, compression=compression)
        picture.save(turned, compression=compression, tiffinfo={0x0112: orientation})
    else:
        picture.save(stored)
        picture.save(turned, exif=exif)
    for read in (read_visible, read_infrared):
        upright = Image.fromarray(read(stored).permute(1, 2, 0).squeeze(-1).numpy())
        upright.getexif()[0x0112] = orientation
        found = read(turned)
        np.testing.assert_array_equal(
            found.permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(ImageOps.exif_transpose(upright))
        )
        assert tuple(found.shape[1:]) == image_size(turned)


def test_orientation_of_a_fourth_channel_without_a_meaning_is_applied(tmp_path, rgb):
    four = np.dstack([rgb, rgb[..., 0]])
    tag = [(0x0112, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "t.tif", four, photometric="rgb", extrasamples=["unspecified"], extratags=tag)
    visible, infrared = read_rgbt(tmp_path / "t.tif")
    np.testing.assert_array_equal(torch.cat([visible, infrared]).permute(1, 2, 0).numpy(), np.rot90(four, -1))


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<u2", "int16", "float32"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_white_is_zero_is_inverted_at_any_depth(dtype, compression, tmp_path, rgb):
    for name in ("black", "white"):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", rgb[..., 0].astype(dtype), photometric=f"minis{name}", compression=compression
        )
    expected = 255 - read_infrared(tmp_path / "black.tif").int()
    assert int((read_infrared(tmp_path / "white.tif").int() - expected).abs().max()) <= 1


def test_white_is_zero_is_inverted_where_pil_unpacks(tmp_path, rgb):
    deep = rgb[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "t.tif", compression="tiff_lzw", tiffinfo={262: 0})
    assert torch.equal(read_visible(tmp_path / "t.tif")[0], torch.from_numpy(255 - rgb[..., 0]))
    assert torch.equal(read_label(tmp_path / "t.tif"), torch.from_numpy(65535 - deep.astype(np.int64)))


def test_rgbt_is_split_and_other_channel_counts_are_refused(tmp_path, rgb):
    heat = 255 - rgb[..., 1]
    write_png(tmp_path / "four.png", np.dstack([rgb, heat]))
    visible, infrared = read_rgbt(tmp_path / "four.png")
    assert torch.equal(visible, torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(infrared[0], torch.from_numpy(heat))
    write_png(tmp_path / "three.png", rgb)
    with pytest.raises(InputError, match=r"3 channels; expected 4 channels"):
        read_rgbt(tmp_path / "three.png")


def test_a_thermal_fourth_channel_is_never_dropped_in_silence(tmp_path, rgb):
    four = np.dstack([rgb, 255 - rgb[..., 1]])
    write_png(tmp_path / "f.png", four)
    tifffile.imwrite(tmp_path / "named.tif", four, photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "unnamed.tif", four, photometric="rgb", extrasamples=["unspecified"])
    tifffile.imwrite(tmp_path / "deep.tif", four.astype(np.uint16) * 9, photometric="rgb")
    for name in ("f.png", "named.tif", "unnamed.tif", "deep.tif"):
        for read in (read_visible, read_infrared):
            with pytest.raises(InputError, match=rf"{name}: 4 channels that are no transparency.*--rgbt"):
                read(tmp_path / name)
        if name != "deep.tif":
            assert torch.equal(read_rgbt(tmp_path / name)[1][0], torch.from_numpy(four[..., 3])), name


def test_palette_labels_whose_colours_are_those_of_other_classes_are_refused(tmp_path):
    palette = [(0, 0, 0), (64, 0, 128), (64, 64, 0)]
    image = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8), "P")
    image.putpalette([channel for index in (0, 2, 1) for channel in palette[index]])
    image.save(tmp_path / "exchanged.png")
    with pytest.raises(InputError, match="index 1 of its palette has the colour of class 2; save the label as RGB"):
        read_label(tmp_path / "exchanged.png", palette)
    image.putpalette([9, 9, 9] * 3)  # colours of no class are decoration
    image.save(tmp_path / "decorated.png")
    assert read_label(tmp_path / "decorated.png", palette).tolist() == [[0, 1], [1, 2]]
    image.putpalette([channel for color in palette for channel in color])
    image.save(tmp_path / "own.png")
    assert read_label(tmp_path / "own.png", palette).tolist() == [[0, 1], [1, 2]]
    image.putpalette([0] * 9)  # no colours at all
    image.save(tmp_path / "black.png")
    assert read_label(tmp_path / "black.png", palette).tolist() == [[0, 1], [1, 2]]


def test_grey_ids_that_became_a_palette_file_are_refused(tmp_path):
    palette = [(40 * i, 0, 0) for i in range(5)]
    Image.fromarray(np.array([[0, 2], [4, 2]], np.uint8)).quantize(3).save(tmp_path / "quantized.png")
    with pytest.raises(InputError, match="has the colour of class"):
        read_label(tmp_path / "quantized.png", palette)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_of_few_bits_are_the_stored_ones(tmp_path, bits):
    ids = np.arange(2 ** min(bits, 4), dtype=np.uint8).reshape(2, -1)
    packed = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(2, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", ids.shape[1], 2, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "few.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert read_label(tmp_path / "few.png").tolist() == ids.tolist()


def test_colour_labels_need_their_palette(tmp_path):
    ids = torch.arange(H * W).reshape(H, W) % 3
    palette = [(0, 0, 0), (64, 0, 128), (64, 64, 0)]
    write_png(tmp_path / "c.png", np.array(palette, dtype=np.uint8)[ids.numpy()])
    assert torch.equal(read_label(tmp_path / "c.png", palette), ids)
    with pytest.raises(InputError, match="give the palette"):
        read_label(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"colour \(64, 64, 0\).*not in the palette of 2 classes"):
        read_label(tmp_path / "c.png", palette[:2])


def test_write_png_reads_back_and_names_an_unwritable_folder(tmp_path, rgb):
    write_png(tmp_path / "deep" / "a.png", torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(read_visible(tmp_path / "deep" / "a.png"), torch.from_numpy(rgb).permute(2, 0, 1))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", rgb)


def test_write_png_leaves_nothing_behind_when_interrupted(tmp_path, rgb, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", rgb)
    assert list(tmp_path.iterdir()) == []
