"""The pairs of a table, shard by shard: a worker makes the results of one shard, then the shard's rows of the results
table. A shard whose rows are there is finished, so a run may be killed at any time and goes on by the table alone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusionsam.data.manifests import CAMERAS, Listed
from fusionsam.data.splits import Entry
from fusionsam.data.storage import Folder, file_name, is_remote, local_path, read_bytes
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.results import (
    RECORD,
    SOURCES,
    Read,
    Request,
    fingerprint,
    identity,
    open_model,
    predict_alike,
)
from fusionsam.types import InputError, JsonObject

TABLE = "results"
"""Subfolder of the results table."""
AHEAD = 32
"""Files that are fetched, or written, beside the network."""
Row = dict[str, str | int | float | list[str] | None]
"""One row of the results table."""


def shard_name(index: int) -> str:
    """File of the results table."""
    return f"{TABLE}/part-{index:06d}.parquet"


def schema(classes: Sequence[str]) -> pa.Schema:
    """Columns of the results table: shares in percent of the pixels, confidence the mean probability of the class that
    was chosen (0-1), error null where all went well."""
    text, size, number = pa.string(), pa.int32(), pa.float64()
    columns = [("id", text), *((camera, text) for camera in CAMERAS), ("files", pa.list_(text))]
    columns += [("height", size), ("width", size), *((f"share_{name}", number) for name in classes)]
    return pa.schema([*columns, ("confidence", number), ("error", text)])


def pairs_digest(pairs: Sequence[Listed]) -> str:
    """What a shard's rows are of."""
    listed = [[pair.id, pair.files(), *([pair.alone] if pair.alone else [])] for pair in pairs]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """Pairs that become one file of the results table."""

    index: int
    pairs: list[Listed]
    errors: int = 0
    """Of a shard that the table has: pairs that failed, which are tried again."""


@dataclass
class Done:
    """What a worker tells of a shard."""

    index: int
    pairs: int
    failed: int = 0
    first: str = ""
    """Of those that failed: id and reason."""
    notices: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind -> how many pairs had it, and the sentence of the first."""
    aligned: list[JsonObject] = field(default_factory=list)
    fatal: str = ""
    """Why the run cannot go on, as where results cannot be written."""


class Worker:
    """One model, and the shards it is given."""

    def __init__(
        self, request: Request, out: str, model: FusionSAM | None = None, tick: Callable[[int], object] = lambda _: None
    ) -> None:
        """`out` is the folder of the results; the `model` is loaded where it is left out; `tick` is told how many pairs
        are done. InputError for weights that are not those of the request: another file of that name elsewhere."""
        self.request, self.options, self.folder, self.tick = request, request.options, Folder(out), tick
        if model is None and fingerprint(self.options.weights, self.options.backend) != request.settings["weights"]:
            raise InputError(f"weights {self.options.weights}: differ from machine to machine; copy one file to all")
        self.model = open_model(self.options) if model is None else model
        self.schema = schema(self.model.config.classes)

    def __call__(self, shard: Shard) -> Done:
        """Make the results of a shard and write its rows."""
        done = Done(shard.index, len(shard.pairs))
        try:
            rows = self._rows(shard, done)
        except InputError as error:
            done.fatal = str(error)
            return done
        failed = [row for row in rows if row["error"]]
        done.failed, done.first = len(failed), f"{failed[0]['id']}: {failed[0]['error']}" if failed else ""
        return done

    def _rows(self, shard: Shard, done: Done) -> list[Row]:
        kept: dict[str, Row] = {}
        pairs = shard.pairs
        if shard.errors:
            kept = {str(row["id"]): row for row in read_rows(self.folder, shard.index) if not row["error"]}
            pairs = [pair for pair in shard.pairs if pair.id not in kept]
            if self.options.batch_size > 1 and any(map(self._readable, pairs)):
                kept, pairs = {}, shard.pairs  # or it would be predicted in another company, with other roundings
        self.tick(len(shard.pairs) - len(pairs))
        with ThreadPoolExecutor(8) as pool, TemporaryDirectory(prefix="fusionsam-") as scratch:
            kept |= self._predict(pairs, pool, Path(scratch), done)
        rows = [kept[pair.id] for pair in shard.pairs]
        table = pa.Table.from_pylist(rows, schema=self.schema.with_metadata({"pairs": pairs_digest(shard.pairs)}))
        data = io.BytesIO()
        pq.write_table(table, data, compression="zstd")
        self.folder.write(shard_name(shard.index), data.getvalue())
        return rows

    def _predict(self, pairs: list[Listed], pool: ThreadPoolExecutor, scratch: Path, done: Done) -> dict[str, Row]:
        """Rows by id; the results of all of them are written when this returns."""
        rows: dict[str, Row] = {}
        writes: list[Future[None]] = []
        waiting: dict[tuple[object, ...], list[_Coming]] = {}

        def predict(group: list[_Coming]) -> None:
            for read, prediction in self._predictions(group, rows):
                rows[read.pair.id] = self._put(read, prediction, pool, writes)
            self.tick(len(group))

        for read in _fetch(pairs, pool, scratch):
            try:
                self._decode(read, done)
            except InputError as error:
                rows[read.pair.id] = self._error(read.pair, error, read.local)
                self.tick(1)
                continue
            assert read.opened is not None
            sample = read.opened.sample
            key = (sample.size, sample.visible is None, sample.infrared is None, sample.covered is None)
            waiting.setdefault(key, []).append(read)
            if len(waiting[key]) == self.options.batch_size:
                predict(waiting.pop(key))
        for group in waiting.values():
            predict(group)
        for write in writes:
            write.result()
        return rows

    def _decode(self, read: _Coming, done: Done) -> None:
        """Fill in the sample, and note what is odd about it. InputError where it cannot be read."""
        if isinstance(read.local, InputError):
            raise read.local
        pair = read.pair
        for camera, path in read.local.items():
            address = pair.files()[camera]
            # of a file elsewhere there is no time that all file systems tell
            read.sources[camera] = [address, path.stat().st_size, None] if is_remote(address) else identity(path)
        visible, infrared, radiometric = (read.local.get(camera) for camera in CAMERAS)
        read.opened = self.request.read(Entry(pair.id, visible, infrared, radiometric=radiometric))
        sample = read.opened.sample
        for notice in sample.notices:
            first = f"{pair.id}: {_by_address(notice.sentence(options=True), read)}"
            count, first = done.notices.get(notice.kind, (0, first))
            done.notices[notice.kind] = (count + 1, first)
        if sample.alignment:
            done.aligned.append(
                {k: v for k, v in sample.alignment.items() if k in ("score", "covered", "warning", "applied")}
            )

    def _readable(self, pair: Listed) -> bool:
        with ThreadPoolExecutor(1) as pool, TemporaryDirectory(prefix="fusionsam-") as scratch:
            (read,) = _fetch([pair], pool, Path(scratch))
            try:
                self._decode(read, Done(0, 0))
            except InputError:
                return False
        return True

    def _predictions(self, group: list[_Coming], rows: dict[str, Row]) -> Iterator[tuple[_Coming, Prediction]]:
        """Predictions of a group of equal size; those that fail become rows."""
        samples = [read.opened.sample for read in group if read.opened is not None]
        try:
            yield from zip(group, predict_alike(self.model, samples, self.options), strict=True)
        except InputError as error:
            if len(group) == 1:
                rows[group[0].pair.id] = self._error(group[0].pair, error, group[0].local)
            for read in group if len(group) > 1 else ():
                yield from self._predictions([read], rows)

    def _put(self, read: _Coming, prediction: Prediction, pool: ThreadPoolExecutor, writes: list[Future[None]]) -> Row:
        """The row of a pair, whose pictures and JSON are on their way."""
        assert read.opened is not None
        pair, results = read.pair, self.request.results(read.opened, read.sources, prediction)
        prediction = results.prediction
        results.told.pop("seconds")  # results are the same bytes wherever and whenever they are made
        text = _by_address(json.dumps(results.told, indent=1), read, in_json=True) + "\n"
        files = {f"{pair.id}{ending}": data for ending, data in results.files.items()}
        files[f"{pair.id}{RECORD}"] = text.encode()
        while len(writes) >= AHEAD:
            writes.pop(0).result()
        writes.extend(pool.submit(self.folder.write, name, data) for name, data in files.items())
        height, width = prediction.labels.shape
        counts = np.bincount(prediction.labels.ravel(), minlength=len(prediction.classes))
        shares = {
            f"share_{name}": round(100 * float(counts[index]) / prediction.labels.size, 4)
            for index, name in enumerate(prediction.classes)
        }
        confidence = round(float(prediction.confidence.mean(dtype=np.float64)), 4)
        row: Row = {**dict.fromkeys(CAMERAS), **pair.files(), "id": pair.id, "files": [*files]}
        return {**row, "height": height, "width": width, **shares, "confidence": confidence, "error": None}

    def _error(self, pair: Listed, error: InputError, local: dict[str, Path] | InputError) -> Row:
        """The row of a pair that failed. InputError where the run is to end at the first."""
        text = _by_address(" ".join(str(error).split()), _Coming(pair, local)).removeprefix(f"{pair.id}: ")
        if self.options.stop_on_error:
            raise InputError(f"{pair.id}: {text}")
        empty = dict.fromkeys(self.schema.names)
        return {**empty, **pair.files(), "id": pair.id, "files": [], "error": text}


@dataclass
class _Coming:
    """A pair on its way into the network."""

    pair: Listed
    local: dict[str, Path] | InputError
    """Camera -> file on this machine, or why there is none."""
    sources: JsonObject = field(default_factory=lambda: dict.fromkeys(SOURCES))
    opened: Read | None = None


def _fetch(pairs: Sequence[Listed], pool: ThreadPoolExecutor, scratch: Path) -> Iterator[_Coming]:
    """The pairs in order, their files on this machine while they are looked at; the next AHEAD are on their way."""

    def bring(number: int) -> _Coming:
        if (reason := pairs[number].alone) is not None:
            return _Coming(pairs[number], InputError(reason))
        local: dict[str, Path] = {}
        for camera, address in pairs[number].files().items():
            local[camera] = local_path(address)
            if is_remote(address):
                try:
                    data = read_bytes(address)
                except InputError as error:
                    return _Coming(pairs[number], error)
                local[camera] = scratch / f"{number}-{camera}" / (file_name(address) or "file")
                local[camera].parent.mkdir()
                local[camera].write_bytes(data)
        return _Coming(pairs[number], local)

    coming: list[Future[_Coming]] = [pool.submit(bring, number) for number in range(min(AHEAD, len(pairs)))]
    for number in range(len(pairs)):
        read = coming.pop(0).result()
        if number + AHEAD < len(pairs):
            coming.append(pool.submit(bring, number + AHEAD))
        yield read
        for path in () if isinstance(read.local, InputError) else read.local.values():
            if path.is_relative_to(scratch):
                path.unlink()


def _by_address(text: str, read: _Coming, in_json: bool = False) -> str:
    """`text` with the addresses of a pair's files in place of their copies on this machine."""
    for camera, path in () if isinstance(read.local, InputError) else read.local.items():
        if is_remote(address := read.pair.files()[camera]):
            old, new = (json.dumps(name)[1:-1] if in_json else name for name in (str(path), address))
            text = text.replace(old, new)
    return text


def read_rows(folder: Folder, index: int) -> list[Row]:
    """The rows of one shard. InputError where it is no table of ours."""
    return open_shard(folder, index).to_pylist()


def open_shard(folder: Folder, index: int) -> pa.Table:
    """One shard as a table. InputError where it is no table of ours."""
    data = folder.read(shard_name(index))
    try:
        table = pq.read_table(io.BytesIO(data or b""))
        if not {"id", *CAMERAS, "error"} <= set(table.column_names):
            raise ValueError(f"its columns are {table.column_names[:5]}")
        return table
    except (pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{folder / shard_name(index)}: is no shard of ours ({reason}); remove it, or choose another "
                         "--out") from None  # fmt: skip
