"""Exported files compute what PyTorch computes, at sizes and batches they were not traced at."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build_debug
from fusionsam.cli.main import main as cli
from fusionsam.config.schema import EncoderConfig, ModelConfig
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.export import onnx as export
from fusionsam.export.fixed import write_fixed
from fusionsam.export.graphs import Whole, trace
from fusionsam.export.onnx import firm_scenes
from fusionsam.export.triton import write_repository
from fusionsam.inference import onnx as backends
from fusionsam.inference.onnx import DECODER, ENCODER, WHOLE, OnnxNetwork, open_session, run_session
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import Prompts
from fusionsam.weights.checkpoint import load_network, save_checkpoint

pytest.importorskip("onnxruntime", reason="the extra fusionsam[export] is not installed")
pytest.importorskip("onnxscript", reason="the extra fusionsam[export] is not installed")


class Made(SimpleNamespace):
    network: FusionSAMNetwork
    weights: Path
    files: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A debug checkpoint and what the installed command exports of it."""
    folder = tmp_path_factory.mktemp("export")
    network = build_debug(lambda config: setattr(config.prompts, "points", 3))  # every peak adds to the graph
    with torch.no_grad():  # a new picture head is the plain average of both images
        network.picture_head.out.weight.normal_(std=0.3)
    save_checkpoint(folder / "weights", network, {"step": 7, "calibration": {"temperature": 1.25}})
    outputs = ["--out", str(folder / "files"), "--triton", str(folder / "triton"), "--fixed-size", "96x130"]
    assert cli(["export", "--weights", str(folder / "weights"), *outputs]) == 0
    network, _ = load_network(folder / "weights")
    return Made(network=network, weights=folder / "weights", files=folder / "files")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--fixed-size", "40x5000"), "--fixed-size 40x5000: expected 64 to"),
        (("--triton", "{root}/file"), "file: cannot be written"),
        (("--triton", "{root}/theirs"), "weights: holds model.py already, no model of ours; choose another --triton"),
    ],
)
def test_what_cannot_be_is_told_before_the_long_export(
    made: Made, tmp_path: Path, wrong: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "theirs" / "weights").mkdir(parents=True)
    (tmp_path / "theirs" / "weights" / "model.py").touch()
    option, value = wrong[0], wrong[1].format(root=tmp_path)
    assert cli(["export", "--weights", str(made.weights), "--out", str(tmp_path / "out"), option, value]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def agree(found: np.ndarray | torch.Tensor, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), atol=1e-3, rtol=0)


def test_one_file_computes_the_network_at_any_size_and_batch(made: Made) -> None:
    session = open_session(made.files / WHOLE)
    for size, batch in (((67, 101), 3), ((128, 64), 1)):
        visible, infrared, _ = firm_scenes(made.network, size, batch)
        found = run_session(session, {"visible": visible.numpy(), "infrared": infrared.numpy()})
        with torch.inference_mode():
            wanted = made.network(visible, infrared)
        agree(found["logits"], wanted.logits)
        agree(found["fused"], wanted.fused)


def test_an_absent_image_is_what_it_is_in_pytorch(made: Made) -> None:
    visible, infrared, _ = firm_scenes(made.network, (67, 101), 1)
    session, halves = open_session(made.files / WHOLE), OnnxNetwork(made.files)
    for there, images in (([True, False], (visible, None)), ([False, True], (None, infrared))):
        with torch.inference_mode():
            wanted = made.network(*images)
        arrays = {"visible": (visible * there[0]).numpy(), "infrared": (infrared * there[1]).numpy()}
        found = run_session(session, {**arrays, "present": np.array([there])})
        agree(found["logits"], wanted.logits)
        agree(found["fused"], wanted.fused)
        agree(halves(*images).logits, wanted.logits)


def test_a_decoder_run_answers_prompts_as_pytorch_does(made: Made) -> None:
    visible, infrared, _ = firm_scenes(made.network, (67, 101), 2)
    halves = OnnxNetwork(made.files)
    with torch.inference_mode():
        wanted_half, found_half = made.network.encode(visible, infrared), halves.encode(visible, infrared)
    points, labels = torch.tensor([[[50.0, 20.0], [3.0, 60.0]]] * 2), torch.tensor([[1, 0]] * 2)
    boxes = torch.tensor([[[10.0, 11.0, 60.0, 50.0]], [[0.0, 0.0, 100.0, 66.0]]])
    wanted, found = [], []
    for prompts in (
        Prompts(points, labels),
        Prompts(boxes=boxes),
        Prompts(points, labels, boxes),
        Prompts(points[:, :1], labels[:, :1]),
    ):
        with torch.inference_mode():
            wanted.append(made.network.decode(wanted_half, prompts))
        found.append(halves.decode(found_half, prompts))
    # far below what sets two prompts apart, else any prompt would pass
    apart = min((one.fot_logits - two.fot_logits).abs().max() for one, two in itertools.combinations(wanted, 2))
    for one, two in zip(found, wanted, strict=True):
        agree(one.logits, two.logits)
        assert (one.fot_logits - two.fot_logits).abs().max() < 0.05 * apart
    for mode in ("none", "self"):
        with torch.inference_mode():
            by_itself = made.network.decode(wanted_half, mode=mode)
        answer = halves.decode(found_half, mode=mode)
        agree(answer.logits, by_itself.logits)
        assert answer.prompts.source == mode


def test_the_file_says_how_to_use_it(made: Made) -> None:
    config = made.network.config
    for name in (WHOLE, ENCODER, DECODER):
        facts = backends.metadata(open_session(made.files / name))
        assert facts["classes"] == config.classes
        assert [tuple(color) for color in facts["palette"]] == [tuple(color) for color in config.palette]
        assert facts["preprocessing"]["largest_side"] == config.max_side
        assert facts["card"]["step"] == 7
    session = open_session(made.files / WHOLE)
    assert [item.name for item in session.get_inputs()] == ["visible", "infrared"]
    assert [item.name for item in session.get_outputs()] == ["fused", "logits"]
    assert all(isinstance(side, str) for i in (0, 2, 3) for side in [session.get_inputs()[0].shape[i]])


def test_a_triton_repository_holds_what_its_configuration_says(made: Made, tmp_path: Path) -> None:
    folder = made.files.parent / "triton" / "weights"
    text = (folder / "config.pbtxt").read_text()
    session = open_session(folder / "1" / "model.onnx")
    kinds = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8"}
    for item in (*session.get_inputs(), *session.get_outputs()):
        dims = ", ".join(str(n) if isinstance(n, int) else "-1" for n in item.shape[1:])  # the batch goes unsaid
        assert f'name: "{item.name}", data_type: TYPE_{kinds[item.type]}, dims: [ {dims} ]' in text
    assert text.count("data_type") == len(session.get_inputs()) + len(session.get_outputs())
    assert (folder / "labels.txt").read_text().split() == made.network.config.classes
    visible, infrared, _ = firm_scenes(made.network, (67, 101), 2)
    found = run_session(session, {"visible": visible.numpy(), "infrared": infrared.numpy()})
    assert np.array_equal(found["labels"], found["logits"].argmax(1))
    shares = torch.from_numpy(found["logits"] / 1.25).softmax(1).amax(1)  # 1.25: the calibration's temperature
    np.testing.assert_allclose(found["confidence"], shares, atol=1e-5)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "notes.txt").write_text("not ours")
    with pytest.raises(InputError, match=r"holds notes\.txt already"):
        write_repository(made.files, tmp_path)


def test_a_fixed_file_has_numbers_alone_and_computes_the_same(made: Made) -> None:
    import onnx

    session = open_session(made.files / "fusionsam_96x130.onnx")
    shapes = {item.name: item.shape for item in (*session.get_inputs(), *session.get_outputs())}
    classes = len(made.network.config.classes)
    assert shapes == {
        "visible": [1, 3, 96, 130], "infrared": [1, 1, 96, 130], "fused": [1, 3, 96, 130],
        "logits": [1, classes, 96, 130],
    }  # fmt: skip
    visible, infrared, _ = firm_scenes(made.network, (96, 130), 1)
    found = run_session(session, {"visible": visible.numpy(), "infrared": infrared.numpy()})
    with torch.inference_mode():
        wanted = made.network(visible, infrared)
    agree(found["logits"], wanted.logits)
    agree(found["fused"], wanted.fused)
    free, fixed = (onnx.load(str(made.files / name)).graph for name in (WHOLE, "fusionsam_96x130.onnx"))
    assert len(fixed.node) < len(free.node)
    assert not {node.op_type for node in fixed.node} & {"Shape", "If", "Loop", "NonZero"}  # nothing asks for a size
    with pytest.raises(InputError, match="--fixed-size 40x5000: expected 64 to"):
        write_fixed(made.files, (40, 5000))


def test_tritons_own_schema_reads_the_configuration(made: Made) -> None:
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    text = (made.files.parent / "triton" / "weights" / "config.pbtxt").read_text()
    read = text_format.Parse(text, schema.ModelConfig())
    assert (read.name, read.backend, read.max_batch_size) == ("weights", "onnxruntime", 8)
    assert [list(item.dims) for item in read.input] == [[3, -1, -1], [1, -1, -1]]
    assert read.output[1].label_filename == "labels.txt"


def test_a_file_that_differs_is_not_kept(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build_debug(seed=1)
    with pytest.raises(InputError, match="differs from PyTorch"):
        export.compare(other, made.files)
    (tmp_path / WHOLE).write_text("an older export")
    monkeypatch.setattr(export, "write_onnx", lambda graph, facts, path: shutil.copy(made.files / path.name, path))
    with pytest.raises(InputError, match="no file was kept"):
        export.write(other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    assert (tmp_path / WHOLE).read_text() == "an older export"


def test_predict_writes_the_same_files_with_both_backends(made: Made, tmp_path: Path) -> None:
    synthesize(tmp_path / "pairs", 2, seed=3, size=(75, 90), progress=False)
    common = ["predict", "--rgbt", str(tmp_path / "pairs" / "images"), "--confidence-map"]
    for backend, weights in (("torch", made.weights), ("onnx", made.files)):
        out = str(tmp_path / backend)
        assert cli([*common, "--weights", str(weights), "--backend", backend, "--out", out]) == 0
    wanted = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == wanted
    for name in wanted:
        one, two = tmp_path / "torch" / name, tmp_path / "onnx" / name
        if name.endswith(".json"):
            pair = [json.loads(path.read_text()) for path in (one, two)]
            assert pair[0]["prompts"] == pair[1]["prompts"]
            assert pair[0]["classes"].keys() == pair[1]["classes"].keys()
        elif name.endswith("_labels.png"):
            assert (np.asarray(Image.open(one)) != np.asarray(Image.open(two))).mean() <= 1e-3
        elif not name.endswith("_overlay.png"):
            pixels = [np.asarray(Image.open(path)).astype(int) for path in (one, two)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_what_an_exported_model_cannot_do_is_said(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = made.network.config.max_side + 1
    with pytest.raises(InputError, match=f"64x{side} pixels.*up to {side - 1} a side.*--backend torch"):
        OnnxNetwork(made.files)(torch.zeros(1, 3, 64, side), None)
    with pytest.raises(InputError, match="expected 64 to"):
        OnnxNetwork(made.files)(torch.zeros(1, 3, 64, 63), None)
    image = str(tmp_path / "a.png")
    Image.new("L", (80, 70)).save(image)
    command = ["predict", "--infrared", image, "--out", str(tmp_path), "--backend", "onnx", "--weights"]
    assert cli([*command, str(made.weights)]) == 2
    assert "fusionsam export" in capsys.readouterr().err
    assert cli([*command, str(made.files), "--device", "cuda"]) == 2
    assert "--backend torch" in capsys.readouterr().err


def test_a_bad_calibration_folder_is_told_before_the_export(made: Made, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("fusionsam.export.onnx.write", lambda *_: pytest.fail("exported"))
    given = ["export", "--weights", str(made.weights), "--out", str(tmp_path), "--quantize", "int8", "--calibrate"]
    assert cli([*given, str(tmp_path / "typo")]) == 2
    assert "--calibrate" in capsys.readouterr().err
    assert cli([*given, str(tmp_path), "--calibration-pairs", "0"]) == 2
    assert "--calibration-pairs: found 0" in capsys.readouterr().err


def test_an_int8_model_stays_beside_its_own_weights_and_goes_with_others(made: Made, tmp_path: Path) -> None:
    path = tmp_path / backends.WHOLE_INT8
    weights = backends.metadata(open_session(made.files / WHOLE))["weights"]
    for name, stays in ((weights, True), ("others", False), ("", False)):
        shutil.copy(made.files / WHOLE, path)
        export._drop_stale(path, name)
        assert path.exists() == stays
    path.write_bytes(b"no model")
    export._drop_stale(path, weights)
    assert not path.exists()
    export._drop_stale(path, weights)  # none there


def test_a_model_of_one_size_goes_with_other_weights(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "write_onnx", lambda _, __, path: path.write_bytes(b""))
    monkeypatch.setattr(export, "compare", lambda *_: [])
    (tmp_path / "fusionsam_480x640.onnx").write_bytes(b"of others")
    (tmp_path / "theirs.onnx").write_bytes(b"of others")
    export.write(made.network, tmp_path, {"weights": "ours"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([DECODER, ENCODER, WHOLE, "theirs.onnx"])


def test_exchanged_halves_are_named(made: Made, tmp_path: Path) -> None:
    for name in (ENCODER, DECODER):
        shutil.copy(made.files / ENCODER, tmp_path / name)
    with pytest.raises(InputError, match=r"decoder.onnx: gives .*, and no logits; export the model again"):
        OnnxNetwork(tmp_path)


def test_int8_touches_the_image_encoder_alone_and_reports_its_price(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    from fusionsam.export import quantize

    synthesize(tmp_path / "pairs", 5, seed=4, size=(70, 90), progress=False)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / WHOLE).write_bytes((made.files / WHOLE).read_bytes())
    result = quantize.quantize(tmp_path / "files", tmp_path / "pairs", 2)
    assert (result["calibrated_on"], result["measured_on"]) == (2, 1)  # train.txt has three, val.txt one
    said = capsys.readouterr().out
    assert f"mIoU {result['int8']['miou']:.2f} against {result['float']['miou']:.2f}" in said
    graph = onnx.load(str(tmp_path / "files" / quantize.WHOLE_INT8)).graph
    weights = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) > 5
    assert all(name.startswith(quantize.PART) for name in weights)
    entry = quantize.split_pairs(tmp_path / "pairs", 2)[1][0]
    arrays = quantize.feed(entry)
    logits = [
        run_session(open_session(tmp_path / "files" / name), arrays)["logits"] for name in (WHOLE, quantize.WHOLE_INT8)
    ]
    difference = np.abs(logits[0] - logits[1])
    # weights of 7 bits: twice the rounding of 8, which saturate without VNNI (quantize.py)
    assert 0 < difference.mean() < 0.15 * logits[0].std()


def test_a_traced_program_runs_at_other_sizes(made: Made) -> None:
    program = trace(Whole(made.network))
    visible, infrared, present = firm_scenes(made.network, (81, 77), 3)
    with torch.inference_mode():
        wanted = made.network(visible, infrared)
        fused, logits = program.module()(visible, infrared, present)
    agree(logits, wanted.logits)
    agree(fused, wanted.fused)


@pytest.mark.slow
def test_a_compiled_network_computes_the_same(made: Made) -> None:
    visible, infrared, _ = firm_scenes(made.network, (81, 77), 2)
    compiled = torch.compile(made.network, backend="aot_eager")  # all of the tracing, none of the C++ compiler
    with torch.no_grad():
        wanted, found = made.network(visible, infrared), compiled(visible, infrared)
    agree(found.logits, wanted.logits)
    agree(found.fused, wanted.fused)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["on a square frame", "of two backbones"])
def test_another_encoder_exports(sam: tuple[torch.nn.Module, Path], tmp_path: Path, kind: str) -> None:
    square = EncoderConfig(kind="sam", source=str(sam[1]), training="full")
    several = EncoderConfig(guided=True, thermal=True)

    def change(config: ModelConfig) -> None:
        config.encoder = square if kind == "on a square frame" else several
        config.prompts.points = 2

    network = build_debug(change)
    if network.config.encoder.thermal:
        with torch.no_grad():  # they begin at zero
            for layer in (network.image_encoder.guide, *network.image_encoder.inject):
                layer.weight.normal_(std=0.1)
    export.write(network, tmp_path)
    halves = OnnxNetwork(tmp_path)
    for size in ((131, 67), (64, 173)):  # upright and lying, both with a rest
        visible, infrared, _ = firm_scenes(network, size, 1)
        with torch.inference_mode():
            wanted = network(visible, infrared)
        agree(halves(visible, infrared).logits, wanted.logits)


@pytest.mark.slow
def test_the_shipped_weights_export(tmp_path: Path) -> None:
    network, _ = load_network("tiny")
    rows = export.write(network, tmp_path)
    assert {(tuple(row["size"]), row["batch"]) for row in rows} == {
        (s, b) for s in export.SIZES for b in export.BATCHES
    }
    assert max(row["logits"] for row in rows) <= 1e-3
    assert max(row["pixels"] for row in rows) <= 1e-3


WEB_PAGE = """<!doctype html><script src="ort.wasm.min.js"></script><script>
const done = new Promise(async (resolve) => {
  try {
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = "/";
    const session = await ort.InferenceSession.create("model.onnx");
    const feeds = {};
    for (const [name, shape] of Object.entries(SHAPES)) {
      const data = new Float32Array(await (await fetch(name + ".bin")).arrayBuffer());
      feeds[name] = new ort.Tensor("float32", data, shape);
    }
    const found = await session.run(feeds);
    resolve({ logits: Array.from(found.logits.data), fused: Array.from(found.fused.data) });
  } catch (error) { resolve({ error: String(error) }); }
});
</script>"""


@pytest.mark.slow  # 150 MB of packages
def test_a_browser_computes_the_same(made: Made, tmp_path: Path) -> None:
    """onnxruntime-web in Chromium: WebAssembly, another build of the operators."""
    web = pytest.importorskip("selenium.webdriver")
    driver_path = shutil.which("chromedriver")
    if not (shutil.which("npm") and driver_path):
        pytest.skip("needs npm and chromedriver")
    install = ["npm", "install", "--prefix", str(tmp_path), "--ignore-scripts", "--no-audit", "onnxruntime-web@1"]
    if (done := subprocess.run(install, capture_output=True, text=True)).returncode:
        pytest.skip(f"npm has no onnxruntime-web: {done.stderr.strip()[-200:]}")
    site = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    shutil.copy(made.files / WHOLE, site / "model.onnx")
    visible, infrared, _ = firm_scenes(made.network, (67, 101), 1)
    arrays = {"visible": visible.numpy(), "infrared": infrared.numpy()}
    for name, array in arrays.items():
        (site / f"{name}.bin").write_bytes(array.astype("<f4").tobytes())
    shapes = json.dumps({name: array.shape for name, array in arrays.items()})
    (site / "index.html").write_text(WEB_PAGE.replace("SHAPES", shapes))
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    options = web.ChromeOptions()
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(flag)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver = web.Chrome(options=options, service=web.ChromeService(driver_path))
        try:
            driver.set_script_timeout(300)
            driver.get(f"http://127.0.0.1:{server.server_port}/index.html")
            found = driver.execute_async_script("done.then(arguments[0])")
        finally:
            driver.quit()
            server.shutdown()
    assert "error" not in found, found
    wanted = run_session(open_session(made.files / WHOLE), arrays)
    for name in ("logits", "fused"):
        np.testing.assert_allclose(np.reshape(found[name], wanted[name].shape), wanted[name], atol=1e-3, rtol=0)
