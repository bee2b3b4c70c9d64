"""What the labelling page costs on a folder of 200 pairs of 12 megapixels, recorded: `python benchmarks/label_page.py`.

Asks a workspace what the page asks it, pair after pair, with the models that ship. Times are CPU seconds of the thread
that answers, so that other programs on the machine do not count; memory is the process's. The pairs are hard links to a
few drawn scenes.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fusionsam.data.images import write_png
from fusionsam.data.labelling.drawing import cropped
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.splits import pair_entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.inference.interactive import shipped_sam
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import commit, write_json
from fusionsam.server.labelling.workspace import Workspace

T = TypeVar("T")
SIZE, DISTINCT = (3000, 4000), 2
CLASSES, PALETTE = ["none", "car", "person"], [(0, 0, 0), (230, 60, 60), (60, 200, 90)]


def build(root: Path, pairs: int) -> None:
    """`pairs` pairs, all of them hard links to DISTINCT scenes, drawn small and enlarged."""
    larger = (SIZE[0] // 250, SIZE[1] // 333 + 1)
    for number in range(pairs):
        for folder in ("visible", "infrared"):
            file = root / folder / f"p{number:03}.png"
            if number >= DISTINCT:
                os.link(root / folder / f"p{number % DISTINCT:03}.png", file)
                continue
            scene = draw_scene(0, number, (250, 334))
            image = (scene.visible if folder == "visible" else scene.infrared).permute(1, 2, 0).numpy()
            large = image.repeat(larger[0], 0).repeat(larger[1], 1)[: SIZE[0], : SIZE[1]]
            write_png(file, large if folder == "visible" else large[..., 0])


def memory() -> float:
    """Resident megabytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(root: Path, opened: int) -> dict[str, object]:
    """Seconds of every question, and memory after each pair."""
    seconds: dict[str, list[float]] = defaultdict(list)
    after = []

    def timed(name: str, ask: Callable[[], T]) -> T:
        started = time.thread_time()
        answer = ask()
        seconds[name].append(time.thread_time() - started)
        return answer

    entries = pair_entries(root / "visible", root / "infrared")
    folder = timed("start", lambda: LabelFolder(root / "out", entries, CLASSES, PALETTE))
    workspace = Workspace(folder, FusionSAM.from_pretrained("tiny", "cpu"), shipped_sam("cpu"))
    timed("list of pairs", workspace.describe)
    disc = np.zeros(SIZE, bool)
    y, x = np.mgrid[:1000, :1000]
    disc[700:1700, 900:1900] = (y - 500) ** 2 + (x - 500) ** 2 < 450**2
    for index in range(opened):
        timed("open a pair", lambda index=index: workspace.show(index))
        pair = workspace.pair(index)
        timed("visible picture", lambda pair=pair: pair.picture("visible"))
        pair.masks().encoded("fused")  # waits for the background
        timed("click", lambda index=index: workspace.mask(index, {"points": [[2000, 1500]], "on": "fused"}))
        change = {"kind": "paint", **cropped(disc), "class": 1}
        timed("change and save", lambda index=index, change=change: workspace.change(index, change))
        timed("undo and save", lambda index=index: workspace.change(index, {"kind": "undo"}))
        after.append(round(memory()))
    workspace.close()
    return {
        "cpu_seconds_median": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "memory_mb_after_each_pair": after,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Build, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--opened", type=int, default=8, help="pairs that are opened, one after another")
    parser.add_argument("--out", type=Path, default=Path("out/bench/label_page.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), given.pairs)
        measured = measure(Path(folder), given.opened)
    command = f"python benchmarks/label_page.py --pairs {given.pairs} --opened {given.opened}"
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record = {"command": command, "commit": commit(), "size": list(SIZE), "machine": machine, **measured}
    write_json(given.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
