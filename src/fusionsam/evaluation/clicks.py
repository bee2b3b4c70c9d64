"""`fusionsam clicks`: how many clicks a Segment Anything needs for the objects of a labelled split.

A simulated user (`interaction`) clicks at every connected region of a class, on the visible, the infrared and our fused
picture. The clicks come from the ground truth, as a user knows what he wants: these figures say nothing of how well the
network segments by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.sequences import recording_sequences
from fusionsam.evaluation.click_options import Choose, ClicksOptions, settings
from fusionsam.evaluation.click_report import AFTER, NAME, TARGETS, Measured, scores, table
from fusionsam.evaluation.run import EvaluateConfig, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import write_table
from fusionsam.inference.device import choose_device
from fusionsam.inference.interactive import InteractivePair, InteractiveSAM, Picture
from fusionsam.inference.interactive import locate as locate_sam
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import OTHER_OUT, digest, progress_bar, require_writable, write_json
from fusionsam.metrics.interaction import Ask, Bools, Click, Object, iou, objects, simulate
from fusionsam.types import IGNORE, Array, InputError, Sample
from fusionsam.weights import checkpoint

CHOICES: dict[Choose, str] = {
    "score": "of a first click's three masks the one with the highest predicted IoU is taken",
    "best": "of a first click's three masks the one nearest to the truth is taken, as a user would choose by eye",
}
LINES = "objects.jsonl"


def measure(options: ClicksOptions) -> dict[str, object]:
    """Click at the objects of a split and write clicks.json, .md, .tex, .csv and objects.jsonl into `out`.

    Pairs that `out` holds already, measured with the same settings, are kept. InputError for unusable options, data or
    weights, and for an `out` with pairs measured otherwise."""
    started = time.perf_counter()
    plain = EvaluateConfig(
        options.dataset, options.root, options.split, weights=[options.weights], class_file=options.class_file
    )
    data = open_labelled(plain)
    require_writable(options.out)
    done = _read_lines(Path(options.out) / LINES, _settings(options))
    device = choose_device(options.device)
    model = FusionSAM.from_pretrained(options.weights, device) if "fused" in options.images else None
    guard = leak_guard(plain, data.entries, [model.card]) if model is not None else None
    drawn = drawn_pairs(data, options)
    _run(options, data, drawn, done, model, device)
    measured = [one for index in sorted(drawn) for one in done[data.entries[index].id]]
    if not measured:
        raise InputError(
            f"{options.root}: split {options.split!r} has no object of {options.min_pixels} pixels; lower --min-pixels"
        )
    sequences = recording_sequences(data.entries)
    notes = [CHOICES[options.choose], "clicks come from the ground truth, as a user knows what he wants"]
    if len(drawn) < len(data):
        notes.append(f"{len(drawn)} pairs drawn of {len(data)}, seed {options.seed}")
    values = {
        "title": f"Clicks: {options.sam} on {options.dataset}/{options.split}",
        "most": options.most,
        **scores(measured, data.row.classes, options.most, sequences, options.bootstrap, options.seed),
        **_settings(options),
        "bootstrap": options.bootstrap,
        "n_images": len(drawn),
        "guard": None if guard is None else asdict(guard.findings),
        "notes": notes + ([] if guard is None else guard.notes),
        "commit": checkpoint.commit(),
        "command": options.command,
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(options.out) / f"{NAME}.json", values, allow_nan=False)
    write_table(table(values), Path(options.out))
    return values


def _settings(options: ClicksOptions) -> dict[str, object]:
    """All that a line of objects.jsonl depends on."""
    found: dict[str, object] = settings(options)
    if Path(located := locate_sam(options.sam)).is_file():
        found["sam_sha256"] = digest(Path(located))
    if "fused" in options.images:
        found["weights_sha256"] = digest(checkpoint.locate(options.weights) / checkpoint.WEIGHTS)
    return found


def _read_lines(path: Path, settings: dict[str, object]) -> dict[str, list[Measured]]:
    """What was measured before, by id; a line cut short by a kill is left out. A new file is begun where none is."""
    if not path.is_file():
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        stored = json.loads(lines[0])["settings"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise InputError(f"{path}: is not ours to read; {OTHER_OUT}, or remove it") from None
    differing = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
    if differing:
        raise InputError(f"{path}: was measured with another {', '.join(differing)}; {OTHER_OUT}, or remove it")
    found: dict[str, list[Measured]] = {}
    whole = [line for line in lines if line.endswith("\n")]
    for line in whole[1:]:
        row = json.loads(line)
        found[row["id"]] = [Measured(**one) for one in row["objects"]]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return found


def drawn_pairs(data: LabelledPairs, options: ClicksOptions) -> list[int]:
    """The pairs to measure, in the order of a draw by the seed: more pairs begin with those of fewer."""
    order = np.random.default_rng(options.seed).permutation(len(data)).tolist()
    return order[: options.pairs] if options.pairs else order


def _run(
    options: ClicksOptions,
    data: LabelledPairs,
    drawn: Sequence[int],
    done: dict[str, list[Measured]],
    model: FusionSAM | None,
    device: str,
) -> None:
    """Measure what `done` lacks, into it and, a line a pair, into objects.jsonl."""
    todo = [index for index in drawn if data.entries[index].id not in done]
    if len(todo) < len(drawn):
        tqdm.write(f"{len(drawn) - len(todo)} of {len(drawn)} pairs were already in {options.out}")
    if not todo:
        return
    sam = InteractiveSAM.from_pretrained(options.sam, device)
    with (Path(options.out) / LINES).open("a", encoding="utf-8") as lines:
        for index in progress_bar(todo, desc="clicks", unit="pair"):
            sample = data[index]
            label = sample.label.numpy()
            found = objects(label, options.min_pixels)
            rows = _pair(options, sample, found, label != IGNORE, sam, model) if found else []
            done[sample.id] = rows
            lines.write(json.dumps({"id": sample.id, "objects": [asdict(row) for row in rows]}) + "\n")
            lines.flush()


def _pair(
    options: ClicksOptions,
    sample: Sample,
    chosen: Sequence[Object],
    valid: Bools,
    sam: InteractiveSAM,
    model: FusionSAM | None,
) -> list[Measured]:
    given: dict[Picture, Array | Tensor | None] = {"visible": sample.visible, "infrared": sample.infrared}
    if model is not None:
        given["fused"] = model.predict(sample.visible, sample.infrared).fused
    pictures: dict[Picture, Array | Tensor] = {}
    for on in dict.fromkeys(options.images):
        picture = given[on]
        if picture is None:
            raise InputError(f"{sample.id}: has no {on} image; leave it out of --images")
        pictures[on] = picture
    pair = InteractivePair(sam, pictures)
    rows = []
    for one in chosen:
        ious = {}
        for on in pictures:
            ask = user(pair, on, one.mask, valid, options.choose)
            ious[on] = simulate(ask, one.mask, valid, options.most, max(TARGETS), max(AFTER))
        rows.append(Measured(sample.id, one.class_id, one.pixels, {on: [round(v, 5) for v in ious[on]] for on in ious}))
    return rows


def user(pair: InteractivePair, on: Picture, truth: Bools, valid: Bools, choose: Choose) -> Ask:
    """What a user does with his clicks: all of them are given, the chosen mask of the last answer is fed back."""
    previous: list[torch.Tensor] = []

    def ask(clicks: Sequence[Click]) -> Bools:
        points, labels = [[click.x, click.y] for click in clicks], [int(click.on) for click in clicks]
        fed_back = previous[-1] if previous else None
        answer = pair.sam.mask(pair.encoded(on), points, labels, previous=fed_back)
        best = answer.best
        if choose == "best" and len(answer.masks) > 1:
            best = int(np.argmax([iou(mask, truth, valid) for mask in answer.masks]))
        previous[:] = [answer.logits[best]]
        mask: Bools = answer.masks[best]
        return mask

    return ask
