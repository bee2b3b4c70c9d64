"""Label maps from files: class ids from grey, palette and colour pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusionsam.data.image_files import load, png_bits
from fusionsam.types import Array, InputError


def read_label(path: str | Path, palette: Sequence[tuple[int, int, int]] | None = None) -> Tensor:
    """int64 (H,W) class ids: the value of a grey file (0 is black), the index of a palette file. With `palette` (RGB of
    each id) colour files are translated too; a colour that is not in it raises InputError, as does a colour file
    without."""
    path = Path(path)
    image, *_ = load(path)
    if not isinstance(image, Image.Image):
        if image.ndim == 2 and image.dtype.kind in "iu":
            return torch.from_numpy(image.astype(np.int64))
        raise InputError(f"{path}: label of {image.dtype} {image.shape}; expected one channel of integer class ids")
    if image.mode in ("L", "P", "1", "LA", "PA"):
        ids = np.array(image if len(image.getbands()) == 1 else image.getchannel(0))
        if palette is not None and image.mode in ("P", "PA"):
            _require_own_indices(path, image, ids, palette)
            _require_own_indices(path, image, ids, [(grey, grey, grey) for grey in range(len(palette))])
        if image.mode == "L" and (bits := png_bits(path)) in (2, 4):
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
