"""The loop of docs/tutorials/label-and-train.md without a hand on the mouse: draw scenes, then label them as a person
would, by clicks, through the page's own questions.

    python examples/label_scenes.py draw out/loop
    fusionsam label --visible out/loop/visible --infrared out/loop/infrared --out out/loop/labelled --classes ...
    python examples/label_scenes.py click http://127.0.0.1:7861 out/loop/truth --json out/loop/clicks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.config.datasets import find
from fusionsam.data.images import write_png
from fusionsam.data.label_files import read_label
from fusionsam.data.labelling.drawing import cropped, from_runs
from fusionsam.data.synthetic.scenes import draw_scene

SIZE, SEED = (240, 320), 26
PAIRS, TEST = 20, 40
SMALLEST = 40
"""Pixels of an object that somebody would still label."""
CLICKS, GOOD = 4, 0.8
"""Clicks on one object, and the IoU at which a person is content; below it, the outline is drawn by hand."""


def draw(out: Path) -> None:
    """20 pairs to label and their truth, which nobody has in life; 40 more with labels, to score with."""
    for number in range(PAIRS + TEST):
        scene, root = draw_scene(SEED, number, SIZE), out if number < PAIRS else out / "test"
        write_png(root / "visible" / f"{scene.id}.png", scene.visible.permute(1, 2, 0).numpy())
        write_png(root / "infrared" / f"{scene.id}.png", scene.infrared[0].numpy())
        folder = "truth" if number < PAIRS else "labels"
        write_png(root / folder / f"{scene.id}.png", scene.label.numpy().astype(np.uint8))
    row = find("mfnet", None)
    classes = {"classes": list(row.classes), "palette": [list(color) for color in row.palette]}
    (out / "classes.yaml").write_text(yaml.safe_dump(classes, sort_keys=False))


def ask(address: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """What the server answers."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address, data), timeout=600) as answer:
        content: dict[str, object] = json.loads(answer.read())
    return content


def middle(region: NDArray[np.bool_]) -> tuple[int, int]:
    """x, y of the pixel that lies deepest inside."""
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """IoU of two masks."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def click(pair: str, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
    """The mask of one object by at most four clicks, each into the middle of the largest error; and their number."""
    found, points, labels, previous = np.zeros_like(wanted), [], [], None
    while len(points) < CLICKS and overlap(found, wanted) < GOOD:
        missing, wrong = wanted & ~found, found & ~wanted
        inside = not points or missing.sum() >= wrong.sum()
        points.append(list(middle(missing if inside else wrong)))
        labels.append(int(inside))
        answer = ask(f"{pair}/mask", {"points": points, "labels": labels, "on": "fused", "previous": previous})
        masks = []
        for one in answer["masks"]:  # type: ignore[attr-defined]
            mask, (x, y, w, h) = np.zeros_like(wanted), one["box"]
            mask[y : y + h, x : x + w] = from_runs(one["runs"], h, w)
            masks.append(mask)
        best = int(np.argmax([overlap(mask, wanted) for mask in masks]))  # who looks sees which one fits
        found, previous = masks[best], [answer["token"], best]
    return found, len(points)


def label(address: str, truth: Path) -> dict[str, object]:
    """Every pair of the page; what it took."""
    project = ask(f"{address}/api/project")
    clicks = outlines = objects = 0
    total = 0
    for index, row in enumerate(project["pairs"]):  # type: ignore[arg-type, var-annotated]
        pair = f"{address}/api/pairs/{index}"
        ask(pair)
        ids = read_label(truth / f"{row['id']}.png").numpy()
        for class_id in np.unique(ids[ids > 0]):
            regions, count = ndimage.label(ids == class_id, np.ones((3, 3)))
            for number in range(1, count + 1):
                wanted = regions == number
                if wanted.sum() < SMALLEST:
                    continue
                mask, spent = click(pair, wanted)
                by_hand = overlap(mask, wanted) < GOOD
                change = {"kind": "paint", **cropped(wanted if by_hand else mask), "class": int(class_id)}
                tool = {"tool": "polygon"} if by_hand else {"tool": "click", "on": "fused", "clicks": spent}
                ask(f"{pair}/change", {**change, **tool})
                clicks, outlines, objects = clicks + spent, outlines + by_hand, objects + 1
        ask(f"{pair}/change", {"kind": "mark", "done": True})
        total += 1
        print(f"{row['id']}: {objects} objects so far", flush=True)
    return {"pairs": total, "objects": objects, "clicks": clicks, "drawn_by_hand": outlines}


def main() -> None:
    """Draw, or click."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    drawing = steps.add_parser("draw")
    drawing.add_argument("out", type=Path)
    clicking = steps.add_parser("click")
    clicking.add_argument("address")
    clicking.add_argument("truth", type=Path)
    clicking.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.step == "draw":
        draw(given.out)
        return
    told = json.dumps(label(given.address, given.truth), indent=1)
    print(told)
    if given.json:
        given.json.write_text(told + "\n")


if __name__ == "__main__":
    main()
