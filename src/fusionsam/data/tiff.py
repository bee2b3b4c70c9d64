"""TIFFs: the header is judged before any pixel is decoded, and deep pixels are read as they are stored."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageOps

from fusionsam.types import LARGEST, Array, InputError

MAX_PIXELS = 2 * LARGEST**2
"""Largest height * width that is decoded."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # EXIF's and TIFF's tag: how the stored picture is to be turned or mirrored
TURNED = (5, 6, 7, 8)  # its values that exchange height and width
_PHOTOMETRIC = 262  # TIFF tag: 0 is MinIsWhite
_SAMPLES = 277  # TIFF tag: channels of a pixel
_GDAL_NODATA = 42113  # TIFF tag: the value of pixels without data, as text
_PLAIN, _DEFLATE = 1, (8, 32946)  # values of TIFF's tag for the compression
_PIL = ("TIFF",)
TILE = 1024 * 1024
"""Pixels of a TIFF's tile that are decoded however small the picture is."""
LOW_BYTES = "a 16-bit file with colour or alpha would lose its low bytes"
"""How a refusal begins; what to do follows."""


class Loaded(NamedTuple):
    """A file's pixels, upright: a PIL image with 8 bits a channel, or the (H,W) or (H,W,C) array of a deeper one."""

    image: Image.Image | Array
    nodata: float | None = None
    orientation: int = 1


def require_bounded(path: Path, width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """InputError for a declared size without pixels, or with more than `limit`."""
    if width * height > limit:
        raise InputError(
            f"{path}: its header declares {width}x{height} pixels, more than the limit of {limit}; "
            "reduce or tile the image"
        )
    if width < 1 or height < 1:
        raise InputError(f"{path}: its header declares {width}x{height} pixels, expected at least 1x1")


def is_tiff(path: Path) -> bool:
    """By the file's first bytes, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGIC


class TiffHeader(NamedTuple):
    """What a TIFF's header says: width and height as stored, before they are turned."""

    width: int
    height: int
    dtype: np.dtype | None
    orientation: int
    white_is_zero: bool
    nodata: float | None = None
    """The value of pixels without data, of GDAL's tag."""


def tiff_size(path: Path, limit: int = MAX_PIXELS) -> tuple[int, int, int]:
    """Width and height as stored, and the orientation. InputError for more than `limit` pixels."""
    header = tiff_header(path)
    require_bounded(path, header.width, header.height, limit)
    if is_deep(header.dtype):
        return header.width, header.height, header.orientation
    with Image.open(path, formats=_PIL) as image:  # PIL's size is turned already, so the header's is taken
        return header.width, header.height, image.getexif().get(ORIENTATION, 1)


def read_tiff(path: Path, deep_colour: str = "") -> Loaded:
    """`image_files.load` of a TIFF."""
    header = tiff_header(path)
    require_bounded(path, header.width, header.height)
    if is_deep(header.dtype) and (stored := tiff_array(path, header)) is not None:
        return Loaded(stored, header.nodata, header.orientation)
    # Not by its path, or PIL maps the pixels into memory as rows of the turned width: a torn picture.
    with path.open("rb") as file, Image.open(file, formats=_PIL) as image:
        require_bounded(path, *image.size)
        deep = image.mode.startswith("I") or image.mode == "F"
        if deep_colour and not deep and header.dtype is not None and header.dtype.itemsize > 1:
            raise InputError(f"{path}: {LOW_BYTES}; {deep_colour}")
        # PIL reads a TIFF whose fourth channel is of no declared meaning as RGB, without that channel.
        unnamed = image.mode == "RGB" and image.getexif().get(_SAMPLES) == 4
        if unnamed and (stored := tiff_array(path, header)) is not None:
            return Loaded(Image.fromarray(stored, "RGBA"))
        upright = ImageOps.exif_transpose(image)
    if not deep:
        return Loaded(upright, header.nodata, header.orientation)
    # PIL inverts MinIsWhite of 8 bits, but not of more
    array = np.asarray(upright)
    return Loaded(inverted(array) if header.white_is_zero else array, header.nodata, header.orientation)


def tiff_header(path: Path) -> TiffHeader:
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
        if page.dtype is not None and page.dtype.kind == "c":
            raise InputError(f"{path}: holds complex numbers ({page.dtype}); expected a picture; save their magnitude")
        orientation, white_is_zero = page.tags.valueof(ORIENTATION, 1), page.tags.valueof(_PHOTOMETRIC) == 0
        nodata = _number(page.tags.valueof(_GDAL_NODATA))
        return TiffHeader(page.imagewidth, page.imagelength, page.dtype, orientation, white_is_zero, nodata)


def _number(text: object) -> float | None:
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def is_deep(dtype: np.dtype | None) -> bool:
    """More than 8 bits a channel."""
    return dtype is not None and dtype not in (np.dtype("uint8"), np.dtype("bool"))


def tiff_array(path: Path, tiff: TiffHeader) -> Array | None:
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
            return turned(inverted(array) if tiff.white_is_zero else array, tiff.orientation)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return None


def turned(array: Array, orientation: int) -> Array:
    """(H,W) or (H,W,C) as a viewer shows it, (W,H) or (W,H,C) for `TURNED`; whatever is no orientation is 1."""
    array = array.swapaxes(0, 1) if orientation in TURNED else array
    array = array[:, ::-1] if orientation in (2, 3, 6, 7) else array
    return np.ascontiguousarray(array[::-1] if orientation in (3, 4, 7, 8) else array)


def inverted(array: Array) -> Array:
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
