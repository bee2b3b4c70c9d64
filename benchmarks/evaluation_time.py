"""What an evaluation spends its time on, recorded: `python benchmarks/evaluation_time.py`.

Scores a folder of predictions on a made-up split of MFNet's size and form (1569 pairs of 480x640, few distinct scenes
under many names) as `fusionsam evaluate --predictions` does, with and without the leak guard. Shares are of the
process's CPU time, so that other programs on the machine do not count.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from fusionsam.data import fingerprints, images, predictions
from fusionsam.data.synthetic.scenes import draw_scene, scene_id
from fusionsam.evaluation import leak_guard
from fusionsam.evaluation import run as evaluation
from fusionsam.evaluation.run import EvaluateConfig, evaluate
from fusionsam.evaluation.tally import Tally
from fusionsam.inference import label_maps as predictors
from fusionsam.io import commit, write_json

TIMED = {
    "decoding": [(images, "_load"), (predictors, "image_size"), (predictions, "image_size")],
    "metric": [(Tally, "update"), (evaluation, "scores")],
    "leak_guard": [(fingerprints.Fingerprints, "add"), (leak_guard, "compare")],
}
"""What is asked for -> the functions that do it; none of them calls another one."""


def build(root: Path, count: int, distinct: int) -> None:
    """`count` pairs in MFNet's layout and a prediction each, all of them hard links to `distinct` scenes."""
    for index in range(distinct + 1):
        sample = draw_scene(0, index)
        assert sample.visible is not None
        assert sample.infrared is not None
        assert sample.label is not None
        # shifted by four pixels and with one class missed: outlines near the true ones, and none at all
        guess = torch.roll(sample.label, (2, 3), (0, 1))
        guess[guess == 1 + index % 8] = 0
        names = [scene_id(index)] if index == distinct else [scene_id(i) for i in range(index, count, distinct)]
        names = [f"9{names[0]}"] if index == distinct else names
        for folder, array in (
            ("images", torch.cat([sample.visible, sample.infrared])),
            ("labels", sample.label.to(torch.uint8)),
            ("predictions", guess.to(torch.uint8)),
        ):
            first = root / folder / f"{names[0]}.png"
            images.write_png(first, array)
            for name in names[1:]:
                os.link(first, first.with_name(f"{name}.png"))
        if index == distinct:
            (root / "predictions" / f"{names[0]}.png").unlink()
            (root / "train.txt").write_text(names[0])
    (root / "many.txt").write_text("\n".join(scene_id(i) for i in range(count)))


def timed(root: Path, **options: str) -> dict[str, object]:
    """One evaluation: CPU seconds, the share of each of `TIMED`, and what it found."""
    spent = dict.fromkeys(TIMED, 0.0)

    def clocked(function: Callable[..., object], what: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            before = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[what] += time.process_time() - before

        return call

    with ExitStack() as stack:
        for what, functions in TIMED.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, clocked(getattr(owner, name), what)))
        before = time.process_time()
        config = EvaluateConfig("mfnet", root, "many", predictions=root / "predictions", out=root / "out", **options)
        report = evaluate(config)
        total = time.process_time() - before
    shares = {what: round(seconds / total, 3) for what, seconds in spent.items()}
    return {
        "cpu_seconds": round(total, 1),
        "shares": {**shares, "other": round(1 - sum(shares.values()), 3)},
        "metric_ms_an_image": round(1000 * spent["metric"] / report.n_images, 2),
        "n_images": report.n_images,
        "miou": round(report.miou or 0.0, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1569)
    parser.add_argument("--distinct", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("results/evaluation_time.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, args.images, args.distinct)
        runs = {"as_given": timed(root), "train_split_none": timed(root, train_split="none")}
    record = {
        "command": f"python benchmarks/evaluation_time.py --images {args.images} --distinct {args.distinct}",
        "commit": commit(),
        "size": [480, 640],
        **runs,
        # ru_maxrss is in KiB on Linux
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
