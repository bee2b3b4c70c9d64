"""The three graphs that are exported, and how each becomes an ONNX file: one traced program, a little finishing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbols
from torch.nn import functional as F

from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.types import SMALLEST, Encoded, Frame, ImageFeatures, InputError, Latents, Prompts

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18  # the first whose operators torch's exporter writes without converting them
IMAGES = ("visible", "infrared", "present")


class Whole(nn.Module):
    """visible (B,3,H,W), infrared (B,1,H,W) in [0,1], present bool (B,2) -> fused (B,3,H,W), logits (B,K,H,W)."""

    inputs: tuple[str, ...] = IMAGES
    outputs: tuple[str, ...] = ("fused", "logits")

    def __init__(self, network: FusionSAMNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, visible: Tensor, infrared: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        """The network's own forward, with the prompts of its configuration."""
        output = self.network(visible, infrared, present=present)
        return output.fused, output.logits


class EncoderHalf(Whole):
    """All that no prompt changes: the same inputs -> picture, latents, mask prompt, SAM's embedding and levels."""

    def __init__(self, network: FusionSAMNetwork) -> None:
        super().__init__(network)
        self.levels = tuple(f"level_{i}" for i in range(len(network.image_encoder.level_strides)))
        latents = ("visible_latents", "infrared_latents", "z_f", "mask_prompt")
        self.outputs = ("fused", *latents, "image_embeddings", *self.levels)

    def forward(self, visible: Tensor, infrared: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        """FusionSAMNetwork.encode as a flat tuple in the order of `outputs`."""
        e = self.network.encode(visible, infrared, present)
        latents = (e.latents.visible, e.latents.infrared, e.z_f, e.mask_prompt)
        return (e.fused, *latents, e.features.embedding, *e.features.levels)


class DecoderHalf(EncoderHalf):
    """Prompts -> masks (the output tokens' own logits) and logits, (B,K,H,W) at the padded size the network works at.

    points (B,P,2) in pixels and point_labels (B,P) as SAM's exported decoder has them: 1 on, 0 off, 2 and 3 the
    corners of a box, -1 padding. The rest is what EncoderHalf gave.
    """

    def __init__(self, network: FusionSAMNetwork) -> None:
        super().__init__(network)
        self.inputs = ("points", "point_labels", "z_f", "mask_prompt", "image_embeddings", *self.levels)
        self.outputs = ("masks", "logits")

    def forward(  # type: ignore[override]
        self, points: Tensor, point_labels: Tensor, z_f: Tensor, mask_prompt: Tensor, embedding: Tensor, *levels: Tensor
    ) -> tuple[Tensor, ...]:
        """FusionSAMNetwork.decode for a person's prompts."""
        stride = Tokenizer.STRIDE
        padded = (stride * z_f.shape[2], stride * z_f.shape[3])
        encoder = self.network.image_encoder
        frame = Frame(padded, padded) if encoder.image_size is None else encoder.frame(*padded)
        features = ImageFeatures(embedding, list(levels), frame)
        # decode hands picture and latents through; here nobody asks for them
        encoded = Encoded(features, mask_prompt, Latents(z_f, z_f), z_f, mask_prompt, padded, padded, padded)
        output = self.network.decode(encoded, Prompts(points, point_labels, source="user"))
        return output.fot_logits, output.logits


def scenes(size: tuple[int, int], batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic street scenes: visible (B,3,H,W), infrared (B,1,H,W) in [0,1], present all true."""
    drawn = [draw_scene(seed, index, size) for index in range(batch)]
    visible = torch.stack([scene.visible for scene in drawn if scene.visible is not None])
    infrared = torch.stack([scene.infrared for scene in drawn if scene.infrared is not None])
    return visible.float() / 255, infrared.float() / 255, torch.ones(batch, 2, dtype=torch.bool)


def trace(graph: Whole) -> ExportedProgram:
    """torch.export of a graph in eval mode; batch, prompts, height and width stay dynamic, the sides from 64 up to the
    model's max_side."""
    # of the layout channels_last a graph would keep that no symbolic size is 1
    network, batch = graph.network.eval().to(memory_format=torch.contiguous_format), Dim("batch")  # type: ignore[call-overload]
    images = scenes((250, 313), 2)
    # a size of 1 (a batch, a single window) is not taken for special; older releases of torch do without the option
    option = {"backed_size_oblivious": True} if hasattr(symbols, "backed_size_oblivious") else {}
    free = symbols.patch(option) if option else nullcontext()  # type: ignore[attr-defined]
    with torch.no_grad(), free, _fixed_padding(network):
        if isinstance(graph, DecoderHalf):
            arguments, shapes = _decoder_arguments(graph, images, batch)
        else:
            height, width = (Dim(n, min=SMALLEST, max=network.config.max_side) for n in ("height", "width"))
            arguments = images
            shapes = ({0: batch, 2: height, 3: width}, {0: batch, 2: height, 3: width}, {0: batch})
        return torch.export.export(
            graph.eval(),
            arguments,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def _fixed_padding(network: FusionSAMNetwork) -> Iterator[None]:
    """timm's SAME convolutions compute their padding from the input's size. On whole multiples of their stride, which
    is all they ever get here, it is always the same; a symbolic one would grow with every layer."""
    found = [module for module in network.modules() if isinstance(module, Conv2dSame)]

    def convolve(module: Conv2dSame, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, step, spread in zip(module.kernel_size, module.stride, module.dilation, strict=True):
            total = max((size - 1) * spread + 1 - step, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), module.weight, module.bias, module.stride, 0, module.dilation, module.groups)

    try:
        for module in found:
            module.forward = partial(convolve, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in found:
            del module.forward


def _decoder_arguments(
    graph: DecoderHalf, images: tuple[Tensor, ...], batch: Dim
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    network = graph.network
    half = EncoderHalf(network)
    found = dict(zip(half.outputs, half(*images), strict=True))
    points = torch.tensor([[10.0, 20.0], [40.0, 30.0], [5.0, 6.0], [70.0, 50.0], [0.0, 0.0]]).repeat(2, 1, 1)
    labels = torch.tensor([1, 0, 2, 3, -1]).repeat(2, 1)
    arguments = (points, labels, *(found[name] for name in graph.inputs[2:]))

    square = network.image_encoder.image_size is not None  # a frame of one size for pictures of all sizes

    def grid(name: str) -> dict[int, Dim]:
        if square and name != "z_f":
            return {0: batch}
        return {0: batch, 2: Dim(f"{name}_height", min=2), 3: Dim(f"{name}_width", min=2)}

    prompts, cells = {0: batch, 1: Dim("prompts")}, grid("z_f")
    levels = tuple(grid(name) for name in graph.levels)
    shapes = (prompts, prompts, cells, cells, grid("embedding"))
    return arguments, (*shapes, levels) if levels else shapes


def to_onnx(graph: Whole, metadata: dict[str, str]) -> ModelProto:
    """The graph as an onnx.ModelProto. `present` may be left out by who feeds it (both images are there then); the
    decoder gets a further input `size` (H, W) and cuts masks and logits to it. InputError without onnx."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError('export needs onnx and onnxscript; pip install "fusionsam[export]"') from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names and versions: the comparison afterwards is what counts
        program = torch.onnx.export(
            trace(graph),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    if isinstance(graph, DecoderHalf):
        _cut_to_size(model)
    else:
        _default_present(model)
    _name_axes(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    return model


def write_onnx(graph: Whole, metadata: dict[str, str], path: Path) -> None:
    """`to_onnx` into a file. InputError as there, and for a model beyond 2 GB."""
    model = to_onnx(graph, metadata)
    import onnx

    try:
        onnx.save(model, str(path))
    except ValueError as error:  # protobuf's limit
        if "2GB" not in str(error).replace(" ", ""):
            raise
        raise InputError(
            f"{path.name}: would be larger than 2 GB, more than one ONNX file holds; use --backend torch"
        ) from None


def _default_present(model: ModelProto) -> None:
    """`present` of one row serves every batch, and both images are there where it is left out."""
    from onnx import TensorProto, helper

    graph = model.graph
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == "present":
                node.input[place] = "present_rows"
    graph.initializer.append(helper.make_tensor("present_columns", TensorProto.INT64, [1], [2]))
    # an initializer that is an input too is that input's default
    graph.initializer.append(helper.make_tensor("present", TensorProto.BOOL, [1, 2], [True, True]))
    first = (
        helper.make_node("Shape", ["visible"], ["present_batch"], start=0, end=1),
        helper.make_node("Concat", ["present_batch", "present_columns"], ["present_shape"], axis=0),
        helper.make_node("Expand", ["present", "present_shape"], ["present_rows"]),
    )
    for place, node in enumerate(first):
        graph.node.insert(place, node)


def _cut_to_size(model: ModelProto) -> None:
    """A further input `size` (H, W), to which masks and logits are cut."""
    from onnx import TensorProto, helper

    graph = model.graph
    names = [item.name for item in graph.output]
    graph.input.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    graph.initializer.append(helper.make_tensor("cut_from", TensorProto.INT64, [2], [0, 0]))
    graph.initializer.append(helper.make_tensor("cut_axes", TensorProto.INT64, [2], [2, 3]))
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                if name in names:
                    values[place] = f"{name}_padded"
    for name in names:
        graph.node.append(helper.make_node("Slice", [f"{name}_padded", "cut_from", "size", "cut_axes"], [name]))


def _name_axes(model: ModelProto) -> None:
    """Readable names for the free axes of inputs and outputs, in place of the tracer's symbols."""
    graph = model.graph
    del graph.value_info[:]  # they speak of the symbols still
    for item in (*graph.input, *graph.output):
        if item.name == "size":
            continue
        if item.name in ("visible", "infrared", "fused", "masks", "logits"):
            sides = ("height", "width")
        elif item.name.endswith("_latents") or item.name in ("z_f", "mask_prompt"):
            sides = ("rows", "columns")
        else:
            sides = (f"{item.name}_height", f"{item.name}_width")
        names = ("batch_or_1" if item.name == "present" else "batch", "prompts", *sides)
        for axis, name in zip(item.type.tensor_type.shape.dim, names, strict=False):
            if axis.HasField("dim_param"):
                axis.dim_param = name
