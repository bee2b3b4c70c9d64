"""`fusionsam clicks --steer`: what clicks that name a class do to the class map.

For every object a simulated user clicks at the middle of the largest error in its box and names the class that the
ground truth has there, up to five times. These clicks come from the truth: no figure here says how well the network
segments by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fusionsam.data.notices import CHECK_TELLS
from fusionsam.data.sequences import recording_sequences
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation.click_options import ClicksOptions
from fusionsam.evaluation.click_report import AFTER, FEW_OBJECTS, grouped_interval, selections
from fusionsam.evaluation.clicks import Lines, drawn_pairs, pairs_told
from fusionsam.evaluation.run import EvaluateConfig, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import Row, Table, write_table
from fusionsam.inference.device import choose_device
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import commit, digest, progress_bar, require_writable, write_json
from fusionsam.metrics.interaction import Corrected, correct, iou_after, objects
from fusionsam.types import InputError, JsonObject, LabelledSample, Prompts
from fusionsam.weights import checkpoint

NAME = "steering"
LINES = "steered.jsonl"
WEAK = 0.8
"""Objects whose box has less IoU before any click are told apart: only there is much to be gained."""
Values = dict[str, object]


@dataclass(frozen=True)
class Steered:
    """One object, and what up to the most clicks did to it."""

    id: str
    class_id: int
    pixels: int
    done: Corrected

    @classmethod
    def of(cls, row: JsonObject) -> Steered:
        """From a line of objects."""
        return cls(**{**row, "done": Corrected(**row["done"])})


def measure_steering(options: ClicksOptions) -> Values:
    """Click at the objects of a split and write steering.json, .md, .tex, .csv and steered.jsonl into `out`; pairs that
    are in the last one already are kept.

    InputError for an `out` with pairs measured otherwise, for unusable options, data or weights, and for weights that
    no click that names a class steers."""
    started = time.perf_counter()
    plain = EvaluateConfig(
        options.dataset, options.root, options.split, weights=[options.weights], class_file=options.class_file
    )
    data = open_labelled(plain)
    require_writable(options.out)
    model = FusionSAM.from_pretrained(options.weights, choose_device(options.device))
    if model.network.steering is None:
        raise InputError(f"weights {options.weights}: have no steering; train it with configs/steering.yaml")
    guard = leak_guard(plain, data.entries, [model.card])
    drawn = drawn_pairs(data, options)
    settings = {
        "dataset": options.dataset,
        "split": options.split,
        "weights": Path(options.weights).name,
        "weights_sha256": digest(checkpoint.locate(options.weights) / checkpoint.WEIGHTS),
        "min_pixels": options.min_pixels,
        "seed": options.seed,
    }
    told = {**settings, **pairs_told(data), "calibration": checkpoint.calibrated_digest(model.card)}
    lines = Lines(options.out, NAME, LINES, told, Steered.of)
    for index in progress_bar(lines.left(data, drawn), desc="clicks", unit="pair"):
        sample = data[index]
        lines.add(sample, _pair(model, sample, options.min_pixels))
    lines.notices.close(CHECK_TELLS)
    measured = [one for index in sorted(drawn) for one in lines.done[data.entries[index].id]]
    if not measured:
        raise InputError(
            f"{options.root}: split {options.split!r} has no object of {options.min_pixels} pixels with an error; "
            "lower --min-pixels"
        )
    notes = ["clicks and the classes they name come from the ground truth, as a user knows what is there"]
    if len(drawn) < len(data):
        notes.append(f"{len(drawn)} pairs drawn of {len(data)}, seed {options.seed}")
    values: Values = {
        "title": f"Clicks that name a class: {model.name} on {options.dataset}/{options.split}",
        "groups": scores(measured, data.row.classes, recording_sequences(data.entries), options),
        **settings,
        "bootstrap": options.bootstrap,
        "n_images": len(drawn),
        "n_objects": len(measured),
        "guard": asdict(guard.findings),
        "notes": [*notes, *guard.notes, *lines.notices.lines()],
        "commit": commit(),
        "command": options.command,
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(options.out) / f"{NAME}.json", values, allow_nan=False)
    write_table(steering_table(values), Path(options.out))
    return values


@torch.inference_mode()
def _pair(model: FusionSAM, sample: LabelledSample, min_pixels: int) -> list[Steered]:
    """Every object of one pair in which the first pass errs."""
    label = sample.label.numpy()
    found = objects(label, min_pixels)
    if not found:
        return []
    images = [None if image is None else to_unit(image)[None] for image in (sample.visible, sample.infrared)]
    encoded = model.network.encode(*(None if image is None else image.to(model.device) for image in images))
    first = model.network.first_pass(encoded)

    def ask(prompts: Prompts | None) -> NDArray[np.integer]:
        given = None if prompts is None else prompts.to(model.device)
        ids: NDArray[np.integer] = model.network.decode(encoded, given, first=first).logits[0].argmax(0).cpu().numpy()
        return ids

    own = ask(None)
    every = [Steered(sample.id, one.class_id, one.pixels, correct(ask, own, label, one, max(AFTER))) for one in found]
    return [one for one in every if one.done.obeyed]


def scores(
    measured: Sequence[Steered], classes: Sequence[str], sequences: Mapping[str, str], options: ClicksOptions
) -> Values:
    """For all objects, those that the first pass has below WEAK, day, night and each class: IoU in the box in percent
    before any click and after 1, 3 and 5, what was gained with its 95 % interval over recordings, the share of clicks
    whose pixel got its class, and the share of pixels changed elsewhere after 1 and 3 clicks, both in percent."""
    names = [sequences.get(one.id, f"pair {one.id}") for one in measured]
    recordings = np.unique(names, return_inverse=True)[1]
    before = np.array([100 * one.done.ious[0] for one in measured])
    groups = selections([one.id for one in measured], [one.class_id for one in measured], classes)
    groups = {"all": groups.pop("all"), f"below {WEAK:g}": before < 100 * WEAK, **groups}
    found: Values = {}
    for name, chosen in groups.items():
        if not chosen.any():
            continue
        inside = [one for one, member in zip(measured, chosen, strict=True) if member]
        row: Values = {"objects": len(inside), "iou0": float(before[chosen].mean())}
        for clicks in AFTER:
            gain = np.array([100 * (iou_after(one.done.ious[1:], clicks) - one.done.ious[0]) for one in inside])
            row[f"gain{clicks}"] = float(gain.mean())
            row[f"iou{clicks}"] = float(before[chosen].mean() + gain.mean())
            if options.bootstrap:
                interval = grouped_interval(gain, recordings[chosen], options.bootstrap, options.seed)
                row[f"gain{clicks}_interval"] = interval
            row[f"elsewhere{clicks}"] = float(np.mean([100 * iou_after(one.done.elsewhere, clicks) for one in inside]))
        row["obeyed"] = 100 * float(np.mean([right for one in inside for right in one.done.obeyed]))
        found[name] = row
    return found


def steering_table(values: Mapping[str, object]) -> Table:
    """One line for every group of objects."""
    columns = ("objects", "number", "IoU before", *(f"after {clicks}" for clicks in AFTER))
    columns += ("gain of 1 (95 %)", "gain of 3 (95 %)", "class obeyed, %", "elsewhere 1, %", "elsewhere 3, %")
    rows = []
    groups = values["groups"]
    assert isinstance(groups, dict)
    for name, row in groups.items():
        few = (f"fewer than {FEW_OBJECTS} objects",) if row["objects"] < FEW_OBJECTS else ()
        cells = [name, str(row["objects"]), *(f"{row[f'iou{clicks}']:.1f}" for clicks in (0, *AFTER))]
        for clicks in (1, 3):
            ends = row.get(f"gain{clicks}_interval")
            cells.append(f"{row[f'gain{clicks}']:+.1f}" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else ""))
        cells += [f"{row['obeyed']:.1f}", f"{row['elsewhere1']:.2f}", f"{row['elsewhere3']:.2f}"]
        rows.append(Row(str(values["title"]), tuple(cells), few))
    return Table(NAME, str(values["title"]), columns, rows, list(values.get("notes", ())))  # type: ignore[call-overload]
