"""Eleven measures of fused pictures, beside simple fusions."""

from __future__ import annotations

import csv
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fusionsam.alignment.apply import filled
from fusionsam.data.dataset import read_sample
from fusionsam.data.fingerprints import Fingerprints, fingerprint
from fusionsam.data.image_files import image_size
from fusionsam.data.images import read_visible
from fusionsam.data.label_files import read_label
from fusionsam.data.leaks import compare
from fusionsam.data.notices import NoticeBook
from fusionsam.data.rigs import fit, open_aligner
from fusionsam.data.splits import Entry, pair_entries
from fusionsam.evaluation import simple_fusions as fusion_baselines
from fusionsam.evaluation.fusion_report import (
    MEANS,
    OBJECTS,
    ROWS,
    Scores,
    Table,
    as_text,
    contrast_lines,
    object_contrast,
    write,
)
from fusionsam.evaluation.options import FusionMetricsOptions
from fusionsam.evaluation.simple_fusions import FUSIONS
from fusionsam.io import Made, OutputFolder, commit, digest, progress_bar, require_writable, write_json
from fusionsam.metrics.contrast import Surrounded, contrast, surrounded
from fusionsam.metrics.fusion import SMALLEST_SIDE, fusion_metrics, luma, prepare
from fusionsam.types import IGNORE, InputError, JsonObject, Sample

if TYPE_CHECKING:
    from fusionsam.inference.predictor import FusionSAM

RUN = "fusion_metrics_run.json"


@dataclass(frozen=True)
class Job:
    """One pair and every fusion of it that is to be measured."""

    id: str
    name: Path  # of its visible picture
    visible: NDArray[np.uint8]  # (3,H,W)
    infrared: NDArray[np.uint8]  # (1,H,W)
    fused: Mapping[str, Path | NDArray[np.uint8]]  # method -> file, or picture (H,W,3)
    built_in: tuple[str, ...] = ()  # names of FUSIONS
    label: Path | None = None
    label_id: int = 0  # objects of this id are measured against their surroundings


def measure(job: Job) -> dict[str, Scores]:
    """Method -> its eleven measures on one pair, in the order of `job`; with a label also OBJECTS: how many there are,
    and the mean contrast of each in the fused and in the infrared picture. InputError names the file."""
    visible, infrared = job.visible, job.infrared
    pictures: dict[str, NDArray[np.uint8]] = {
        name: read_visible(given).numpy() if isinstance(given, Path) else given for name, given in job.fused.items()
    }
    found, objects = {}, _objects(job, infrared.shape[-2:])
    try:
        sources = prepare(visible, "visible"), prepare(infrared, "infrared")
    except InputError as error:
        raise InputError(f"{job.name}: {error}") from None
    for name in (*pictures, *job.built_in):
        try:
            picture = pictures[name] if name in pictures else FUSIONS[name](visible, infrared)
            found[name] = fusion_metrics(*sources, picture)
            if objects:
                means = [float(np.mean(contrast(luma(each), objects))) for each in (picture, infrared)]
                found[name] |= dict(zip(OBJECTS, (float(len(objects)), *means), strict=True))
        except InputError as error:
            raise InputError(f"{job.name} ({name}): {error}") from None
    return found


def _objects(job: Job, size: tuple[int, ...]) -> list[Surrounded]:
    if job.label is None:
        return []
    label = read_label(job.label).numpy()
    if label.shape != size:
        raise InputError(f"{job.label}: found {label.shape[0]}x{label.shape[1]}, its pair is {size[0]}x{size[1]}")
    return surrounded(label == job.label_id, label != IGNORE)


def fused_files(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """Id -> its fused picture in `folder`: of the same stem, or NAME_fused as `fusionsam predict` writes it.

    Raises InputError naming the first id without a picture, or with two."""
    files = {entry.id: entry.visible for entry in pair_entries(folder, None)}
    found: dict[str, Path] = {}
    for id in ids:
        both = [path for stem in (id, f"{id}_fused") if (path := files.get(stem)) is not None]
        if len(both) != 1:
            what = "no fused picture" if not both else f"both {both[0].name} and {both[1].name}"
            raise InputError(f"{folder}: {what} for {id!r}; expected one file named {id}.png or {id}_fused.png")
        found[id] = both[0]
    return found


def check_sizes(
    entries: Sequence[Entry], folders: Mapping[str, Mapping[str, Path]], smallest: int, align: bool = False
) -> None:
    """Judge every file by its header before hours are spent: InputError names one that is too small, or whose size
    differs from its visible image's; with `align` infrared may have its own."""
    for entry in entries:
        assert entry.visible is not None
        assert entry.infrared is not None
        wanted = image_size(entry.visible)
        if min(wanted) < smallest:
            advice = "leave it out"
            if min(wanted) >= SMALLEST_SIDE:
                advice = "leave it out, or give --no-baselines"
            found = f"{wanted[0]}x{wanted[1]} (height x width)"
            raise InputError(f"{entry.visible}: {found}, expected sides of at least {smallest} pixels; {advice}")
        fused = [files[entry.id] for files in folders.values()]
        for path in fused if align else [entry.infrared, *fused]:
            if (size := image_size(path)) != wanted:
                raise InputError(
                    f"{path}: {size[0]}x{size[1]} (height x width), its visible image {entry.visible.name} is "
                    f"{wanted[0]}x{wanted[1]}; give aligned pictures of one size"
                    + (", or --align" if path == entry.infrared else "")
                )


def measure_all(jobs: Iterable[Job], total: int, workers: int) -> Table:
    """`measure` for every job in `workers` processes (1 = this one) -> method -> image -> metrics, in order of id.

    Jobs are drawn as workers become free, so memory does not grow with their number."""
    table: Table = {}
    rows: dict[str, dict[str, Scores]] = {}
    with progress_bar(range(total), desc="fusion metrics", unit="pair") as bar:
        for id, found in _in_processes(jobs, workers) if workers > 1 else ((job.id, measure(job)) for job in jobs):
            rows[id] = found
            bar.update()
    for id in sorted(rows):
        for method, scores in rows[id].items():
            table.setdefault(method, {})[id] = scores
    return table


def _in_processes(jobs: Iterable[Job], workers: int) -> Iterator[tuple[str, dict[str, Scores]]]:
    # spawned, not forked: a fork of a process that ran a network may hang in its thread pool
    workers = min(workers, 61) if sys.platform == "win32" else workers  # more cannot be waited for there
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    running: dict[Future[dict[str, Scores]], str] = {}
    try:
        for job in jobs:
            if len(running) >= 2 * workers:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
            running[pool.submit(measure, job)] = job.id
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise InputError(
            f"workers: one of {workers} processes was killed, most likely for want of memory; give fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def method_names(sources: Sequence[str | Path]) -> list[str]:
    """A name for each folder or shipped name: its last part, with the folder above where that occurs twice. InputError
    if names still collide, with each other or with a built-in fusion."""
    paths = [Path(source) for source in sources]
    last = [path.name or path.resolve().name for path in paths]
    names = [
        f"{path.resolve().parent.name}/{name}" if last.count(name) > 1 else name
        for path, name in zip(paths, last, strict=True)
    ]
    taken = [name for name in names if names.count(name) > 1 or name in FUSIONS]
    if taken:
        raise InputError(f"{taken[0]}: names two of the methods compared; rename the folder")
    return names


def run(options: FusionMetricsOptions) -> str:
    """Measure folders of fused pictures and the pictures that checkpoints draw, beside the built-in fusions; writes
    into `options.out` and returns the table as text. Raises InputError as its parts do."""
    visible, infrared, out = options.visible, options.infrared, options.out
    fused, weights, workers = options.fused, options.weights, options.workers
    baselines = options.baselines
    if not fused and not weights:
        raise InputError("fusion-metrics: nothing to measure; give --fused DIR or --weights W")
    if workers < 1:
        raise InputError(f"--workers: {workers}; expected at least 1")
    entries = pair_entries(visible, infrared)
    if not entries:
        raise InputError(f"{visible}: holds no image; expected pairs of one name here and in {infrared}")
    names = method_names([*weights, *fused])
    ids = [entry.id for entry in entries]
    folders = {name: fused_files(path, ids) for name, path in zip(names[len(weights) :], fused, strict=True)}
    labels = _label_files(options, ids)
    smallest = fusion_baselines.SMALLEST_SIDE if baselines else SMALLEST_SIDE
    check_sizes(entries, folders, smallest, options.align is not None)
    aligner = open_aligner(options.align, partial(fit, entries), refine=not options.no_refine)
    require_writable(out)
    _require_ours(out, ids)
    made_by = _made_by(options, names, len(entries))
    models: list[FusionSAM] = []
    notes: list[str] = []
    if weights:
        from fusionsam.inference.predictor import (
            FusionSAM,  # not above: every process that measures would load the network's code
        )

        models = [FusionSAM.from_pretrained(source, options.device) for source in weights]
        for name, count in _trained_on(dict(zip(names, weights, strict=False)), entries).items():  # weights stand first
            notes.append(f"{name}: at least a part of it was trained on {count} of these {len(entries)} pairs")

    read_as = NoticeBook()

    def jobs() -> Iterator[Job]:
        for entry in entries:
            assert entry.visible is not None
            given: dict[str, Path | NDArray[np.uint8]] = {}
            sample = read_sample(entry, align=aligner)
            read_as.add(sample)
            for name, model in zip(names, models, strict=False):  # weights stand first among the names
                try:
                    given[name] = model.predict(sample.visible, sample.infrared, covered=sample.covered).fused
                except InputError as error:
                    raise InputError(f"{entry.visible} ({name}): {error}") from None
            given |= {name: files[entry.id] for name, files in folders.items()}
            built_in, label = tuple(FUSIONS) if baselines else (), (labels.get(entry.id), options.label_id or 0)
            yield Job(entry.id, entry.visible, *_arrays(sample), given, built_in, *label)

    table = measure_all(jobs(), len(entries), workers)
    read_as.close()
    notes += (guessed := read_as.lines())
    found = write(out, table)
    write_json(out / RUN, {**made_by, "notes": guessed} if guessed else made_by)
    if options.labels is not None and options.label_id is not None:
        notes = [*contrast_lines(object_contrast(table), options.label_id), *notes]
    return "\n".join([as_text(found, {method: len(rows) for method, rows in table.items()}, names), *notes])


def _made_by(options: FusionMetricsOptions, names: Sequence[str], pairs: int) -> JsonObject:
    found = {}
    if options.weights:
        from fusionsam.weights.checkpoint import WEIGHTS, locate

        stored = zip(names, options.weights, strict=False)  # weights stand first among the names
        found = {name: digest(locate(source) / WEIGHTS) for name, source in stored}
    return {"command": options.command, "commit": commit(), "n_images": pairs, "weights_sha256": found}


def _arrays(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The pair as it is measured: what infrared does not reach is as in the visible picture, for both are all that a
    fused picture can show there."""
    visible, infrared = sample.visible, sample.infrared
    if sample.covered is not None:
        visible, infrared = filled(visible, infrared, sample.covered)
    assert visible is not None
    assert infrared is not None
    return visible.numpy(), infrared.numpy()


def _label_files(options: FusionMetricsOptions, ids: Sequence[str]) -> dict[str, Path]:
    """Id -> its label map; nothing without --labels. InputError where one is missing."""
    if (options.labels is None) != (options.label_id is None):
        raise InputError("fusion-metrics: --labels and --label-id go together; give both or neither")
    if options.labels is None:
        return {}
    files = {entry.id: entry.visible for entry in pair_entries(options.labels, None) if entry.visible is not None}
    if missing := [id for id in ids if id not in files]:
        raise InputError(
            f"{options.labels}: no label map for {missing[0]!r} and {len(missing) - 1} others; expected one PNG a pair"
        )
    return {id: files[id] for id in ids}


def _require_ours(out: Path, ids: Sequence[str]) -> None:
    """InputError for figures of other images in `out`, which would be lost, and for files that somebody else wrote."""
    folder = OutputFolder(out, "fusion-metrics")
    stored = folder.read(MEANS)
    folder.state(MEANS, None if stored is None else Made({}), Made({}), [ROWS], [RUN])
    if "weights_sha256" not in (folder.read(RUN) or {"weights_sha256": None}):
        folder.foreign(RUN)
    if stored is None or not (folder / ROWS).exists():
        return
    try:
        with (folder / ROWS).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        rows = [{}]
    if any("image" not in row for row in rows):
        folder.foreign(ROWS)
    folder.require_none_lost(ROWS, "image", dict.fromkeys(row["image"] for row in rows), ids)


def _trained_on(weights: Mapping[str, str | Path], entries: Sequence[Entry]) -> dict[str, int]:
    """Name of weights -> how many of the pairs are among the fingerprints that they carry, where any is."""
    from fusionsam.weights.checkpoint import locate

    known = {name: seen for name, source in weights.items() if (seen := Fingerprints.read(locate(source))) is not None}
    these = fingerprint("fusion-metrics", entries) if known else Fingerprints()  # once, it decodes every pair
    counts = {}
    for name, seen in known.items():
        ids = {"seen": [str(i) for i in range(len(seen.content))], "these": [entry.id for entry in entries]}
        found = compare({"seen": seen, "these": these}, ids)
        counts[name] = len({leak.second_id for leak in found if leak.kind in ("id", "content", "mirrored")})
    return {name: count for name, count in counts.items() if count}
