"""Prediction of many: pairs of files or folders in, pictures and JSON out, finished ones skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from os.path import realpath
from pathlib import Path

from tqdm import tqdm

from fusionsam.data.notices import NoticeBook
from fusionsam.data.pairing import Paired
from fusionsam.data.rigs import AUTO, Agreement, fit, keep, open_aligner
from fusionsam.data.splits import Entry, require_id
from fusionsam.data.storage import Folder
from fusionsam.inference.batch import Failures
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode, prompt_mode, prompts_file, read_prompts
from fusionsam.inference.results import (
    CELSIUS,
    CONFIDENCE,
    ENDINGS,
    RECORD,
    SOURCES,
    Read,
    Results,
    describe,
    open_model,
    require_possible,
    sources_of,
)
from fusionsam.inference.selection import select
from fusionsam.io import Made, OutputFolder, State, progress_bar, require_writable, say, scratch
from fusionsam.types import InputError, JsonObject, Prompts

UNFINISHED: JsonObject = {"run": None}
"""What a NAME.json says while its pictures are put in their places."""


def require_apart(entries: Sequence[Entry], out: Path, endings: Sequence[str], folders: bool) -> None:
    """InputError if a result `out`/ID + ending would replace one of the inputs, or, with `folders`, if `out` is where
    inputs are listed from: the next run would take the results for pictures."""
    if folders and realpath(out) in {realpath(path.parent) for path in _files(entries)}:
        raise InputError(
            f"{out}: is the folder of the inputs, whose next run would find the results; choose another --out"
        )
    require_kept(entries, (out / f"{entry.id}{ending}" for entry in entries for ending in endings))


def require_kept(entries: Sequence[Entry], results: Iterable[Path]) -> None:
    """InputError if one of the files to write is one of the inputs."""
    inputs = {realpath(path): path for path in _files(entries)}  # Path.resolve raises for a link to itself
    for result in results:
        if (hit := inputs.get(realpath(result))) is not None:
            raise InputError(f"{hit}: would be overwritten by a result of that name; choose another --out")


def _files(entries: Sequence[Entry]) -> list[Path]:
    return [path for e in entries for path in (e.visible, e.infrared, e.rgbt, e.radiometric) if path is not None]


def _todo(entries: Sequence[Entry], out: Path, asked: JsonObject, with_confidence: bool) -> list[Entry]:
    """Entries whose results are not there yet, or that cannot be read, which is told when their turn comes. InputError
    where files of their names are of another pair, or were written by somebody else."""
    folder = OutputFolder(out, "predict", "choose another --out, or --overwrite")
    found = []
    for entry in entries:
        try:
            now = _made({**asked, **sources_of(entry)})
        except InputError:
            found.append(entry)
            continue
        record = f"{entry.id}{RECORD}"
        stored = folder.read(record, damaged=UNFINISHED)  # damaged, as an older version left it
        if stored is not None and not _is_ours(stored):
            folder.foreign(record)
        run = None if stored is None else stored["run"] or {}
        told = None if run is None else _made(run)
        warm = bool(asked.get("celsius") and stored and stored.get("celsius"))
        absent = {RECORD, *([] if with_confidence else [CONFIDENCE]), *([] if warm else [CELSIUS])}
        every, whole = ([f"{entry.id}{end}" for end in ENDINGS if end not in but] for but in ({RECORD}, absent))
        if folder.state(record, told, now, whole, every) is not State.FINISHED:
            found.append(entry)
    return found


def _made(run: JsonObject) -> Made:
    """`run` of a NAME.json: the files' paths are what it was made of; size and time tell whether they are unchanged."""
    paths = {name: run[name][0] for name in SOURCES if run.get(name)}
    return Made(paths, {key: value for key, value in run.items() if value is not None})


def _is_ours(stored: JsonObject) -> bool:
    run = stored.get("run", 0)
    return run is None or (isinstance(run, dict) and all(isinstance(run.get(key) or [], list) for key in SOURCES))


def run(options: PredictOptions) -> tuple[int, int]:
    """Predict files or folders into `options.out`; returns the number of pairs predicted (finished ones are skipped)
    and the exit code: batch.SOME_FAILED where pairs could not be read, which failures.csv lists, or else 0.

    For each pair NAME_fused.png, NAME_labels.png (class ids; 255 where the model is less certain than
    `min_confidence`), NAME_overlay.png and NAME.json. `as_trained` leaves out what `fusionsam calibrate` fitted;
    `scales` and `flip` are those of FusionSAM.predict; `align` is a rig.json, or auto to find the rig in the pairs, and
    `frame` and `refine` are Aligner's. Every file is complete or absent, and a NAME.json is only there
    with the pictures it describes, or UNFINISHED. Raises InputError as its parts do, for an `out` where a result would
    replace an input, and, without `overwrite`, for one that holds results of other pairs or files of these names that
    predict did not write.
    """
    out, with_confidence = options.folder(), options.confidence_map
    selected = _selected(options, out)
    entries = selected.entries
    clicks = prompts_file(options.prompts)
    require_possible(options, options.radiometric is not None)
    aligner = open_aligner(options.align, partial(fit, entries), frame=options.frame, refine=not options.no_refine)
    model = open_model(options)
    request = describe(options, model, aligner, [entry.id for entry in entries])
    require_writable(out)
    todo = entries if options.overwrite else _todo(entries, out, request.settings, with_confidence)
    if aligner and options.align == AUTO:
        keep(aligner.rig, Folder(out), [entry.id for entry in entries], options.overwrite)
    tried = {*selected.alone, *(entry.id for entry in todo)}
    alone_here = len(entries) == 1 and not selected.alone
    failures = Failures(out, tried, done={entry.id for entry in entries} - tried)
    for name, reason in selected.alone.items():
        failures.add(name, reason)
    notices, aligned, done = NoticeBook(options=True), Agreement(), 0
    for entry in progress_bar(todo, desc="predict", unit="pair", disable=len(entries) == 1):
        try:
            sources = sources_of(entry)
            read = request.read(entry)
            prediction = _predicted(model, read, options, clicks)
        except InputError as error:
            if options.stop_on_error or alone_here:
                raise
            failures.add(entry.id, str(error))
            continue
        notices.add(read.sample)
        if read.sample.alignment:
            aligned.add(read.sample.alignment)
        _write(out, entry.id, request.results(read, sources, prediction))
        done += 1
    notices.close(", each told in its JSON")
    for line in aligned.lines(str(options.align)):
        tqdm.write(line)
    skipped = len(entries) - len(todo)
    if skipped:
        tqdm.write(f"{skipped} of {len(entries)} pairs were already done in {out}; --overwrite does them again")
    return done, failures.close(len(entries) - len(todo) + done)


def _selected(options: PredictOptions, out: Path) -> Paired:
    """The pairs that are asked for. InputError where a result would replace an input."""
    selected = select(options)
    given = (options.visible, options.infrared, options.rgbt, options.radiometric)
    folders = any(path is not None and path.is_dir() for path in given)
    require_apart(selected.entries, out, ENDINGS, folders)
    for line in selected.aside:
        say(line)
    for entry in selected.entries:
        try:
            require_id(entry.id, str(next(path for key in SOURCES if (path := getattr(entry, key)) is not None)))
        except InputError as error:
            if options.stop_on_error or len(selected.entries) == 1:
                raise
            selected.alone[entry.id] = str(error)
    return replace(selected, entries=[entry for entry in selected.entries if entry.id not in selected.alone])


def _predicted(model: FusionSAM, read: Read, options: PredictOptions, clicks: Path | None) -> Prediction:
    """What the model makes of a pair under the prompts of the file `clicks`."""
    sample = read.sample
    steer: Prompts | Mode | None = prompt_mode(options.prompts)
    if clicks is not None:
        steer = read_prompts(clicks, sample.id, sample.size, model.config.classes)
    try:
        return model.predict(sample.visible, sample.infrared, steer, options.scales, options.flip, sample.covered)
    except InputError as error:
        raise InputError(f"{sample.id}: {error}") from None


def _write(out: Path, name: str, results: Results) -> None:
    try:
        with scratch(out) as folder:
            for ending, data in results.files.items():
                (folder / ending).write_bytes(data)
            part = folder / "json"
            part.write_text(json.dumps(results.told, indent=1) + "\n")
            # what an earlier run said must not stand beside these pictures, and a run that ends here goes on later
            begun = folder / "begun"
            begun.write_text(json.dumps(UNFINISHED) + "\n")
            os.replace(begun, out / f"{name}{RECORD}")
            for ending in ENDINGS:
                if ending in results.files:
                    os.replace(folder / ending, out / f"{name}{ending}")
                elif ending != RECORD:
                    (out / f"{name}{ending}").unlink(missing_ok=True)
            os.replace(part, out / f"{name}{RECORD}")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
