"""`fusionsam clicks`: how many clicks a Segment Anything needs for the objects of a labelled split.

A simulated user (`interaction`) clicks at every connected region of a class, on the visible, the infrared and our fused
picture. The clicks come from the ground truth, as a user knows what he wants: these figures say nothing of how well the
network segments by itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusionsam.data.dataset import LabelledPairs
from fusionsam.data.fingerprints import FILE as FINGERPRINTS
from fusionsam.data.notices import CHECK_TELLS, NoticeBook
from fusionsam.data.sequences import recording_sequences
from fusionsam.evaluation.click_options import Choose, ClicksOptions, settings
from fusionsam.evaluation.click_report import AFTER, NAME, TARGETS, Measured, scores, table
from fusionsam.evaluation.leak_guard import LeakCheck, check_leaks
from fusionsam.evaluation.run import EvaluateConfig, leak_guard, open_labelled
from fusionsam.evaluation.tables.formats import write_table
from fusionsam.inference.device import choose_device
from fusionsam.inference.interactive import InteractivePair, InteractiveSAM, Picture
from fusionsam.inference.interactive import locate as locate_sam
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import OTHER_OUT, commit, digest, progress_bar, require_writable, write_json, write_text
from fusionsam.metrics.interaction import Ask, Bools, Click, Object, iou, objects, simulate
from fusionsam.types import IGNORE, Array, InputError, JsonObject, Sample
from fusionsam.weights import checkpoint

CHOICES: dict[Choose, str] = {
    "score": "of a first click's three masks the one with the highest predicted IoU is taken",
    "best": "of a first click's three masks the one nearest to the truth is taken, as a user would choose by eye",
}
LINES = "objects.jsonl"
T = TypeVar("T")


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
    rules = _settings(options)
    told = {**rules, **pairs_told(data)}
    lines = Lines(options.out, NAME, LINES, told, lambda row: Measured(**row))
    device = choose_device(options.device)
    model = FusionSAM.from_pretrained(options.weights, device) if "fused" in options.images else None
    guard = _guard(plain, data, model, options.sam)
    drawn = drawn_pairs(data, options)
    _run(options, data, drawn, lines, model, device)
    measured = [one for index in sorted(drawn) for one in lines.done[data.entries[index].id]]
    if not measured:
        raise InputError(
            f"{options.root}: split {options.split!r} has no object of {options.min_pixels} pixels; lower --min-pixels"
        )
    lines.notices.close(CHECK_TELLS)
    sequences = recording_sequences(data.entries)
    notes = [CHOICES[options.choose], "clicks come from the ground truth, as a user knows what he wants"]
    if len(drawn) < len(data):
        notes.append(f"{len(drawn)} pairs drawn of {len(data)}, seed {options.seed}")
    values = {
        "title": f"Clicks: {options.sam} on {options.dataset}/{options.split}",
        "most": options.most,
        **scores(measured, data.row.classes, options.most, sequences, options.bootstrap, options.seed),
        **rules,
        "bootstrap": options.bootstrap,
        "n_images": len(drawn),
        "guard": asdict(guard.findings),
        "notes": notes + guard.notes + lines.notices.lines(),
        "commit": commit(),
        "command": options.command,
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(options.out) / f"{NAME}.json", values, allow_nan=False)
    write_table(table(values), Path(options.out))
    return values


def _guard(plain: EvaluateConfig, data: LabelledPairs, model: FusionSAM | None, sam: str) -> LeakCheck:
    """Whether the SAM, or the network that fuses, was trained on the pairs. InputError where one was."""
    located = Path(locate_sam(sam))
    folder = located if located.is_dir() else located.parent
    if model is not None:
        guard = leak_guard(plain, data.entries, [model.card], [folder])
    else:
        guard = check_leaks(data.entries, plain.split, folders=[folder])
    if not (folder / FINGERPRINTS).is_file():
        guard.notes.append(f"nothing tells what the SAM {sam} was trained on: it has no {FINGERPRINTS} beside it")
    return guard


def _settings(options: ClicksOptions) -> dict[str, object]:
    """All that a line of objects.jsonl depends on."""
    found: dict[str, object] = settings(options)
    located = Path(locate_sam(options.sam))
    if located.is_file():
        found["sam_sha256"] = digest(located)
    elif located.is_dir():
        found["sam_sha256"] = {file.name: digest(file) for file in sorted(located.glob("*.safetensors"))}
    if "fused" in options.images:
        found["weights_sha256"] = digest(checkpoint.locate(options.weights) / checkpoint.WEIGHTS)
    return found


def pairs_told(data: LabelledPairs) -> dict[str, object]:
    """What a line depends on of the pairs: their files, and what the ids of their labels mean."""
    mapped = {str(was): now for was, now in data.row.labels_map.items()}
    # None, as in lines of before this was told: most data sets have no such map
    return {"classes": list(data.row.classes), "labels_map": mapped or None, "files_sha256": files_digest(data)}


def files_digest(data: LabelledPairs) -> str:
    """SHA-256 of the pictures and labels of all pairs: what was measured of other files is not what is asked."""
    found = hashlib.sha256()
    for entry in data.entries:
        for path in (entry.rgbt, entry.radiometric, entry.visible, entry.infrared, entry.label):
            if path is not None:
                found.update(f"{entry.id} {digest(path)}\n".encode())
    return found.hexdigest()


@dataclass
class Read(Generic[T]):
    """What a file of lines holds."""

    settings: JsonObject
    objects: dict[str, list[T]]
    """Of each pair."""
    notices: dict[str, list[str]]
    """The kinds of what was guessed of each pair's files."""
    text: str
    """Less a line that a kill cut short."""


def read_lines(path: Path, make: Callable[[JsonObject], T]) -> Read[T]:
    """A file of lines. InputError for one in another form."""
    try:
        text = path.read_text(encoding="utf-8")
        kept = text[: text.rfind("\n") + 1]
        first, *rows = map(json.loads, kept.rstrip("\n").split("\n"))
        found = {str(row["id"]): [make(one) for one in row["objects"]] for row in rows}
        return Read({**first["settings"]}, found, {str(row["id"]): [*row.get("notices", [])] for row in rows}, kept)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: is not ours to read; {OTHER_OUT}, or remove it") from None


class Lines(Generic[T]):
    """What was measured of each pair, a line a pair in `out`, by which a stopped run goes on.

    `settings` are all that a line depends on, `make` builds an object of a line again. InputError for a file of other
    settings or in another form, and for a report of that `owner` without such a file, which would be lost."""

    def __init__(
        self, out: str | Path, owner: str, name: str, settings: dict[str, object], make: Callable[[JsonObject], T]
    ) -> None:
        self.path = Path(out) / name
        self.done: dict[str, list[T]] = {}
        self.notices = NoticeBook()
        self._told: dict[str, list[str]] = {}
        if self.path.is_file():
            read = read_lines(self.path, make)
            stored, self.done, self._told, kept = read.settings, read.objects, read.notices, read.text
            differing = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
            if differing:
                other = ", ".join(differing)
                raise InputError(f"{self.path}: was measured with another {other}; {OTHER_OUT}, or remove it")
            if len(kept.encode()) < self.path.stat().st_size:
                write_text(self.path, kept)
            return
        report = f"{owner}.json"
        if (Path(out) / report).exists():
            raise InputError(f"{Path(out) / report}: is there without {name}, and would be lost; {OTHER_OUT}")
        write_text(self.path, json.dumps({"settings": settings}) + "\n")

    def left(self, data: LabelledPairs, drawn: Sequence[int]) -> list[int]:
        """The places of the pairs that are still to be measured; of others it is told that they are there."""
        ids = [data.entries[index].id for index in drawn]
        todo = [index for index, id in zip(drawn, ids, strict=True) if id not in self.done]
        for id in ids:
            if id in self.done:
                self.notices.count(self._told[id])
        if len(todo) < len(drawn):
            tqdm.write(f"{len(drawn) - len(todo)} of {len(drawn)} pairs were already in {self.path.parent}")
        return todo

    def add(self, pair: Sample, objects: list[T]) -> None:
        """Keep what was measured of a pair, and tell what was guessed of its files."""
        self.done[pair.id] = objects
        self.notices.add(pair)
        line = {"id": pair.id, "objects": [asdict(one) for one in objects]}  # type: ignore[call-overload]
        if pair.notices:
            line["notices"] = [notice.kind for notice in pair.notices]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def drawn_pairs(data: LabelledPairs, options: ClicksOptions) -> list[int]:
    """The pairs to measure, in the order of a draw by the seed: more pairs begin with those of fewer."""
    order = np.random.default_rng(options.seed).permutation(len(data)).tolist()
    return order[: options.pairs] if options.pairs else order


def _run(
    options: ClicksOptions,
    data: LabelledPairs,
    drawn: Sequence[int],
    lines: Lines[Measured],
    model: FusionSAM | None,
    device: str,
) -> None:
    """Measure the pairs that `lines` lack."""
    todo = lines.left(data, drawn)
    if not todo:
        return
    sam = InteractiveSAM.from_pretrained(options.sam, device)
    for index in progress_bar(todo, desc="clicks", unit="pair"):
        sample = data[index]
        label = sample.label.numpy()
        found = objects(label, options.min_pixels)
        lines.add(sample, _pair(options, sample, found, label != IGNORE, sam, model) if found else [])


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
