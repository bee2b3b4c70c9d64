"""Pictures of any form (paths, files in memory, PIL, arrays, tensors) as the tensors that the network takes, with what
was found."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fusionsam.data.images import read_heat, read_visible, require_no_thermal, shallow_visible
from fusionsam.data.infrared import DEFAULT, Heat, InfraredOptions, to_heat
from fusionsam.inference.views import size_of
from fusionsam.types import LUMA, Array, InputError, Notice, native

ImageLike = str | Path | bytes | IO[bytes] | Image.Image | Array | Tensor
"""A path; the content of an image file, as bytes or as an open file (io.BytesIO); a picture in memory."""
Name = Literal["visible", "infrared"]
FORMS = "a path, bytes, an open file, a PIL image, an array or a tensor"


@dataclass
class Inputs:
    """A pair as (1,3,H,W) and (1,1,H,W) float in [0,1]; either may be None."""

    visible: Tensor | None
    infrared: Tensor | None
    facts: dict[str, object] = field(default_factory=dict)
    """How the infrared picture was read: range, palette, polarity."""
    notices: list[Notice] = field(default_factory=list)


def read_inputs(visible: ImageLike | None, infrared: ImageLike | None, options: InfraredOptions = DEFAULT) -> Inputs:
    """Both pictures, ready for the network.

    Args:
        visible: a path, the content of an image file (bytes, io.BytesIO), a PIL image, an array (H,W,3) or (H,W), or a
            tensor (3,H,W), (1,H,W) or (H,W): uint8, bool (false 0, true 255), float in [0,1], or deeper (16-bit
            integers, floats up to 255), in any byte order.
        infrared: the same; deeper values (16-bit counts, degrees Celsius) are stretched over the range of the scene.
        options: how the infrared picture is read.

    Raises:
        InputError: what does not fit, named.
    """
    heat = None if infrared is None else _heat(infrared, options)
    found = None
    if isinstance(heat, Heat):
        found = torch.from_numpy(heat.pixels)[None, None].float() / 255
        return Inputs(_visible(visible), found, heat.facts, heat.notices)
    return Inputs(_visible(visible), heat)


def _heat(image: ImageLike, options: InfraredOptions) -> Heat | Tensor:
    """As a file would be read; a float picture in [0,1], and a tensor of uint8 with one channel, are ready."""
    with _file(image, "infrared") as path:
        if path is not None:
            return read_heat(path, options)
    if isinstance(image, Image.Image):
        return _named(_array(_upright(image, "infrared"), "infrared"), options)
    array = _array(image, "infrared")
    unit = array.dtype.kind == "f" and _is_unit(array)
    if unit and options == DEFAULT:
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        weights = tensor.new_tensor(LUMA)[:, None, None]
        return (tensor if tensor.shape[0] == 1 else (tensor * weights).sum(0, keepdim=True)).float()[None]
    if isinstance(image, Tensor) and array.dtype == np.uint8 and array.shape[2] == 1 and options == DEFAULT:
        return torch.from_numpy(array).permute(2, 0, 1).float()[None] / 255
    if unit and not isinstance(options.limits, tuple):  # grey values, not counts or degrees
        array = (array * 255).round().astype(np.uint8)
    return _named(array, options)


def _named(array: Array, options: InfraredOptions) -> Heat:
    """(H,W,1) or (H,W,3) as heat."""
    try:
        return to_heat(array[..., 0] if array.shape[2] == 1 else array, options)
    except InputError as error:
        raise InputError(f"infrared: {error}") from None


def _visible(image: ImageLike | None) -> Tensor | None:
    if image is None:
        return None
    with _file(image, "visible") as path:
        if path is not None:
            return read_visible(path).float()[None] / 255
    if isinstance(image, Image.Image):
        image = _upright(image, "visible")
    array = _array(image, "visible")
    if array.dtype.kind != "f" or not _is_unit(array):
        if array.dtype.kind == "f" and not bool(((array >= 0) & (array <= 255)).all()):  # NaN fails too
            raise InputError(
                f"visible: found {array.dtype} outside of [0, 255]; give uint8, uint16, or float in [0, 1]"
            )
        array = array if array.dtype == np.uint8 else shallow_visible(array)
        array = array.astype(np.float32) / 255
    tensor = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
    return tensor.expand(3, -1, -1).float()[None]


def _upright(image: Image.Image, name: Name) -> Array:
    """(H,W) where it is grey or deep, else (H,W,3), as a file of it would be read."""
    try:
        image = ImageOps.exif_transpose(image)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # opened, but not decoded yet
        raise InputError(f"{name}: damaged or truncated image ({error}); fetch the file again") from None
    require_no_thermal(name, image)
    image = image.convert("LA") if image.mode == "La" else image  # all that PIL converts it to
    deep = image.mode.startswith("I") or image.mode == "F"
    grey = image.mode in ("L", "LA")
    return np.asarray(image if deep else image.getchannel(0) if grey else image.convert("RGB"))


def _content(image: object, name: Name) -> bytes | None:
    """The bytes of an image file in memory, or of an open one from its beginning; None for other forms."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    read, seek = getattr(image, "read", None), getattr(image, "seek", None)
    if isinstance(image, Image.Image) or read is None:
        return None
    try:
        if seek is not None:
            with suppress(io.UnsupportedOperation):  # a pipe is read from where it stands
                seek(0)
        content = read()
    except (OSError, ValueError) as error:  # ValueError: a closed file
        raise InputError(f"{name}: the open file cannot be read ({error}); give its path or its bytes") from None
    if not isinstance(content, bytes):
        raise InputError(f"{name}: the open file gives {type(content).__name__}, expected bytes; open it with 'rb'")
    return content


@contextmanager
def _file(image: object, name: Name) -> Iterator[str | Path | None]:
    """The path for the readers: the one that was given, or of a copy of a file in memory, which what they say calls by
    the picture's name; None for pictures."""
    content = None if isinstance(image, str | Path) else _content(image, name)
    if content is None:
        yield image if isinstance(image, str | Path) else None
        return
    with tempfile.TemporaryDirectory(prefix="fusionsam-") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            yield path
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from None


def as_list(given: object) -> list[ImageLike | None] | None:
    """The pictures of a list or tuple; None for one picture, which nested lists of numbers are."""
    if not isinstance(given, list | tuple) or any(isinstance(item, list | tuple | int | float) for item in given):
        return None
    return list(given)


def listed_pairs(visible: object, infrared: object) -> list[tuple[ImageLike | None, ImageLike | None]] | None:
    """The pairs of two lists of pictures, or of one where the other is None; None where neither is a list.

    Raises:
        InputError: lists of two lengths, an empty one, or a list with a single picture.
    """
    one, two = as_list(visible), as_list(infrared)
    if one is None and two is None:
        return None
    if (one is None and visible is not None) or (two is None and infrared is not None):
        raise InputError("visible, infrared: one is a list of pictures and one a picture; give two of a kind")
    counts = {len(found) for found in (one, two) if found is not None}
    if len(counts) > 1:
        raise InputError(f"visible, infrared: {len(one or [])} and {len(two or [])} pictures; expected as many")
    if counts == {0}:
        raise InputError("visible, infrared: an empty list; give at least one picture")
    nothing: list[ImageLike | None] = [None] * counts.pop()
    return list(zip(one or nothing, two or nothing, strict=True))


def _is_unit(array: Array) -> bool:
    return bool(((array >= 0) & (array <= 1)).all())


def _array(image: object, name: Name) -> Array:
    """(H,W,1) or (H,W,3) of the machine's own integers or floats, bool as 0 and 255; tensors have their channels first,
    arrays last. InputError for anything else, and for a picture without a pixel."""
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        found = tuple(tensor.shape)
        array = (tensor[None] if tensor.ndim == 2 else tensor).numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray | Sequence) or hasattr(image, "__array__"):
        try:
            array = np.asarray(image)
        except ValueError:
            raise InputError(f"{name}: rows of several lengths; expected {FORMS}") from None
        found = array.shape
        array = array[..., None] if array.ndim == 2 else array
    else:
        raise InputError(f"{name}: found {type(image).__name__}; expected {FORMS}")
    if array.ndim == 3 and 0 in array.shape[:2]:
        raise InputError(f"{name}: found shape {found}, which holds no pixel; give a picture")
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        layout = "(C,H,W), a tensor's layout" if isinstance(image, Tensor) else "(H,W,C), an array's layout"
        raise InputError(f"{name}: found shape {found}, expected one image of 1 or 3 channels, {layout}")
    if array.dtype.kind not in "iufb":
        raise InputError(f"{name}: found {array.dtype}, expected numbers: uint8, uint16, or float")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return native(array)


def read_covered(covered: object, pair: Sequence[Tensor | None]) -> Tensor | None:
    """What a caller says of which pixels (2,H,W) of a `pair` (1,C,H,W) each camera reaches, as bool (1,2,H,W); None
    stays. InputError unless it is an array or tensor of that shape."""
    if covered is None:
        return None
    try:
        given = covered if isinstance(covered, Tensor) else torch.from_numpy(np.array(covered))
        there = given >= 0.5  # 0 and 1 of any number type, too
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"covered: found {type(covered).__name__}, expected a bool array or tensor") from None
    if there.shape != (2, *size_of(pair)):
        height, width = size_of(pair)
        raise InputError(
            f"covered: found shape {tuple(there.shape)}, expected (2, {height}, {width}): where the visible, and where "
            "the infrared camera reaches"
        )
    return there[None]
