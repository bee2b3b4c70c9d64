"""The command `fusionsam benchmark`."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from fusionsam.config.options import CommandLine, WeightsOption
from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class Options(WeightsOption, CommandLine):
    """Measure time, memory and arithmetic of the model beside SAM, SAM2, SegFormer and the obvious alternative, all in
    one run on this machine. Each is a process of its own; times are printed as multiples of ours, or of the first
    model's where ours is not among --models."""

    out: Path = field(default=Path("benchmark.json"), metadata={"metavar": "FILE"})
    """a .json with every run's seconds, the machine and the commit; the table beside it is a .md"""
    models: tuple[str, ...] = ("fusionsam", "two_streams", "segformer_b2", "two_mit_b2", "sam2_tiny", "sam_vit_b")
    """which, by name; bf16, two_streams_bf16, compiled, onnx, int8 and openvino are more"""
    onnx: Path | None = field(default=None, metadata={"metavar": "DIR"})
    """folder of fusionsam export, for onnx, int8 and openvino; it adds those of them that are there"""
    plot: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """also draw time and memory at the first size into FILE.png or FILE.svg"""
    sizes: tuple[str, ...] = ("480x640",)
    """HEIGHTxWIDTH of the pair; with several, the growth of our time with the pixels is told"""
    threads: tuple[int, ...] = (1,)
    """numbers of threads; 0 = all cores"""
    runs: int = 5
    """warm predictions that are timed"""


def main(options: Options) -> int:
    """Measure, write the JSON and the table, print the table."""
    from fusionsam.evaluation import speed, speed_report
    from fusionsam.evaluation.tables import figures
    from fusionsam.io import commit, write_json, write_text

    sizes = [_size(text) for text in options.sizes]
    if not 1 <= options.runs <= 1000:
        raise InputError(f"--runs {options.runs}: expected 1 to 1000")
    if bad := [count for count in options.threads if count < 0]:
        raise InputError(f"--threads {bad[0]}: expected 0 (all cores) or more")
    threads = [count or os.cpu_count() or 1 for count in options.threads]
    if options.plot is not None:
        if options.plot.suffix not in (".png", ".svg"):
            raise InputError(f"--plot {options.plot}: expected a name that ends in .png or .svg")
        figures.require("leave out --plot")
    models = [*options.models, *(name for name in _of_folder(options.onnx) if name not in options.models)]
    _require_writable(options)
    started = os.getloadavg()[0]
    rows = speed.benchmark(
        models, sizes, threads, options.runs, options.weights, None if options.onnx is None else str(options.onnx)
    )
    table = speed_report.as_markdown(rows)
    ours = [row for row in rows if row.name == speed.OURS and row.threads == threads[0]]
    growth = {name: speed.exponent(ours, None if name == "all" else name) for name in ("all", *speed.STAGES)}
    found = {"command": options.command, "commit": commit(), "machine": speed.machine(), "exponents": growth}
    load = {"load_average": [round(started, 1), round(os.getloadavg()[0], 1)]}
    write_json(options.out, {**found, **load, "rows": [asdict(row) for row in rows]})
    if options.plot is not None:
        speed_report.plot(rows, options.plot)
    write_text(options.out.with_suffix(".md"), table)
    print(table)
    print(f"-> {options.out}, {options.out.with_suffix('.md')}")
    return 0


def _require_writable(options: Options) -> None:
    """InputError where the results could not be written, or would replace what this command did not write."""
    from fusionsam.io import Made, OutputFolder, require_writable

    if options.out.suffix != ".json":  # the table beside it has the same name, but for .md
        raise InputError(f"--out {options.out}: expected a name that ends in .json")
    require_writable(options.out.parent)
    folder = OutputFolder(options.out.parent, "benchmark")
    stored = folder.read(options.out.name)
    if stored is not None and not {"exponents", "machine", "rows"} <= set(stored):
        folder.foreign(options.out.name)
    table = options.out.with_suffix(".md").name
    folder.state(options.out.name, None if stored is None else Made({}), Made({}), [table])
    if options.plot is not None:
        require_writable(options.plot.parent, "choose another --plot")
        if options.plot.exists() and str(options.plot) not in (stored or {}).get("command", ""):
            raise InputError(
                f"{options.plot}: is there, and {options.out} tells of no such plot; choose another --plot"
            )


def _of_folder(folder: Path | None) -> list[str]:
    """The rows that an exported folder allows for, with what is installed."""
    if folder is None:
        return []
    from fusionsam.inference.onnx import WHOLE, WHOLE_INT8

    files = {"onnx": (WHOLE, "onnxruntime"), "int8": (WHOLE_INT8, "onnxruntime"), "openvino": (WHOLE, "openvino")}
    if not (folder / WHOLE).is_file():
        raise InputError(f"--onnx {folder}: no {WHOLE} in it; write it with: fusionsam export --out {folder}")
    return [name for name, (file, needs) in files.items() if (folder / file).is_file() and find_spec(needs)]


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", text)
    if match is None or not all(64 <= int(side) <= 4096 for side in match.groups()):
        raise InputError(f"--sizes {text}: expected HEIGHTxWIDTH of 64 to 4096 pixels a side, for example 480x640")
    return int(match.group(1)), int(match.group(2))
