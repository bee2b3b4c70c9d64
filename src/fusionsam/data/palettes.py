"""Colour-mapped infrared pictures back to heat: each pixel becomes its place along the palette, cold 0 to hot 255.

The tables are drawn from public formulas (jet, hot, rainbow), from matplotlib's colour maps (CC0, Apache-2.0 for turbo,
K. Moreland's coolwarm) at 17 or 33 places, and, for the cameras' own, from the order of colours that FLIR and DJI show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from fusionsam.types import InputError

_ANCHORS = {
    "ironbow_flir": "001e28 500a91 a0199b d23c64 eb7328 f3aa0a f0d73c e1f0eb",
    "ironbow": "000014 2d0082 8200a0 be1482 dc463c f0780a fab40a ffe664 fffff0",
    "iron_dark": "0f102d 1c1050 29105a 441664 5d1c60 8c1774 ac1d76 e55618 eaa610 ebdd1a ebeb56 fffff0",
    "rainbow_hc": "101010 781078 d010d0 6a10b0 1020a0 1085c0 10c8c0 108058 286810 88a810 d0c810 a06010 801014 a82828 "
    "d04848 e09898 f0e0e0",
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d04545 e35933 f1711f f98c0a fcaa0f "
    "f9c932 f2e865 fcffa4",
    "magma": "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 cf4070 e55064 f4695c fb8761 fea571 "
    "fec287 fde0a1 fcfdbf",
    "plasma": "0d0887 310597 4c02a1 6600a7 7e03a8 9511a1 aa2395 bc3587 cc4778 d9586a e56b5d f07f4f f89441 fdab33 "
    "fdc328 f9dd25 f0f921",
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d "
    "aadc32 d5e21a fde725",
    "coolwarm": "3b4cc0 4e68d8 6282ea 779af7 8db0fe a3c2fe b9d0f9 ccd9ed dddcdc ebd3c6 f4c5ad f7b194 f49a7b ec7f63 "
    "de614d cb3e38 b40426",
    "turbo": "30123b 392a73 4040a2 4456c7 466be3 4680f6 4294ff 37a8fa 28bceb 1ccdd8 18ddc2 1fe9af 32f298 4ef97d "
    "6dfe62 8bff4b a4fc3c b7f735 cbed34 dde037 ecd13a f7c13a fdae35 fe992c fb8122 f56918 ec530f e14109 "
    "d23105 c12302 ac1701 950d01 7a0403",
    "rainbow": "0000ff 00ffff 00ff00 ffff00 ff0000",
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
    "hot": "0a0000 ff0000 ffff00 ffffff",
    # the wheel of hues, red the least
    "hsv": "ff0000 ffff00 00ff00 00ffff 0000ff ff00ff ff0040",
    "spectrum": "ff0029 ff0000 ffff00 00ff00 00ffff 0000ff ff00ff ff00bf",
}  # fmt: skip
_PLACES = {  # where the anchors are not at equal distances
    "hot": (0.0, 0.365079, 0.746032, 1.0),
    "hsv": (*(hue / 345 for hue in range(0, 301, 60)), 1.0),
    "spectrum": (0.0, *((hue + 9.65) / 324.65 for hue in range(0, 301, 60)), 1.0),
}
KNOWN = (*_ANCHORS, "violet_rainbow")
"""Names that `--palette` takes."""
EITHER_WAY = ("rainbow", "hsv", "spectrum", "violet_rainbow")
"""Rainbows are in use with red hot and with red cold; which it is, the scene must tell."""
CLOSE = 16.0
"""Mean distance in RGB (0-255 a channel) up to which a picture is of a palette."""
COLORFUL = 12.0
"""Mean difference of the largest and the smallest channel from which on a picture is no grey one."""
_SAMPLE = 20_000


@dataclass(frozen=True)
class Match:
    """How well a picture's colours lie on a palette."""

    name: str
    error: float
    """Mean distance of the pixels' colours to the nearest of the palette, RGB 0-255."""
    spread: float
    """Part of the palette that is used, 0..1."""

    @property
    def known(self) -> bool:
        """Whether the palette may be taken for the picture's own."""
        return self.error <= CLOSE and self.spread >= 0.1

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"name": self.name, "error": round(self.error, 2), "spread": round(self.spread, 3)}


def table(name: str) -> NDArray[np.uint8]:
    """(256,3) RGB of a palette, cold first. InputError for a name that is not known."""
    place = np.linspace(0, 1, 256)
    if name == "violet_rainbow":  # matplotlib's rainbow
        channels = [np.abs(2 * place - 0.5).clip(0, 1), np.sin(np.pi * place), np.cos(np.pi / 2 * place)]
        return (np.stack(channels, 1) * 255).round().astype(np.uint8)
    if name not in _ANCHORS:
        raise InputError(f"palette {name!r}: expected auto, none or one of {', '.join(KNOWN)}")
    anchors = np.array([list(bytes.fromhex(color)) for color in _ANCHORS[name].split()], dtype=float)
    places = _PLACES.get(name, tuple(np.linspace(0, 1, len(anchors))))
    channels = [np.interp(place, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, 1).round().astype(np.uint8)


def is_colorful(rgb: NDArray[np.uint8]) -> bool:
    """Whether uint8 (H,W,3) has more colour than the noise of a grey JPEG."""
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return False
    sample = _sample(rgb).astype(np.int16)
    return bool((sample.max(1) - sample.min(1)).mean() > COLORFUL)


def best_match(rgb: NDArray[np.uint8]) -> Match:
    """The palette on which the colours of uint8 (H,W,3) lie nearest."""
    sample = _sample(rgb).astype(np.float32)
    return min((_match(name, table(name), sample) for name in KNOWN), key=lambda match: match.error)


def match(rgb: NDArray[np.uint8], name: str) -> Match:
    """How well uint8 (H,W,3) fits the palette `name`."""
    return _match(name, table(name), _sample(rgb).astype(np.float32))


def heat(rgb: NDArray[np.uint8], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (H,W,3) and the (N,3) colours of its palette, cold first -> uint8 (H,W), 0 cold to 255 hot."""
    codes = (rgb[..., 0].astype(np.uint32) << 16) | (rgb[..., 1].astype(np.uint32) << 8) | rgb[..., 2]
    unique, place = np.unique(codes, return_inverse=True)
    found = np.stack([unique >> 16, (unique >> 8) & 255, unique & 255], 1).astype(np.float32)
    _, nearest = cKDTree(colors.astype(np.float32)).query(found)
    values = np.round(nearest * 255 / (len(colors) - 1)).astype(np.uint8)
    return values[place].reshape(rgb.shape[:2])


def distinct_colors(rgb: NDArray[np.uint8]) -> int:
    """Cells of a grid of 16 levels a channel that hold at least 1 in 5000 pixels: dozens for a palette, hundreds for a
    photograph."""
    sample = _sample(rgb).astype(np.int64) >> 4
    counts = np.bincount((sample[:, 0] << 8) | (sample[:, 1] << 4) | sample[:, 2], minlength=4096)
    return int((counts >= max(1, len(sample) / 5000)).sum())


def _sample(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    flat = rgb.reshape(-1, 3)
    return flat[:: max(1, len(flat) // _SAMPLE)]


def _match(name: str, colors: NDArray[np.uint8], sample: NDArray[np.float32]) -> Match:
    distances, places = cKDTree(colors.astype(np.float32)).query(sample)
    low, high = np.percentile(places, (1, 99)) / (len(colors) - 1)
    return Match(name, float(distances.mean()), float(high - low))
