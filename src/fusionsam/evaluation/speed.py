"""Time, memory and arithmetic of this model and of what one would use in its place, measured in one run.

Each row runs in a process of its own: its peak memory is that process', and what one row leaves behind slows no other.
Only the ratios mean something: times differ from machine to machine, and on one machine from hour to hour.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from fusionsam.evaluation.speed_models import MODELS, OURS, Run, Setting, Size
from fusionsam.io import progress_bar
from fusionsam.types import InputError, JsonObject

STAGES = ("tokenizer", "fusion", "picture_head", "image_encoder", "prompt_encoder", "mask_decoder", "head")


@dataclass
class Row:
    """What one model cost for one pair (or one image, where it takes one)."""

    name: str
    size: tuple[int, int]  # (height, width)
    threads: int
    seconds: list[float]  # CPU seconds of each run, warm
    gflop: float | None  # multiply and add count as two; None where a runtime does not tell
    peak_mb: float  # resident memory of the whole process, libraries included
    parameters: int | None
    stages: dict[str, float] = field(default_factory=dict)  # stage of ours -> share of its seconds
    stage_gflop: dict[str, float] = field(default_factory=dict)  # stage of ours -> its part of gflop
    reduced: bool = False  # ours, of a pair larger than it looks at: its time says nothing of how time grows
    peak_gflops: float | None = None  # GFLOP a second of a matrix product on these threads, beside ours

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    def share_of_peak(self, stage: str) -> float | None:
        """What a stage makes of the machine's matrix products, 0..1; None where it was not measured."""
        seconds = self.stages.get(stage, 0.0) * self.median
        if not self.peak_gflops or not seconds:
            return None
        return self.stage_gflop.get(stage, 0.0) / seconds / self.peak_gflops


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(name: str, of: Setting, runs: int) -> Row:
    """One row, in this process: `runs` warm predictions, timed in CPU seconds on one thread, in seconds on several."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(of.threads)
    # of one thread CPU seconds, which other work on the machine leaves alone; of several, time as it passes
    clock = time.process_time if of.threads == 1 else time.perf_counter
    network, run = MODELS[name][1](of)
    with torch.inference_mode():
        run()
        seconds = [_timed(run, clock) for _ in range(runs)]
        row = Row(name, of.size, of.threads, seconds, None, 0.0, None)
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS tells bytes, Linux kilobytes
        row.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if network is None:
            return row
        row.parameters = sum(p.numel() for p in network.parameters())
        if name == OURS:
            row.reduced = max(of.size) > int(getattr(network.config, "max_side", max(of.size)))
            row.stages = _stage_shares(network, run, clock, min(runs, 3))
            row.peak_gflops = _matrix_product(clock)
        with FlopCounterMode(display=False) as counter:
            run()
    row.gflop = counter.get_total_flops() / 1e9
    if name == OURS:
        found, root = counter.get_flop_counts(), type(network).__name__
        row.stage_gflop = {
            stage: sum(sum(found.get(f"{root}.{name}", {}).values()) for name in _modules_of(network, stage)) / 1e9
            for stage in STAGES
        }
    return row


def _timed(run: Run, clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def _matrix_product(clock: Callable[[], float], side: int = 1024, tries: int = 7) -> float:
    """GFLOP a second of the best of some products of two square float32 matrices."""
    one, two = torch.rand(side, side), torch.rand(side, side)
    one @ two
    return 2 * side**3 / min(_timed(lambda: one @ two, clock) for _ in range(tries)) / 1e9


def _modules_of(network: nn.Module, stage: str) -> list[str]:
    """Names of the modules whose forwards make up a stage: its own, and those of the head that `head.features` runs."""
    outside = [
        name for name, _ in network.named_modules() if re.fullmatch(r"head\.(pyramid|smooth|lateral\.\d+)", name)
    ]
    return [stage, *outside] if stage == "head" else [stage]


def _stage_shares(network: nn.Module, run: Run, clock: Callable[[], float], runs: int) -> dict[str, float]:
    """Median share of a prediction's time that each stage takes; what is left lies between the stages."""
    spent, begun = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    hooks = []
    for name in STAGES:
        parts = [network.get_submodule(part) for part in _modules_of(network, name)]

        def start(*_: object, name: str = name) -> None:
            begun[name] = clock()

        def stop(*_: object, name: str = name) -> None:
            spent[name] += clock() - begun[name]

        hooks += [part.register_forward_pre_hook(start) for part in parts]
        hooks += [part.register_forward_hook(stop) for part in parts]
    shares: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(runs):
        spent.update(dict.fromkeys(STAGES, 0.0))
        total = _timed(run, clock)
        for name in STAGES:
            shares[name].append(spent[name] / total)
    for hook in hooks:
        hook.remove()
    return {name: statistics.median(values) for name, values in shares.items()}


def benchmark(
    names: Sequence[str],
    sizes: Sequence[Size],
    threads: Sequence[int],
    runs: int,
    weights: str,
    onnx: str | None = None,
) -> list[Row]:
    """A row for each model, size and number of threads, each from a process of its own.

    Raises InputError for unknown names, and for a row whose process failed."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise InputError(f"--models {unknown[0]}: not known; choose among {', '.join(MODELS)}")
    wanted = [(name, size, count) for count in threads for size in sizes for name in names]
    rows = []
    for name, size, count in progress_bar(wanted, desc="measuring"):
        rows.append(_in_a_process(name, Setting(size, count, weights, onnx), runs))
    return rows


def _in_a_process(name: str, of: Setting, runs: int) -> Row:
    code = "import json, sys; from fusionsam.evaluation.speed import main; main(json.loads(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(of.threads)}
    call = {"name": name, "of": asdict(of), "runs": runs}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(call)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("fusionsam.types.InputError: ")
        raise InputError(f"{name} at {of.size[0]}x{of.size[1]}: {reason[:200]}; leave it out (--models)")
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**found, "size": tuple(found["size"])})


def main(call: JsonObject) -> None:
    """What a row's own process does: print it as JSON."""
    of = Setting(**{**call["of"], "size": tuple(call["of"]["size"])})
    print(json.dumps(asdict(measure(call["name"], of, call["runs"]))))


def exponent(rows: Sequence[Row], stage: str | None = None) -> float | None:
    """Slope of log seconds over log pixels by least squares, of the whole or of a `stage`: 1 = time grows as the pixels
    do. None below two sizes that are looked at as they are, and for a stage that takes no time."""

    def seconds(row: Row) -> float:
        return row.median * (1.0 if stage is None else row.stages.get(stage, 0.0))

    points = {row.size[0] * row.size[1]: seconds(row) for row in rows if not row.reduced}
    if len(points) < 2 or min(points.values()) <= 0:
        return None
    x = torch.tensor([float(n) for n in points]).log()
    y = torch.tensor([points[n] for n in points]).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def machine() -> JsonObject:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
