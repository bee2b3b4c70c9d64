"""Visible and infrared pictures from files and from memory as uint8 arrays of one documented form, and back into PNG.
InputError in one line for whatever cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusionsam.data.image_files import load, png_bits
from fusionsam.data.infrared import DEFAULT, Heat, InfraredOptions, to_heat
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.stretch import find_range, stretch
from fusionsam.data.tiff import LOW_BYTES
from fusionsam.io import whole
from fusionsam.types import Array, InputError


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
    image, _, orientation = load(path)
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
    image, nodata, orientation = load(
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


def read_rgbt(path: str | Path) -> tuple[Tensor, Tensor]:
    """MFNet's 4-channel file: visible uint8 (3,H,W) and infrared uint8 (1,H,W).

    Raises InputError for unreadable files, for any other number of channels and for more than 8 bits a channel."""
    path = Path(path)
    expected = (
        "expected 4 channels of 8 bits; save it with 8 bits, or for the data set 'pairs' as two files, the thermal one "
        "with one grey channel"
    )
    image, *_ = load(path, expected)
    if not isinstance(image, Image.Image) and png_bits(path) == 16 and image.dtype == np.uint16:
        raise InputError(f"{path}: {LOW_BYTES}; {expected}")
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


def write_png(path: str | Path, array: Tensor | NDArray[np.uint8]) -> None:
    """Write uint8 as PNG, whole or not at all (`io.whole`).

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
