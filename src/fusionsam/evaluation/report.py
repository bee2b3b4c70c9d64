"""Reports of evaluations: from counts to scores, to a table, to files and back, and one held against another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusionsam.errors import InputError
from fusionsam.io import write_text
from fusionsam.metrics.boundary import BoundaryScore
from fusionsam.metrics.segmentation import (
    PROTOCOLS,
    CalibrationError,
    ConfusionMatrix,
    ImageMatrices,
    accuracy,
    bootstrap_miou,
    f1,
    headline,
    id_pair,
    iou,
    paired_bootstrap,
    pixel_accuracy,
    plain,
    protocols_of,
)
from fusionsam.types import Report

ORACLE = "ORACLE PROMPTS (upper bound, ground truth was used)"
"""How the title of a report begins whose prompts were drawn from the labels."""

PUBLISHED: dict[str, tuple[int, tuple[tuple[str, float, str], ...]]] = {
    "mfnet": (
        393,
        (
            ("CRM-RGBTSeg Swin-B", 61.4, "nine classes"),
            ("Sigma-B (trained on train+val)", 61.3, "nine classes"),
            ("OmniSegmentor", 60.6, "nine classes"),
            ("CMNeXt", 59.9, "nine classes"),
            ("CMX-B4", 59.7, "nine classes"),
            ("SHIFNet", 59.2, "nine classes"),
        ),
    ),
    "fmb": (
        280,
        (
            ("PEAFusion", 69.5, "13"),
            ("SHIFNet", 67.8, "14-zero"),
            ("MM SAM-Adapter", 66.1, "protocol not stated"),
            ("StitchFusion", 64.9, "14-zero"),
        ),
    ),
    "msrs": (361, (("DiFusionSeg", 80.8, "nine classes"),)),
    "pst900": (288, (("SARTM", 89.9, "five classes"),)),
}
"""Data set -> images of the official test split (of MSRS as its repository has them, of PST900 as its README says), and
(method, mIoU, protocol) as published. None of them was given prompts from the ground truth."""


class Tally:
    """All counts of one evaluation, added image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.confusion = ConfusionMatrix(len(self.classes))
        self.images = ImageMatrices(len(self.classes))
        self.boundary = BoundaryScore(len(self.classes))
        self.calibration: CalibrationError | None = None

    def update(
        self, image_id: str, prediction: ArrayLike, label: ArrayLike, confidence: ArrayLike | None = None
    ) -> None:
        """Add one image: ids (H,W), ids (H,W) with 255 = ignore, probability of the predicted class (H,W) or None.

        Raises InputError for differing sizes, strange ids, or an id added twice."""
        prediction, label = id_pair(prediction, label)
        self.images.add(image_id, self.confusion.update(prediction, label))
        self.boundary.update(prediction, label)
        if confidence is not None:
            self.calibration = self.calibration or CalibrationError()
            self.calibration.update(confidence, prediction, label)


def _named(classes: Sequence[str], ratios: ArrayLike) -> dict[str, float | None]:
    """Class -> percent, None where undefined."""
    return dict(zip(classes, plain(100 * np.asarray(ratios, np.float64)), strict=True))


def _number(value: float) -> float | None:
    return plain([value])[0]


def scores(tally: Tally, dataset: str, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Everything that follows from the counts, in plain JSON types; all scores in percent, None where undefined.

    `interval` is the 95 % bootstrap interval of the headline mIoU over images; None with `draws` 0."""
    matrix, classes = tally.confusion.matrix, tally.classes
    protocol = headline(dataset, matrix.sum(1) > 0)
    protocols = {}
    for name in protocols_of(dataset):
        score = PROTOCOLS[name](matrix)
        protocols[name] = {"miou": _number(score.miou), "classes": [classes[i] for i in score.classes]}
    interval = bootstrap_miou(tally.images.dense(), protocol, draws, seed) if draws else None
    values: dict[str, Any] = {
        "unit": "percent",
        "miou": protocols[protocol]["miou"],
        "protocol": protocol,
        "protocols": protocols,
        "interval": None if interval is None else plain(interval),
        "bootstrap": {"draws": draws, "seed": seed},
        "n_images": len(tally.images.ids),
        "classes": list(classes),
        "per_class_iou": _named(classes, iou(matrix)),
        "per_class_accuracy": _named(classes, accuracy(matrix)),
        "per_class_f1": _named(classes, f1(matrix)),
        "per_class_boundary_f": _named(classes, tally.boundary.f_score()),
        "pixel_accuracy": _number(100 * pixel_accuracy(matrix)),
        "boundary_f": _number(100 * tally.boundary.mean()),
        "ece": None if tally.calibration is None else _number(100 * tally.calibration.value()),
        "confusion_matrix": matrix.tolist(),
    }
    if dataset in ("mfnet", "msrs"):
        values["by_time"] = _by_time(tally, draws, seed)
    return values


def _by_time(tally: Tally, draws: int, seed: int) -> dict[str, Any]:
    """Ids of MFNet, and of MSRS, which was made from it, end in D by day and N at night."""
    found = {}
    for name, letter in (("day", "D"), ("night", "N")):
        ids = [i for i in tally.images.ids if i.removesuffix("_flip").endswith(letter)]
        if ids:
            matrices = tally.images.dense(ids)
            matrix = matrices.sum(0, dtype=np.int64)
            found[name] = {
                "n_images": len(ids),
                "protocol": "present",
                "miou": _number(PROTOCOLS["present"](matrix).miou),
                "interval": plain(bootstrap_miou(matrices, "present", draws, seed)) if draws else None,
                "per_class_iou": _named(tally.classes, iou(matrix)),
            }
    return found


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample deviation of what is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def summarise(many: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Values of one report over several checkpoints on the same images: the mean of each score, its sample deviation
    as `KEY_deviation`, the sum of the matrices, and each checkpoint's own figures under `checkpoints`."""
    values = {key: value for key, value in many[0].items() if key not in ("weights_card", "weights_sha256")}
    for key in ("miou", "pixel_accuracy", "boundary_f", "ece"):
        values[key], values[f"{key}_deviation"] = _mean([one[key] for one in many])
    for key in ("per_class_iou", "per_class_accuracy", "per_class_f1", "per_class_boundary_f"):
        both = {name: _mean([one[key][name] for one in many]) for name in values["classes"]}
        values[key] = {name: mean for name, (mean, _) in both.items()}
        values[f"{key}_deviation"] = {name: deviation for name, (_, deviation) in both.items()}
    values["protocols"] = {
        name: {**score, "miou": _mean([one["protocols"][name]["miou"] for one in many])[0]}
        for name, score in values["protocols"].items()
    }
    if "by_time" in values:
        values["by_time"] = {}
        for name in many[0]["by_time"]:
            parts = [one["by_time"][name] for one in many]
            iou_of = {c: _mean([part["per_class_iou"][c] for part in parts])[0] for c in values["classes"]}
            mean = _mean([part["miou"] for part in parts])[0]
            values["by_time"][name] = {**parts[0], "miou": mean, "interval": None, "per_class_iou": iou_of}
    values["confusion_matrix"] = np.sum([one["confusion_matrix"] for one in many], axis=0).tolist()
    for key in ("seconds", "seconds_counting"):
        values[key] = sum(one[key] for one in many)
    # what holds for one of them holds for the mean
    values["notes"] = list(dict.fromkeys(note for one in many for note in one["notes"]))
    values["fitted"] = {key: max(one["fitted"][key] for one in many) for key in many[0]["fitted"]}
    prompts = {one["prompts"] for one in many}
    values |= {"interval": None, "weights": [one["weights"] for one in many]}
    values["prompts"] = prompts.pop() if len(prompts) == 1 else "mixed"
    keys = ("weights", "weights_card", "weights_sha256", "prompts", "miou", "interval", "per_class_iou", "fitted")
    values["checkpoints"] = [{key: one[key] for key in keys} for one in many]
    return values


def split_digest(ids: Sequence[str]) -> str:
    """SHA-256 of the sorted ids, one a line: two reports are of one split if it is equal."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def write(out: Path, report: Report, images: ImageMatrices | None) -> Path:
    """Write report.json (report_oracle.json where the ground truth prompted) and the per-image matrices beside it; each
    appears whole or not at all. Returns the report's path; InputError if the folder cannot be written."""
    values = report.as_dict()
    mark = file_mark(values)
    values["per_image"] = None if images is None else f"per_image{mark}.json"
    path = out / f"report{mark}.json"
    # both are spelt before either is written: what cannot be spelt leaves an older pair as it was
    texts = {path: json.dumps(values, indent=1, allow_nan=False)}
    if images is not None:
        matrices = {"split_ids_sha256": values["split_ids_sha256"], **images.as_dict()}
        texts = {out / f"per_image{mark}.json": json.dumps(matrices, allow_nan=False), **texts}
    for file, text in texts.items():
        write_text(file, text)
    return path


def require_split(out: Path, dataset: str, split: str) -> None:
    """InputError if `out` holds a report of another data set or split (its `split_digest`): it would be lost."""
    for path in out.glob("report*.json"):
        try:
            values = read(path)
        except InputError:
            continue  # not one of ours; that file's name is refused or replaced when it is written
        if (values.get("dataset"), values.get("split_ids_sha256")) != (dataset, split):
            raise InputError(
                f"{path}: is the report of {values.get('dataset')}/{values.get('split')}, other pairs than these; "
                "choose another --out"
            )


def file_mark(values: dict[str, Any]) -> str:
    """What the names of a report's files end in: `_oracle` where the ground truth prompted."""
    return "_oracle" if is_oracle(values) else ""


def is_oracle(values: dict[str, Any]) -> bool:
    """Whether the prompts of a report were drawn from the ground truth."""
    return values.get("prompts") == "oracle" or str(values.get("title", "")).startswith("ORACLE")


def read(path: str | Path) -> dict[str, Any]:
    """The values of a report; a folder stands for its report.json. InputError for whatever is not a report of ours."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    values = _read_json(path)
    lacking = {"title", "miou", "per_class_iou", "confusion_matrix", "split_ids_sha256", "dataset"} - set(values)
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(sorted(lacking))}; expected a report.json of fusionsam evaluate")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as JSON ({detail}); expected a report.json with its files") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected a report.json of fusionsam evaluate")
    return values


def read_comparable(path: str | Path, dataset: str, digest: str) -> tuple[dict[str, Any], ImageMatrices]:
    """A report and its per-image matrices, if it may be held against one of `dataset` with the split `digest`.

    Raises InputError for oracle reports, other data sets or splits, and missing or foreign per-image matrices."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    values = read(path)
    if is_oracle(values):
        raise InputError(
            f"{path}: its prompts were drawn from the ground truth (oracle); it is compared with no report"
        )
    if values["dataset"] != dataset or values["split_ids_sha256"] != digest:
        raise InputError(
            f"{path}: is of {values['dataset']}/{values.get('split')} with other images than the split evaluated here; "
            "compare reports of one split"
        )
    if not values.get("per_image"):
        raise InputError(f"{path}: a summary over checkpoints has no per-image matrices; compare one of its reports")
    return values, read_images(path, values)


def read_images(path: Path, values: dict[str, Any]) -> ImageMatrices:
    """The per-image matrices beside the report at `path`; InputError if they are missing or not of its `values`."""
    beside = path.parent / Path(str(values["per_image"])).name
    if not beside.is_file():
        raise InputError(f"{beside}: no such file; keep it beside {path.name}, the paired bootstrap needs it")
    images = ImageMatrices.from_dict(_read_json(beside))
    if not images.ids or images.dense().sum(0, dtype=np.int64).tolist() != values["confusion_matrix"]:
        raise InputError(f"{beside}: does not add up to the matrix of {path.name}; evaluate again")
    return images


def compare(
    ours: dict[str, Any], our_images: ImageMatrices, theirs: dict[str, Any], their_images: ImageMatrices, draws: int
) -> dict[str, Any]:
    """Ours less theirs on the images that both scored and that have a label, with a paired bootstrap, and in words
    whether it is real at 95 %.

    Raises InputError if no image is common, or if the labels were not the same."""
    known = set(their_images.ids)
    common = [i for i in our_images.ids if i in known]
    if not common:
        raise InputError("against: no image was scored in both reports; compare reports of one split")
    if our_images.num_classes != their_images.num_classes:
        raise InputError("against: the reports differ in the number of classes; compare reports of one class set")
    a, b = our_images.dense(common), their_images.dense(common)
    differs = np.flatnonzero((a.sum(2) != b.sum(2)).any(1))
    if len(differs):
        raise InputError(
            f"against: {len(differs)} images were scored with other labels (first: {common[differs[0]]}); compare "
            "reports made with the same label files"
        )
    protocol, seed = ours["protocol"], ours["bootstrap"]["seed"]
    void = list(PROTOCOLS[protocol].ignored)
    told = np.delete(a, void, axis=1).any((1, 2))  # an image without a counted label speaks for neither side
    if told.any():
        a, b = a[told], b[told]
    gap = paired_bootstrap(a, b, protocol, draws, seed)
    low, high = gap.interval
    few = told.sum() < 6  # every resample of so few images may lie on one side by chance alone: 2 ** -5 of them do
    real = (low > 0 or high < 0) and gap.p < 0.05 and not few
    words = (
        f"mIoU ({protocol}) differs by {gap.difference:+.2f} points on {len(a)} common images, 95 % interval "
        f"{low:+.2f} to {high:+.2f}, p = {gap.p:.3f}: "
    )
    if few:
        words += "too few images to tell"
    else:
        why = "0 is within the interval" if low <= 0 <= high else "p is not below 0.05"
        words += "the difference is real at 95 %" if real else f"the difference is not real at 95 % ({why})"
    rows = {}
    for name, one, two in zip(ours["classes"], _percent(a), _percent(b), strict=True):
        rows[name] = {"ours": one, "theirs": two, "difference": None if None in (one, two) else one - two}
    return {
        "title": theirs["title"],
        "protocol": protocol,
        "n_common": len(a),
        "miou": [_number(PROTOCOLS[protocol](stack.sum(0, dtype=np.int64)).miou) for stack in (a, b)],
        "difference": _number(gap.difference),
        "interval": plain(gap.interval),
        "p": gap.p,
        "real": bool(real),
        "words": words,
        "per_class_iou": rows,
        "images": _image_by_image(a, b, draws, seed),
    }


def _image_by_image(a: NDArray[np.int32], b: NDArray[np.int32], draws: int, seed: int) -> dict[str, Any]:
    """Means over images of each image's own mIoU (`present`), the bootstrap interval of their difference, and on how
    many images ours is the better one. One large object decides less here than in counts of all pixels together."""
    labelled = np.flatnonzero(a.any((1, 2)))  # an image may be all void
    if not len(labelled):
        return {"words": "image by image: no pixel has a label"}
    ours, theirs = (PROTOCOLS["present"].many(stack[labelled]) for stack in (a, b))
    gap = ours - theirs
    means = gap[np.random.default_rng(seed).integers(0, len(gap), (draws, len(gap)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    better, worse = int((gap > 0).sum()), int((gap < 0).sum())
    return {
        "miou": plain([ours.mean(), theirs.mean()]),
        "difference": _number(gap.mean()),
        "interval": plain([low, high]),
        "better": better,
        "worse": worse,
        "words": f"image by image: mIoU {ours.mean():.2f} and {theirs.mean():.2f}, {gap.mean():+.2f} (95 % interval "
        f"{low:+.2f} to {high:+.2f}), better on {better} and worse on {worse} of {len(gap)}",
    }


def _percent(stack: NDArray[np.int32]) -> list[Any]:
    return plain(100 * iou(stack.sum(0, dtype=np.int64)))


def _cell(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def table(values: dict[str, Any]) -> str:
    """A report as text for the terminal."""
    columns = ("per_class_iou", "per_class_accuracy", "per_class_f1", "per_class_boundary_f")
    width = max(len("pixel accuracy"), *map(len, values["per_class_iou"])) + 2
    lines = [
        values["title"],
        "",
        "class".ljust(width) + "".join(f"{n:>12}" for n in ("IoU", "accuracy", "F1", "bound. F")),
    ]
    for name in values["per_class_iou"]:
        lines.append(name.ljust(width) + "".join(f"{_cell(values[column][name]):>12}" for column in columns))
    lines.append("")
    for name, score in values["protocols"].items():
        line = f"mIoU {name}".ljust(width) + f"{_cell(score['miou']):>12}  over {len(score['classes'])} classes"
        if name == values["protocol"]:
            line += "  <- headline"
            if values.get("interval"):
                low, high = map(_cell, values["interval"])
                line += f", 95 % interval {low} to {high}"
            if values.get("miou_deviation") is not None:
                line += f", deviation {values['miou_deviation']:.2f} over {len(values['checkpoints'])} checkpoints"
        lines.append(line)
    for name, key in (("pixel accuracy", "pixel_accuracy"), ("boundary F", "boundary_f"), ("ECE", "ece")):
        lines.append(name.ljust(width) + f"{_cell(values[key]):>12}")
    for name, part in (values.get("by_time") or {}).items():
        lines.append(f"mIoU {name}".ljust(width) + f"{_cell(part['miou']):>12}  {part['n_images']} images, present")
    if values.get("published"):
        lines += ["", "Published on this split (mIoU, protocol):"]
        lines += [f"  {row['miou']:.1f}  {row['method']} ({row['protocol']})" for row in values["published"]]
    if values.get("against"):
        lines += ["", *_side_by_side(values["against"], width)]
    return "\n".join([*lines, *(f"note: {note}" for note in values.get("notes", ()))])


def _side_by_side(against: dict[str, Any], width: int) -> list[str]:
    lines = [f"Against: {against['title']}", "IoU".ljust(width) + f"{'ours':>12}{'theirs':>12}{'difference':>12}"]
    for name, row in against["per_class_iou"].items():
        cells = (_cell(row["ours"]), _cell(row["theirs"]), _cell(row["difference"], "+"))
        lines.append(name.ljust(width) + "".join(f"{cell:>12}" for cell in cells))
    ours, theirs = against["miou"]
    cells = (_cell(ours), _cell(theirs), _cell(against["difference"], "+"))
    return [
        *lines,
        "mIoU".ljust(width) + "".join(f"{cell:>12}" for cell in cells),
        against["words"],
        against["images"]["words"],
    ]
