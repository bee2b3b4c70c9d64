"""An exported model for pairs of one size alone, as TensorRT and compilers for small devices want it: every shape is a
number, both images are there, and what depended on the size is computed beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusionsam.export.graphs import scenes
from fusionsam.export.onnx import FIXED_SIZE, LOGITS, PIXELS, difference
from fusionsam.inference.onnx import WHOLE, metadata, open_session, run_session, runtime
from fusionsam.io import scratch, whole
from fusionsam.types import SMALLEST, InputError

if TYPE_CHECKING:
    import onnx

Size = tuple[int, int]


def write_fixed(folder: Path, size: Size) -> Path:
    """fusionsam_HxW.onnx beside fusionsam.onnx in `folder`: one pair of `size` (height, width), no input `present`.

    It is kept only if ONNX Runtime finds in it what fusionsam.onnx gives. InputError otherwise, and for a size that the
    model does not take.
    """
    import onnx

    facts = metadata(session := open_session(folder / WHOLE))
    require_size(size, facts["preprocessing"]["largest_side"])
    target = folder / FIXED_SIZE.format(*size)
    with scratch(folder) as place:
        made = _fold(_with_sizes(folder / WHOLE, size), place)
    onnx.helper.set_model_props(made, dict(session.get_modelmeta().custom_metadata_map))
    with whole(target, "choose another --out") as part:
        onnx.save(made, str(part))
        visible, infrared, _ = scenes(size, 1)
        arrays = {"visible": visible.numpy(), "infrared": infrared.numpy()}
        row = difference(run_session(open_session(part), arrays), run_session(session, arrays))
        # a token between two codes takes either one, so a few logits may differ by more than rounding
        if not (row["fused"] <= LOGITS and row["pixels"] <= PIXELS):
            raise InputError(f"{target.name}: differs from {WHOLE} in {row['pixels']:.3%} of the classes; not kept")
    return target


def require_size(size: Size, largest: int) -> None:
    """InputError for a (height, width) that a model does not take whose pictures have up to `largest` pixels a side."""
    if not all(SMALLEST <= side <= largest for side in size):
        raise InputError(f"--fixed-size {size[0]}x{size[1]}: expected {SMALLEST} to {largest} a side")


def _with_sizes(path: Path, size: Size) -> onnx.ModelProto:
    """The model with numbers in the place of its free axes."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(str(path))
    inputs = [item for item in model.graph.input if item.name != "present"]  # its default stays, as a constant
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, value in (("batch", 1), ("height", size[0]), ("width", size[1])):
        make_dim_param_fixed(model.graph, name, value)
    return model


def _fold(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after ONNX Runtime computed what is constant; the operators stay those of ONNX itself."""
    import onnx

    ort = runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(str(folder / "folded.onnx"))
    if foreign := {node.domain for node in folded.graph.node} - {"", "ai.onnx"}:
        raise InputError(f"fusionsam.onnx: needs operators of {min(foreign)}; export it again")
    kept = [item for item in folded.opset_import if item.domain in ("", "ai.onnx")]
    del folded.opset_import[:]
    folded.opset_import.extend(kept)
    return folded
