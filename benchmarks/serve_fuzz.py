"""Malformed uploads against one server: each must be answered 4xx with a sentence, the process must live on.

python benchmarks/serve_fuzz.py --cases 500 --weights tiny --out results/serve.json
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import lzma
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from serve_load import Server, machine, png, record, request_of

NAMES = (
    "../../etc/passwd",
    "/etc/shadow",
    "..\\..\\boot.ini",
    "a\0b.png",
    "$(id).png",
    "x" * 3000,
    "%2e%2e%2f",
    "\u202egnp",
)
HUNDRED_MB = 100 * 2**20


def part(name: str, data: bytes, filename: str = "a.png") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


def image(r: random.Random, mode: str = "RGB", kind: str = "PNG") -> bytes:
    array = np.frombuffer(r.randbytes(80 * 96 * len(mode)), np.uint8).reshape(80, 96, -1).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


SWOLLEN, SWOLLEN_LZMA = zlib.compress(bytes(300 * 2**20), 9), lzma.compress(bytes(300 * 2**20))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def promised(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def truncated(r: random.Random) -> bytes:
    data = image(r, kind=r.choice(("PNG", "JPEG", "TIFF", "BMP")))
    # a JPEG or a BMP of nearly full length may still be read
    return part("visible", data[: r.randrange(1, len(data) // 2)])


def bomb(r: random.Random) -> bytes:
    zeros = zlib.compress(bytes(20 * 2**20), 9)  # 20 MB of pixels in 20 kB, in a picture that says it has more
    sizes = ((60000, 60000), (2**31 - 1, 2**31 - 1), (4096, 4097), (5000, 100), (4000, 4000), (1, 2**30))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * 2**20), 9))
    data = promised(*r.choice(sizes), zeros)
    if r.random() < 0.3:  # compressed text of 200 MB before pixels that are missing
        data = promised(100, 100)
        data = data[:33] + text + data[33:]
    return part("visible", data)


def tiff_bomb(r: random.Random) -> bytes:
    """A TIFF whose directory promises absurd counts."""
    entries = [
        (256, 4, 1, r.choice((100, 2**31))),
        (257, 4, 1, r.choice((100, 2**31))),
        (258, 3, r.choice((1, 2**30)), 8),
    ]
    entries += [(259, 3, 1, r.choice((1, 5, 8))), (262, 3, 1, 1), (273, 4, r.choice((1, 2**31)), 8), (277, 3, 1, 1)]
    entries += [(32997, 4, 1, r.choice((1, 2**16, 2**31)))] if r.random() < 0.3 else []
    entries += [(278, 4, 1, 2**31), (279, 4, r.choice((1, 2**30)), r.choice((10, 2**31)))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    return part(r.choice(("visible", "infrared")), b"II*\0" + struct.pack("<I", 8) + directory)


def swelling(r: random.Random) -> bytes:
    """A TIFF of 64x64 pixels whose one strip or tile unpacks to hundreds of megabytes."""
    tile = r.choice((0, 8192, 16384))
    # a strip of other kinds is read up to its due end, and so answered
    compression, data, bits = r.choice(((8, SWOLLEN, 8), (34925, SWOLLEN_LZMA, 16))) if tile else (8, SWOLLEN, 16)
    tags = {256: 64, 257: 64, 258: bits, 259: compression, 262: 1, 277: 1}
    tags |= {322: tile, 323: tile, 324: 8, 325: len(data)} if tile else {273: 8, 278: 64, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    return part(r.choice(("visible", "infrared")), head + directory + bytes(4))


def wrong_type(r: random.Random) -> bytes:
    kinds = (
        b"%PDF-1.7\n",
        b"GIF89a",
        b"PK\3\4",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x7fELF",
        b"RIFF",
        b"\x89PNG",
    )
    return part(r.choice(("visible", "infrared", "rgbt")), r.choice(kinds) + r.randbytes(r.randrange(5000)))


def path_names(r: random.Random) -> bytes:
    name = r.choice(NAMES)
    if r.random() < 0.5:  # a good image in a field of that name
        return part(name, image(r))
    return part("visible", image(r)[:200], name)


def wrong_size(r: random.Random) -> bytes:
    small, other = png(np.zeros((r.randrange(1, 64), 80), np.uint8)), png(np.zeros((81, 96), np.uint8))
    return part("visible", small) if r.random() < 0.5 else part("visible", image(r)) + part("infrared", other)


def wrong_channels(r: random.Random) -> bytes:
    return part("rgbt", image(r)) if r.random() < 0.5 else part("visible", image(r, "RGBA"))


def wrong_prompts(r: random.Random) -> bytes:
    texts = (
        "{",
        "[" * 60000,
        '{"points": [[1e999, 1]]}',
        '{"points": [[-1, 5]]}',
        '{"boxes": [[9, 9, 1, 1]]}',
        "oracle",
        "null",
    )
    head = b'--b\r\nContent-Disposition: form-data; name="prompts"\r\n\r\n'
    return part("visible", image(r)) + head + r.choice(texts).encode() + b"\r\n"


def corrupted(r: random.Random) -> bytes:
    """The compressed pixels of a PNG, overwritten; its checksums are right."""
    raw = bytearray(zlib.compress(r.randbytes(80 * (1 + 96 * 3))))
    raw[:400] = r.randbytes(400)
    return part("visible", promised(96, 80, bytes(raw)))


def wrong_form(r: random.Random) -> bytes:
    whole = part("visible", image(r))
    forms = (b"", r.randbytes(300), whole[: r.randrange(10, 60)], b"--b\r\n\r\n\r\n", b"--b" * 50, whole * 5)
    forms += (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n", whole.replace(b"name=", b"eman=", 1))
    forms += (b"--b\r\n" + b"X-A: " + b"y" * 20000 + b"\r\n" + whole[5:].replace(b"visible", b"v", 1),)
    return r.choice(forms)


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    truncated, bomb, tiff_bomb, swelling, wrong_type, path_names, wrong_size, wrong_channels, wrong_prompts, corrupted,
    wrong_form,
)  # fmt: skip


def hundred_mb(chunked: bool) -> Iterator[bytes] | bytes:
    if not chunked:
        return part("visible", bytes(HUNDRED_MB))
    return iter([part("visible", b""), *[bytes(2**20)] * 100])


def send(port: int, path: str, body: bytes | Iterator[bytes]) -> tuple[int, str, str]:
    """Status, content type, text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # its answer may have come all the same
            connection.request("POST", path, body, headers, encode_chunked=not isinstance(body, bytes))
        answer = connection.getresponse()
        return answer.status, answer.getheader("content-type", ""), answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, "", repr(error)
    finally:
        connection.close()


def fault(status: int, kind: str, text: str) -> str | None:
    """What is wrong with an answer, if anything."""
    try:
        sentence = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status}: not a JSON error: {text[:100]}"
    if not 400 <= status < 500:
        return f"{status}: {sentence}"
    words = len(sentence.split())
    if words < 3 or "\n" in sentence or "Traceback" in sentence or "/tmp" in sentence:
        return f"{status}: no sentence: {sentence[:100]}"
    return None


def run(server: Server, cases: int, seed: int) -> dict:
    r, faults, statuses = random.Random(seed), [], Counter()
    memory, slowest = [], 0.0
    by_kind: dict[str, Counter[str]] = {}
    for case in range(cases):
        make = KINDS[case % len(KINDS)]
        name, body = make.__name__, make(r)
        if case % 25 == 24:  # 20 of 500
            name, body = "hundred_mb", hundred_mb(chunked=case % 50 == 49)
        elif make is not wrong_form:
            body += b"--b--\r\n"
        started = time.monotonic()
        status, kind, text = send(server.port, r.choice(("/v1/predict", "/v1/sessions")), body)
        slowest = max(slowest, time.monotonic() - started)
        statuses[str(status)] += 1
        by_kind.setdefault(name, Counter())[str(status)] += 1
        if found := fault(status, kind, text):
            faults.append(f"case {case} {name}: {found}")
        memory.append(round(server.rss_mb(), 1))
    good = request_of((64, 64), 0)
    _, _, body = good.partition(b"\r\n\r\n")
    return {
        "cases": cases,
        "seed": seed,
        "statuses": dict(statuses),
        "by_kind": {name: dict(counts) for name, counts in sorted(by_kind.items())},
        "faults": faults,
        "slowest_s": round(slowest, 2),
        "rss_mb": {"after_50": memory[min(49, cases - 1)], "at_end": memory[-1], "max": max(memory)},
        "a_good_pair_afterwards": send(server.port, "/v1/predict", body)[0],
        "alive": server.process.poll() is None,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("results/serve.json"))
    args = parser.parse_args()
    about = {"command": "python benchmarks/serve_fuzz.py " + " ".join(sys.argv[1:]), **machine()}
    server = Server(args.weights)
    try:
        report = {**about, "weights": Path(args.weights).name, **run(server, args.cases, args.seed)}
        report["sigterm"] = dict(zip(("exit_code", "last_line"), server.stop(), strict=True))
    finally:
        server.process.kill()
    print(json.dumps(report, indent=1))
    record(args.out, "fuzz", report)
    return 1 if report["faults"] or not report["alive"] or report["a_good_pair_afterwards"] != 200 else 0


if __name__ == "__main__":
    sys.exit(main())
