"""Time, memory and arithmetic of this model and of what one would use in its place, measured in one run.

Each row runs in a process of its own: its peak memory is that process', and what one row leaves behind slows no other.
Only the ratios mean something: times differ from machine to machine, and on one machine from hour to hour.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusionsam.config.options import DEFAULT_WEIGHTS
from fusionsam.errors import InputError
from fusionsam.progress import progress_bar

Run = Callable[[], object]
OURS = "fusionsam"
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

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


# -- the models ----------------------------------------------------------------------------------------------------


def _pair(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, *size, generator=generator), torch.rand(1, 1, *size, generator=generator)


def _ours(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    from fusionsam.inference.predictor import FusionSAM

    model = FusionSAM.from_pretrained(weights, device="cpu")
    visible, infrared = _pair(size)
    return model.network, lambda: model.infer(visible, infrared)


def _compiled(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    from fusionsam.inference.predictor import FusionSAM

    network = FusionSAM.from_pretrained(weights, device="cpu").network
    compiled = torch.compile(network)
    visible, infrared = _pair(size)
    return network, lambda: compiled(visible, infrared)


class TwoStreams(nn.Module):
    """The obvious alternative: two backbones of ours, features summed, an FPN decoder, a 1x1 convolution."""

    def __init__(self, source: str = "mobilenetv2_100", classes: int = 9) -> None:
        import timm
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

        super().__init__()
        self.streams = nn.ModuleList(timm.create_model(source, features_only=True) for _ in range(2))
        info: Any = self.streams[0].feature_info
        self.decoder = FPNDecoder(info.channels()[-4:], 3, 128, segmentation_channels=96)
        self.head = nn.Conv2d(96, classes, 1)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """(B,3,H,W) and (B,1,H,W), sides multiples of 32 -> logits (B,K,H/4,W/4)."""
        images = (visible, infrared.expand(-1, 3, -1, -1))
        levels = [stream(image)[-4:] for stream, image in zip(self.streams, images, strict=True)]
        out: Tensor = self.head(self.decoder([a + b for a, b in zip(*levels, strict=True)]))
        return out


def _two_streams(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    network = TwoStreams().eval().to(memory_format=torch.channels_last)
    visible, infrared = _pair((size[0] + -size[0] % 32, size[1] + -size[1] % 32))
    return network, lambda: network(visible, infrared)


def _sam_vit_b(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    from transformers import SamConfig, SamModel

    network = SamModel(SamConfig()).eval()
    image, points = torch.rand(1, 3, 1024, 1024), torch.tensor([[[[300.0, 400.0]]]])
    return network, lambda: network(pixel_values=image, input_points=points)


def _sam2_tiny(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    from transformers import Sam2Config, Sam2Model

    network = Sam2Model(Sam2Config()).eval()
    image, points = torch.rand(1, 3, 1024, 1024), torch.tensor([[[[300.0, 400.0]]]])
    return network, lambda: network(pixel_values=image, input_points=points)


def _mit_b2() -> dict[str, Any]:
    # SegFormer (arXiv 2105.15203), table 6: B2
    return {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768, "num_labels": 9}


def _segformer_b2(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    network = SegformerForSemanticSegmentation(SegformerConfig(**_mit_b2())).eval()
    visible, _ = _pair(size)
    return network, lambda: network(pixel_values=visible)


class _TwoMiT(nn.Module):
    """Two MiT-B2 whose features are summed before SegFormer's decoder: CMX (arXiv 2203.04838) without its own fusion
    blocks, so a little less than CMX costs."""

    def __init__(self) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        super().__init__()
        config = SegformerConfig(**_mit_b2())
        self.one, self.two = (SegformerForSemanticSegmentation(config) for _ in range(2))
        self.two.decode_head = nn.Identity()  # type: ignore[assignment]

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        images = (visible, infrared.expand(-1, 3, -1, -1))
        levels = [
            network.segformer(image, output_hidden_states=True).hidden_states
            for network, image in zip((self.one, self.two), images, strict=True)
        ]
        out: Tensor = self.one.decode_head([a + b for a, b in zip(*levels, strict=True)])
        return out


def _two_mit_b2(size: tuple[int, int], weights: str) -> tuple[nn.Module, Run]:
    network = _TwoMiT().eval()
    visible, infrared = _pair(size)
    return network, lambda: network(visible, infrared)


MODELS: dict[str, tuple[str, Callable[[tuple[int, int], str], tuple[nn.Module, Run]]]] = {
    OURS: ("FusionSAM", _ours),
    "compiled": ("FusionSAM, torch.compile", _compiled),
    "two_streams": ("two-stream FPN of the same backbones", _two_streams),
    "segformer_b2": ("SegFormer-B2 on the visible image (random weights)", _segformer_b2),
    "two_mit_b2": ("two MiT-B2, summed (CMX-like, random weights)", _two_mit_b2),
    "sam2_tiny": ("SAM2 tiny at 1024x1024 (random weights)", _sam2_tiny),
    "sam_vit_b": ("SAM ViT-B at 1024x1024 (random weights)", _sam_vit_b),
}
"""Name -> what the table calls it, and how it is built: network, and one prediction to time."""


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(name: str, size: tuple[int, int], threads: int, runs: int, weights: str = DEFAULT_WEIGHTS) -> Row:
    """One row, in this process: `runs` warm predictions of a pair of `size` (H, W), timed in CPU seconds."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(threads)
    network, run = MODELS[name][1](size, weights)
    with torch.inference_mode():
        run()
        seconds = []
        for _ in range(runs):
            # of one thread CPU seconds, which other work on the machine leaves alone; of several, time as it passes
            clock = time.process_time if threads == 1 else time.perf_counter
            started = clock()
            run()
            seconds.append(clock() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        stages = _stage_shares(network, run) if name == OURS else {}
        with FlopCounterMode(display=False) as counter:
            run()
    parameters = sum(p.numel() for p in network.parameters())
    return Row(name, size, threads, seconds, counter.get_total_flops() / 1e9, peak, parameters, stages)


def _stage_shares(network: nn.Module, run: Run) -> dict[str, float]:
    """Share of one prediction's CPU seconds that each stage takes; what is left lies between the stages."""
    spent, begun = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    hooks = []
    for name in STAGES:
        stage = network.get_submodule(name)

        def start(*_: object, name: str = name) -> None:
            begun[name] = time.process_time()

        def stop(*_: object, name: str = name) -> None:
            spent[name] += time.process_time() - begun[name]

        hooks += [stage.register_forward_pre_hook(start), stage.register_forward_hook(stop)]
    started = time.process_time()
    run()
    total = time.process_time() - started
    for hook in hooks:
        hook.remove()
    return {name: value / total for name, value in spent.items()}


def benchmark(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], threads: Sequence[int], runs: int, weights: str
) -> list[Row]:
    """A row for each model, size and number of threads, each from a process of its own.

    Raises InputError for unknown names, and for a row whose process failed."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise InputError(f"--models {unknown[0]}: not known; choose among {', '.join(MODELS)}")
    wanted = [(name, size, count) for count in threads for size in sizes for name in names]
    rows = []
    for name, size, count in progress_bar(wanted, desc="measuring"):
        call = {"name": name, "size": size, "threads": count, "runs": runs, "weights": weights}
        rows.append(_in_a_process(call))
    return rows


def _in_a_process(call: dict[str, Any]) -> Row:
    code = "import json, sys; from fusionsam.evaluation.speed import main; main(json.loads(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(call["threads"])}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(call)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise InputError(f"{call['name']} at {call['size'][0]}x{call['size'][1]}: {reason}; leave it out (--models)")
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**found, "size": tuple(found["size"])})


def main(call: dict[str, Any]) -> None:
    """What a row's own process does: print it as JSON."""
    print(json.dumps(asdict(measure(**{**call, "size": tuple(call["size"])}))))


def exponent(rows: Sequence[Row]) -> float | None:
    """Slope of log seconds over log pixels by least squares: 1 = time grows as the pixels do. None below two sizes."""
    points = {row.size[0] * row.size[1]: row.median for row in rows}
    if len(points) < 2:
        return None
    x = torch.tensor([float(n) for n in points]).log()
    y = torch.tensor([points[n] for n in points]).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """A table a size and number of threads; times are given as multiples of ours in the same run."""
    lines = []
    for key in dict.fromkeys((row.size, row.threads) for row in rows):
        group = [row for row in rows if (row.size, row.threads) == key]
        ours = next((row.median for row in group if row.name == OURS), group[0].median)
        (height, width), threads = key
        lines += [f"### {height}x{width}, {threads} thread{'s' * (threads > 1)}", ""]
        lines += [
            "| model | time, ours = 1 | spread | GFLOP | peak memory MB | parameters M |",
            "|---|---|---|---|---|---|",
        ]
        for row in group:
            spread = f"{min(row.seconds) / row.median:.2f}-{max(row.seconds) / row.median:.2f}"
            flop = "" if row.gflop is None else f"{row.gflop:.1f}"
            size = "" if row.parameters is None else f"{row.parameters / 1e6:.1f}"
            lines.append(
                f"| {MODELS[row.name][0]} | {row.median / ours:.2f} | {spread} | {flop} | {row.peak_mb:.0f} | {size} |"
            )
        shares = next((row.stages for row in group if row.stages), {})
        if shares:
            told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            lines += ["", f"Stages of FusionSAM: {told}."]
        lines.append("")
    return "\n".join(lines)
