"""The pairs of an evaluation that scored worst, drawn side by side, so that somebody looks at what goes wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.images import write_png
from fusionsam.inference.label_maps import FolderPredictor, NetworkPredictor
from fusionsam.inference.render import overlay, side_by_side
from fusionsam.io import write_json
from fusionsam.metrics.segmentation import PROTOCOLS, ImageMatrices
from fusionsam.types import InputError

FILE = "worst.json"


def worst(images: ImageMatrices, protocol: str, count: int) -> list[tuple[str, float]]:
    """The `count` lowest (id, mIoU in percent of that image alone), the worst first; images of which the protocol says
    nothing are left out. InputError for a count below 1."""
    if count < 1:
        raise InputError(f"--worst: {count} pairs; expected at least 1")
    scores = PROTOCOLS[protocol].many(images.dense())
    order = [int(i) for i in np.argsort(scores, kind="stable") if not np.isnan(scores[i])]
    return [(images.ids[i], float(scores[i])) for i in order[:count]]


def clear(out: Path) -> None:
    """Take away what an earlier evaluation drew into `out`: it is of other label maps."""
    if not (out / FILE).is_file():
        return
    with suppress(OSError):  # something of somebody else is left in it
        for stale in (*out.glob("[0-9][0-9]*_*.png"), out / FILE):
            stale.unlink()
        out.rmdir()


def draw(
    predictor: NetworkPredictor | FolderPredictor,
    data: LabelledPairs,
    images: ImageMatrices,
    protocol: str,
    out: Path,
    count: int = 10,
) -> list[Path]:
    """Write `out`/01_ID.png and so on, and worst.json with their ids and mIoU; those of an earlier run go.

    A picture shows visible, infrared, fused (of a network), prediction and truth. Returns the paths of the pictures;
    InputError as `worst`, and if they cannot be written."""
    found = worst(images, protocol, count)
    place = {entry.id: index for index, entry in enumerate(data.entries)}
    written = []
    try:
        clear(out)
        values = [{"id": image_id, "miou": score, "protocol": protocol} for image_id, score in found]
        write_json(out / FILE, values)  # before the pictures: it tells that they are ours
        for number, (image_id, score) in enumerate(found, 1):
            sheet = _sheet(predictor, data, place[image_id], f"{image_id}, mIoU {score:.1f}")
            written.append(out / f"{number:02d}_{image_id.replace('/', '_')}.png")
            write_png(written[-1], np.asarray(sheet))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
    return written


def _sheet(predictor: NetworkPredictor | FolderPredictor, data: LabelledPairs, index: int, title: str) -> Image.Image:
    sample, predicted = data[index], predictor(data, index)
    names, colors = data.row.classes, data.row.palette
    seen = [
        (name, image.permute(1, 2, 0).numpy())
        for name, image in (("visible", sample.visible), ("infrared", sample.infrared))
        if image is not None
    ]
    ground = seen[0][1]
    if isinstance(predictor, NetworkPredictor):
        visible, infrared = (None if image is None else image[0] for image in predictor.images(sample))
        ground = predictor.model.predict(visible, infrared).fused
        seen.append(("fused", ground))
    # the pixels a label leaves out are shown as unlabelled in both
    truth = np.where(predicted.label.numpy() == 255, 0, predicted.label.numpy())
    pictures: list[tuple[str, ArrayLike | Image.Image]] = list(seen)
    for name, ids in (("prediction", predicted.ids), ("truth", truth)):
        pictures.append((name, overlay(ground, ids, names, colors)))
    pictures[0] = (f"{title}: {pictures[0][0]}", pictures[0][1])
    return side_by_side(pictures)
