"""Shards on Ray Data: a pool of workers on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import pickle
import zlib
from collections.abc import Generator, Iterator, Sequence

from fusionsam.inference.results import Request
from fusionsam.inference.shards import Done, Shard, Worker
from fusionsam.types import InputError

MEMORY = 256 << 20
"""Bytes of Ray's object store on one machine: shards are lists of addresses, pictures never pass through it."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
"""Set where nothing else is."""


class RayWorker:
    """A `Worker` of Ray Data: one row is one shard."""

    def __init__(self, request: bytes, out: str) -> None:
        self.worker, self.refused = None, ""
        try:
            self.worker = Worker(pickle.loads(request), out)
        except InputError as error:  # Ray would start a worker anew that ends while it begins
            self.refused = str(error)

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """Packed shard -> pickled Done."""
        shard = unpacked(row["shard"])
        if self.worker is None:
            return {"done": pickle.dumps(Done(shard.index, 0, fatal=self.refused))}
        return {"done": pickle.dumps(self.worker(shard))}


def packed(shard: Shard) -> bytes:
    """A shard on its way to a worker: addresses are much alike, and a million of them would fill the store."""
    return zlib.compress(pickle.dumps(shard))


def unpacked(data: bytes) -> Shard:
    """The shard."""
    found = pickle.loads(zlib.decompress(data))
    assert isinstance(found, Shard)
    return found


def work(request: Request, out: str, shards: Sequence[Shard]) -> Generator[Done]:
    """What the workers tell, in the order in which they finish. A worker that dies is replaced, and its shard done
    again. InputError where Ray is not installed or cannot be reached."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; pip install 'fusionsam[ray]', or leave it out") from None
    running = ray.is_initialized()
    try:
        _connect(request)
        yield from _stream(request, out, shards)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(f"--engine ray: {reason}; the same command goes on where it ended") from None
    finally:
        if not running:
            ray.shutdown()


def _connect(request: Request) -> None:
    import ray

    if ray.is_initialized():
        return
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                num_cpus=request.options.workers or os.cpu_count(),
                object_store_memory=MEMORY,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, and Exception itself of a slow start
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--engine ray: cannot be started or reached ({reason}); check RAY_ADDRESS") from None


def _stream(request: Request, out: str, shards: Sequence[Shard]) -> Iterator[Done]:
    import ray
    import ray.data

    have = ray.cluster_resources()
    device, gpus = request.options.device, int(have.get("GPU", 0))
    on_gpu = device.startswith("cuda") if device != "auto" else gpus > 0
    count = request.options.workers or (gpus if on_gpu else int(have.get("CPU", 1)))
    count = max(1, min(count, len(shards)))
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pairs
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [{"shard": packed(shard)} for shard in shards]
    found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RayWorker,  # type: ignore[arg-type] # a class is what a pool of actors takes
        fn_constructor_args=[pickle.dumps(request), out],
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    for row in found.iter_rows():
        yield pickle.loads(row["done"])
