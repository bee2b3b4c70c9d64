"""A client of `fusionsam serve` that needs nothing but the standard library. Copy it into your own project.

python examples/client.py --visible rgb.png --infrared thermal.png --out out
python examples/client.py --visible rgb.png --infrared thermal.png --out out --on 320,240 --box 200,150,400,330

A token is taken from the environment variable FUSIONSAM_TOKEN.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path


class Client:
    """One server. Every method raises RuntimeError with the server's own sentence when it is refused."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, tries: int = 5) -> None:
        self.url, self.tries = url.rstrip("/"), tries
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def predict(self, visible: Path | None = None, infrared: Path | None = None) -> dict[str, bytes]:
        """Files by name: result.json, fused.png, labels.png, overlay.png."""
        body, kind = form({"visible": visible, "infrared": infrared})
        return unzip(self.ask("POST", "/v1/predict", body, {"Content-Type": kind, "Accept": "application/zip"}))

    def begin(self, visible: Path | None = None, infrared: Path | None = None) -> str:
        """Encode a pair once; the id of its session."""
        body, kind = form({"visible": visible, "infrared": infrared})
        return json.loads(self.ask("POST", "/v1/sessions?images=", body, {"Content-Type": kind}))["id"]

    def prompt(self, session: str, points: list, labels: list, boxes: list) -> dict[str, bytes]:
        """Files as of `predict`, steered by points (label 1 on the object, 0 off it) and boxes, in pixels."""
        body = json.dumps({"points": points, "labels": labels, "boxes": boxes}).encode()
        path = f"/v1/sessions/{session}/prompts?images=fused,labels,overlay"
        headers = {"Content-Type": "application/json", "Accept": "application/zip"}
        return unzip(self.ask("POST", path, body, headers))

    def end(self, session: str) -> None:
        """Free the session's memory."""
        self.ask("DELETE", f"/v1/sessions/{session}")

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """The answer's bytes; a busy server is asked again when it said it might be free."""
        for left in reversed(range(self.tries)):
            request = urllib.request.Request(self.url + path, body, {**self.headers, **(headers or {})}, method=method)
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                if error.code == 503 and left:
                    time.sleep(float(error.headers.get("Retry-After", 1)))
                    continue
                raise RuntimeError(f"{error.code}: {sentence(error.read())}") from None
            except urllib.error.URLError as error:
                raise RuntimeError(f"{self.url}: {error.reason}; does fusionsam serve run there?") from None
        raise AssertionError("at least one try")


def form(files: dict[str, Path | None]) -> tuple[bytes, str]:
    """multipart/form-data of some files, and its content type."""
    boundary, parts = uuid.uuid4().hex, b""
    for name, path in files.items():
        if path is not None:
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
            parts += head.encode() + path.read_bytes() + b"\r\n"
    return parts + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def unzip(data: bytes) -> dict[str, bytes]:
    """Name -> content."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sentence(body: bytes) -> str:
    try:
        return json.loads(body)["error"]
    except (ValueError, KeyError):
        return body[:200].decode(errors="replace")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Send a pair to fusionsam serve and write what it answers.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--visible", type=Path)
    parser.add_argument("--infrared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--on", type=numbers, action="append", default=[], help="x,y of a point on the object")
    parser.add_argument("--off", type=numbers, action="append", default=[], help="x,y of a point off it")
    parser.add_argument("--box", type=numbers, action="append", default=[], help="x0,y0,x1,y1")
    args = parser.parse_args()
    client = Client(args.url, os.environ.get("FUSIONSAM_TOKEN"))
    try:
        if args.on or args.off or args.box:
            session = client.begin(args.visible, args.infrared)
            labels = [1] * len(args.on) + [0] * len(args.off)
            try:
                files = client.prompt(session, args.on + args.off, labels, args.box)
            finally:
                client.end(session)
        else:
            files = client.predict(args.visible, args.infrared)
    except (RuntimeError, OSError) as error:
        print(f"client: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (args.out / Path(name).name).write_bytes(data)
    print(f"{', '.join(files)} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
