"""Reading and writing image files safely. Whatever a file holds, a reader returns the documented array or raises
InputError with one line; the size in the header is judged before any pixel is decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fusionsam.errors import InputError
from fusionsam.io import whole
from fusionsam.types import LARGEST, LUMA

MAX_PIXELS = 2 * LARGEST**2
"""Largest height * width that is decoded."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""File names that count as images when folders are listed."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag: how the stored picture is to be turned or mirrored
_TURNED = (5, 6, 7, 8)  # its values that exchange height and width
_PHOTOMETRIC = 262  # TIFF tag: 0 is MinIsWhite
_SAMPLES = 277  # TIFF tag: channels of a pixel
_PLAIN, _DEFLATE = 1, (8, 32946)  # values of TIFF's tag for the compression
TILE = 1024 * 1024
"""Pixels of a TIFF's tile that are decoded however small the picture is."""
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

Pixels = NDArray[np.generic]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exists(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected an image file; name one file in it")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes), expected an image; fetch the file again")


def _bounded(path: Path, width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise InputError(
            f"{path}: its header declares {width}x{height} pixels, more than the limit of {limit}; "
            "reduce or tile the image"
        )
    if width < 1 or height < 1:
        raise InputError(f"{path}: its header declares {width}x{height} pixels, expected at least 1x1")


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGIC


class _Tiff(NamedTuple):
    """What a TIFF's header says: width and height as stored, before they are turned."""

    width: int
    height: int
    dtype: np.dtype | None
    orientation: int
    white_is_zero: bool


def _tiff_header(path: Path) -> _Tiff:
    """The header of the first image of a TIFF; a stack or an odd number of channels is refused."""
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        page = series.pages[0]
        if not isinstance(page, tifffile.TiffPage):
            raise InputError(f"{path}: holds no page; expected one image")
        channels = page.samplesperpixel * len(series.pages)
        # depth: a tag of volumes, by which a hundred bytes may promise terabytes of pixels
        if len(series.pages) > 1 or channels not in (1, 3, 4) or page.imagedepth != 1:
            raise InputError(
                f"{path}: is a TIFF of shape {tuple(series.shape)} ({channels} channels or pages); expected one image "
                "with 1, 3 or 4 channels; export the visible and the infrared picture as files of their own"
            )
        # small pictures may lie in one usual tile (256 or 512 a side), but not in one that is all the file is about
        if page.tilewidth * page.tilelength > max(TILE, 4 * page.imagewidth * page.imagelength):
            raise InputError(
                f"{path}: its header declares {page.imagewidth}x{page.imagelength} pixels in tiles of "
                f"{page.tilewidth}x{page.tilelength}; save it without tiles"
            )
        orientation, white_is_zero = page.tags.valueof(_ORIENTATION, 1), page.tags.valueof(_PHOTOMETRIC) == 0
        return _Tiff(page.imagewidth, page.imagelength, page.dtype, orientation, white_is_zero)


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is opened or decoded becomes InputError with one line."""
    _exists(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{path}: refused before decoding, limit {MAX_PIXELS} pixels: {_one_line(error)}; reduce or tile the image"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: is not a readable image, expected PNG, JPEG, TIFF or BMP; convert it or fetch it again"
        ) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)}); check its permissions") from error
    except _BROKEN as error:
        raise InputError(f"{path}: damaged or truncated image ({_one_line(error)}); fetch the file again") from error


def image_size(path: str | Path, limit: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) in pixels as the readers return it (EXIF orientation applied), from the header alone where it is there
    (a PNG may hold its EXIF behind the pixels, so one within `limit` is decoded).

    Raises InputError for whatever is not an image within `limit` pixels."""
    path = Path(path)
    with _guarded(path):
        tiff = _tiff_header(path) if _is_tiff(path) else None
        if tiff is not None and _is_deep(tiff.dtype):
            width, height, orientation = tiff.width, tiff.height, tiff.orientation
            _bounded(path, width, height, limit)
        else:
            with Image.open(path, formats=_FORMATS) as image:
                # a TIFF's size is turned by PIL already, any other's is not
                width, height = (tiff.width, tiff.height) if tiff else image.size
                _bounded(path, width, height, limit)
                orientation = image.getexif().get(_ORIENTATION, 1)
    return (width, height) if orientation in _TURNED else (height, width)


def _is_deep(dtype: np.dtype | None) -> bool:
    return dtype is not None and dtype not in (np.dtype("uint8"), np.dtype("bool"))


def _load(path: Path, deep_colour: str = "") -> Image.Image | Pixels:
    """An upright PIL image with 8 bits a channel, or the upright (H,W) or (H,W,C) array of a deeper file, 0 black.

    PIL drops the low byte of 16-bit colour, except in TIFFs that `_tiff_array` unpacks. With `deep_colour`, the end of
    the message (expected what, do what), such a file raises InputError."""
    with _guarded(path):
        tiff = _tiff_header(path) if _is_tiff(path) else None
        if tiff is not None:
            _bounded(path, tiff.width, tiff.height)
            if _is_deep(tiff.dtype) and (array := _tiff_array(path, tiff)) is not None:
                return array
        # Not by its path, or PIL maps a TIFF's pixels into memory as rows of the turned width: a torn picture.
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            _bounded(path, *image.size)
            deep = image.mode.startswith("I") or image.mode == "F"
            if deep_colour and not deep and _has_low_bytes(path, tiff):
                raise InputError(f"{path}: a 16-bit file with colour or alpha would lose its low bytes; {deep_colour}")
            # PIL reads a TIFF whose fourth channel is of no declared meaning as RGB, without that channel.
            unnamed = image.format == "TIFF" and image.mode == "RGB" and image.getexif().get(_SAMPLES) == 4
            if unnamed and tiff is not None and (array := _tiff_array(path, tiff)) is not None:
                return Image.fromarray(array, "RGBA")
            upright = ImageOps.exif_transpose(image)
        if not deep:
            return upright
        # PIL inverts MinIsWhite of 8 bits, but not of more
        return _inverted(np.asarray(upright)) if tiff is not None and tiff.white_is_zero else np.asarray(upright)


def _has_low_bytes(path: Path, tiff: _Tiff | None) -> bool:
    """Whether a TIFF or PNG stores more than a byte a channel."""
    if tiff is not None:
        return tiff.dtype is not None and tiff.dtype.itemsize > 1
    return _png_bits(path) == 16


def _png_bits(path: Path) -> int | None:
    """Bits a channel, which a PNG's first chunk tells; None for another file."""
    with path.open("rb") as file:
        start = file.read(25)
    return start[24] if len(start) == 25 and start.startswith(b"\x89PNG") else None


def _tiff_array(path: Path, tiff: _Tiff) -> Pixels | None:
    """Upright, 0 black. None for a compression that is not unpacked here within bounds: PIL, whose library bounds it,
    may know it."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            if page.compression in _DEFLATE:
                _bounded_deflate(path, page)
            elif page.compression != _PLAIN:
                return None
            array = np.asarray(page.asarray())
            array = np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array
            return _turned(_inverted(array) if tiff.white_is_zero else array, tiff.orientation)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return None


def _turned(array: Pixels, orientation: int) -> Pixels:
    """(H,W) or (H,W,C) as a viewer shows it, (W,H) or (W,H,C) for `_TURNED`; whatever is no orientation is 1."""
    array = array.swapaxes(0, 1) if orientation in _TURNED else array
    array = array[:, ::-1] if orientation in (2, 3, 6, 7) else array
    return np.ascontiguousarray(array[::-1] if orientation in (3, 4, 7, 8) else array)


def _inverted(array: Pixels) -> Pixels:
    """MinIsWhite as MinIsBlack: the greatest integer of the type becomes the least, of floats 1 becomes 0."""
    return np.invert(array) if array.dtype.kind in "iu" else 1 - array


def _bounded_deflate(path: Path, page: tifffile.TiffPage) -> None:
    """tifffile unpacks a strip or tile to whatever it holds, so each is unpacked here first, no farther than it may be.
    InputError for one that holds more."""
    rows = page.tilelength or min(page.rowsperstrip, page.imagelength)
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    assert page.dtype is not None
    most = rows * (page.tilewidth or page.imagewidth) * samples * page.dtype.itemsize
    file = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(offset)
        if len(zlib.decompressobj().decompress(file.read(count), most + 1)) > most:
            raise InputError(f"{path}: a part of it unpacks to more pixels than its header declares; fetch it again")


def _stretch(path: Path, array: Pixels) -> NDArray[np.uint8]:
    """Robust min-max: the 0.5 and 99.5 percentiles become 0 and 255. A constant image becomes 0."""
    values = array.astype(np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise InputError(f"{path}: holds no finite pixel value; expected a picture")
    low, high = np.percentile(finite, (0.5, 99.5))
    if high <= low:
        low, high = float(finite.min()), float(finite.max())
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def _shallow_visible(path: Path, array: Pixels) -> NDArray[np.uint8]:
    """16-bit -> its high byte; floats in [0,1] times 255, in [0,255] as they are, other ranges stretched."""
    if array.dtype == np.uint16 or (array.dtype.kind in "iu" and array.max(initial=0) > 255):
        return (array.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    if array.dtype.kind in "iu":
        return array.clip(0, 255).astype(np.uint8)
    if np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255:
        return (array * (255 if array.max() <= 1 else 1)).round().astype(np.uint8)
    return _stretch(path, array)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    # A palette with per-entry alpha must pass through RGBA, or PIL mixes the transparent index into the colours.
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def require_no_thermal(path: str | Path, image: Image.Image | Pixels) -> None:
    """Refuse a fourth channel with a picture in it: MFNet's thermal image would be dropped as alpha in silence."""
    if isinstance(image, Image.Image):
        alpha = np.asarray(image.getchannel(3)) if image.mode == "RGBA" else None
    else:
        alpha = image[:, :, 3] if image.ndim == 3 and image.shape[2] == 4 else None
    if alpha is None or alpha.min() == alpha.max():
        return
    top = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
    if not np.isin(alpha, (0, top)).all():
        raise InputError(
            f"{path}: 4 channels that are no transparency: RGB with thermal as in MFNet? give it as --rgbt; "
            "or save the picture without its fourth channel"
        )


def _chw(array: Pixels) -> Tensor:
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def read_visible(path: str | Path) -> Tensor:
    """uint8 (3,H,W), 0-255. Grey becomes three equal channels, alpha is dropped, 16 bits keep their high byte, the
    orientation of EXIF or TIFF is applied, MinIsWhite is inverted. Raises InputError for whatever cannot be read, and
    for a fourth channel that is neither constant nor on-off (MFNet's thermal)."""
    path = Path(path)
    image = _load(path)
    require_no_thermal(path, image)
    if isinstance(image, Image.Image):
        return _chw(_rgb(image))
    array = _shallow_visible(path, image)
    array = array[:, :, None] if array.ndim == 2 else array[:, :, :3]
    return _chw(np.broadcast_to(array, (*array.shape[:2], 3)))


def read_infrared(path: str | Path) -> Tensor:
    """uint8 (1,H,W), 0-255. Of three equal channels one is taken, of unequal ones the luma. More than 8 bits (or
    floats) are stretched from their 0.5 and 99.5 percentiles to 0-255. Raises InputError as `read_visible` does, and
    for 16-bit colour or alpha that is in a PNG or a TIFF packed by other than deflate: too few of its bits are read."""
    path = Path(path)
    image = _load(
        path, "expected 8 bits, or 16 in one grey channel; save it as one grey channel or as uncompressed TIFF"
    )
    require_no_thermal(path, image)
    if not isinstance(image, Image.Image):
        return _chw(_stretch(path, image if image.ndim == 2 else _grey(image[:, :, :3].astype(np.float32))))
    if image.mode in ("L", "LA"):
        return _chw(np.array(image.getchannel(0)))
    return _chw(_grey(_rgb(image)).round().astype(np.uint8))


def _grey(rgb: Pixels) -> Pixels:
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return rgb[..., 0]
    return rgb[..., :3].astype(np.float32) @ np.array(LUMA, dtype=np.float32)


def read_rgbt(path: str | Path) -> tuple[Tensor, Tensor]:
    """MFNet's 4-channel file: visible uint8 (3,H,W) and infrared uint8 (1,H,W).

    Raises InputError for unreadable files, for any other number of channels and for more than 8 bits a channel."""
    path = Path(path)
    image = _load(
        path,
        "expected 4 channels of 8 bits; save it with 8 bits, or for the data set 'pairs' as two files, the thermal one "
        "with one grey channel",
    )
    if not isinstance(image, Image.Image) or image.mode != "RGBA":
        found = (
            f"{len(image.getbands())} channels" if isinstance(image, Image.Image) else f"{image.dtype} {image.shape}"
        )
        raise InputError(
            f"{path}: {found}; expected 4 channels of 8 bits, RGB then thermal (MFNet's layout); for separate "
            "files use the data set 'pairs'"
        )
    array = np.array(image)
    return _chw(array[:, :, :3]), _chw(array[:, :, 3])


def read_label(path: str | Path, palette: Sequence[tuple[int, int, int]] | None = None) -> Tensor:
    """int64 (H,W) class ids: the value of a grey file (0 is black), the index of a palette file. With `palette` (RGB of
    each id) colour files are translated too; a colour that is not in it raises InputError, as does a colour file
    without."""
    path = Path(path)
    image = _load(path)
    if not isinstance(image, Image.Image):
        if image.ndim == 2 and image.dtype.kind in "iu":
            return torch.from_numpy(image.astype(np.int64))
        raise InputError(f"{path}: label of {image.dtype} {image.shape}; expected one channel of integer class ids")
    if image.mode in ("L", "P", "1", "LA", "PA"):
        ids = np.array(image if len(image.getbands()) == 1 else image.getchannel(0))
        if palette is not None and image.mode in ("P", "PA"):
            _require_own_indices(path, image, ids, palette)
            _require_own_indices(path, image, ids, [(grey, grey, grey) for grey in range(len(palette))])
        if image.mode == "L" and (bits := _png_bits(path)) in (2, 4):
            ids = ids // (255 // (2**bits - 1))  # PIL spreads them over 0 to 255
        return torch.from_numpy(ids.astype(np.int64))
    if palette is None:
        raise InputError(
            f"{path}: label of mode {image.mode}; expected one channel of class ids (grey or palette PNG); "
            "for colours give the palette"
        )
    rgb = np.array(image.convert("RGB")).astype(np.int64)
    codes = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    ids = np.full(codes.shape, -1, dtype=np.int64)
    for index, (red, green, blue) in enumerate(palette):
        ids[codes == (red << 16 | green << 8 | blue)] = index
    if (ids < 0).any():
        strange = tuple(int(value) for value in rgb[ids < 0][0])
        raise InputError(
            f"{path}: colour {strange} in {int((ids < 0).sum())} pixels is not in the palette of {len(palette)} "
            "classes; give the palette of this data set"
        )
    return torch.from_numpy(ids)


def _require_own_indices(path: Path, image: Image.Image, ids: Pixels, palette: Sequence[tuple[int, int, int]]) -> None:
    """InputError for a palette file whose colours are the classes', but whose indices are not: what pngquant and PIL's
    adaptive palettes make of a colour file, or of grey ids. Other palettes are decoration, and the index is the
    class."""
    colors = np.array(image.convert("RGB")).reshape(-1, 3)
    used, places = np.unique(ids, return_index=True)
    shown = {int(index): tuple(colors[place].tolist()) for index, place in zip(used, places, strict=True)}
    classes = {tuple(color): index for index, color in enumerate(palette)}
    if len(set(shown.values())) == len(shown) and all(color in classes for color in shown.values()):
        for index, color in shown.items():
            if classes[color] != index:
                raise InputError(
                    f"{path}: index {index} of its palette has the colour of class {classes[color]}; save the label as "
                    "RGB, or as grey ids"
                )


def write_png(path: str | Path, array: Tensor | NDArray[np.uint8]) -> None:
    """Write uint8 as PNG under a temporary name in the same folder, then move it into place.

    numpy arrays are (H,W), (H,W,3) or (H,W,4); tensors (H,W) or (C,H,W) with C 1, 3 or 4. Folders are made. Raises
    InputError if the folder cannot be written to."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8:
        raise TypeError(f"write_png takes uint8, got {array.dtype}")
    with whole(path, "choose a folder you may write to") as part:
        Image.fromarray(np.ascontiguousarray(array)).save(part, format="PNG")
