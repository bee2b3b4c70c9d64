"""The command `fusionsam export`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fusionsam.config.options import OutOption, WeightsOption
from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class Options(WeightsOption, OutOption):
    """Write the model as ONNX files into --out, and compare them with the original; a file that differs is not kept."""

    quantize: Literal["int8"] | None = None
    """also write an int8 model; needs --calibrate"""
    calibrate: Path | None = None
    """folder of pairs that sets int8's ranges: images/ of four channels, or visible/ and infrared/"""
    calibration_pairs: int = 32
    """how many of them"""
    fixed_size: str | None = field(default=None, metadata={"metavar": "HxW"})
    """also write a model for one pair of this size alone, every shape a number: for TensorRT and small devices"""
    triton: Path | None = field(default=None, metadata={"metavar": "DIR"})
    """also put the model into this model repository of NVIDIA's Triton: config.pbtxt, ONNX, labels"""

    def __post_init__(self) -> None:
        """InputError for options that do not go together."""
        if (self.quantize is None) != (self.calibrate is None):
            raise InputError("--quantize int8 and --calibrate FOLDER belong together; give both or neither")
        if self.fixed_size is not None and not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", self.fixed_size):
            raise InputError(f"--fixed-size {self.fixed_size}: expected HEIGHTxWIDTH in pixels, for example 480x640")


def main(options: Options) -> int:
    """Export, and tell how far each file is from the original."""
    from fusionsam.export import onnx

    size = _require_possible(options)
    calibration = None
    if options.calibrate is not None:
        from fusionsam.export.quantize import quantize, split_pairs

        calibration = (options.calibrate, options.calibration_pairs)
        onnx.runtime()
        split_pairs(*calibration)  # what is wrong with them is told before the long export
    for row in onnx.export(options.weights, options.out):
        print(
            f"{row['file']:<28} {row['size'][0]}x{row['size'][1]} batch {row['batch']}: logits within "
            f"{row['logits']:.1e}, picture within {row['fused']:.1e}, {row['pixels']:.3%} of pixels differ"
        )
    for name in (onnx.WHOLE, onnx.ENCODER, onnx.DECODER):
        print(f"{options.out / name}  {(options.out / name).stat().st_size / 1e6:.1f} MB")
    if size is not None:
        from fusionsam.export.fixed import write_fixed

        print(f"{write_fixed(options.out, size)}  one pair of {options.fixed_size} alone")
    if options.triton is not None:
        from fusionsam.export import triton

        written = triton.write_repository(options.out, options.triton)
        print(f"{written}  model of the repository {options.triton}")
    if calibration is not None:
        quantize(options.out, *calibration)
    return 0


def _require_possible(options: Options) -> tuple[int, int] | None:
    """The fixed size, if one is asked for. InputError for what would end the command only after the long export."""
    from fusionsam.export import triton
    from fusionsam.export.fixed import require_size
    from fusionsam.weights.checkpoint import load_network

    if options.fixed_size is None and options.triton is None:
        return None
    network, card = load_network(options.weights)
    size = None
    if options.fixed_size is not None:
        height, _, width = options.fixed_size.partition("x")
        size = int(height), int(width)
        require_size(size, network.config.max_side)
    if options.triton is not None:
        triton.place_for(card["name"], options.triton)
    return size
