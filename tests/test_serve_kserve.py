"""The paths of the Open Inference Protocol, driven by Triton's own client and by what no client would send."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from conftest import build_debug
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server.app import create_app
from fusionsam.server.config import ServeConfig

INFER, HEADER = "/v2/models/debug/infer", "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def model() -> FusionSAM:
    return FusionSAM(build_debug(), "debug", {})


@pytest.fixture(scope="module")
def client(model):
    with TestClient(create_app(model, ServeConfig(max_upload_mb=2, max_pixels=300 * 300, max_batch=3))) as client:
        yield client


def pair(batch: int = 2, height: int = 67, width: int = 79) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return tuple(random.integers(0, 256, (batch, n, height, width), dtype=np.uint8) for n in (3, 1))


def tensor(name: str, array: np.ndarray, **change: object) -> dict:
    kind = "UINT8" if array.dtype == np.uint8 else "FP32"
    return {"name": name, "datatype": kind, "shape": list(array.shape), "data": array.tolist(), **change}


def alone(model: FusionSAM, visible: np.ndarray | None, infrared: np.ndarray | None, row: int = 0):
    """What `predict` says of one pair of a batch."""
    return model.predict(
        None if visible is None else visible[row].transpose(1, 2, 0), None if infrared is None else infrared[row, 0]
    )


class TestTritonClient:
    @pytest.fixture(scope="class")
    def triton(self, model):
        """Triton's client at a server of this process, with a token, on loopback."""
        http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
        bound = socket.create_server(("127.0.0.1", 0))
        app = create_app(model, ServeConfig(), "secret")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="on"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.05)
        client = http.InferenceServerClient(f"127.0.0.1:{bound.getsockname()[1]}", network_timeout=60)
        yield http, client
        client.close()
        server.should_exit = True
        thread.join(60)

    def test_health_and_metadata(self, triton):
        _, client = triton
        assert client.is_server_live()
        assert client.is_server_ready()  # without the token, as probes ask
        headers = {"Authorization": "Bearer secret"}
        assert client.is_model_ready("debug", headers=headers)
        assert not client.is_model_ready("other", headers=headers)
        assert client.get_server_metadata(headers=headers)["extensions"] == ["binary_tensor_data"]
        told = client.get_model_metadata("debug", headers=headers)
        assert [(t["name"], t["shape"]) for t in told["inputs"]] == [
            ("visible", [-1, 3, -1, -1]),
            ("infrared", [-1, 1, -1, -1]),
        ]
        assert told["parameters"]["classes"].startswith("unlabeled,car")

    @pytest.mark.parametrize("binary", [True, False])
    @pytest.mark.parametrize("floats", [True, False])
    def test_a_batch_is_what_python_says_of_each_pair(self, triton, model, binary, floats):
        http, client = triton
        arrays = dict(zip(("visible", "infrared"), pair(), strict=True))
        inputs = []
        for name, array in arrays.items():
            sent = (array / 255).astype(np.float32) if floats else array
            inputs.append(http.InferInput(name, list(sent.shape), "FP32" if floats else "UINT8"))
            inputs[-1].set_data_from_numpy(sent, binary_data=binary)
        outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in ("labels", "confidence", "fused")]
        asked = {"inputs": inputs, "outputs": outputs, "headers": {"Authorization": "Bearer secret"}, "request_id": "7"}
        answer = client.infer("debug", **asked)
        assert answer.get_response()["id"] == "7"
        for row in range(2):
            expected = alone(model, arrays["visible"], arrays["infrared"], row)
            assert np.mean(answer.as_numpy("labels")[row] == expected.labels) > 0.99
            np.testing.assert_allclose(answer.as_numpy("confidence")[row], expected.confidence, atol=0.02)
            fused = answer.as_numpy("fused")[row].transpose(1, 2, 0).astype(int)
            np.testing.assert_allclose(fused, expected.fused, atol=2)

    def test_a_refusal_reaches_the_client_as_its_sentence(self, triton):
        http, client = triton
        image = http.InferInput("thermal", [1, 1, 64, 64], "UINT8")
        image.set_data_from_numpy(np.zeros((1, 1, 64, 64), np.uint8))
        with pytest.raises(Exception, match="'thermal' is not known; send visible and infrared"):
            client.infer("debug", [image], headers={"Authorization": "Bearer secret"})
        with pytest.raises(Exception, match="a bearer token is needed"):
            client.infer("debug", [image])


@pytest.mark.parametrize("given", ["visible", "infrared"])
def test_a_camera_may_be_missing_and_prompts_are_taken(client, model, given):
    visible, infrared = (
        array if name == given else None for name, array in zip(("visible", "infrared"), pair(1), strict=True)
    )
    array = visible if visible is not None else infrared
    for mode in ("self", "none"):
        body = {"inputs": [tensor(given, array)], "outputs": [{"name": "labels"}], "parameters": {"prompts": mode}}
        (found,) = client.post(INFER, json=body).json()["outputs"]
        expected = model.predict(
            None if visible is None else visible[0].transpose(1, 2, 0),
            None if infrared is None else infrared[0, 0],
            mode,
        )
        assert np.array_equal(np.reshape(found["data"], found["shape"])[0], expected.labels)


def test_all_outputs_without_a_wish(client):
    answer = client.post(INFER, json={"inputs": [tensor("infrared", pair(1)[1])]}).json()
    assert [(item["name"], item["shape"]) for item in answer["outputs"]] == [
        ("fused", [1, 3, 67, 79]), ("labels", [1, 67, 79]), ("confidence", [1, 67, 79]),
    ]  # fmt: skip


BYTE = np.zeros((1, 1, 64, 64), np.uint8)
COLOUR = np.zeros((2, 3, 64, 70), np.uint8)
FLOAT = BYTE.astype(np.float32)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([], "expected an object with inputs"),
        ({}, "inputs: expected a list"),
        ({"inputs": [7]}, "inputs: expected a list"),
        ({"inputs": [tensor("infrared", BYTE, datatype="INT8")]}, "datatype 'INT8'"),
        ({"inputs": [tensor("infrared", BYTE, shape=[1, 64, 64])]}, "expected [batch, 1, height, width]"),
        ({"inputs": [tensor("infrared", BYTE, shape=[1, 3, 64, 64])]}, "expected 1 channels"),
        ({"inputs": [tensor("infrared", BYTE, shape=[1, 1, 64, 65])]}, "expected 4160 numbers"),
        ({"inputs": [tensor("infrared", BYTE, shape=[1, 1, 10**9, 64])]}, "resize the pair"),
        ({"inputs": [tensor("infrared", BYTE, shape=[1, 1, 400, 400])]}, "at most 90000"),
        ({"inputs": [tensor("infrared", BYTE[:, :, :32])]}, "resize the pair"),
        ({"inputs": [tensor("infrared", BYTE.astype(int) + 256, datatype="UINT8")]}, "outside of 0 to 255"),
        ({"inputs": [tensor("infrared", FLOAT + 0.5, datatype="UINT8")]}, "numbers of its datatype"),
        ({"inputs": [tensor("infrared", FLOAT + 2)]}, "outside of 0 to 1"),
        ({"inputs": [tensor("infrared", BYTE, data="x")]}, "numbers of its datatype"),
        ({"inputs": [tensor("infrared", BYTE, data=[[1], [1, 2]])]}, "numbers of its datatype"),
        ({"inputs": [tensor("infrared", BYTE)] * 2}, "is there twice"),
        ({"inputs": [tensor("infrared", np.repeat(BYTE, 4, 0))]}, "a batch of 4, expected at most 3"),
        ({"inputs": [tensor("visible", COLOUR[:1, ..., :66]), tensor("infrared", BYTE)]}, "differ in size"),
        ({"inputs": [tensor("visible", COLOUR[..., :64]), tensor("infrared", BYTE)]}, "batches of 2"),
        ({"inputs": [tensor("infrared", BYTE)], "outputs": [{"name": "masks"}]}, "'masks' is not known"),
        ({"inputs": [tensor("infrared", BYTE)], "parameters": {"prompts": "all"}}, "prompts: not JSON"),
        ({"inputs": [tensor("infrared", BYTE)], "parameters": {"prompts": 3}}, "prompts is text"),
        ({"inputs": [tensor("infrared", BYTE)], "id": 3}, "id: expected text"),
        ({"inputs": [tensor("infrared", BYTE, parameters={"binary_data_size": 4096})]}, "binary_data_size"),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_in_a_sentence(client, body, word):
    answer = client.post(INFER, json=body)
    assert answer.status_code == 422, answer.text
    assert list(answer.json()) == ["error"]
    assert word in answer.json()["error"]


def test_binary_bodies_that_do_not_add_up(client):
    item = {"name": "infrared", "datatype": "UINT8", "shape": [1, 1, 64, 64], "parameters": {"binary_data_size": 4096}}
    head = json.dumps({"inputs": [item]}).encode()
    for length, data, word in (
        (str(len(head)), b"0" * 4095, "expected 4096 bytes"),
        (str(len(head)), b"0" * 4097, "bytes are left"),
        (str(len(head) - 1), b"0" * 4096, "not JSON"),
        ("-1", b"", "inference-header-content-length: found -1"),
        ("9" * 30, b"", "inference-header-content-length: found 999"),
    ):
        answer = client.post(INFER, content=head + data, headers={HEADER: length})
        assert (answer.status_code, word in answer.json()["error"]) == (422, True), answer.text
    assert client.post(INFER, content=b"0" * 3 * 2**20).status_code == 413
    assert client.post(INFER, content=head, headers={"Content-Encoding": "gzip"}).status_code == 415
    answer = client.post("/v2/models/other/infer", json={})
    assert (answer.status_code, answer.json()["error"]) == (
        404,
        "model 'other': not served here; the one that is: debug",
    )


def test_shutdown_is_announced_here_too(model):
    with TestClient(app := create_app(model)) as client:
        assert client.get("/v2/health/ready").status_code == client.get("/v2/models/debug/ready").status_code == 200
        app.state.service.draining = True
        assert client.get("/v2/health/ready").status_code == client.get("/v2/models/debug/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        assert client.post(INFER, json={}).status_code == 503
