"""ONNX Runtime against eager PyTorch: seconds and peak memory of one pair, as ratios of one run.

python benchmarks/onnx_runtime.py [--weights tiny] [--files DIR] [--pairs DIR] [--rounds 10] [--openvino]
    [--out results/onnx.json]
python benchmarks/onnx_runtime.py --parity-of vit_b   # random weights; takes 17 GB

Both run on one thread and are timed in turns, in CPU seconds (median), so that other work on the machine does not
count. Peak memory is that of a process of its own that loads the model and predicts once, less the same process'
memory before the model was loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusionsam.config.schema import preset
from fusionsam.export.graphs import scenes
from fusionsam.export.onnx import compare, difference, write
from fusionsam.export.quantize import feed, quantize, split_pairs
from fusionsam.inference.onnx import WHOLE, open_session, run_session
from fusionsam.io import commit, write_json
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import InputError
from fusionsam.weights.checkpoint import load_network, save_checkpoint

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def machine() -> dict[str, Any]:
    model = "unknown"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


def resident() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def peak(backend: str, weights: str, folder: str, size: list[int]) -> None:
    """Printed by a child process: MB above what the libraries took."""
    torch.set_num_threads(1)
    visible, infrared, _ = scenes((size[0], size[1]), 1)
    before = resident()
    if backend == "torch":
        network, _ = load_network(weights)
        with torch.inference_mode():
            network(visible, infrared)
    else:
        run_session(open_session(Path(folder) / WHOLE, 1), {"visible": visible.numpy(), "infrared": infrared.numpy()})
    print(resident() - before)


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call in `rounds` turns, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def measure(weights: str, folder: Path, size: list[int], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    network, _ = load_network(weights)
    session = open_session(folder / WHOLE, 1)
    visible, infrared, _ = scenes((size[0], size[1]), 1)
    arrays = {"visible": visible.numpy(), "infrared": infrared.numpy()}
    with torch.inference_mode():
        calls = {"torch": lambda: network(visible, infrared), "onnx": lambda: run_session(session, arrays)}
        seconds = in_turns(calls, rounds)
    memory = {}
    for backend in seconds:
        command = [sys.executable, __file__, "--child", backend, "--weights", weights, "--folder", str(folder)]
        answer = subprocess.run([*command, "--size", *map(str, size)], capture_output=True, text=True, check=True)
        memory[backend] = float(answer.stdout.split()[-1])
    medians = {backend: float(np.median(values)) for backend, values in seconds.items()}
    return {
        "size": size,
        "rounds": rounds,
        "cpu_seconds_torch": round(medians["torch"], 4),
        "cpu_seconds_onnx": round(medians["onnx"], 4),
        "spread_seconds": {b: [round(min(v), 4), round(max(v), 4)] for b, v in seconds.items()},
        "time_ratio": round(medians["onnx"] / medians["torch"], 3),
        "peak_mb_torch": round(memory["torch"], 1),
        "peak_mb_onnx": round(memory["onnx"], 1),
        "memory_ratio": round(memory["onnx"] / memory["torch"], 3),
    }


def openvino_time(folder: Path, size: list[int], rounds: int) -> dict[str, Any]:
    """OpenVINO (pip install openvino) on the same file, one thread, in turns with ONNX Runtime: whether it would be
    worth a backend."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(folder / WHOLE, "CPU", options).create_infer_request()
    session = open_session(folder / WHOLE, 1)
    visible, infrared, _ = scenes((size[0], size[1]), 1)
    arrays = {"visible": visible.numpy(), "infrared": infrared.numpy()}
    calls = {"openvino": lambda: request.infer(arrays), "onnx": lambda: run_session(session, arrays)}
    seconds = in_turns(calls, rounds)
    medians = {backend: float(np.median(values)) for backend, values in seconds.items()}
    return {
        "version": openvino.__version__,
        **{f"cpu_seconds_{backend}": round(value, 4) for backend, value in medians.items()},
        "time_ratio_to_onnx": round(medians["openvino"] / medians["onnx"], 3),
    }


def parity(weights: str, folder: Path, exported: bool) -> list[dict[str, Any]] | str:
    """The rows of the comparison that every export makes, or the sentence that refused it."""
    network, _ = load_network(weights)
    try:
        return compare(network, folder) if exported else write(network, folder, {"name": weights, "weights": weights})
    except InputError as error:
        return str(error)


def parity_of_random(kind: str, folder: Path) -> list[dict[str, Any]] | str:
    """`parity` of a preset with random weights."""
    torch.manual_seed(0)
    network = FusionSAMNetwork(preset(kind))
    with torch.no_grad():  # a codebook before its first batch is all zeros: every code is as near as any other
        network.tokenizer.train()(torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64))
    network.eval()
    save_checkpoint(folder / kind, network, {})
    del network  # it is read again
    return parity(str(folder / kind), folder / f"{kind}-files", exported=False)


def on_pairs(weights: str, folder: Path, pairs: Path) -> dict[str, Any]:
    """Real pairs at their own size, val.txt's where there is such a list: what rounding does to codes shows here."""
    network, _ = load_network(weights)
    session = open_session(folder / WHOLE, 1)
    shares, logits = [], []
    for entry in split_pairs(pairs, 1)[1]:
        arrays = feed(entry)
        visible, infrared, present = (torch.from_numpy(arrays[name]) for name in ("visible", "infrared", "present"))
        with torch.inference_mode():
            output = network(visible, infrared, present=present)
        row = difference(run_session(session, arrays), {"fused": output.fused.numpy(), "logits": output.logits.numpy()})
        shares.append(row["pixels"])
        logits.append(row["logits"])
    return {
        "folder": pairs.name,
        "pairs": len(shares),
        "pixels_of_another_class_percent": {"mean": 100 * float(np.mean(shares)), "worst": 100 * max(shares)},
        "largest_logit_difference": {"median": float(np.median(logits)), "worst": max(logits)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--files", type=Path, help="what fusionsam export wrote of them (default: written anew)")
    parser.add_argument(
        "--pairs", type=Path, help="real pairs in MFNet's layout: compare on them, and quantise by them"
    )
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--random", nargs="*", default=["debug"], help="presets shown with random weights")
    parser.add_argument("--parity-of", metavar="PRESET", help="nothing but this preset's parity, with random weights")
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO on the same file, too")
    parser.add_argument("--out", type=Path, default=Path("results/onnx.json"))
    parser.add_argument("--child", choices=["torch", "onnx"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        peak(args.child, args.weights, args.folder, args.size)
        return
    if args.openvino and importlib.util.find_spec("openvino") is None:
        parser.error("--openvino: not installed here; pip install openvino, or leave it out")
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    about = {"command": f"python {' '.join(sys.argv)}", "commit": commit(), "machine": machine()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    shown = result.setdefault("parity", {})
    if args.parity_of:
        kind = args.parity_of
        with tempfile.TemporaryDirectory() as name:
            rows = parity_of_random(kind, Path(name))
        facts = {**about, "versions": versions, "peak_gb": round(resident() / 1024, 2)}
        result.setdefault("parity_alone", {})[kind] = facts
        shown[f"{kind} (random weights)"] = rows
        write_json(args.out, result)
        print(json.dumps({**facts, "rows": rows}, indent=1))
        return
    result |= {**about, "versions": versions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = args.files or folder / "files"
        shown[args.weights] = parity(args.weights, files, exported=args.files is not None)
        result["weights"] = args.weights
        if args.pairs:
            result["real_pairs"] = on_pairs(args.weights, files, args.pairs)
            result["int8"] = quantize(files, args.pairs)
        result |= measure(args.weights, files, args.size, args.rounds)
        if args.openvino:
            result["openvino"] = openvino_time(files, args.size, args.rounds)
        for kind in args.random:
            shown[f"{kind} (random weights)"] = parity_of_random(kind, folder)
    write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "parity"}, indent=1))


if __name__ == "__main__":
    main()
