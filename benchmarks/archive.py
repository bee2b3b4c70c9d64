"""Does an archive come out whole? `predict --engine ray` with two workers, from and into a stand-in of S3 on this
machine, killed at random moments, compared byte by byte with `--engine local`.

    python benchmarks/archive.py --pairs 10000 --large 200 --kills 5 --out results/archive.json
    python benchmarks/archive.py --disk --pairs 0 --large 300 --kills 0 --weights tiny --out out/archive_speed.json

The second command is about speed: on the disk, since the stand-in of S3 would take a core of its own. Needs the extras
ray, s3 and dev. Of every hundred pairs one is damaged. With RAY_ADDRESS that cluster is used.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from fusionsam.config.schema import preset
from fusionsam.io import commit
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.weights.checkpoint import save_checkpoint

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
WORKER = "ray::MapWorker(Map(RayWorker))"
BUCKET = "archive"


@dataclass(frozen=True)
class Place:
    """Where pictures and results lie: a file system, a folder in it, and the folder's address for the command."""

    files: fsspec.AbstractFileSystem
    root: str
    address: str


def start_s3() -> subprocess.Popen[bytes]:
    """moto's server, whose address becomes that of S3 for this process and its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", NO_PROXY="127.0.0.1")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    for _ in range(600):
        try:
            urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"], timeout=5).close()
            return server
        except OSError:
            time.sleep(0.5)
    raise SystemExit("moto's server did not begin to answer within 5 minutes")


def png(generator: np.random.Generator, height: int, width: int, *channels: int) -> bytes:
    small = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, *channels), dtype=np.uint8))
    data = io.BytesIO()
    small.resize((width, height)).save(data, format="PNG")
    return data.getvalue()


def upload(place: Place, pairs: int, large: int) -> int:
    """Pictures and manifest into the place; the number of pairs that are damaged."""
    generator = np.random.default_rng(0)
    sizes = [(64, 64)] * pairs + [(480, 640)] * large
    order = generator.permutation(len(sizes))
    place.files.makedirs(f"{place.root}/in", exist_ok=True)
    damaged, table = 0, io.StringIO()
    rows = csv.writer(table)
    rows.writerow(("id", "visible", "infrared"))
    for number, index in enumerate(order):
        height, width = sizes[index]
        broken = number % 100 == 50
        damaged += broken
        warm = b"damaged" if broken else png(generator, height, width)
        place.files.pipe({f"{place.root}/in/{number}_v.png": png(generator, height, width, 3),
                          f"{place.root}/in/{number}_t.png": warm})  # fmt: skip
        rows.writerow((f"pair{number}", f"{number}_v.png", f"{number}_t.png"))
    place.files.pipe_file(f"{place.root}/in/pairs.csv", table.getvalue().encode())
    return damaged


def command(place: Place, weights: str | Path, out: str, shard: int, *more: str) -> list[str]:
    given = {
        "--manifest": f"{place.address}/in/pairs.csv",
        "--out": f"{place.address}/{out}",
        "--weights": str(weights),
    }
    flags = [part for flag in given.items() for part in flag]
    return [sys.executable, "-m", "fusionsam", "predict", *flags, "--device", "cpu", "--shard", str(shard), *more]


def workers() -> list[int]:
    """Process ids of Ray's workers of this machine."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().decode(errors="replace").startswith(WORKER):
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def shards_done(place: Place) -> int:
    place.files.invalidate_cache()
    try:
        return len(place.files.ls(f"{place.root}/ray/results", detail=False))
    except FileNotFoundError:
        return 0


def killed_run(place: Place, given: list[str], kills: int, shards: int, seed: int) -> list[str]:
    """Run on Ray to the end, with a kill whenever a random share of what is left has been done; who was killed."""
    draw, told = random.Random(seed), list[str]()
    # kills come after these numbers of finished shards, so that there is always something left to do
    marks = sorted(draw.sample(range(1, max(kills + 1, shards)), kills))
    driver = subprocess.Popen(given)
    while (code := driver.poll()) is None or (code < 0):
        if code is not None:
            driver = subprocess.Popen(given)
        if marks and shards_done(place) >= marks[0]:
            time.sleep(draw.uniform(0, 2))  # somewhere within a shard
            alive = workers()
            victim = "driver" if draw.random() < 0.5 or not alive else "worker"
            os.kill(driver.pid if victim == "driver" else draw.choice(alive), signal.SIGKILL)
            told.append(f"{victim} after {marks.pop(0)} shards")
            print(told[-1], flush=True)
        time.sleep(0.5)
    if code != 3:
        raise SystemExit(f"the run on Ray ended with exit code {code}, not 3 (some pairs failed)")
    return told


def compare(place: Place, count: int, damaged: int) -> dict[str, int]:
    """Files of both engines, and how often each id is in the table. Ends where they differ."""
    files, root = place.files, place.root
    names = [{name.removeprefix(f"{root}/{out}/") for name in files.find(f"{root}/{out}")} for out in ("local", "ray")]
    if names[0] != names[1]:
        raise SystemExit(f"other files: {sorted(names[0] ^ names[1])[:5]}")
    for name in names[0]:
        if files.cat_file(f"{root}/local/{name}") != files.cat_file(f"{root}/ray/{name}"):
            raise SystemExit(f"{name}: other bytes")
    rows = pq.read_table(f"{root}/ray/results", filesystem=files).to_pylist()
    often = Counter(row["id"] for row in rows)
    if sorted(often) != sorted(f"pair{number}" for number in range(count)) or set(often.values()) != {1}:
        raise SystemExit("an id is missing, or there more than once")
    errors = sum(row["error"] is not None for row in rows)
    if errors != damaged:
        raise SystemExit(f"{errors} rows with an error, expected {damaged}")
    return {"files": len(names[0]), "rows": len(rows), "rows_with_an_error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000, help="of 64x64 pixels")
    parser.add_argument("--large", type=int, default=200, help="of 480x640 pixels")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--shard", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true", help="on this machine's disk, without a stand-in of S3")
    parser.add_argument("--weights", help="(left out: a tiny network, random)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    server = None if options.disk else start_s3()
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            weights = options.weights or save_checkpoint(
                Path(folder) / "weights", FusionSAMNetwork(preset("debug")), {}
            )
            place = Place(fsspec.filesystem("file"), f"{folder}/{BUCKET}", f"{folder}/{BUCKET}")
            if server is not None:
                place = Place(fsspec.filesystem("s3", use_listings_cache=False), BUCKET, f"s3://{BUCKET}")
            count = options.pairs + options.large
            damaged = upload(place, options.pairs, options.large)
            started = time.monotonic()
            code = subprocess.run(command(place, weights, "local", options.shard), check=False).returncode
            if code != 3:
                raise SystemExit(f"the local run ended with exit code {code}, not 3 (some pairs failed)")
            local = time.monotonic() - started
            started = time.monotonic()
            ray = command(place, weights, "ray", options.shard, "--engine", "ray", "--workers", "2")
            told = killed_run(place, ray, options.kills, -(-count // options.shard), options.seed)
            on_ray = time.monotonic() - started
            found = {
                "command": shlex.join(["python", *sys.argv]),
                "commit": commit(),
                "machine": {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
                "pairs_of_64x64": options.pairs,
                "pairs_of_480x640": options.large,
                "shard": options.shard,
                "killed": told,
                **compare(place, count, damaged),
                "bytes_equal_to_local": True,
                "seconds_local": round(local, 1),
                "seconds_ray_with_kills": round(on_ray, 1),
                "speed_of_local": round(local / on_ray, 2),
                "load_average": [round(value, 1) for value in os.getloadavg()],
            }
    finally:
        if server is not None:
            server.kill()
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
