"""The two streams from a backbone that has seen streets, out of a file of 8 bits.

    pip install ai-edge-litert
    python experiments/two_stream/street_backbones.py convert --source mobilenet_edgetpu_075 --tflite FILE.tflite \
        --root data/mfnet --out city.safetensors
    python experiments/two_stream/street_backbones.py train --peer two_stream ... \
        --model.encoder.source mobilenet_edgetpu_075 --model.encoder.weights city.safetensors
    python experiments/two_stream/street_backbones.py fusionsam train --model.encoder.source mobilenet_edgetpu_075 ...

--source, and its FILE.tflite:
    mobilenet_edgetpu_075: Cityscapes, 19 classes: deeplab_mobilenet_edgetpu_slim_cityscapes_quant.tflite of
        github.com/google-coral/test_data (Apache-2.0)
    mobilenet_multi_avg_seg: ADE20K, 32 classes: mobile_segmenter_r3_quant.tflite (MOSAIC, Wang and Howard 2021) of
        github.com/mlcommons/mobile_models (Apache-2.0)
Both run the last stages dilated at stride 16; with the same weights at stride 32 they give every second feature of
it. The norms are folded into the file's convolutions and are taken out again as benchmarks/coco_backbone.py does it.
All but `convert` is baselines.py, or the command `fusionsam`, to which the backbones are made known.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models import efficientnet, register_model
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import baselines
from coco_backbone import Layer, fill, renormalised, unfold

from fusionsam.data.dataset import open_split
from fusionsam.data.transforms import to_unit
from fusionsam.io import whole

SOURCES = ("mobilenet_edgetpu_075", "mobilenet_multi_avg_seg")
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
"""What timm's encoder of a source without a configuration normalises by; the file wants [-1, 1]."""
PICTURES = 22
BLOCKS = {
    "ConvBnAct": (("conv", "bn1"),),
    "EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


@register_model
def mobilenet_edgetpu_075(pretrained: bool = False, **options: Any) -> Any:
    """mobilenet_edgetpu_100 at 0.75 of its widths, without the activation that TensorFlow's first block lacks."""
    net = efficientnet._gen_mobilenet_edgetpu("mobilenet_edgetpu_100", channel_multiplier=0.75, **options)
    net.blocks[0][0].bn1.act = nn.Identity()
    return net


@register_model
def mobilenet_multi_avg_seg(pretrained: bool = False, **options: Any) -> Any:
    """TensorFlow's MobileNetMultiAVGSeg, which has no block at stride 2."""
    stages = [
        ["ir_r1_k3_s2_e3_c32", "ir_r1_k3_s1_e2_c32"],
        ["ir_r1_k5_s2_e5_c64", "ir_r1_k3_s1_e3_c64", "ir_r1_k3_s1_e2_c64", "ir_r1_k3_s1_e3_c64"],
        ["ir_r1_k5_s2_e6_c128", "ir_r3_k3_s1_e3_c128", "ir_r1_k3_s1_e6_c160", "ir_r1_k3_s1_e4_c160"],
        ["ir_r1_k3_s2_e6_c192", "ir_r1_k5_s1_e2_c96", "ir_r2_k5_s1_e4_c96"],
    ]
    built: dict[str, Any] = {"block_args": decode_arch_def(stages), "num_features": 448, "act_layer": nn.ReLU}
    # the name is one that timm has a configuration for; nothing of that is used
    return efficientnet._create_effnet("mobilenet_edgetpu_100", **built, **options)


def layers(net: Any) -> list[Layer]:
    """In the order of the forward pass."""
    found = [(net.conv_stem, net.bn1)]
    for block in (block for stage in net.blocks for block in stage):
        found += [(getattr(block, conv), getattr(block, norm)) for conv, norm in BLOCKS[type(block).__name__]]
    found.append((net.conv_head, net.bn2))
    return [(conv, norm, str(number)) for number, (conv, norm) in enumerate(found)]


def convolutions(file: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights (O,I,h,w) and offsets (O) of the file's convolutions in their order, as real numbers."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    graph = model.subgraphs[0]
    kinds = {schema.BuiltinOperator.CONV_2D: (0, 3, 1, 2), schema.BuiltinOperator.DEPTHWISE_CONV_2D: (3, 0, 1, 2)}
    types = {schema.TensorType.UINT8: np.uint8, schema.TensorType.INT32: np.int32}

    def constant(index: int) -> Tensor:
        tensor = graph.tensors[index]
        stored = np.frombuffer(bytes(bytearray(model.buffers[tensor.buffer].data)), types[tensor.type])
        found = tensor.quantization
        real = (stored.reshape(tensor.shape).astype(np.float32) - found.zeroPoint[0]) * found.scale[0]
        return torch.from_numpy(real.astype(np.float32))

    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    wanted = [op for op in graph.operators if codes[op.opcodeIndex] in kinds]
    return [(constant(op.inputs[1]).permute(kinds[codes[op.opcodeIndex]]), constant(op.inputs[2])) for op in wanted]


@torch.no_grad()
def convert(source: str, file: Path, root: str, out: Path) -> None:
    """The backbone of `file` with norms that learn, in timm's names."""
    net: Any = timm.create_model(source).eval()
    found = layers(net)
    # what is left over is the decoder's
    for number, ((conv, norm, _), (weight, offset)) in enumerate(zip(found, convolutions(file), strict=False)):
        if number == 0:
            weight, offset = renormalised(weight, offset, MEAN, STD)
        fill(conv, norm, weight, offset)
    data = open_split("mfnet", root, "train")
    pictures = [data[number].visible for number in range(0, len(data), -(-len(data) // PICTURES))]
    batches = [((to_unit(p) - MEAN[:, None, None]) / STD[:, None, None])[None] for p in pictures if p is not None]
    unfold(net, found, batches)
    with whole(out) as part:
        save_file({k: v.contiguous() for k, v in net.state_dict().items() if not k.startswith("classifier.")}, part)
    print(out)


def main() -> int:
    if sys.argv[1:2] == ["fusionsam"]:
        return baselines.cli(sys.argv[2:])
    if sys.argv[1:2] != ["convert"]:
        return baselines.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, required=True)
    parser.add_argument("--tflite", type=Path, required=True)
    parser.add_argument("--root", required=True, help="MFNet's folder: pictures of its training split are measured")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(sys.argv[2:])
    convert(given.source, given.tflite, given.root, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
