"""PNGs of 16 bits a channel with colour or alpha, whose low bytes PIL drops: decoded here, all bits kept."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CHANNELS = {2: 3, 4: 2, 6: 4}  # colour types: RGB, grey and alpha, RGBA


def read_png16(path: Path, limit: int) -> NDArray[np.uint16] | None:
    """(H,W,C) as stored, with C 2 (grey and alpha), 3 or 4; None for any other PNG (8 bits, one channel, interlaced).

    Raises:
        ValueError, zlib.error: damaged, or more than `limit` pixels.
    """
    with path.open("rb") as file:
        start = file.read(33)
        if len(start) < 33 or start[:8] != b"\x89PNG\r\n\x1a\n" or start[12:16] != b"IHDR":
            return None
        width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", start[16:29])
        if bits != 16 or color not in _CHANNELS or interlaced:
            return None
        if not 0 < width * height <= limit:
            raise ValueError(f"declares {width}x{height} pixels")
        pixel = 2 * _CHANNELS[color]
        expected = height * (1 + width * pixel)
        unpack, data = zlib.decompressobj(), bytearray()
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            length = struct.unpack(">I", head[:4])[0]
            if head[4:] == b"IDAT":
                data += unpack.decompress(file.read(length), expected - len(data) + 1)
                if len(data) > expected:  # and a most of 0 would be no limit
                    break
            else:
                file.seek(length, 1)
            file.seek(4, 1)  # the checksum
        if len(data) < expected:
            raise ValueError(f"{len(data)} bytes of pixels, expected {expected}")
    rows = np.frombuffer(data, np.uint8, expected).reshape(height, 1 + width * pixel)
    pixels = _unfiltered(rows[:, 0], rows[:, 1:].reshape(height, width, pixel))
    return np.ascontiguousarray(pixels).view(">u2").astype(np.uint16)


def _unfiltered(kinds: NDArray[np.uint8], stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """PNG's filters undone. A pixel needs its left, upper and upper left neighbours, so a whole diagonal is done at a
    time: pixel x of row y at step x + y."""
    height, width, channels = stored.shape
    if not (kinds <= 4).all():
        raise ValueError(f"filter {kinds.max()} of its rows is not known")
    out = np.zeros((height + 1, width + 1, channels), np.int16)  # a border of zeros above and on the left
    for step in range(height + width - 1):
        y = np.arange(max(0, step - width + 1), min(height, step + 1))
        x = step - y
        left, up, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        kind = kinds[y][:, None]
        guess = np.where(kind == 1, left, np.where(kind == 2, up, 0))
        guess = np.where(kind == 3, (left + up) >> 1, guess)
        if (kind == 4).any():
            near = left + up - corner
            a, b, c = abs(near - left), abs(near - up), abs(near - corner)
            paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
            guess = np.where(kind == 4, paeth, guess)
        out[y + 1, x + 1] = (stored[y, x] + guess) & 255
    return out[1:, 1:].astype(np.uint8)
