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
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fusionsam.data.infrared import DEFAULT, Heat, InfraredOptions, to_heat
from fusionsam.data.png16 import read_png16
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.stretch import find_range, stretch
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
from fusionsam.errors import InputError
from fusionsam.io import whole
from fusionsam.types import Array

HEIC = (".heic", ".heif")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *HEIC)
"""File names that count as images when folders are listed."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


class _Loaded(NamedTuple):
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
            f"{path}: is not a readable image, expected PNG, JPEG, TIFF, BMP, WebP or HEIC; convert it, or fetch it "
            "again"
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


def _load(path: Path, deep_colour: str = "") -> _Loaded:
    """An upright picture, 0 black.

    PIL drops the low byte of 16-bit colour, except in TIFFs that `tiff_array` and PNGs that `read_png16` unpacks. With
    `deep_colour`, the end of the message (expected what, do what), such a file raises InputError."""
    with _guarded(path):
        tiff = tiff_header(path) if is_tiff(path) else None
        nodata = None if tiff is None else tiff.nodata
        if tiff is not None:
            require_bounded(path, tiff.width, tiff.height)
            if is_deep(tiff.dtype) and (array := tiff_array(path, tiff)) is not None:
                return _Loaded(array, nodata, tiff.orientation)
        # Not by its path, or PIL maps a TIFF's pixels into memory as rows of the turned width: a torn picture.
        with path.open("rb") as file, Image.open(file, formats=_formats(path)) as image:
            require_bounded(path, *image.size)
            orientation = image.getexif().get(ORIENTATION, 1) if tiff is None else tiff.orientation
            if image.format == "PNG" and (deep_png := read_png16(path, MAX_PIXELS)) is not None:
                return _Loaded(turned(deep_png[..., 0] if deep_png.shape[2] == 2 else deep_png, orientation))
            deep = image.mode.startswith("I") or image.mode == "F"
            if deep_colour and not deep and _has_low_bytes(path, tiff):
                raise InputError(f"{path}: a 16-bit file with colour or alpha would lose its low bytes; {deep_colour}")
            # PIL reads a TIFF whose fourth channel is of no declared meaning as RGB, without that channel.
            unnamed = image.format == "TIFF" and image.mode == "RGB" and image.getexif().get(SAMPLES) == 4
            if unnamed and tiff is not None and (array := tiff_array(path, tiff)) is not None:
                return _Loaded(Image.fromarray(array, "RGBA"))
            upright = ImageOps.exif_transpose(image)
        if not deep:
            return _Loaded(upright, nodata, orientation)
        # PIL inverts MinIsWhite of 8 bits, but not of more
        array = np.asarray(upright)
        return _Loaded(inverted(array) if tiff is not None and tiff.white_is_zero else array, nodata, orientation)


def _has_low_bytes(path: Path, tiff: TiffHeader | None) -> bool:
    """Whether a TIFF or PNG stores more than a byte a channel."""
    if tiff is not None:
        return tiff.dtype is not None and tiff.dtype.itemsize > 1
    return _png_bits(path) == 16


def _png_bits(path: Path) -> int | None:
    """Bits a channel, which a PNG's first chunk tells; None for another file."""
    with path.open("rb") as file:
        start = file.read(25)
    return start[24] if len(start) == 25 and start.startswith(b"\x89PNG") else None


def shallow_visible(array: Array) -> NDArray[np.uint8]:
    """Deep visible pixels as 8 bits: of 16-bit integers the high byte, or the 8 highest of the 10 or 12 bits that are
    in use; floats in [0,1] times 255, in [0,255] as they are, other ranges stretched over the scene."""
    if array.dtype.kind in "iu":
        bits = visible_bits(array)
        return (array.astype(np.int64).clip(0, 65535) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255:
        return (array * (255 if array.max() <= 1 else 1)).round().astype(np.uint8)
    return stretch(array, find_range(array))


def visible_bits(array: Array) -> int:
    """Bits in use of integers (H,W) or (H,W,C): 8, 10, 12 or 16. Cameras of 10 and 12 bits write them into files of 16,
    which would be all but black."""
    top = int(array.max(initial=0))
    return next((bits for bits in (8, 10, 12) if top < 2**bits), 16)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    # A palette with per-entry alpha must pass through RGBA, or PIL mixes the transparent index into the colours.
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def require_no_thermal(path: str | Path, image: Image.Image | Array) -> None:
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


def _chw(array: Array) -> Tensor:
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def read_visible(path: str | Path) -> Tensor:
    """uint8 (3,H,W), 0-255. Grey becomes three equal channels, alpha is dropped, 16 bits keep their high byte (10 and
    12 bits in a file of 16 their 8 highest), the orientation of EXIF or TIFF is applied, MinIsWhite is inverted. Raises
    InputError for whatever cannot be read, and for a fourth channel that is neither constant nor on-off (MFNet's
    thermal)."""
    return read_visible_facts(path)[0]


def read_visible_facts(path: str | Path) -> tuple[Tensor, dict[str, object]]:
    """`read_visible`, and what was found: the orientation that was applied, bits in use where there are more than 8."""
    path = Path(path)
    image, _, orientation = _load(path)
    require_no_thermal(path, image)
    facts: dict[str, object] = {} if orientation == 1 else {"orientation": orientation}
    if isinstance(image, Image.Image):
        return _chw(_rgb(image)), facts
    if image.dtype.kind in "iu":
        facts["bits"] = visible_bits(image)
    with _naming(path):
        array = shallow_visible(image)
    array = array[:, :, None] if array.ndim == 2 else array[:, :, :3]
    return _chw(np.broadcast_to(array, (*array.shape[:2], 3))), facts


def read_infrared(path: str | Path, options: InfraredOptions = DEFAULT) -> Tensor:
    """uint8 (1,H,W), 0 cold to 255 hot. Of three equal channels one is taken, colours of a known palette are turned
    back into heat, others give their luma. More than 8 bits (or floats) are stretched over the range of the scene
    (`stretch.find_range`), radiometric files give their counts. Raises InputError as `read_visible` does, and for
    16-bit colour in a TIFF packed by other than deflate: too few of its bits are read."""
    return _chw(read_heat(path, options).pixels)


def read_heat(path: str | Path, options: InfraredOptions = DEFAULT) -> Heat:
    """`read_infrared` as an array (H,W), with everything that was found, guessed and is worth a notice."""
    path = Path(path)
    if is_radiometric(path):
        return _radiometric_heat(path, options)
    image, nodata, orientation = _load(
        path, "expected 8 bits, or 16 in one grey channel; save it as one grey channel or as uncompressed TIFF"
    )
    require_no_thermal(path, image)
    with _naming(path):
        heat = to_heat(_plain(image), options, nodata)
    if orientation != 1:
        heat.facts["orientation"] = orientation
    return heat


def _plain(image: Image.Image | Array) -> Array:
    """(H,W), or (H,W,3) of any depth."""
    if not isinstance(image, Image.Image):
        return image if image.ndim == 2 else image[:, :, :3]
    return np.array(image.getchannel(0)) if image.mode in ("L", "LA") else _rgb(image)


def _radiometric_heat(path: Path, options: InfraredOptions) -> Heat:
    """Counts, or degrees Celsius where a person gave a range and the file has the constants."""
    file = read_radiometric(path)
    celsius = file.celsius() if isinstance(options.limits, tuple) else None
    with _naming(path):
        heat = to_heat(file.counts if celsius is None else celsius, options, hot_is_white=True)
    heat.facts |= {"kind": "counts" if celsius is None else "degrees Celsius", "radiometric": file.facts()}
    return heat


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """InputError of what knows no file gets its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def infrared_array(image: Image.Image | Array, options: InfraredOptions = DEFAULT) -> Heat:
    """An infrared picture in memory, treated as a file is: PIL images of any mode, (H,W) or (H,W,3) of uint8, integers
    (counts) or floats (degrees Celsius)."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I") or image.mode == "F"
        image = np.asarray(image) if deep else image
    return to_heat(_plain(image), options)


def read_rgbt(path: str | Path) -> tuple[Tensor, Tensor]:
    """MFNet's 4-channel file: visible uint8 (3,H,W) and infrared uint8 (1,H,W).

    Raises InputError for unreadable files, for any other number of channels and for more than 8 bits a channel."""
    path = Path(path)
    expected = (
        "expected 4 channels of 8 bits; save it with 8 bits, or for the data set 'pairs' as two files, the thermal one "
        "with one grey channel"
    )
    image, *_ = _load(path, expected)
    if not isinstance(image, Image.Image) and _png_bits(path) == 16 and image.dtype == np.uint16:
        raise InputError(f"{path}: a 16-bit file with colour or alpha would lose its low bytes; {expected}")
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
    image, *_ = _load(path)
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


def _require_own_indices(path: Path, image: Image.Image, ids: Array, palette: Sequence[tuple[int, int, int]]) -> None:
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
