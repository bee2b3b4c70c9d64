"""Opening image files safely. Whatever a file holds, InputError says in one line why it cannot be read; the size in the
header is judged before any pixel is decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fusionsam.data.png16 import read_png16
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.tiff import (
    LOW_BYTES,
    MAX_PIXELS,
    ORIENTATION,
    TURNED,
    Loaded,
    is_tiff,
    read_tiff,
    require_bounded,
    tiff_size,
    turned,
)
from fusionsam.types import InputError

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevm", b"hevs", b"hevx", b"mif1", b"msf1")
"""What a HEIC file calls itself behind ftyp, where films of the same form (MP4) have other words."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".heic", ".heif")
"""File names that count as images when folders are listed."""
FILMS = (".mp4", ".mkv", ".avi", ".mov", ".m4v", ".webm")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


def _formats(path: Path) -> tuple[str, ...]:
    """What PIL may take the file for, by its first bytes, whatever its name; HEIC needs pillow-heif."""
    with path.open("rb") as file:
        start = file.read(12)
    if start[4:8] != b"ftyp" or start[8:] not in HEIC_BRANDS:
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
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise InputError(f"{str(path)[:200]}: cannot be read ({_one_line(error)[:100]}); check the path") from None
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected an image file; name one file in it")
    if not there:
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
        height, width = read_radiometric(path, limit).counts.shape
        return height, width
    with _guarded(path):
        if is_tiff(path):
            width, height, orientation = tiff_size(path, limit)
        else:
            with Image.open(path, formats=_formats(path)) as image:
                width, height = image.size
                require_bounded(path, width, height, limit)
                orientation = image.getexif().get(ORIENTATION, 1)
    return (width, height) if orientation in TURNED else (height, width)


def load(path: Path, deep_colour: str = "") -> Loaded:
    """An upright picture, 0 black.

    PIL drops the low byte of 16-bit colour, except in TIFFs that `tiff_array` and PNGs that `read_png16` unpacks. With
    `deep_colour`, the end of the message (expected what, do what), such a file raises InputError."""
    with _guarded(path):
        if is_tiff(path):
            return read_tiff(path, deep_colour)
        with path.open("rb") as file, Image.open(file, formats=_formats(path)) as image:
            require_bounded(path, *image.size)
            orientation = image.getexif().get(ORIENTATION, 1)
            if image.format == "PNG" and (stored := read_png16(path, MAX_PIXELS)) is not None:
                return Loaded(turned(stored[..., 0] if stored.shape[2] == 2 else stored, orientation))
            deep = image.mode.startswith("I") or image.mode == "F"
            if deep_colour and not deep and png_bits(path) == 16:
                raise InputError(f"{path}: {LOW_BYTES}; {deep_colour}")
            upright = ImageOps.exif_transpose(image)
        return Loaded(np.asarray(upright) if deep else upright, orientation=orientation)


def png_bits(path: Path) -> int | None:
    """Bits a channel, which a PNG's first chunk tells; None for another file."""
    with path.open("rb") as file:
        start = file.read(25)
    return start[24] if len(start) == 25 and start.startswith(b"\x89PNG") else None
