"""int8 by static quantisation: the image encoder's convolutions and matrix products, whose ranges a folder of pairs
sets. LSTG, FMP and the decoder stay in float: codes and peaks are choices that a rounding error flips."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusionsam.data.dataset import read_sample
from fusionsam.data.splits import Entry, entries, pair_entries
from fusionsam.data.transforms import eval_transform
from fusionsam.inference.onnx import WHOLE, WHOLE_INT8, metadata, open_session, run_session
from fusionsam.io import whole
from fusionsam.metrics.segmentation import PROTOCOLS, ConfusionMatrix
from fusionsam.types import Array, InputError, JsonObject

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PART = "network.image_encoder."
KINDS = ("Conv", "MatMul", "Gemm")


def quantize(folder: Path, pairs: Path, count: int = 32) -> JsonObject:
    """Write fusionsam_int8.onnx beside the float model in `folder`, and print what it costs and gains.

    Calibrated on `count` pairs of `pairs`; see `split_pairs` for its layouts. Returns mIoU (percent; None without
    labels) and CPU seconds a pair of both, measured on the pairs held back. InputError for folders without pairs.
    """
    session = open_session(folder / WHOLE)
    facts = metadata(session)
    seen, held = split_pairs(pairs, count)
    nodes = encoder_nodes(folder / WHOLE)
    with whole(folder / WHOLE_INT8) as part:
        _quantize(folder / WHOLE, part, nodes, seen)
    result: JsonObject = {"calibrated_on": len(seen), "measured_on": len(held), "nodes": len(nodes)}
    result["same_pairs"] = held is seen
    for name, path in (("float", WHOLE), ("int8", WHOLE_INT8)):
        result[name] = measure(open_session(folder / path, threads=1), held, len(facts["classes"]))
        result[name]["megabytes"] = round((folder / path).stat().st_size / 1e6, 2)
    print(sentence(result))
    return result


def _quantize(source: Path, target: Path, nodes: dict[str, str], seen: Sequence[Entry]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """One pair at a time, for the histograms' library keeps what it has read until a range ends."""

        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Array]] = (feed(entry) for entry in seen)

        def __len__(self) -> int:
            return len(seen)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.feeds = (feed(entry) for entry in seen[start_index:end_index])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    options: JsonObject
    kinds = set(nodes.values())
    if kinds == {"Conv"}:
        # a few outliers would leave most values a handful of steps: 57.2 mIoU of tiny fell to 50.4 by plain extremes
        method, options = CalibrationMethod.Percentile, {"CalibPercentile": 99.99, "CalibStridedMinMax": 1}
    else:  # histograms of attention maps do not fit into memory
        method, options = CalibrationMethod.MinMax, {"CalibMovingAverage": True}
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the library gives its advice on the root logger
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of a channel whose weights are all zero
            quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(kinds),
                per_channel=True,
                # 7 bits: with 8, processors without VNNI saturate where they add two products in 16 bits
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=list(nodes),
                calibrate_method=method,
                extra_options=options,
            )
    finally:
        root.setLevel(level)


def sentence(result: JsonObject) -> str:
    """The outcome of `quantize` in one line."""
    old, new = result["float"], result["int8"]
    speed = f"{new['seconds']:.3f} s a pair against {old['seconds']:.3f} ({new['seconds'] / old['seconds']:.2f} x)"
    size = f"{new['megabytes']:.1f} MB against {old['megabytes']:.1f}"
    where = f"{result['measured_on']} pairs, calibrated on {result['calibrated_on']}"
    if result["same_pairs"]:
        where += ", the same: no others are there"
    if old["miou"] is None:
        return f"int8: {speed}, {size}; no labels, so no mIoU ({where})"
    change = new["miou"] - old["miou"]
    return f"int8: mIoU {new['miou']:.2f} against {old['miou']:.2f} ({change:+.2f}), {speed}, {size} ({where})"


def split_pairs(root: Path, count: int) -> tuple[list[Entry], list[Entry]]:
    """Pairs to calibrate on (at most `count`, evenly spaced) and pairs to measure on, which are others where there are.

    `root` has images/ with four-channel files, or visible/ and infrared/; labels/ is optional. With the lists
    train.txt and val.txt the first calibrates and the second measures.
    """
    if count < 1:
        raise InputError(f"--calibration-pairs: found {count}, expected at least 1")
    labels = root / "labels" if (root / "labels").is_dir() else None
    if (root / "train.txt").is_file() and (root / "val.txt").is_file() and (root / "images").is_dir():
        train, val = entries("mfnet", root, "train"), entries("mfnet", root, "val")
        return spaced(train, count), val
    if (root / "images").is_dir():
        found = pair_entries(root / "images", None, labels)
        found = [Entry(entry.id, rgbt=entry.visible, label=entry.label) for entry in found]
    elif (root / "visible").is_dir() and (root / "infrared").is_dir():
        found = pair_entries(root / "visible", root / "infrared", labels)
    else:
        raise InputError(
            f"--calibrate {root}: neither images/ nor visible/ and infrared/ are in it; give such a folder"
        )
    if not found:
        raise InputError(f"--calibrate {root}: holds no pairs; give a folder with at least one")
    seen = spaced(found, count)
    chosen = {entry.id for entry in seen}
    return seen, [entry for entry in found if entry.id not in chosen] or seen


def spaced(items: Sequence[Entry], count: int) -> list[Entry]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count).round()]


def encoder_nodes(path: Path) -> dict[str, str]:
    """Names and kinds of the image encoder's convolutions and matrix products: those whose weights are its own."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    nodes = {
        node.name: node.op_type
        for node in graph.node
        if node.op_type in KINDS and any(name.startswith(PART) for name in node.input)
    }
    if not nodes:
        raise InputError(f"{path}: no convolution of the image encoder found in it; export it again")
    return nodes


def feed(entry: Entry) -> dict[str, Array]:
    """One pair as the exported model takes it; an absent image as zeros, marked in `present`."""
    item = eval_transform(read_sample(entry))
    given = {"visible": item.visible, "infrared": item.infrared, "present": item.present}
    return {name: tensor[None].numpy() for name, tensor in given.items()}


def measure(session: InferenceSession, pairs: Sequence[Entry], classes: int) -> JsonObject:
    """mIoU in percent over the classes in the labels (None without) and the median CPU seconds a pair."""
    matrix, seconds = ConfusionMatrix(classes), []
    for entry in pairs:
        arrays = feed(entry)
        started = time.process_time()
        logits = run_session(session, arrays)["logits"]
        seconds.append(time.process_time() - started)
        label = read_sample(entry).label
        if label is not None:
            matrix.update(logits[0].argmax(0), label.numpy())
    counted = bool(matrix.matrix.sum())
    return {
        "miou": round(PROTOCOLS["present"](matrix.matrix).miou, 3) if counted else None,
        "seconds": round(float(np.median(seconds)), 4),
    }
