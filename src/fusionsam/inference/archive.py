"""Prediction of the pairs of a manifest, be they a million: a results table beside the pictures, here or elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from os.path import abspath, realpath
from pathlib import Path

from tqdm import tqdm

from fusionsam.config.options import Address
from fusionsam.data.manifests import CAMERAS, Listed, read_manifest
from fusionsam.data.rigs import AUTO, Agreement, fit, keep, open_aligner
from fusionsam.data.splits import Entry
from fusionsam.data.storage import Folder, fixed_part, is_remote, local_path, parent
from fusionsam.inference.batch import SOME_FAILED
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.results import ENDINGS, Request, describe, open_model, require_possible
from fusionsam.inference.shards import TABLE, Done, Shard, Worker, open_shard, pairs_digest, shard_name
from fusionsam.io import progress_bar, require_writable, say
from fusionsam.types import InputError, JsonObject

RECORD = f"{TABLE}/_run.json"
"""What the results were made with; tables are read past names that begin with _."""
ENOUGH = 100
"""Pairs from which on a share of failures says something."""
Tick = Callable[[int], object]
"""Is told how many pairs are done."""
ANOTHER = "choose another --out, or --overwrite"
DIGEST = 40
"""Characters from which on a setting is no word but a digest, or a list of such."""


def run(options: PredictOptions) -> tuple[int, int]:
    """Predict the pairs that `options.manifest` lists; the number of pairs that are done now, and the exit code.

    For each pair the files of `files.run` (NAME.json without seconds), and a row of the table OUT/results: id, files,
    share of each class, confidence, error. A pair that cannot be read is a row with an error, and is tried again by the
    next run; all others are done once. Results are the same bytes from either engine, for one kind of processor and
    number of threads.

    Raises:
        InputError: for what cannot be read or written, results of other pairs or settings, and too many failures.
    """
    options = _from_anywhere(options)
    folder = Folder(options.out)
    pairs = [_absolute(pair) for pair in read_manifest(str(options.manifest), options.match)]
    _require_apart(pairs, folder, str(options.manifest))
    request, model = _request(options, pairs)
    shards = _open_table(folder, request, pairs)
    if request.aligner is not None and options.align == AUTO:
        keep(request.aligner.rig, folder, (pair.id for pair in pairs), options.overwrite)
    left = sum(len(shard.pairs) for shard in shards if not shard.errors)
    failed = sum(shard.errors for shard in shards)
    finished = len(pairs) - left - failed  # what failed is tried again
    tally = _Tally(len(pairs), len(pairs) - left, failed)
    if shards:
        _work(request, model, folder, shards, tally)
    if finished:
        say(f"{finished} of {len(pairs)} pairs were already in {folder / TABLE}; --overwrite does them again")
    return tally.close(folder, str(options.align))


def _from_anywhere(options: PredictOptions) -> PredictOptions:
    """The options without paths that begin where the command was given: workers run elsewhere."""
    weights, prompts, out = options.weights, options.prompts, str(options.out)
    return replace(
        options,
        weights=abspath(weights) if Path(weights).is_dir() else weights,
        prompts=abspath(prompts) if prompts is not None and Path(prompts).is_file() else prompts,
        out=Address(out if is_remote(out) else abspath(local_path(out))),
    )


def _absolute(pair: Listed) -> Listed:
    """The table is read from any folder."""

    found = {camera: at if is_remote(at) else abspath(local_path(at)) for camera, at in pair.files().items()}
    return replace(pair, **found)


def _require_apart(pairs: Sequence[Listed], folder: Folder, manifest: str) -> None:
    """InputError if a result would replace an input, or if a pattern would find the results at the next run."""

    inputs, out = _inputs(pairs), _place(folder.address)
    for name in _names(pair.id for pair in pairs):
        if (hit := inputs.get(f"{out}/{name}")) is not None:
            raise InputError(f"{hit}: would be overwritten by a result of that name; choose another --out")
    if "*" in manifest and (out in {parent(at) for at in inputs} or ("**" in manifest and _below(out, manifest))):
        raise InputError(f"{folder.address}: is where {manifest} looks for inputs, and the next run would find the "
                         "results; choose another --out")  # fmt: skip


def _place(address: str) -> str:
    return address if is_remote(address) else realpath(address)


def _inputs(pairs: Sequence[Listed]) -> dict[str, str]:
    """Where they lie -> as they are listed."""
    return {_place(address): address for pair in pairs for address in pair.files().values()}


def _names(ids: Iterable[str]) -> Iterable[str]:
    """The names of all files that there may be of the pairs."""
    return (f"{id}{ending}" for id in ids for ending in ENDINGS)


def _below(out: str, pattern: str) -> bool:
    root = fixed_part(pattern)
    return f"{out}/".startswith(f"{_place(root)}/")


def _request(options: PredictOptions, pairs: Sequence[Listed]) -> tuple[Request, FusionSAM]:
    require_possible(options, any(pair.radiometric is not None for pair in pairs))
    if options.align == AUTO and any(is_remote(address) for pair in pairs for address in pair.files().values()):
        raise InputError("--align auto: looks at local pairs; find the rig by fusionsam align and give rig.json")
    entries = [
        Entry(pair.id, local_path(pair.visible), local_path(pair.infrared))
        for pair in pairs
        if options.align == AUTO and pair.visible is not None and pair.infrared is not None
    ]
    aligner = open_aligner(options.align, partial(fit, entries), frame=options.frame, refine=not options.no_refine)
    # what is asked for is known without the workers' device
    model = open_model(replace(options, device="cpu") if options.engine == "ray" else options)
    request = describe(options, model, aligner, [pair.id for pair in pairs])
    return request, model


def _open_table(folder: Folder, request: Request, pairs: list[Listed]) -> list[Shard]:
    """The shards that are still to be done. InputError where the table is of other pairs or settings."""
    options = request.options
    if not folder.remote:
        for place in (folder.address, folder / TABLE):
            require_writable(place)
    record: JsonObject = {**request.settings, "batch_size": options.batch_size, "shard": options.shard}
    stored = folder.read(RECORD)
    if options.overwrite:
        _remove(folder, pairs)
    elif stored is None:
        _require_empty(folder, pairs)
    else:
        _require_same(folder / RECORD, stored, record)
    if stored is None or options.overwrite:
        folder.write(RECORD, (json.dumps(record, indent=1) + "\n").encode())
    size = options.shard
    shards = [Shard(i, pairs[i * size : (i + 1) * size]) for i in range(-(-len(pairs) // size))]
    return _unfinished(folder, shards) if stored is not None and not options.overwrite else shards


def _require_empty(folder: Folder, pairs: Sequence[Listed]) -> None:
    there = set(folder.names())
    names = (name for name in _names(pair.id for pair in pairs) if name in there)
    if (name := next(iter((*map(shard_name, _parts(folder)), *names)), None)) is not None:
        raise InputError(f"{folder / name}: is there, and no {RECORD} of ours tells of it; {ANOTHER}")


def _parts(folder: Folder) -> list[int]:
    """Numbers of the shards that the table has."""
    names = [name.split(".")[0].removeprefix("part-") for name in folder.names(TABLE, "part-*.parquet")]
    return [int(name) for name in names if name.isdigit()]


def _remove(folder: Folder, pairs: Sequence[Listed]) -> None:
    """Take away the table and the files of the pairs, those that it lists among them, but for inputs. The record goes
    first, and a part of the table after its files: a run that ends here leaves nothing that passes for a result."""
    there, inputs = set(folder.names()), _inputs(pairs)
    if folder.read(RECORD) is not None:
        folder.remove(RECORD)

    def clear(ids: Iterable[str]) -> None:
        for name in _names(ids):
            if name in there and _place(folder / name) not in inputs:
                folder.remove(name)
                there.discard(name)

    def clear_part(index: int) -> None:
        try:
            ids = open_shard(folder, index).column("id").to_pylist()
        except InputError:  # damaged: of its pairs those are known that are listed now
            ids = []
        clear(ids)
        folder.remove(shard_name(index))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(clear_part, _parts(folder)))
    clear(pair.id for pair in pairs)


def _require_same(place: str, stored: bytes, record: JsonObject) -> None:
    try:
        found = json.loads(stored)
        if not isinstance(found, dict):
            raise ValueError
    except ValueError:
        raise InputError(f"{place}: was not written by predict; choose another --out") from None
    changed = [key for key in {**record, **found} if found.get(key) != json.loads(json.dumps(record.get(key)))]
    if changed:
        words = ", ".join(_difference(key, found, record) for key in changed)
        raise InputError(f"{place}: these results were made with another {words}; {ANOTHER}")


def _difference(key: str, found: JsonObject, record: JsonObject) -> str:
    """A setting in words, with both values where it is an option that a person can read (most others are digests)."""
    words = key.replace("_", " ")
    option = {each.name: each.default for each in fields(PredictOptions)}
    if key not in option:
        return words
    then, now = (_in_words(settings.get(key, option[key])) for settings in (found, record))
    return words if max(len(then), len(now)) > DIGEST else f"{words} ({then}, now {now})"


def _in_words(value: object) -> str:
    """A setting as one would type it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _unfinished(folder: Folder, shards: list[Shard]) -> list[Shard]:
    """Shards that are not in the table, or are of other rows of the manifest by now, or have errors. InputError where
    the table tells of pairs that are not listed any more, or of other files."""
    listed = {pair.id: pair for shard in shards for pair in shard.pairs}

    def look(shard: Shard) -> Shard | None:
        table, place = open_shard(folder, shard.index), folder / shard_name(shard.index)
        if (table.schema.metadata or {}).get(b"pairs") == pairs_digest(shard.pairs).encode():
            errors = len(table) - table.column("error").null_count
            return replace(shard, errors=errors) if errors else None
        for row in table.select(["id", *CAMERAS, "error"]).to_pylist():
            pair = listed.get(row["id"])
            if pair is None:
                raise InputError(f"{place}: tells of {row['id']}, which the manifest does not list; {ANOTHER}")
            files = {camera: row[camera] for camera in CAMERAS if row[camera] is not None}
            if row["error"] is None and pair.files() != files:  # what failed may have got its files by now
                raise InputError(f"{place}: {row['id']} is of other files than the manifest lists; {ANOTHER}")
        return shard

    indices = _parts(folder)
    stored = [shards[i] if i < len(shards) else Shard(i, []) for i in indices]  # what is beyond them tells of more
    with ThreadPoolExecutor(16) as pool:
        looked = dict(zip(indices, pool.map(look, stored), strict=True))
    found = [looked.get(shard.index, shard) for shard in shards]
    return [shard for shard in found if shard is not None]


class _Tally:
    """What is done, what failed, and what is to be told at the end."""

    def __init__(self, total: int, done: int, failed: int) -> None:
        self.total, self.seen, self.failed = total, done, failed
        self.new, self.first = 0, list[str]()
        self.notices: Counter[str] = Counter()
        self.aligned = Agreement()
        self.started = time.monotonic()

    def add(self, done: Done, shard: Shard, limit: float) -> None:
        """One shard more. InputError where it is the end of the run."""
        if done.fatal:
            raise InputError(done.fatal)
        tried = shard.errors or len(shard.pairs)
        self.seen += 0 if shard.errors else tried
        self.failed += done.failed - shard.errors
        self.new += tried - done.failed
        self.first += [done.first] if done.first else []
        for kind, (count, text) in done.notices.items():
            if not self.notices[kind]:
                say(text)
            self.notices[kind] += count
        for told in done.aligned:
            self.aligned.add(told)
        if self.seen >= min(ENOUGH, self.total) and self.failed > limit * self.seen:
            raise InputError(
                f"{self.failed} of {self.seen} pairs failed, more than --max-failure-rate {limit:g}; the first: "
                f"{self.first[0] if self.first else 'an earlier one'}; mend it and give the same command again"
            )

    def close(self, folder: Folder, align: str) -> tuple[int, int]:
        """Tell how it went; pairs that are done now, and the exit code."""
        for kind, count in self.notices.items():
            if count > 1:
                say(f"{kind}: {count} of {self.total} pairs, each told in its JSON")
        for line in self.aligned.lines(align):
            tqdm.write(line)
        if self.new:
            say(f"{self.new / (time.monotonic() - self.started):.1f} pairs a second")
        if self.failed:
            where = f"the column error of {folder / TABLE}"
            say(f"failed: {self.failed} of {self.total} pairs; the reasons are in {where}; the first:")
            for line in self.first[:5]:
                say(f"  {line}")
        return self.new, SOME_FAILED if self.failed else 0


def _work(request: Request, model: FusionSAM, folder: Folder, shards: list[Shard], tally: _Tally) -> None:
    by_index = {shard.index: shard for shard in shards}
    pairs = sum(len(shard.pairs) for shard in shards)
    with progress_bar(range(pairs), desc="predict", unit="pair") as bar:
        work = _on_ray if request.options.engine == "ray" else _here
        with closing(work(request, model, folder, shards, bar.update)) as finished:
            for done in finished:
                tally.add(done, by_index[done.index], request.options.max_failure_rate)


def _here(request: Request, model: FusionSAM, folder: Folder, shards: list[Shard], tick: Tick) -> Generator[Done]:
    worker = Worker(request, folder.address, model, tick)
    for shard in shards:
        yield worker(shard)


def _on_ray(request: Request, model: FusionSAM, folder: Folder, shards: list[Shard], tick: Tick) -> Generator[Done]:
    from fusionsam.inference import ray_engine

    with closing(ray_engine.work(request, folder.address, shards)) as finished:
        for done in finished:
            tick(done.pairs)
            yield done
