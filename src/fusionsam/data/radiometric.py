"""Radiometric JPEGs: one file with the camera's counts, its constants and often a visible picture.

FLIR writes its records into APP1 segments (the format is known through ExifTool's FLIR.pm and Thermimage), also in the
cameras that it made for DJI (XT, XT2). DJI's own cameras put the bare counts into APP3. What is read is bounded by the
file's own size; damaged files raise InputError with one line.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fusionsam.data.planck import Planck
from fusionsam.types import LARGEST, InputError

MAX_PIXELS = 2 * LARGEST**2
MAX_BYTES = 256 << 20
"""Largest file that is looked at, in bytes."""
SUFFIXES = (".jpg", ".jpeg")
"""File names that count as radiometric files when folders are listed."""
_RAW, _EMBEDDED, _CAMERA, _PIP = 0x01, 0x0E, 0x20, 0x2A  # types of FLIR's records
_RECORDS = 256  # a file has some twenty
_SEGMENTS = 4096  # counts of the largest picture are a thousand; empty ones could be millions
_FLIR, _DJI = b"FLIR\0", 0xE3
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class MakerAlignment:
    """How the camera itself lays its visible picture over the infrared one (FLIR's picture in picture)."""

    real_to_infrared: float
    """Field of view of the visible picture by that of the infrared one; above 1 it shows more."""
    offset_x: int
    """Pixels of the visible picture from its centre to the infrared picture's, to the right."""
    offset_y: int
    """The same, downwards."""
    crop: tuple[int, int, int, int]
    """x1, x2, y1, y2 of the inset, in pixels of the infrared picture."""

    def box(self, visible: tuple[int, int], infrared: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part x0, y0, x1, y1 of a visible picture (H,W) that the infrared one (H,W) covers; it may lie partly
        outside. The shape is the infrared picture's."""
        height, width = visible
        covered_width = width / self.real_to_infrared
        covered_height = covered_width * infrared[0] / infrared[1]
        x, y = width / 2 + self.offset_x, height / 2 + self.offset_y
        return (
            x - covered_width / 2, y - covered_height / 2, x + covered_width / 2, y + covered_height / 2,
        )  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """Under the names that ExifTool gives."""
        names = ("PiPX1", "PiPX2", "PiPY1", "PiPY2")
        own = {"Real2IR": round(self.real_to_infrared, 6), "OffsetX": self.offset_x, "OffsetY": self.offset_y}
        return {**own, **dict(zip(names, self.crop, strict=True))}


@dataclass(frozen=True)
class Radiometric:
    """What one radiometric file holds."""

    maker: Literal["FLIR", "DJI"]
    camera: str
    counts: NDArray[np.uint16]
    """(H,W), more is hotter."""
    planck: Planck | None = None
    """The constants from counts to degrees Celsius; None where the file gives none that are usable."""
    visible: NDArray[np.uint8] | None = None
    """(H',W',3) RGB, the embedded visible picture."""
    alignment: MakerAlignment | None = None

    def celsius(self) -> NDArray[np.float32] | None:
        """(H,W) degrees Celsius with the file's own constants; None without them."""
        return None if self.planck is None else self.planck.celsius(self.counts)

    def facts(self) -> dict[str, object]:
        """What the JSON of a prediction tells of the file."""
        found: dict[str, object] = {
            "maker": self.maker,
            "camera": self.camera,
            "counts": [int(self.counts.min()), int(self.counts.max())],
            "visible": None if self.visible is None else list(self.visible.shape[:2]),
            "alignment": None if self.alignment is None else self.alignment.to_dict(),
        }
        celsius = self.celsius()
        if celsius is not None and (known := celsius[np.isfinite(celsius)]).size:
            found["celsius"] = [round(float(known.min()), 2), round(float(known.max()), 2)]
        return found


def is_radiometric(path: str | Path) -> bool:
    """Whether a file has the segments of FLIR or DJI, whatever its name; False for what cannot be read."""
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > MAX_BYTES:
            return False
        with Path(path).open("rb") as file:
            return any(
                (marker == 0xE1 and body.startswith(_FLIR)) or (marker == _DJI and length > 2 * 32 * 32)
                for marker, length, body in _walk(file, 8)
            )
    except OSError:
        return False


def read_radiometric(path: str | Path, limit: int = MAX_PIXELS) -> Radiometric:
    """All that a FLIR or DJI radiometric JPEG holds; none of its pictures is decoded that has more than `limit` pixels.

    >>> file = read_radiometric("FLIR.jpg")  # doctest: +SKIP
    >>> file.celsius().max()  # doctest: +SKIP

    Raises:
        InputError: no such file, no radiometric JPEG, damaged, or larger than MAX_BYTES or `limit`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "no such file"
            raise InputError(f"{path}: {what}; expected a radiometric JPEG of FLIR or DJI")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, more than the limit of {MAX_BYTES}")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segments = _segments(file)
            if segments.flir:
                return _from_flir(segments.flir, segments.exif, limit)
            if segments.counts:
                return _from_dji(segments, limit)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: damaged radiometric file ({reason}); fetch it again") from error
    raise InputError(
        f"{path}: holds no radiometric data of FLIR (APP1) or DJI (APP3); give a file as the camera wrote it, not an "
        "edited copy"
    )


@dataclass
class _Segments:
    """The segments before the picture, joined by kind."""

    flir: bytes
    counts: bytes  # DJI's APP3
    exif: dict[str, str]
    size: tuple[int, int]  # (H, W) of the preview


def _walk(file: BinaryIO, most: int = 1 << 16) -> Iterator[tuple[int, int, bytes]]:
    """Marker, length and (up to `most` bytes of) body of each segment before the picture; nothing for other files."""
    if file.read(2) != b"\xff\xd8":
        return
    for _ in range(_SEGMENTS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xD9, 0xDA):
            return
        length = struct.unpack(">H", head[2:])[0] - 2
        if length < 0:
            return
        place = file.tell()
        yield head[1], length, file.read(min(length, most))
        file.seek(place + length)


def _segments(file: BinaryIO) -> _Segments:
    flir: dict[int, bytes] = {}
    counts, exif, size = [], {}, (0, 0)
    for marker, _, body in _walk(file):
        if marker == 0xE1 and body.startswith(_FLIR) and len(body) > 8:
            flir.setdefault(body[6], body[8:])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = _camera_names(body)
        elif marker == _DJI:
            counts.append(body)
        elif 0xC0 <= marker <= 0xC3 and len(body) >= 5:
            size = struct.unpack(">HH", body[1:5])
    if flir and sorted(flir) != list(range(len(flir))):
        raise InputError("lacks some of its FLIR segments (cut while it was copied?); fetch it again")
    return _Segments(b"".join(flir[index] for index in sorted(flir)), b"".join(counts), exif, size)


def _camera_names(body: bytes) -> dict[str, str]:
    try:
        exif = Image.Exif()
        exif.load(body)
        found = {"make": exif.get(271, ""), "model": exif.get(272, "")}
    except _BROKEN:
        return {}
    return {key: str(value).strip("\0 *") for key, value in found.items()}


# -- FLIR --------------------------------------------------------------------------------------------------------


def _from_flir(data: bytes, exif: dict[str, str], limit: int) -> Radiometric:
    records = _records(data)
    if _RAW not in records:
        raise InputError("its FLIR segments hold no raw thermal picture; give the file as the camera wrote it")
    camera = records.get(_CAMERA, b"")
    name = _text(camera[0xD4:0xF4]) or exif.get("model", "") or "FLIR"
    file = Radiometric("FLIR", name, _flir_counts(records[_RAW], limit), _planck(camera))
    return replace(
        file,
        visible=_embedded(records[_EMBEDDED], limit) if _EMBEDDED in records else None,
        alignment=_pip(records[_PIP]) if _PIP in records else None,
    )


def _records(data: bytes) -> dict[int, bytes]:
    """Type -> bytes of the first record of each type in an FFF block."""
    if data[:4] not in (b"FFF\0", b"AFF\0") or len(data) < 64:
        raise InputError("its FLIR segments do not begin with FFF; fetch it again")
    order = ">" if 100 <= struct.unpack(">I", data[20:24])[0] < 200 else "<"
    if not 100 <= struct.unpack(order + "I", data[20:24])[0] < 200:
        raise InputError("its FLIR segments are of a version that is not known; expected 100 to 199")
    start, count = struct.unpack(order + "II", data[24:32])
    found: dict[int, bytes] = {}
    for index in range(min(count, _RECORDS)):
        entry = data[start + 32 * index : start + 32 * index + 32]
        if len(entry) < 32:
            break
        kind = struct.unpack(order + "H", entry[:2])[0]
        offset, length = struct.unpack(order + "II", entry[12:20])
        if kind and length and offset + length <= len(data):
            found.setdefault(kind, data[offset : offset + length])
    return found


def _order(record: bytes, expected: int) -> str:
    """Byte order of a record, which begins with a small number."""
    return "<" if struct.unpack("<H", record[:2])[0] < 0x100 else ">" if expected else "<"


def _flir_counts(record: bytes, limit: int) -> NDArray[np.uint16]:
    order = _order(record, 2)
    width, height = struct.unpack(order + "HH", record[2:6])
    body = record[32:]
    if body.startswith((b"\x89PNG", b"II*\0", b"MM\0*")):
        with Image.open(io.BytesIO(body), formats=("PNG", "TIFF")) as image:
            _bounded(*image.size, limit)
            counts = np.asarray(image).astype(np.uint16)
            # FLIR stores its PNG with the bytes of a pixel exchanged
            counts = counts.byteswap() if image.format == "PNG" else counts
    else:
        _bounded(width, height, limit)
        if len(body) < 2 * width * height:
            raise InputError(f"its raw thermal picture has {len(body)} bytes, expected {2 * width * height}")
        counts = np.frombuffer(body, order + "u2", width * height).reshape(height, width).astype(np.uint16)
    if counts.ndim != 2:
        raise InputError(f"its raw thermal picture has shape {counts.shape}; expected one channel")
    return counts


def _bounded(width: int, height: int, limit: int) -> None:
    if width < 1 or height < 1 or width * height > limit:
        raise InputError(f"declares {width}x{height} pixels inside; expected 1 to {limit}")


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("latin-1").strip(" *")


def _planck(camera: bytes) -> Planck | None:
    if len(camera) < 0x310:
        return None
    order = _order(camera, 2)
    at = partial(_number, camera, order)
    constants = Planck(
        r1=at(0x58), b=at(0x5C), f=at(0x60), o=float(struct.unpack(order + "i", camera[0x308:0x30C])[0]), r2=at(0x30C),
        emissivity=at(0x20), distance=at(0x24), reflected=at(0x28) - 273.15, air=at(0x2C) - 273.15,
        window=at(0x30) - 273.15, window_transmission=at(0x34), humidity=at(0x3C),
        alpha1=at(0x70), alpha2=at(0x74), beta1=at(0x78), beta2=at(0x7C), x=at(0x80),
    )  # fmt: skip
    return constants if constants.usable() else None


def _number(data: bytes, order: str, place: int) -> float:
    return float(struct.unpack(order + "f", data[place : place + 4])[0])


def _embedded(record: bytes, limit: int) -> NDArray[np.uint8] | None:
    body = record[32:]
    is_png = body.startswith(b"\x89PNG")
    if not is_png and not body.startswith(b"\xff\xd8\xff"):
        return None
    with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as image:
        _bounded(*image.size, limit)
        if is_png and image.mode == "RGB":  # its three channels are Y, Cb and Cr
            return np.array(Image.frombytes("YCbCr", image.size, image.tobytes()).convert("RGB"))
        return np.array(image.convert("RGB"))


def _pip(record: bytes) -> MakerAlignment | None:
    if len(record) < 16:
        return None
    scale, x, y, x1, x2, y1, y2 = struct.unpack("<f6h", record[:16])
    return MakerAlignment(scale, x, y, (x1, x2, y1, y2)) if np.isfinite(scale) and 0.05 < scale < 20 else None


# -- DJI ---------------------------------------------------------------------------------------------------------


def _from_dji(segments: _Segments, limit: int) -> Radiometric:
    (height, width), found = segments.size, len(segments.counts)
    if 2 * width * height != found:
        raise InputError(
            f"its DJI segments hold {found} bytes, expected {2 * width * height} (two a pixel of the {width}x{height} "
            "preview); give the file as the camera wrote it"
        )
    _bounded(width, height, limit)
    counts = np.frombuffer(segments.counts, "<u2").reshape(height, width).astype(np.uint16)
    return Radiometric("DJI", segments.exif.get("model", "") or "DJI", counts)
