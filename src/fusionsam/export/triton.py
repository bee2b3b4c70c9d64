"""An exported model as a folder that NVIDIA's Triton Inference Server reads: config.pbtxt, the ONNX file, class names.

Format: the model repository and model configuration of Triton's user guide.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fusionsam.inference.onnx import WHOLE, metadata, open_session
from fusionsam.io import require_writable, whole, write_text
from fusionsam.types import InputError

if TYPE_CHECKING:
    from onnx import ModelProto

CONFIG, MODEL, LABELS, VERSION = "config.pbtxt", "model.onnx", "labels.txt", "1"
MAX_BATCH = 8
REMEDY = "choose another --triton"


def write_repository(folder: Path, repository: Path) -> Path:
    """Put the model of an exported `folder` into the model `repository`, under the name of its weights.

    Its inputs are those of fusionsam.onnx; labels (uint8) and confidence (of the calibrated softmax) join its outputs,
    so that nobody has to send logits over the wire. Returns the model's folder. InputError where that cannot be
    written, or is another's.
    """
    import onnx

    facts = metadata(open_session(folder / WHOLE))
    target = place_for(facts["name"], repository)
    name = target.name
    model = onnx.load(str(folder / WHOLE))
    temperature = float((facts["card"].get("calibration") or {}).get("temperature", 1.0))
    _add_labels(model, temperature)
    onnx.checker.check_model(model)
    with whole(target / VERSION / MODEL, REMEDY) as part:
        onnx.save(model, str(part))
    classes = facts["classes"]
    write_text(target / LABELS, "".join(f"{c}\n" for c in classes), REMEDY)
    write_text(target / CONFIG, config(name, len(classes)), REMEDY)
    return target


def place_for(name: str, repository: Path) -> Path:
    """The folder in `repository` of the weights of that name, which is ours or not there yet. InputError for another's,
    and where nothing can be written."""
    target = repository / re.sub(r"[^\w.-]", "_", name)
    theirs = {path.name for path in target.iterdir()} - {CONFIG, LABELS, VERSION} if target.is_dir() else set()
    if theirs or target.is_file():
        raise InputError(f"{target}: holds {min(theirs, default='something')} already, no model of ours; {REMEDY}")
    require_writable(repository, REMEDY)
    return target


def config(name: str, classes: int) -> str:
    """The model's config.pbtxt; sizes are free, and requests of equal size are batched."""
    inputs = [_tensor("visible", "FP32", "3, -1, -1"), _tensor("infrared", "FP32", "1, -1, -1")]
    outputs = [
        _tensor("fused", "FP32", "3, -1, -1"),
        _tensor("logits", "FP32", f"{classes}, -1, -1", LABELS),
        _tensor("labels", "UINT8", "-1, -1"),
        _tensor("confidence", "FP32", "-1, -1"),
    ]
    head = f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH}\n'
    return f"{head}input [\n{_list(inputs)}]\noutput [\n{_list(outputs)}]\ndynamic_batching {{ }}\n"


def _tensor(name: str, kind: str, dims: str, labels: str | None = None) -> str:
    named = f', label_filename: "{labels}"' if labels else ""
    return f'  {{ name: "{name}", data_type: TYPE_{kind}, dims: [ {dims} ]{named} }}'


def _list(items: list[str]) -> str:
    return ",\n".join(items) + "\n"


def _add_labels(model: ModelProto, temperature: float) -> None:
    """Outputs labels uint8 (B,H,W) and confidence (B,H,W) beside the logits."""
    from onnx import TensorProto, helper

    graph = model.graph
    graph.initializer.append(helper.make_tensor("temperature", TensorProto.FLOAT, [], [temperature]))
    graph.initializer.append(helper.make_tensor("class_axis", TensorProto.INT64, [1], [1]))
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], ["label_ids"], axis=1, keepdims=0),
            helper.make_node("Cast", ["label_ids"], ["labels"], to=TensorProto.UINT8),
            helper.make_node("Div", ["logits", "temperature"], ["scaled_logits"]),
            helper.make_node("Softmax", ["scaled_logits"], ["probabilities"], axis=1),
            helper.make_node("ReduceMax", ["probabilities", "class_axis"], ["confidence"], keepdims=0),
        ]
    )
    axes = ["batch", "height", "width"]
    graph.output.append(helper.make_tensor_value_info("labels", TensorProto.UINT8, axes))
    graph.output.append(helper.make_tensor_value_info("confidence", TensorProto.FLOAT, axes))
