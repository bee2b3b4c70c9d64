"""Many clients against one server on loopback, with the standard library: answers, errors, times, memory.

python benchmarks/serve_load.py --clients 200 --seconds 60 --weights tiny --out results/serve.json
python benchmarks/serve_load.py --clients 20 --seconds 1200 --half-of load --key half_load --out results/serve.json

Every client keeps a connection and sends the next small pair (64x64 to 128x128) when the last is answered; a 503 is
obeyed (Retry-After). With --half-of the clients together keep half of the pairs a second of an earlier run, whatever an
answer takes. Each answer is compared with the one that pair got alone, before the load. At the end, with all
clients still sending, the server gets SIGTERM: every request that it had accepted must still be answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from fusionsam.io import write_json

LATE = "503, accepted but not in time"
REFUSED, IDLE = "refused after SIGTERM", "kept connection closed after SIGTERM, before the next request"
SIZES = [(64, 64), (64, 96), (96, 96), (96, 128), (128, 128)]


class Server:
    """`fusionsam serve` on a free port, and its memory."""

    def __init__(self, weights: str, *flags: str) -> None:
        command = [sys.executable, "-m", "fusionsam", "serve", "--weights", weights, "--port", "0", *flags]
        # a pipe that nobody reads would stop the server one day
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)", line)
        if not found:
            self.log.seek(0)
            raise SystemExit(line + self.log.read())
        self.port = int(found[1])

    def rss_mb(self) -> float:
        """Resident memory, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and last line."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=300)
        return self.process.returncode, out.strip()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def request_of(size: tuple[int, int], seed: int) -> bytes:
    """A whole POST /v1/predict of one pair: smooth shapes, so that classes are areas and not noise."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small, "RGBA").resize((size[1], size[0]), Image.Resampling.BICUBIC))
    body = b""
    for name, array in (("visible", image[..., :3]), ("infrared", image[..., 3])):
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n\r\n'
        body += head.encode() + png(np.ascontiguousarray(array)) + b"\r\n"
    body += b"--b--\r\n"
    head = "POST /v1/predict?images=labels HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    head += f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def labels_of(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(json.loads(body)["images"]["labels"]))))


class Load:
    """The clients and what they saw."""

    def __init__(self, port: int, requests: list[bytes], pause: float = 0) -> None:
        self.port, self.requests, self.pause = port, requests, pause  # pause: seconds from one request to the next
        self.alone: list[np.ndarray] = []
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.differing: list[float] = []
        self.stopping = False

    async def measure_alone(self) -> None:
        """The labels of every pair when nothing else runs."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for request in self.requests:
            writer.write(request)
            status, _, body = await answer_of(reader)
            assert status == 200, body
            self.alone.append(labels_of(body))
        writer.close()

    async def client(self, number: int, end: float) -> None:
        """One client, until the server stops it or `end`."""
        turn, connection, rested = number, None, False
        due = time.monotonic() + self.pause * (number % 97) / 97  # not all at once
        while time.monotonic() < end:
            turn += 1
            if self.pause and not self.stopping:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += self.pause
            which = turn % len(self.requests)
            started = time.monotonic()
            try:
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", self.port)
                connection[1].write(self.requests[which])
                status, headers, body = await answer_of(connection[0])
            except ConnectionRefusedError:
                self.statuses[REFUSED if self.stopping else "refused"] += 1
                return
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                partial = getattr(error, "partial", b"")
                # while it obeyed Retry-After or kept its pace, the server closed what no request was running on
                idle = self.stopping and (rested or self.pause > 0) and not partial
                self.statuses[IDLE if idle else "lost"] += 1
                rested = False
                connection = None
                continue
            late = status == 503 and b"no answer within" in body  # it had a place
            self.statuses[LATE if late else str(status)] += 1
            rested = status == 503
            if status == 200:
                self.seconds.append(time.monotonic() - started)
                labels = labels_of(body)
                same_size = labels.shape == self.alone[which].shape
                self.differing.append(float((labels != self.alone[which]).mean()) if same_size else 1.0)
            if headers.get("connection") == "close":
                connection[1].close()
                connection = None
            if status == 503:
                if self.stopping:
                    return
                await asyncio.sleep(float(headers["retry-after"]))


async def watch(server: Server, end: float, memory: list[float]) -> None:
    while time.monotonic() < end:
        memory.append(round(server.rss_mb(), 1))
        await asyncio.sleep(1)


async def run(server: Server, clients: int, seconds: float, rate: float | None = None) -> dict:
    requests = [request_of(size, seed) for seed, size in enumerate(SIZES * 4)]
    load, memory = Load(server.port, requests, clients / rate if rate else 0), []
    await load.measure_alone()
    started = time.monotonic()
    end = started + seconds
    tasks = [asyncio.create_task(load.client(i, end + 300)) for i in range(clients)]
    await watch(server, end, memory)
    done = load.statuses["200"]
    load.stopping = True
    at_signal = dict(load.statuses)
    code, last = await asyncio.to_thread(server.stop)
    await asyncio.gather(*tasks)
    accepted = int(last.split(" of ")[1].split()[0])
    seen = len(requests) + load.statuses["200"] + load.statuses[LATE]
    times = sorted(load.seconds)
    fifth = max(1, len(memory) // 5)
    return {
        "clients": clients,
        "seconds": seconds,
        "wanted_pairs_a_second": rate,
        "answers_before_sigterm": at_signal,
        "answers_in_all": dict(load.statuses),
        "pairs_a_second": round(done / seconds, 2),
        "latency_s": {
            "median": round(statistics.median(times), 3),
            "p95": round(times[int(0.95 * len(times))], 3),
            "max": round(times[-1], 3),
        },
        "labels_that_differ_from_alone": {
            "answers_with_any": sum(d > 0 for d in load.differing),
            "largest_share_of_pixels": round(max(load.differing), 5),
        },
        "rss_mb": {
            "median_of_each_fifth": [statistics.median(memory[i * fifth : (i + 1) * fifth]) for i in range(5)],
            "max": max(memory),
        },
        "sigterm": {"exit_code": code, "last_line": last, "accepted_but_never_answered": accepted - seen},
    }


def machine() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    load = round(os.getloadavg()[0], 1)
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "commit": commit, "load_average_before": load}


def record(path: Path, key: str, values: dict) -> None:
    """Put `values` under `key` of a JSON file, keeping the rest."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**kept, key: values})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--flags", default="", help="more flags for the server, in one string")
    parser.add_argument("--half-of", help="key of an earlier run in --out, half of whose pairs a second is kept up")
    parser.add_argument("--key", default="load", help="name of this run within --out")
    parser.add_argument("--out", type=Path, default=Path("results/serve.json"))
    args = parser.parse_args()
    about = {"command": "python benchmarks/serve_load.py " + " ".join(sys.argv[1:]), **machine()}
    rate = json.loads(args.out.read_text())[args.half_of]["pairs_a_second"] / 2 if args.half_of else None
    server = Server(args.weights, *args.flags.split())
    try:
        found = asyncio.run(run(server, args.clients, args.seconds, rate))
        report = {**about, "weights": Path(args.weights).name, **found}
    finally:
        server.process.kill()
    print(json.dumps(report, indent=1))
    record(args.out, args.key, report)
    unexpected = set(report["answers_in_all"]) - {"200", "503", LATE, REFUSED, IDLE}
    sigterm = report["sigterm"]
    return 1 if unexpected or sigterm["exit_code"] or sigterm["accepted_but_never_answered"] else 0


if __name__ == "__main__":
    sys.exit(main())
