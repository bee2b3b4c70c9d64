"""What share of a training step on one CPU thread is the reading of its pairs? In CPU seconds, which other programs on
the machine do not change.

    python benchmarks/data_loading.py --config configs/mfnet_tiny.yaml --batch-size 2 --out results/data_loading.json

draws its pairs, so the share is that of PNG files of 480x640 pixels: read (first pass), and kept in memory (later).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fusionsam.config.datasets import find
from fusionsam.config.load import read_settings
from fusionsam.data.dataset import PairDataset
from fusionsam.data.loader import class_shares, train_loader
from fusionsam.data.splits import entries
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.io import commit
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.segmentation_task import SegmentationTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mfnet_tiny.yaml")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_settings(options.config)
    config.data.workers = 0
    config.data.extra_pairs = config.data.extra_labels = []
    model = replace(config.model, start_from=None, tokenizer_weights=None, sam_weights=None)
    model.encoder.weights = None
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), 10, seed=0, size=(480, 640), progress=False)
        row = find("mfnet")
        pairs = PairDataset(entries("mfnet", folder, "train"), row, cache=True)
        shares = class_shares(pairs)
        task = SegmentationTask(FusionSAMNetwork(model), config, 100, shares)
        task.log = task.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        optimizer = task.configure_optimizers()["optimizer"]
        config.data.rare_sampling = config.data.paste = 0.0  # which look at every label before the first step
        times: dict[str, list[float]] = {"read": [], "kept": [], "step": []}
        for kind, cached in (("read", False), ("kept", True)):
            steps = options.steps + 1
            data = PairDataset(pairs.entries, row, cache=cached)
            for index in range(len(data) if cached else 0):
                data[index]
            stream = iter(train_loader(data, config.data, model.foreground, options.batch_size, 0, steps=steps))
            for _ in range(steps):
                started = time.process_time()
                batch = next(stream)
                times[kind].append(time.process_time() - started)
        for _ in range(options.steps + 1):
            started = time.process_time()
            optimizer.zero_grad()
            task.training_step(batch, 0).backward()
            optimizer.step()
            times["step"].append(time.process_time() - started)
    median = {kind: statistics.median(found[1:]) for kind, found in times.items()}
    told = {
        "commit": commit(),
        "config": options.config,
        "batch_size": options.batch_size,
        "cpu_seconds_of_a_step": round(median["step"], 3),
        "cpu_seconds_to_read_a_batch": round(median["read"], 4),
        "cpu_seconds_of_a_batch_in_memory": round(median["kept"], 4),
        "percent_read": round(100 * median["read"] / (median["read"] + median["step"]), 2),
        "percent_in_memory": round(100 * median["kept"] / (median["kept"] + median["step"]), 2),
    }
    print(json.dumps(told, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
