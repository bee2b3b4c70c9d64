"""`fusionsam clicks`: how many clicks a Segment Anything needs for the objects of a labelled split.

A simulated user (`interaction`) clicks at every connected region of a class, on the visible, the infrared and our fused
picture. The clicks come from the ground truth, as a user knows what he wants: these figures say nothing of how well the
network segments by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from fusionsam.config.datasets import CATALOG
from fusionsam.data.dataset import PairDataset
from fusionsam.data.sequences import recording_sequences
from fusionsam.errors import InputError
from fusionsam.evaluation.click_report import AFTER, NAME, TARGETS, Measured, scores, table
from fusionsam.evaluation.interaction import Ask, Bools, Click, Object, iou, objects, simulate
from fusionsam.evaluation.run import EvaluateConfig, digest, guard_findings, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import to_markdown, write_table
from fusionsam.inference.interactive import PICTURES, SHIPPED, InteractivePair, InteractiveSAM, Picture
from fusionsam.inference.interactive import locate as locate_sam
from fusionsam.inference.predictor import FusionSAM, choose_device
from fusionsam.io import OTHER_OUT, given_path, require_writable, write_json
from fusionsam.types import IGNORE, Sample
from fusionsam.weights import checkpoint

Choose = Literal["score", "best"]
CHOICES: dict[Choose, str] = {
    "score": "of a first click's three masks the one with the highest predicted IoU is taken",
    "best": "of a first click's three masks the one nearest to the truth is taken, as a user would choose by eye",
}
LINES = "objects.jsonl"


@dataclass(frozen=True)
class ClicksConfig:
    """What is measured and how; the options of `fusionsam clicks` and their defaults."""

    dataset: str
    root: str | Path
    out: str | Path
    split: str = "val"
    sam: str = SHIPPED
    """`sam` (ships), or a SAM of your own: SamModel or Sam2Model folder or hub name, SAM or MobileSAM file."""
    weights: str | Path = "tiny"
    """Our checkpoint: draws the fused picture."""
    images: Sequence[Picture] = PICTURES
    choose: Choose = "score"
    min_pixels: int = 400
    """Smaller regions are left out."""
    most: int = 10
    """Clicks on one object."""
    pairs: int = 0
    """Pairs to measure, drawn by `seed`; 0 = all. Those of a smaller number are kept by a larger one."""
    seed: int = 0
    """Of the drawn pairs and of the bootstrap."""
    bootstrap: int = 1000
    class_file: str | Path | None = None
    device: str = "auto"
    command: str = ""


def measure(config: ClicksConfig) -> dict[str, Any]:
    """Click at the objects of a split and write clicks.json, .md, .tex, .csv and objects.jsonl into `out`.

    Pairs that `out` holds already, measured with the same settings, are kept. InputError for unusable options, data or
    weights, and for an `out` with pairs measured otherwise."""
    started = time.perf_counter()
    _check(config)
    plain = EvaluateConfig(config.dataset, config.root, config.split, [config.weights], class_file=config.class_file)
    data = open_labelled(plain)
    assert data.row is not None
    require_writable(config.out)
    done = _read_lines(Path(config.out) / LINES, _settings(config))
    device = choose_device(config.device)
    model = FusionSAM.from_pretrained(config.weights, device) if "fused" in config.images else None
    guard = leak_guard(plain, data.entries, [model.card]) if model is not None else None
    drawn = _drawn(data, config)
    _run(config, data, drawn, done, model, device)
    measured = [one for index in sorted(drawn) for one in done[data.entries[index].id]]
    if not measured:
        raise InputError(
            f"{config.root}: split {config.split!r} has no object of {config.min_pixels} pixels; lower --min-pixels"
        )
    sequences = recording_sequences(data.entries)
    notes = [CHOICES[config.choose], "clicks come from the ground truth, as a user knows what he wants"]
    if len(drawn) < len(data):
        notes.append(f"{len(drawn)} pairs drawn of {len(data)}, seed {config.seed}")
    values = {
        "title": f"Clicks: {config.sam} on {config.dataset}/{config.split}",
        "most": config.most,
        **scores(measured, data.row.classes, config.most, sequences, config.bootstrap, config.seed),
        **_settings(config),
        "bootstrap": config.bootstrap,
        "n_images": len(drawn),
        "guard": None if guard is None else guard_findings(guard),
        "notes": notes + ([] if guard is None else guard["notes"]),
        "commit": checkpoint.commit(),
        "command": config.command,
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(config.out) / f"{NAME}.json", values, allow_nan=False)
    write_table(table(values), Path(config.out))
    return values


def _check(config: ClicksConfig) -> None:
    lowest = {"min_pixels": 1, "most": max(AFTER), "pairs": 0, "seed": 0, "bootstrap": 0}
    for name, least in lowest.items():
        if getattr(config, name) < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: found {getattr(config, name)}; expected at least {least}")
    if config.choose not in CHOICES:
        raise InputError(f"--choose {config.choose!r}: expected one of {', '.join(CHOICES)}")
    for on in config.images:
        if on not in PICTURES:
            raise InputError(f"--images {on!r}: expected some of {', '.join(PICTURES)}")
    if not config.images:
        raise InputError(f"--images: found none; expected some of {', '.join(PICTURES)}")


def _settings(config: ClicksConfig) -> dict[str, Any]:
    """All that a line of objects.jsonl depends on."""
    names = ("dataset", "split", "sam", "choose", "min_pixels", "most", "seed")
    found = {name: getattr(config, name) for name in names}
    if Path(located := locate_sam(config.sam)).is_file():
        found["sam_sha256"] = digest(Path(located))
    found["images"] = list(dict.fromkeys(config.images))
    if "fused" in config.images:
        found["weights"] = str(config.weights)
        found["weights_sha256"] = digest(checkpoint.locate(config.weights) / checkpoint.WEIGHTS)
    return found


def _read_lines(path: Path, settings: dict[str, Any]) -> dict[str, list[Measured]]:
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


def _drawn(data: PairDataset, config: ClicksConfig) -> list[int]:
    """The pairs to measure, in the order of a draw by the seed: more pairs begin with those of fewer."""
    order = np.random.default_rng(config.seed).permutation(len(data)).tolist()
    return order[: config.pairs] if config.pairs else order


def _run(
    config: ClicksConfig,
    data: PairDataset,
    drawn: Sequence[int],
    done: dict[str, list[Measured]],
    model: FusionSAM | None,
    device: str,
) -> None:
    """Measure what `done` lacks, into it and, a line a pair, into objects.jsonl."""
    todo = [index for index in drawn if data.entries[index].id not in done]
    if len(todo) < len(drawn):
        tqdm.write(f"{len(drawn) - len(todo)} of {len(drawn)} pairs were already in {config.out}")
    if not todo:
        return
    sam = InteractiveSAM.from_pretrained(config.sam, device)
    with (Path(config.out) / LINES).open("a", encoding="utf-8") as lines:
        for index in tqdm(todo, desc="clicks", unit="pair"):
            sample = data[index]
            assert sample.label is not None
            label = sample.label.numpy()
            found = objects(label, config.min_pixels)
            rows = _pair(config, sample, found, label != IGNORE, sam, model) if found else []
            done[sample.id] = rows
            lines.write(json.dumps({"id": sample.id, "objects": [asdict(row) for row in rows]}) + "\n")
            lines.flush()


def _pair(
    config: ClicksConfig,
    sample: Sample,
    chosen: Sequence[Object],
    valid: Bools,
    sam: InteractiveSAM,
    model: FusionSAM | None,
) -> list[Measured]:
    given: dict[Picture, Any] = {"visible": sample.visible, "infrared": sample.infrared}
    if model is not None:
        given["fused"] = model.predict(sample.visible, sample.infrared).fused
    pictures: dict[Picture, Any] = {}
    for on in dict.fromkeys(config.images):
        if given[on] is None:
            raise InputError(f"{sample.id}: has no {on} image; leave it out of --images")
        pictures[on] = given[on]
    pair = InteractivePair(sam, pictures)
    rows = []
    for one in chosen:
        ious = {}
        for on in pictures:
            ask = user(pair, on, one.mask, valid, config.choose)
            ious[on] = simulate(ask, one.mask, valid, config.most, max(TARGETS), max(AFTER))
        rows.append(Measured(sample.id, one.class_id, one.pixels, {on: [round(v, 5) for v in ious[on]] for on in ious}))
    return rows


def user(pair: InteractivePair, on: Picture, truth: Bools, valid: Bools, choose: Choose) -> Ask:
    """What a user does with his clicks: all of them are given, the chosen mask of the last answer is fed back."""
    previous: list[torch.Tensor] = []

    def ask(clicks: Sequence[Click]) -> Bools:
        points, labels = [[click.x, click.y] for click in clicks], [int(click.on) for click in clicks]
        answer = pair.mask(points, labels, on=on, previous=previous[-1] if previous else None)
        best = answer.best
        if choose == "best" and len(answer.masks) > 1:
            best = int(np.argmax([iou(mask, truth, valid) for mask in answer.masks]))
        previous[:] = [answer.logits[best]]
        mask: Bools = answer.masks[best]
        return mask

    return ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fusionsam clicks`."""
    default = {field.name: field.default for field in fields(ClicksConfig)}
    add = parser.add_argument
    add("--dataset", required=True, help=f"one of {', '.join(CATALOG)}")
    add("--root", type=given_path, required=True, help="folder of the data set (or the manifest file)")
    add("--out", type=given_path, required=True, help=f"folder for {NAME}.json, {NAME}.md and {LINES}; can be resumed")
    add("--split", default=default["split"], help="official split, or NAME of a list NAME.txt (%(default)s)")
    add("--sam", default=default["sam"], help="sam, or a SAM, SAM2 or MobileSAM of your own (%(default)s)")
    add("--weights", default=default["weights"], help="our checkpoint, for the fused picture (%(default)s)")
    add("--images", nargs="+", choices=PICTURES, default=PICTURES, help="pictures to click on (all three)")
    add("--choose", choices=tuple(CHOICES), default=default["choose"], help="of the first three masks (%(default)s)")
    add("--min-pixels", type=int, default=default["min_pixels"], help="smaller regions are left out (%(default)s)")
    add("--most", type=int, default=default["most"], help="clicks on one object (%(default)s)")
    add("--pairs", type=int, default=default["pairs"], metavar="N", help="draw N pairs; 0 = all (%(default)s)")
    add("--seed", type=int, default=default["seed"], help="of drawn pairs and bootstrap (%(default)s)")
    add("--bootstrap", type=int, default=default["bootstrap"], help="resamples of the recordings (%(default)s)")
    add("--class-file", help="YAML with classes and palette, for pairs and manifest")
    add("--device", default=default["device"], help="auto, cpu, cuda, mps (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """`fusionsam clicks`."""
    names = {field.name for field in fields(ClicksConfig)} - {"command"}
    given = {name: value for name, value in vars(args).items() if name in names}
    print(to_markdown(table(measure(ClicksConfig(**given, command=getattr(args, "command_line", ""))))))
    return 0
