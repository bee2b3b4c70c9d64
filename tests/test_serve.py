"""The server's paths: what they answer is what the model says, and everything else is refused in one sentence."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import struct
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from conftest import build_debug
from fusionsam.cli.main import main
from fusionsam.data.pairs import read_pair
from fusionsam.data.radiometric import read_radiometric
from fusionsam.data.splits import Entry
from fusionsam.errors import InputError
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server.app import create_app
from fusionsam.server.config import ServeConfig
from fusionsam.server.run import bind, read_token
from fusionsam.types import Prompts
from test_data_radiometric import flir_counts, flir_file

JSON, ZIP = "application/json", "application/zip"


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def pair(height: int = 67, width: int = 79, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return (
        random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        random.integers(0, 256, (height, width), dtype=np.uint8),
    )


def form(visible: np.ndarray | None = None, infrared: np.ndarray | None = None) -> dict:
    given = {"visible": visible, "infrared": infrared}
    return {name: ("picture.png", png(array), "image/png") for name, array in given.items() if array is not None}


@pytest.fixture(scope="module")
def model() -> FusionSAM:
    fitted = {"offsets": {"car": 1.0}, "miou_before": 57.0, "miou_after": 58.0, "content": [["a", "b"]]}
    return FusionSAM(build_debug(), "debug", {"step": 7, "class_offsets": fitted})


@pytest.fixture(scope="module")
def client(model):
    config = ServeConfig(max_upload_mb=1, max_pixels=300 * 300, max_sessions=2)
    with TestClient(create_app(model, config)) as client:
        yield client


def refused(answer, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    return sentence


class TestPredict:
    @pytest.mark.parametrize("given", ["both", "visible", "infrared"])
    def test_json_and_zip_hold_what_the_model_says(self, client, model, given):
        visible, infrared = pair()
        visible, infrared = (visible if given != "infrared" else None), (infrared if given != "visible" else None)
        expected = model.predict(visible, infrared)
        asked = {"files": form(visible, infrared), "params": {"images": "fused,labels,overlay,confidence"}}
        as_json = client.post("/v1/predict", **asked).json()
        images = {name: base64.b64decode(data) for name, data in as_json.pop("images").items()}
        answer = client.post("/v1/predict", **asked, headers={"Accept": ZIP})
        assert answer.headers["content-type"] == ZIP
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        assert sorted(archive.namelist()) == sorted(["result.json", *(f"{name}.png" for name in images)])
        for data in (images, {name: archive.read(f"{name}.png") for name in images}):
            assert np.array_equal(pixels(data["fused"]), expected.fused)
            assert np.array_equal(pixels(data["labels"]), expected.labels)
            assert np.array_equal(pixels(data["overlay"]), np.asarray(expected.overlay()))
        summary = {key: value for key, value in expected.summary().items() if key != "seconds"}
        for result in (as_json, json.loads(archive.read("result.json"))):
            if given != "visible":
                assert result.pop("input")["infrared"]["kind"] == "8-bit"
            assert {key: value for key, value in result.items() if key != "seconds"} == summary

    def test_prompts_in_the_form(self, client, model):
        visible, infrared = pair()
        clicks = {"points": [[20, 30], [70, 5]], "labels": [1, 0], "boxes": [[3, 4, 50, 60]]}
        own = Prompts(torch.tensor([[[20.0, 30], [70, 5]]]), torch.tensor([[1, 0]]), torch.tensor([[[3.0, 4, 50, 60]]]))
        for sent, meant in ((json.dumps(clicks), own), ("none", "none")):
            answer = client.post("/v1/predict", files=form(visible, infrared), data={"prompts": sent}).json()
            assert np.array_equal(
                pixels(base64.b64decode(answer["images"]["labels"])), model.predict(visible, infrared, meant).labels
            )
            assert answer["prompts"]["source"] == ("user" if meant is own else "none")

    def test_four_channels_in_one_file(self, client, model):
        visible, infrared = pair()
        both = png(np.dstack([visible, infrared]))
        answer = client.post("/v1/predict", files={"rgbt": ("x.png", both)}).json()
        found = pixels(base64.b64decode(answer["images"]["labels"]))
        assert np.array_equal(found, model.predict(visible, infrared).labels)
        refused(
            client.post("/v1/predict", files={"visible": ("x.png", both)}), 422, "visible: 4 channels", "field rgbt"
        )

    def test_a_radiometric_file_is_both_images_and_tells_temperatures(self, client, model, tmp_path):
        visible = np.random.default_rng(0).integers(0, 256, (145, 196, 3), dtype=np.uint8)
        path = flir_file(tmp_path / "f.jpg", flir_counts(), visible=visible)
        read = read_pair(Entry("x", radiometric=path))
        expected = model.predict(read.visible, read.infrared)
        sent = {"files": {"radiometric": ("any name", path.read_bytes())}}
        answer = client.post("/v1/predict", **sent).json()
        assert np.array_equal(pixels(base64.b64decode(answer["images"]["labels"])), expected.labels)
        celsius = read_radiometric(path).celsius()
        assert answer["celsius"]["all"]["max"] == pytest.approx(float(celsius.max()), abs=0.01)
        assert set(answer["celsius"]["classes"]) == set(answer["classes"])
        begun = client.post("/v1/sessions", **sent).json()
        assert begun["celsius"] == answer["celsius"]
        client.delete(f"/v1/sessions/{begun['id']}")

    def test_a_radiometric_file_sent_as_infrared_gives_its_counts_not_its_preview(self, client, model, tmp_path):
        path = flir_file(tmp_path / "f.jpg", flir_counts())
        read = read_pair(Entry("x", infrared=path))
        answer = client.post("/v1/predict", files={"infrared": ("any name", path.read_bytes())}).json()
        assert answer["input"]["infrared"] == json.loads(json.dumps(read.facts["infrared"]))
        assert answer["input"]["infrared"]["kind"] == "counts"
        expected = model.predict(None, read.infrared).labels
        assert np.array_equal(pixels(base64.b64decode(answer["images"]["labels"])), expected)
        large = flir_file(tmp_path / "large.jpg", np.tile(flir_counts(), (4, 4))).read_bytes()
        sent = {"infrared": ("x", large)}
        refused(client.post("/v1/predict", files=sent), 422, "infrared: ", "pixels inside; expected 1 to 90000")

    def test_heic_is_known_whatever_its_name(self, client):
        sent = {"infrared": ("any name", b"\0\0\0\x18ftypheic and no picture")}
        said = refused(client.post("/v1/predict", files=sent), 422)
        installed = importlib.util.find_spec("pillow_heif") is not None
        assert said.startswith("infrared: is not a readable" if installed else "infrared: HEIC needs pillow-heif"), said

    def test_what_was_guessed_in_the_files_is_told(self, client):
        counts = np.zeros((67, 79), np.uint16)
        counts[20:] = np.linspace(21000, 25000, 47 * 79).reshape(47, 79)
        answer = client.post("/v1/predict", files={"infrared": ("any name", png(counts))}).json()
        assert answer["input"]["infrared"]["range"]["nodata"] == [0.0]
        assert any("left out of the range" in text for text in answer["input"]["notices"])
        whole = client.post("/v1/sessions", files={"infrared": ("any name", png(counts))}).json()
        assert whole["input"] == answer["input"]
        client.delete(f"/v1/sessions/{whole['id']}")

    def test_a_radiometric_file_is_bounded_and_stands_alone(self, client, tmp_path):
        counts = np.tile(flir_counts(), (4, 4))
        whole = flir_file(tmp_path / "large.jpg", counts).read_bytes()
        sent = {"radiometric": ("x.jpg", whole)}
        refused(client.post("/v1/predict", files=sent), 422, "radiometric: ", "pixels inside; expected 1 to 90000")
        for content, said in ((png(pair()[0]), "holds no radiometric data"), (whole[:30000], "radiometric")):
            refused(client.post("/v1/predict", files={"radiometric": ("x.jpg", content)}), 422, said)
        both = {**sent, **form(pair()[0])}
        refused(client.post("/v1/predict", files=both), 422, "radiometric holds both images; leave visible out")

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [("", JSON), ("*/*", JSON), ("text/html, application/*;q=0.1", JSON), (f"{JSON};q=0.2, {ZIP};q=0.9", ZIP),
         (f"{ZIP};q=0, */*", JSON), (f"{JSON};q=0, */*", ZIP)],
    )  # fmt: skip
    def test_accept_decides(self, client, accept, kind):
        answer = client.post("/v1/predict?images=", files=form(pair()[0]), headers={"Accept": accept})
        assert answer.headers["content-type"] == kind

    def test_pairs_that_ran_together_are_answered_as_alone_and_each_to_its_own(self, model):
        # unequal sizes and seeds: an answer in the wrong hands would show
        pairs = [pair(64 + 3 * (seed % 2), 71, seed) for seed in range(12)]
        alone = [model.predict(*one).labels for one in pairs]
        with TestClient(create_app(model)) as client:
            hold = threading.Event()
            engine = client.app.state.service.engine
            original, sizes, begun = engine._predict, [], []

            def slow(jobs):
                begun.append(len(jobs))
                assert hold.wait(60)
                sizes.append(len(jobs))
                return original(jobs)

            engine._predict = slow

            def ask(one):
                answer = client.post("/v1/predict?images=labels", files=form(*one))
                return pixels(base64.b64decode(answer.json()["images"]["labels"]))

            with ThreadPoolExecutor(12) as threads:
                futures = [threads.submit(ask, one) for one in pairs]
                # the first batch may have begun with more than one
                _until(lambda: begun and begun[0] + client.app.state.service.line.waiting == 12)
                hold.set()
                together = [future.result(120) for future in futures]
            del engine._predict
        assert max(sizes) > 1
        assert sum(sizes) == 12
        for found, expected in zip(together, alone, strict=True):
            assert found.shape == expected.shape
            assert (found != expected).mean() < 1e-3  # a batch may round a tie differently


def _until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestSessions:
    def test_encode_once_prompt_many_times(self, client, model, monkeypatch):
        visible, infrared = pair(seed=3)
        begun = client.post("/v1/sessions?images=fused,labels", files=form(visible, infrared))
        assert begun.status_code == 201
        own = begun.json()
        expected = model.predict(visible, infrared)
        assert np.array_equal(pixels(base64.b64decode(own["images"]["fused"])), expected.fused)
        assert np.array_equal(pixels(base64.b64decode(own["images"]["labels"])), expected.labels)
        path = f"/v1/sessions/{own['id']}"
        point = Prompts(torch.tensor([[[20.0, 30]]]), torch.tensor([[1]]))
        wanted = [model.predict(visible, infrared, prompts).labels for prompts in (point, "none", "self")]

        def encoded_again(*args):
            raise AssertionError("a prompt must not encode")

        monkeypatch.setattr(model.network, "encode", encoded_again)
        bodies = ({"points": [[20, 30]]}, {"mode": "none"}, {"mode": "self"})
        for body, labels in zip(bodies, wanted, strict=True):
            answer = client.post(f"{path}/prompts", json=body).json()
            assert list(answer["images"]) == ["labels", "overlay"]
            assert np.array_equal(pixels(base64.b64decode(answer["images"]["labels"])), labels)
        assert client.delete(path).status_code == 204
        refused(client.post(f"{path}/prompts", json={"mode": "self"}), 404, "session", "expired")
        refused(client.delete(path), 404, "session")

    def test_the_one_unused_for_longest_makes_room(self, client):
        first, second, third = (
            client.post("/v1/sessions?images=", files=form(pair()[0])).json()["id"] for _ in range(3)
        )
        found = [
            client.post(f"/v1/sessions/{id}/prompts?images=", json={"mode": "none"}) for id in (first, second, third)
        ]
        assert [answer.status_code for answer in found] == [404, 200, 200]

    @pytest.mark.parametrize(
        ("body", "word"),
        [(b"", "JSON"), (b"{", "JSON"), (b"[" * 50_000, "JSON"), (b"\xff\xfe", "JSON"), (b"[]", "points"),
         (b"{}", "points"), (b'{"mode": "oracle"}', "mode"), (b'{"mode": []}', "mode"),
         (b'{"mode": "self", "points": [[1, 2]]}', "mode"), (b'{"points": [[1, 2, 3]]}', "numbers"),
         (b'{"points": [[NaN, 2]]}', "numbers"), (b'{"points": [[1e999, 2]]}', "numbers"),
         (b'{"points": [[' + b"9" * 400 + b', 2]]}', "numbers"), (b'{"points": [["a", 2]]}', "numbers"),
         (b'{"points": {"a": 1}}', "numbers"), (b'{"points": [[80, 2]]}', "outside"),
         (b'{"points": [[1, 2]], "labels": [2]}', "labels"), (b'{"points": [[1, 2]], "labels": []}', "labels"),
         (b'{"boxes": [[9, 9, 1, 1]]}', "x0 <= x1"),
         (json.dumps({"points": [[1, 2]] * 300}).encode(), "at most 256"),
         (json.dumps({"points": [[1, 2]], "more": 1}).encode(), "expected points")],
    )  # fmt: skip
    def test_prompts_that_make_no_sense(self, client, body, word):
        id = client.post("/v1/sessions?images=", files=form(pair()[0])).json()["id"]
        refused(client.post(f"/v1/sessions/{id}/prompts", content=body), 422, word)


def declared(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "words"),
        [(b"", ("empty",)), (b"no image", ("not a readable image",)), (png(pair()[0])[:900], ("truncated",)),
         (declared(60000, 60000), ("60000",)), (declared(301, 300), ("301x300", "limit of 90000")),
         (png(pair(63, 100)[0]), ("100x63", "64")), (declared(100, 100), ("truncated",))],
    )  # fmt: skip
    def test_images(self, client, data, words, monkeypatch):
        sentence = refused(client.post("/v1/predict", files={"visible": ("a.png", data)}), 422, "visible: ", *words)
        assert "/tmp" not in sentence

    def test_sizes_that_differ(self, client):
        refused(client.post("/v1/predict", files=form(pair(67, 79)[0], pair(67, 80)[1])), 422, "79x67", "80x67")

    def test_a_file_name_is_never_used(self, client, tmp_path):
        for name in ("../../../etc/passwd", "/etc/passwd", str(tmp_path / "x.png"), "a\\..\\b.png", "\u0000.png"):
            answer = client.post("/v1/predict?images=", files={"visible": (name, png(pair()[0]))})
            assert answer.status_code == 200, name
            refused(client.post("/v1/predict", files={"visible": (name, b"bad")}), 422, "visible: is not")
        assert not list(tmp_path.iterdir())

    def test_forms(self, client):
        one = png(pair()[0])
        refused(client.post("/v1/predict"), 415, "multipart/form-data")
        refused(client.post("/v1/predict", json={}), 415, "multipart/form-data")
        refused(client.post("/v1/predict", files={"image": ("a", one)}), 422, "'image'", "visible")
        refused(client.post("/v1/predict", files={"../../x": ("a", one)}), 422, "not known")
        refused(client.post("/v1/predict", data={"prompts": "self"}, files={"prompts": ("a", b"x")}), 422, "prompts")
        refused(client.post("/v1/predict", files=[("visible", ("a", one))] * 2), 422, "2 times")
        refused(client.post("/v1/predict", files=[("visible", ("a", one))] * 3), 400, "Too many files")
        refused(client.post("/v1/predict", files={"visible": (None, "text")}), 422, "file")
        refused(client.post("/v1/predict?images=mask", files={"visible": ("a", one)}), 422, "mask", "overlay")
        refused(client.post("/v1/predict", files={"visible": ("a", one)}, data={"prompts": "oracle"}), 422, "JSON")
        refused(client.post("/v1/predict", files={"visible": ("a", one)}, headers={"Accept": "text/html"}), 406, ZIP)
        broken = {"content-type": "multipart/form-data; boundary=b"}
        for body in (b"--b\r\nx", b"nothing", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--"):
            assert 400 <= client.post("/v1/predict", content=body, headers=broken).status_code < 500
        refused(
            client.post("/v1/predict", content=b"x", headers={"content-type": "multipart/form-data"}), 400, "oundary"
        )

    def test_bodies_beyond_the_limit_with_and_without_a_declared_length(self, client):
        large = bytes(2**20)
        refused(client.post("/v1/predict", files={"visible": ("a", large)}), 413, str(2**20))
        chunked = {"content-type": "multipart/form-data; boundary=b"}
        head = b'--b\r\nContent-Disposition: form-data; name="visible"; filename="a"\r\n\r\n'
        answer = client.post("/v1/predict", content=iter([head, *[bytes(2**16)] * 32]), headers=chunked)
        refused(answer, 413, str(2**20))

    def test_paths_and_methods(self, client):
        refused(client.get("/v3"), 404, "/docs")
        refused(client.get("/v1/predict"), 405, "method")

    def test_a_failure_of_the_model_is_a_sentence_too(self, model, monkeypatch):
        with TestClient(create_app(model), raise_server_exceptions=False) as client:
            monkeypatch.setattr(model, "infer", lambda *a, **k: 1 / 0)
            refused(client.post("/v1/predict", files=form(pair()[0])), 500, "unexpected")
            monkeypatch.undo()
            counted = 'fusionsam_requests_total{method="POST",route="/v1/predict",status="500"} 1.0'
            assert counted in client.get("/metrics").text.splitlines()
            metrics = client.app.state.service.metrics
            assert metrics.count(metrics.accepted) == metrics.count(metrics.answered) == 1
            assert client.post("/v1/predict?images=", files=form(pair()[0])).status_code == 200


class TestLoad:
    def test_a_full_line_and_a_slow_model_answer_503_with_retry_after(self, model, monkeypatch):
        go, whole = threading.Event(), model.infer
        with TestClient(create_app(model, ServeConfig(queue=1, timeout=60))) as client, ThreadPoolExecutor() as threads:
            monkeypatch.setattr(model, "infer", lambda *a, **k: (go.wait(60), whole(*a, **k))[1])
            service = client.app.state.service
            running = threads.submit(client.post, "/v1/predict?images=", files=form(pair()[0]))
            _until(lambda: service.line.accepted == 1)
            answer = client.post("/v1/predict", files=form(pair()[0]))
            refused(answer, 503, "busy")
            assert int(answer.headers["retry-after"]) >= 1
            go.set()
            assert running.result(60).status_code == 200  # nobody's place was taken
            assert service.line.accepted == 0

            go.clear()
            object.__setattr__(service.config, "timeout", 0.3)  # frozen, but for this test
            answer = client.post("/v1/predict", files=form(pair()[0]))
            go.set()
            refused(answer, 503, "0.3 s")
            assert int(answer.headers["retry-after"]) >= 1

    def test_uploads_on_their_way_are_bounded(self, model):
        with TestClient(create_app(model, ServeConfig(queue=3))) as client:
            client.app.state.service.uploading = 6
            answer = client.post("/v1/predict", files=form(pair()[0]))
            refused(answer, 503, "busy")
            assert int(answer.headers["retry-after"]) >= 1
            client.app.state.service.uploading = 5
            assert client.post("/v1/predict?images=", files=form(pair()[0])).status_code == 200
            assert client.app.state.service.uploading == 5

    def test_a_full_disk_is_not_the_clients_fault(self, model, monkeypatch):
        async def full(parser):
            raise OSError(28, "No space left on device")

        with TestClient(create_app(model)) as client:
            monkeypatch.setattr("starlette.formparsers.MultiPartParser.parse", full)
            answer = client.post("/v1/predict", files=form(pair()[0]))
            refused(answer, 503, "No space left on device")
            assert answer.headers["retry-after"]
            assert client.app.state.service.uploading == 0

    def test_shutdown_is_announced(self, model):
        with TestClient(create_app(model)) as client:
            assert client.get("/readyz").status_code == 200
            client.app.state.service.draining = True
            refused(client.get("/readyz"), 503, "no new work")
            assert client.get("/healthz").headers["connection"] == "close"
            answer = client.post("/v1/predict", files=form(pair()[0]))
            refused(answer, 503, "shutting down")
            assert answer.headers["retry-after"]

    def test_metrics_count_what_happened(self, model):
        with TestClient(create_app(model)) as client:
            for _ in range(3):
                client.post("/v1/predict?images=", files=form(pair()[0]))
            client.post("/v1/predict", files={"visible": ("a", b"bad")})
            client.get("/v1/sessions/aaa/zzz")
            client.post("/v1/sessions?images=", files=form(pair()[0]))
            lines = dict(
                line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
            )
        assert lines['fusionsam_requests_total{method="POST",route="/v1/predict",status="200"}'] == "3.0"
        assert lines['fusionsam_requests_total{method="POST",route="/v1/predict",status="422"}'] == "1.0"
        assert lines['fusionsam_requests_total{method="GET",route="/v1/sessions/{id}",status="404"}'] == "1.0"
        assert (lines["fusionsam_accepted_total"], lines["fusionsam_answered_total"]) == ("5.0", "5.0")
        assert lines["fusionsam_batch_size_count"] == "4.0"
        assert (lines["fusionsam_sessions"], lines["fusionsam_in_flight"]) == ("1.0", "0.0")
        assert float(lines["fusionsam_session_bytes"]) > 67 * 79 * 3 * 4


class TestToken:
    def test_without_it_only_the_probes_answer(self, model):
        with TestClient(create_app(model, token="sesame")) as client:
            for path in ("/v1/model", "/metrics", "/docs", "/openapi.json", "/nothing"):
                refused(client.get(path), 401, "bearer token")
            for wrong in ("sesam", "Sesame", "sesame1", "sésame"):
                answer = client.get("/v1/model", headers={"Authorization": f"Bearer {wrong}".encode()})
                assert answer.status_code == 401
            assert client.get("/v1/model", headers={"Authorization": "Basic sesame"}).status_code == 401
            assert client.get("/v1/model", headers={"Authorization": "Bearer sesame"}).status_code == 200
            assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
            refused(client.post("/v1/predict", files=form(pair()[0])), 401, "bearer token")

    def test_comes_from_a_file_or_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.delenv("FUSIONSAM_TOKEN", raising=False)
        assert read_token(None) is None
        monkeypatch.setenv("FUSIONSAM_TOKEN", "a")
        assert read_token(None) == "a"
        (tmp_path / "token").write_text("b\n")
        assert read_token(tmp_path / "token") == "b"
        for bad in (tmp_path, tmp_path / "none"):
            with pytest.raises(InputError, match="cannot be read"):
                read_token(bad)
        monkeypatch.setenv("FUSIONSAM_TOKEN", " ")
        with pytest.raises(InputError, match="empty"):
            read_token(None)


def test_model_and_openapi_describe_what_is_there(client, model):
    described = client.get("/v1/model").json()
    assert [c["name"] for c in described["classes"]] == model.config.classes
    assert described["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert described["limits"]["max_pixels"] == 300 * 300
    assert described["card"]["class_offsets"] == {"offsets": {"car": 1.0}, "miou_before": 57.0, "miou_after": 58.0}
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) >= {"/v1/predict", "/v1/sessions", "/v1/sessions/{id}/prompts", "/v1/model"}
    fields = paths["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(fields) == {"visible", "infrared", "rgbt", "radiometric", "prompts"}
    assert client.get("/docs").status_code == 200


def test_bad_settings_end_the_command_with_a_sentence(capsys):
    taken = bind("127.0.0.1", 0)
    taken.listen()
    for arguments, words in (
        (["--queue", "0"], "--queue: found 0"),
        (["--weights", "nosuch"], "weights nosuch"),
        (["--port", str(taken.getsockname()[1])], "cannot be served"),
        (["--port", "70000"], "expected 0 to 65535"),
        (["--host", "256.1.1.1"], "cannot be served"),
        (["--host", "127.0..1"], "127.0..1:8000: cannot be served"),
        (["--timeout", "inf"], "--timeout: found inf, expected a finite number above 0"),
    ):
        assert main(["serve", *arguments]) == 2
        assert words in capsys.readouterr().err
    taken.close()
