"""Opening image files safely. Whatever a file holds, InputError says in one line why it cannot be read; the size in the
header is judged before any pixel is decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fusionsam.data.png16 import read_png16
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.tiff import (
    MAX_PIXELS,
    ORIENTATION,
    SAMPLES,
    TURNED,
    TiffHeader,
    inverted,
    is_deep,
    is_tiff,
    require_bounded,
    tiff_array,
    tiff_header,
    turned,
)  # fmt: skip
from fusionsam.types import Array, InputError

HEIC = (".heic", ".heif")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *HEIC)
"""File names that count as images when folders are listed."""
FILMS = (".mp4", ".mkv", ".avi", ".mov", ".m4v", ".webm")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


class Loaded(NamedTuple):
    """A file's pixels, upright: a PIL image with 8 bits a channel, or the (H,W) or (H,W,C) array of a deeper one."""

    image: Image.Image | Array
    nodata: float | None = None
    orientation: int = 1


def _formats(path: Path) -> tuple[str, ...]:
    """What PIL may take the file for; HEIC needs pillow-heif."""
    if path.suffix.lower() not in HEIC:
        return _FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise InputError(f'{path}: HEIC needs pillow-heif; pip install "fusionsam[heic]", or save it as PNG') from None
    pillow_heif.register_heif_opener()
    return (*_FORMATS, "HEIF")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exists(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected an image file; name one file in it")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if not path.is_file():  # a pipe without a writer would be waited for
        raise InputError(f"{path}: is a pipe or a device, expected an image file; save it as one")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes), expected an image; fetch the file again")


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
            f"{path}: is not a readable image, expected PNG, JPEG, TIFF, BMP, WebP or HEIC; "
            + ("give --video for films" if path.suffix.lower() in FILMS else "convert it, or fetch it again")
        ) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)}); check its permissions") from error
    except _BROKEN as error:
        raise InputError(f"{path}: damaged or truncated image ({_one_line(error)}); fetch the file again") from error


def image_size(path: str | Path, limit: int = MAX_PIXELS, as_infrared: bool = False) -> tuple[int, int]:
    """(H, W) in pixels as the readers return it (EXIF orientation applied), from the header alone where it is there
    (a PNG may hold its EXIF behind the pixels, so one within `limit` is decoded). `as_infrared`, a radiometric file has
    the size of its counts, not of its preview.

    Raises InputError for whatever is not an image within `limit` pixels."""
    path = Path(path)
    if as_infrared and is_radiometric(path):
        height, width = read_radiometric(path).counts.shape
        return height, width
    with _guarded(path):
        tiff = tiff_header(path) if is_tiff(path) else None
        if tiff is not None and is_deep(tiff.dtype):
            width, height, orientation = tiff.width, tiff.height, tiff.orientation
            require_bounded(path, width, height, limit)
        else:
            with Image.open(path, formats=_formats(path)) as image:
                # a TIFF's size is turned by PIL already, any other's is not
                width, height = (tiff.width, tiff.height) if tiff else image.size
                require_bounded(path, width, height, limit)
                orientation = image.getexif().get(ORIENTATION, 1)
    return (width, height) if orientation in TURNED else (height, width)


def load(path: Path, deep_colour: str = "") -> Loaded:
    """An upright picture, 0 black.

    PIL drops the low byte of 16-bit colour, except in TIFFs that `tiff_array` and PNGs that `read_png16` unpacks. With
    `deep_colour`, the end of the message (expected what, do what), such a file raises InputError."""
    with _guarded(path):
        tiff = tiff_header(path) if is_tiff(path) else None
        nodata = None if tiff is None else tiff.nodata
        if tiff is not None:
            require_bounded(path, tiff.width, tiff.height)
            if is_deep(tiff.dtype) and (array := tiff_array(path, tiff)) is not None:
                return Loaded(array, nodata, tiff.orientation)
        # Not by its path, or PIL maps a TIFF's pixels into memory as rows of the turned width: a torn picture.
        with path.open("rb") as file, Image.open(file, formats=_formats(path)) as image:
            require_bounded(path, *image.size)
            orientation = image.getexif().get(ORIENTATION, 1) if tiff is None else tiff.orientation
            if image.format == "PNG" and (deep_png := read_png16(path, MAX_PIXELS)) is not None:
                return Loaded(turned(deep_png[..., 0] if deep_png.shape[2] == 2 else deep_png, orientation))
            deep = image.mode.startswith("I") or image.mode == "F"
            if deep_colour and not deep and _has_low_bytes(path, tiff):
                raise InputError(f"{path}: a 16-bit file with colour or alpha would lose its low bytes; {deep_colour}")
            # PIL reads a TIFF whose fourth channel is of no declared meaning as RGB, without that channel.
            unnamed = image.format == "TIFF" and image.mode == "RGB" and image.getexif().get(SAMPLES) == 4
            if unnamed and tiff is not None and (array := tiff_array(path, tiff)) is not None:
                return Loaded(Image.fromarray(array, "RGBA"))
            upright = ImageOps.exif_transpose(image)
        if not deep:
            return Loaded(upright, nodata, orientation)
        # PIL inverts MinIsWhite of 8 bits, but not of more
        array = np.asarray(upright)
        return Loaded(inverted(array) if tiff is not None and tiff.white_is_zero else array, nodata, orientation)


def _has_low_bytes(path: Path, tiff: TiffHeader | None) -> bool:
    """Whether a TIFF or PNG stores more than a byte a channel."""
    if tiff is not None:
        return tiff.dtype is not None and tiff.dtype.itemsize > 1
    return png_bits(path) == 16


def png_bits(path: Path) -> int | None:
    """Bits a channel, which a PNG's first chunk tells; None for another file."""
    with path.open("rb") as file:
        start = file.read(25)
    return start[24] if len(start) == 25 and start.startswith(b"\x89PNG") else None
