"""One real forward of the paper's size, recorded: `python benchmarks/vit_h_forward.py`.

Random weights, a random 480x640 pair. Records seconds, peak memory, parameters and the machine; it is a record, not a
limit.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch

from fusionsam.config.schema import preset
from fusionsam.io import commit, write_json
from fusionsam.models.network import parameter_table
from fusionsam.weights.build import build_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="vit_h")
    parser.add_argument("--out", type=Path, default=Path("results/vit_h_forward.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    network = build_network(preset(args.preset)).eval()
    built = time.perf_counter() - started
    visible, infrared = torch.rand(1, 3, 480, 640), torch.rand(1, 1, 480, 640)
    started = time.perf_counter()
    with torch.inference_mode():
        output = network(visible, infrared)
    record = {
        "command": f"python benchmarks/vit_h_forward.py --preset {args.preset} --out {args.out}",
        "commit": commit(),
        "input": [480, 640],
        "logits": list(output.logits.shape),
        "finite": bool(output.logits.isfinite().all()),
        "parameters": [row._asdict() for row in parameter_table(network)],
        "build_seconds": round(built, 1),
        "forward_seconds": round(time.perf_counter() - started, 1),
        # ru_maxrss is in KiB on Linux
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
