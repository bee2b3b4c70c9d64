"""The installed command as a process of its own: real sockets, signals, the example client."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import build_debug
from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.geometry import centre, similarity
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.images import read_infrared, read_visible, write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server.run import TOKEN
from fusionsam.weights.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
WAIT = 180  # seconds, for a machine that is busy with something else


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "debug", build_debug(), {})


@contextmanager
def server(weights: Path, *flags: str, **environment: str):
    """The process and its port; it is ended in any case."""
    command = [sys.executable, "-m", "fusionsam", "serve", "--weights", str(weights), "--port", "0", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + process.stderr.read()
            yield process, int(found[1])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder, random = tmp_path_factory.mktemp("pair"), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (67, 79, 3), dtype=np.uint8)).save(folder / "v.png")
    Image.fromarray(random.integers(0, 256, (67, 79), dtype=np.uint8)).save(folder / "i.png")
    return folder / "v.png", folder / "i.png"


def multipart(path: Path) -> tuple[bytes, dict[str, str]]:
    head = b'--b\r\nContent-Disposition: form-data; name="visible"; filename="v"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--b--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=b", "Accept": "application/zip"}


def gauge(port: int, name: str) -> float:
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT).read().decode()
    return float(re.search(rf"^{name} (\S+)$", page, re.M)[1])


def test_sigterm_under_load_loses_no_accepted_request(weights, files):
    body, headers = multipart(files[0])
    with server(weights, "--max-batch", "1", "--queue", "40", "--timeout", str(WAIT)) as (process, port):
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT) for _ in range(40)]

        def ask(connection):
            connection.request("POST", "/v1/predict", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

        with ThreadPoolExecutor(40) as threads:
            futures = [threads.submit(ask, connection) for connection in connections]
            end = time.monotonic() + WAIT
            while gauge(port, "fusionsam_accepted_total") < 40:
                assert time.monotonic() < end
            finished = sum(future.done() for future in futures)
            process.send_signal(signal.SIGTERM)
            answers = [future.result(WAIT) for future in futures]
        assert process.wait(WAIT) == 0
        assert finished < 40  # or the signal came too late to prove anything
        assert [status for status, _ in answers] == [200] * 40
        assert all(zipfile.ZipFile(io.BytesIO(data)).testzip() is None for _, data in answers)
        assert "40 of 40 accepted requests answered" in process.stdout.read()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_example_client_gets_what_the_model_says(weights, files, tmp_path):
    model = FusionSAM.from_pretrained(weights, "cpu")
    with server(weights, **{TOKEN: "sesame"}) as (process, port):
        sesame = Path(f"/proc/{process.pid}/cmdline")
        assert not sesame.exists() or b"sesame" not in sesame.read_bytes()

        def client(*flags: str, token: str = "sesame"):
            command = [sys.executable, str(ROOT / "examples" / "client.py"), "--url", f"http://127.0.0.1:{port}"]
            pair = ["--visible", str(files[0]), "--infrared", str(files[1]), "--out", str(tmp_path)]
            env = {**os.environ, TOKEN: token}
            return subprocess.run([*command, *pair, *flags], capture_output=True, text=True, env=env, timeout=WAIT)

        assert client().returncode == 0
        # the server has another number of threads, and noise has pixels on the verge between two classes
        found = np.asarray(Image.open(tmp_path / "labels.png"))
        assert (found != model.predict(*files).labels).mean() < 2e-3
        assert client("--on", "20,30", "--off", "70,5", "--box", "3,4,50,60").returncode == 0
        asked = json.loads((tmp_path / "result.json").read_text())["prompts"]
        assert asked == {"source": "user", "points": [[20, 30], [70, 5]], "labels": [1, 0], "boxes": [[3, 4, 50, 60]]}
        assert gauge_with_token(port, "sesame", "fusionsam_sessions") == 0  # the client has ended its session
        for done in (client("--on", "90,30"), client(token="wrong")):
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 0


def gauge_with_token(port: int, token: str, name: str) -> float:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"})
    return float(re.search(rf"^{name} (\S+)$", urllib.request.urlopen(request).read().decode(), re.M)[1])


def test_a_slow_or_broken_off_upload_harms_nobody(weights, files):
    body, headers = multipart(files[0])
    head = "POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with server(weights, "--timeout", "2", "--queue", "1") as (process, port):
        slow, broken = (socket.create_connection(("127.0.0.1", port), timeout=WAIT) for _ in range(2))
        for connection in (slow, broken):
            connection.sendall(head.encode() + body[:500])
        broken.close()
        while b"}" not in (answer := slow.recv(65536)):  # it holds no place: others are served meanwhile
            assert answer
        assert b" 408 " in answer or b"did not arrive within 2 s" in answer
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        for _ in range(5):
            connection.request("POST", "/v1/predict?images=", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                break
        assert answer.status == 200
        assert process.poll() is None
        assert gauge(port, "fusionsam_in_flight") == 0


def test_dockerfile_installs_as_the_readme_does():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    _, install = [line for line in lines if line.startswith("RUN pip install")]
    (start,) = [line for line in lines if line.startswith("CMD")]
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text()
    assert 'pip install ".[serve]"' in page
    assert install.endswith('".[serve]"')
    assert " ".join(json.loads(start.removeprefix("CMD "))) in page
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_a_server_of_two_cameras_aligns_what_it_gets(weights, tmp_path):
    matrix = similarity(0.8, 2.0, centre((96, 128)), (55.0, 33.0))
    rig = Rig((96, 128), (80, 104), np.linalg.inv(matrix))
    scene = draw_scene(5, 6, (96, 128))
    write_png(tmp_path / "v.png", scene.visible)
    write_png(tmp_path / "i.png", Warp(rig, "infrared")(scene.infrared).image)
    body = b""
    for name in ("visible", "infrared"):
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
        body += head.encode() + (tmp_path / f"{name[0]}.png").read_bytes() + b"\r\n"
    with server(weights, "--align", str(rig.write(tmp_path / "rig.json"))) as (_, port):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        url = f"http://127.0.0.1:{port}/v1/predict?images=labels"
        request = urllib.request.Request(url, body + b"--b--\r\n", headers)
        answer = json.load(urllib.request.urlopen(request, timeout=WAIT))
    pair = Aligner(rig)(read_visible(tmp_path / "v.png"), read_infrared(tmp_path / "i.png"))
    expected = FusionSAM.from_pretrained(weights).predict(pair.visible, pair.infrared, covered=pair.covered)
    assert answer["size"] == [96, 128]
    assert answer["alignment"]["shift"] == pair.told["shift"]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"]["labels"]))))
    assert (found == expected.labels).mean() > 0.999
