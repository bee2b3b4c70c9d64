"""Damaged radiometric files: each must be read or refused in one line, soon, and within bounds of memory.

python benchmarks/radiometric_fuzz.py --root ../shared/data/rjpeg --cases 500 --out results/radiometric_fuzz.json

Bytes are changed, files are cut, segments get wrong lengths, go, or come twice, sizes, places and constants inside
become absurd. What predict does with such a file beside the network is done: both pictures, temperatures, facts. A
warning is a fault, as is any exception but the refusal. Every 20th refused file is given to the command itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fusionsam.cli.main import main as fusionsam
from fusionsam.config.schema import preset
from fusionsam.data.dataset import read_sample
from fusionsam.data.images import read_heat
from fusionsam.data.infrared import InfraredOptions
from fusionsam.data.radiometric import is_radiometric, read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.inference.celsius import celsius_tiff, class_temperatures
from fusionsam.io import commit, write_json
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import InputError
from fusionsam.weights.checkpoint import save_checkpoint

PATIENCE = 30
"""Seconds that one file may take, on a busy machine."""
ROOM = 4 << 30
"""Bytes of address space that may be asked for beyond what is in use before the first file."""
RECORDS = (0x01, 0x20, 0x2A)  # raw picture, camera, picture in picture
FLOATS = (*range(0x20, 0x38, 4), 0x3C, 0x58, 0x5C, 0x60, 0x70, 0x74, 0x78, 0x7C, 0x80, 0x30C)
ODD_FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e-38, 1e38, 3e4, -3e4)


def segments(data: bytes) -> list[tuple[int, int]]:
    """Place and length (with its marker) of each segment before the picture."""
    found, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] not in (0xD9, 0xDA):
        length = 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
        found.append((place, length))
        place += length
    return found


class Inside:
    """Where in a file FLIR's block has its fields."""

    def __init__(self, data: bytes) -> None:
        self.pieces = [
            (place + 12, length - 12)
            for place, length in segments(data)
            if data[place + 1] == 0xE1 and data[place + 4 : place + 9] == b"FLIR\0"
        ]
        block = b"".join(data[place : place + length] for place, length in self.pieces)
        self.whole: list[int] = []  # places of 32-bit numbers in the directory, of 16-bit sizes, of floats
        self.short: list[int] = []
        self.floats: list[int] = []
        if len(block) < 64:
            return
        order = ">" if block[20] == 0 else "<"
        start, count = struct.unpack(order + "II", block[24:32])
        self.whole = [20, 24, 28]
        for entry in range(start, min(start + 32 * count, len(block) - 32), 32):
            kind = struct.unpack(order + "H", block[entry : entry + 2])[0]
            self.whole += [entry + 12, entry + 16]
            at = struct.unpack(order + "I", block[entry + 12 : entry + 16])[0]
            if kind == RECORDS[0]:
                self.short += [at, at + 2, at + 4]
            elif kind == RECORDS[1]:
                self.floats += [at + place for place in FLOATS]
            elif kind == RECORDS[2]:
                self.floats += [at] * 4
                self.short += [at + 4, at + 6]

    def place(self, inside: int) -> int:
        """A place of the block, as one of the file."""
        for place, length in self.pieces:
            if inside < length:
                return place + inside
            inside -= length
        return 2


def put(data: bytearray, place: int, value: bytes) -> None:
    data[place : place + len(value)] = value[: max(0, len(data) - place)]


def flip(data: bytearray, r: random.Random) -> None:
    """Some bytes, mostly of what comes before the picture."""
    end = r.choice((400, 4000, len(data)))
    for _ in range(r.randrange(1, 12)):
        data[r.randrange(2, min(end, len(data)))] = r.randrange(256)


def cut(data: bytearray, r: random.Random) -> None:
    """The end is missing."""
    del data[r.randrange(0, len(data)) :]


def hole(data: bytearray, r: random.Random) -> None:
    """A piece within is missing, or zeros."""
    place, length = r.randrange(2, len(data)), r.choice((1, 100, 5000))
    data[place : place + length] = b"" if r.random() < 0.5 else bytes(min(length, len(data) - place))


def wrong_length(data: bytearray, r: random.Random) -> None:
    """Segments that tell of another length."""
    for place, length in r.choices(segments(data), k=r.randrange(1, 3)):
        value = r.choice((0, 1, 2, 3, 10, length - 1, length - 3, 0xFFFF, r.randrange(65536)))
        put(data, place + 2, struct.pack(">H", max(0, min(value, 65535))))


def other_segments(data: bytearray, r: random.Random) -> None:
    """Segments that are missing, there twice, exchanged, or many without content."""
    place, length = r.choice(segments(data))
    piece = data[place : place + length]
    what = r.randrange(4)
    if what == 0:
        del data[place : place + length]
    elif what == 1:
        data[place:place] = piece
    elif what == 2:
        del data[place : place + length]
        data[2:2] = piece
    else:
        data[2:2] = b"\xff\xe3\0\2" * 200_000


def huge(data: bytearray, r: random.Random) -> None:
    """Sizes and places that are absurd: in the directory, in raw pictures, PNGs and JPEGs."""
    inside = Inside(data)
    value = r.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, r.randrange(1 << 32)))
    for _ in range(r.randrange(1, 4)):
        kind = r.randrange(4)
        if kind == 0 and inside.whole:
            put(data, inside.place(r.choice(inside.whole)), struct.pack(">I", value))
        elif kind == 1 and inside.short:
            put(data, inside.place(r.choice(inside.short)), struct.pack("<H", value & 0xFFFF))
        elif kind == 2 and (place := data.find(b"IHDR")) > 0:
            put(data, place + r.choice((4, 8)), struct.pack(">I", r.choice((value, 1, 4096, 20000))))
        else:
            frames = [place for place in range(2, len(data) - 9) if data[place : place + 4] in FRAMES]
            for place in r.sample(frames, 1) if frames else ():
                put(data, place + r.choice((5, 7)), struct.pack(">H", value & 0xFFFF))


FRAMES = (b"\xff\xc0\0\x11", b"\xff\xc2\0\x11", b"\xff\xc0\0\x0b")


def constants(data: bytearray, r: random.Random) -> None:
    """Planck's constants, and the scale of the visible picture."""
    inside = Inside(data)
    if not inside.floats:
        return flip(data, r)
    for _ in range(r.randrange(1, 4)):
        value = r.choice((*ODD_FLOATS, struct.unpack("<f", r.randbytes(4))[0]))
        put(data, inside.place(r.choice(inside.floats)), struct.pack("<f", value))


KINDS = (flip, cut, hole, wrong_length, other_segments, huge, constants)


class TooLong(BaseException):
    """No part of the program catches it."""


def _ring(*_: object) -> None:
    raise TooLong


def look(path: Path, out: Path) -> None:
    """What predict does with a file, the network aside."""
    is_radiometric(path)
    entry = Entry(path.stem, radiometric=path)
    sample = read_sample(entry)
    json.dumps(sample.input, allow_nan=False)
    file = read_radiometric(path)
    json.dumps(file.facts(), allow_nan=False)
    if file.planck is not None:
        read_heat(path, InfraredOptions(limits=(20.0, 60.0)))
    labels = np.zeros(sample.size, np.uint8)
    if (celsius := file.celsius()) is not None:
        (out / f"{entry.id}_celsius.tif").write_bytes(celsius_tiff(celsius))
        found = class_temperatures(celsius, SimpleNamespace(labels=labels, classes=["all"]))
        json.dumps(found, allow_nan=False)


def command(path: Path, weights: Path, out: Path) -> str:
    """What is wrong with the command's answer to a file that cannot be read, if anything."""
    said = io.StringIO()
    given = ["--radiometric", str(path), "--weights", str(weights), "--out", str(out), "--device", "cpu"]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = fusionsam(["predict", *given])
    lines = said.getvalue().strip().splitlines()
    return "" if code == 2 and len(lines) == 1 and str(path) in lines[0] else f"exit code {code}, said {lines[:3]}"


def run(sources: list[Path], cases: int, seed: int, folder: Path) -> dict[str, object]:
    r, counts, faults, slowest = random.Random(seed), dict[str, Counter[str]](), list[str](), 0.0
    torch.manual_seed(0)
    weights = save_checkpoint(folder / "weights", FusionSAMNetwork(preset("debug")), {})
    whole = [source.read_bytes() for source in sources]
    path, refused = folder / "x.jpg", 0
    for source in sources:
        look(source, folder)  # what is loaded once is no matter of a damaged file
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    signal.signal(signal.SIGALRM, _ring)
    for case in range(cases):
        damage = KINDS[case % len(KINDS)]
        source = (case // len(KINDS)) % len(sources)
        data = bytearray(whole[source])
        damage(data, r)
        path.write_bytes(data)
        name = f"case {case}, {damage.__name__} of {sources[source].name}"
        told = counts.setdefault(damage.__name__, Counter())
        begun = time.monotonic()
        signal.alarm(PATIENCE)
        try:
            look(path, folder)
            told["read"] += 1
        except InputError as error:
            told["refused"] += 1
            refused += 1
            if str(path) not in str(error) or "\n" in str(error):
                faults.append(f"{name}: no line about the file: {str(error)[:200]}")
            elif refused % 20 == 1 and (wrong := command(path, weights, folder / "o")):
                faults.append(f"{name}: {wrong}")
        except (Exception, TooLong) as error:
            told["fault"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(
                f"{name}: {type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
            )
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cases": cases,
        "seed": seed,
        "files": [source.name for source in sources],
        "read": sum(told["read"] for told in counts.values()),
        "refused_in_one_line": refused,
        "by_kind": {name: dict(told) for name, told in counts.items()},
        "faults": faults,
        "slowest_s": round(slowest, 2),
        "rss_mb": {"before": round(start / 1024), "peak": round(peak / 1024)},
        "address_space_limit_mb": round((used + ROOM) / 2**20),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("../shared/data/rjpeg"), help="folder of whole files")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sources = sorted(options.root.glob("*.jpg"))
    if not sources:
        raise SystemExit(f"{options.root}: holds no .jpg; give a folder of radiometric files")
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        found = run(sources, options.cases, options.seed, Path(folder))
    given = "python benchmarks/radiometric_fuzz.py " + " ".join(sys.argv[1:])
    report = {"command": given, "commit": commit(), **found}
    print(json.dumps(report, indent=1))
    if options.out is not None:
        write_json(options.out, report)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
