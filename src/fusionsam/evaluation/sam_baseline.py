"""The paper's Table 4 baselines: an unmodified Segment Anything on the visible, the infrared or our fused picture.

SAM has no classes, so a mask is given one:
- prompts `self`: our network's own points (each a prompt of its own) and its box; a mask gets the class that most of
  its pixels have in our network's label map, that is, by the majority of the prompt's model.
- prompts `oracle`: for each class that the ground truth holds, points drawn from it (each a prompt of its own) and the
  class's box; a mask gets the class that most of its pixels have in the ground truth. An upper bound, marked as such.
A prompt a point, because one prompt of ten points asks SAM for one mask of several objects, which it does badly.
Class 0 (unlabeled, background) is what no mask covers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from fusionsam.config.datasets import DatasetRow
from fusionsam.data.dataset import LabelledPairs, open_labelled_split
from fusionsam.data.images import write_png
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation import report_files
from fusionsam.evaluation.clicks import files_digest
from fusionsam.evaluation.leak_guard import FITTED
from fusionsam.evaluation.options import BaselineConfig, EvaluateConfig
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_parts import ORACLE, Baseline
from fusionsam.evaluation.run import check_classes, evaluate, leak_guard
from fusionsam.inference.device import choose_device
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.segment_anything import PlainSam
from fusionsam.io import Made, OutputFolder, progress_bar, require_writable, scratch, write_json
from fusionsam.models.prompts import oracle_prompts
from fusionsam.types import InputError, JsonObject, LabelledSample
from fusionsam.weights import checkpoint

SETTINGS = "settings.json"

CLASS_RULES = {
    "self": "class given by the majority of the prompt's model: our label map inside the mask",
    "oracle": "class given by the majority of the ground truth inside the mask",
}


def assemble(masks: ArrayLike, scores: ArrayLike, labels: ArrayLike, classes: int) -> NDArray[np.uint8]:
    """Masks with classes by majority, laid over one another -> label map uint8 (H,W).

    masks bool (P,H,W); scores (P), predicted IoU; labels int (H,W), the map whose majority names a mask's class, ids
    outside of 0..classes-1 (255 = ignore) do not vote and equal votes go to the lower id. A mask whose majority is 0 is
    left out. Where masks overlap the higher score counts, of equal scores the earlier mask; the rest is 0.
    """
    shapes, labels, scores = np.asarray(masks, bool), np.asarray(labels), np.asarray(scores)
    result = np.zeros(labels.shape, np.uint8)
    for index in sorted(range(len(shapes)), key=lambda i: (scores[i], -i)):
        inside = labels[shapes[index]]
        votes = np.bincount(inside[(inside >= 0) & (inside < classes)], minlength=classes)
        if votes.argmax() > 0:
            result[shapes[index]] = votes.argmax()
    return result


def own_prompts(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """The points (P,2) and boxes (M,4) our network gave itself, padding left out, in pixels."""
    given = prediction.prompts
    points, boxes = torch.zeros(0, 2), torch.zeros(0, 4)
    if given.points is not None and given.point_labels is not None:
        points = given.points[0][given.point_labels[0] == 1]
    return points, boxes if given.boxes is None else given.boxes[0]


def drawn_prompts(label: Tensor, classes: int, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """`points` points and the box of every class above 0 that label int64 (H,W) holds: (P,2), (M,4), in pixels."""
    drawn, boxes = [torch.zeros(0, 2)], [torch.zeros(0, 4)]
    for index in range(1, classes):
        found = oracle_prompts(label[None], classes, [index], points, seed)
        assert found.points is not None
        assert found.point_labels is not None
        assert found.boxes is not None
        if bool((found.point_labels == 1).all()):
            drawn.append(found.points[0])
            boxes.append(found.boxes[0])
    return torch.cat(drawn), torch.cat(boxes)


def segment(
    sam: PlainSam,
    sample: LabelledSample,
    row: DatasetRow,
    config: BaselineConfig,
    prediction: Prediction | None,
    seed: int,
) -> NDArray[np.uint8]:
    """The baseline's label map uint8 (H,W) of one pair; `prediction` is our network's, if the configuration needs it.
    InputError if the image asked for is not there."""
    if config.image == "fused":
        assert prediction is not None
        picture = torch.from_numpy(prediction.fused.copy()).permute(2, 0, 1).float() / 255
    else:
        image = sample.visible if config.image == "visible" else sample.infrared
        if image is None:
            raise InputError(f"{sample.id}: has no {config.image} image; choose another --image")
        picture = to_unit(image).expand(3, -1, -1)
    if config.prompts == "self":
        assert prediction is not None
        voters = prediction.labels
        points, boxes = own_prompts(prediction)
    else:
        voters = sample.label.numpy()
        points, boxes = drawn_prompts(sample.label, row.num_classes, config.points, seed)
    return assemble(*sam.masks(sam.encode(picture), points, boxes), voters, row.num_classes)


def baseline(config: BaselineConfig) -> Report:
    """Label maps of the whole split in `out`/predictions, and their report as `fusionsam evaluate` writes it.

    Label maps that are there already, made with the same settings, are kept. Raises InputError for unusable options,
    data or weights, and for an `out` that holds label maps made with other settings, or a report of other pairs or of
    another command."""
    if config.points < 1:
        raise InputError(f"--points: {config.points}; expected at least 1")
    if config.seed < 0 or config.bootstrap < 0:
        raise InputError(f"--seed {config.seed}, --bootstrap {config.bootstrap}: expected at least 0")
    data = open_labelled_split(config.dataset, config.root, config.split, config.class_file)
    folder = Path(config.out) / "predictions"
    settings = _settings(config, data)
    require_writable(config.out)
    _require_ours(Path(config.out), config.dataset, data)
    _require_same(Path(config.out), settings)
    plain = _evaluation(config, folder)
    cards = [] if plain.predicted_by is None else [checkpoint.read_checkpoint(plain.predicted_by)[2]]
    leak_guard(plain, data.entries, cards)  # before hours of painting
    _paint(config, data, folder, settings)
    return _score(config, plain)


def _uses_network(config: BaselineConfig) -> bool:
    return config.image == "fused" or config.prompts == "self"


def _settings(config: BaselineConfig, data: LabelledPairs) -> JsonObject:
    """All that a label map depends on; pictures and labels by content, weights by name, size and time."""
    kept = ("dataset", "root", "split", "image", "prompts", "points", "seed", "class_file")
    found: JsonObject = {name: _text(getattr(config, name)) for name in kept}
    found["ids"] = [entry.id for entry in data.entries]
    found["files"] = {"sha256": files_digest(data)}
    found["classes"] = list(data.row.classes)
    found["palette"] = [list(color) for color in data.row.palette]
    found["labels_map"] = {str(was): now for was, now in data.row.labels_map.items()}
    found["sam"] = [str(config.sam), *_stamps(Path(config.sam))]
    if _uses_network(config):
        card = checkpoint.read_checkpoint(config.weights)[2]
        stamps = _stamps(checkpoint.locate(config.weights))
        found["weights"] = [str(config.weights), *stamps, checkpoint.calibrated_digest(card)]
    return found


def _text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _stamps(source: Path) -> list[list[object]]:
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source] if source.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _require_ours(out: Path, dataset: str, data: LabelledPairs) -> None:
    """InputError if `out` holds a report of other pairs, or one that no run of this command wrote."""
    report_files.require_split(out, dataset, report_files.split_digest([entry.id for entry in data.entries]))
    folder = OutputFolder(out, "baselines")
    for name in report_files.REPORTS:
        stored = folder.read(name)
        if stored is not None and not stored.get("baseline"):
            folder.foreign(name)


def _require_same(out: Path, settings: JsonObject) -> None:
    """InputError if the settings.json of `out`, where there is one, differs from `settings`."""
    folder = OutputFolder(out, "baselines", "choose another --out, or remove it")
    stored = folder.read(SETTINGS)
    maps = [f"predictions/{path.name}" for path in sorted((out / "predictions").glob("*.png"))]
    told = None if stored is None else Made({**dict.fromkeys(settings), **stored})
    folder.state(SETTINGS, told, Made({**dict.fromkeys(stored or ()), **settings}), maps)


def _paint(config: BaselineConfig, data: LabelledPairs, folder: Path, settings: JsonObject) -> None:
    todo = [i for i, entry in enumerate(data.entries) if not (folder / f"{entry.id}.png").is_file()]
    if len(todo) < len(data.entries):
        tqdm.write(f"{len(data.entries) - len(todo)} of {len(data.entries)} label maps were already in {folder}")
    if not todo:
        return
    device = choose_device(config.device)
    model = FusionSAM.from_pretrained(config.weights, device) if _uses_network(config) else None
    if model is not None and config.prompts == "self":
        check_classes(model.config.classes, config.weights, data.row)
    sam = PlainSam.open(config.sam, device)
    write_json(Path(config.out) / SETTINGS, settings)  # no sooner: a command that ends here can be mended
    for index in progress_bar(todo, desc=f"{config.image}, {config.prompts} prompts", unit="image"):
        sample = data[index]
        prediction = None if model is None else model.predict(sample.visible, sample.infrared, "self")
        # the place in the list is part of the seed, so that a resumed run draws what an unbroken one would have
        painted = segment(sam, sample, data.row, config, prediction, config.seed + index)
        write_png(folder / f"{sample.id}.png", painted)


def _evaluation(config: BaselineConfig, folder: Path) -> EvaluateConfig:
    """How the label maps are scored."""
    return EvaluateConfig(
        dataset=config.dataset,
        root=config.root,
        split=config.split,
        predictions=folder,
        predicted_by=config.weights if _uses_network(config) else None,
        bootstrap=config.bootstrap,
        seed=config.seed,
        class_file=config.class_file,
        prediction_format="ids",
        command=config.command,
    )


def _score(config: BaselineConfig, plain: EvaluateConfig) -> Report:
    """The report of `fusionsam evaluate --predictions`, with what it cannot know: model, image and prompts."""
    used = _uses_network(config)
    with scratch(config.out) as folder:
        report = evaluate(replace(plain, out=folder))
        mark = report_files.file_mark(report)
        report.per_image = f"per_image{mark}.json"
        images = report_files.read_images(folder / f"report{mark}.json", report)
    if config.prompts == "oracle":  # of our network the picture alone was used, which no offset changes
        report.fitted = dict.fromkeys(report.fitted, 0)
        report.notes = [note for note in report.notes if not note.endswith(FITTED["class_offsets"])]
    report.published = None  # those are trained methods; a prompted SAM is compared in a table of its own
    name = Path(config.sam).stem if Path(config.sam).exists() else str(config.sam)
    rule = CLASS_RULES[config.prompts]
    report.prompts = config.prompts
    report.weights = str(config.weights) if used else None
    report.modality = "both" if used else config.image
    report.baseline = Baseline(str(config.sam), config.image, config.prompts, rule, config.points)
    report.notes = [*report.notes, rule]
    score = "undefined" if report.miou is None else f"{report.miou:.2f}"
    title = f"{name} on the {config.image} image, {config.dataset}/{config.split}: mIoU {score} ({report.protocol})"
    marks = [ORACLE] if config.prompts == "oracle" else []
    report.title = ": ".join([*marks, f"{title}, prompts {config.prompts}"])
    report_files.write(Path(config.out), report, images)
    return report
