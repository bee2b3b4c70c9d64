"""The line before the one model: a bounded number of accepted requests, one thread that runs them, equal ones together.

Knows neither HTTP nor images: a job has a `key` (jobs of equal key may run as one batch, None runs alone) and a `cost`
(pixels), and `run` turns a list of such jobs into a list of results.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from fusionsam.types import InputError

log = logging.getLogger(__name__)


class Job(Protocol):
    """What can stand in line."""

    @property
    def key(self) -> Hashable | None:
        """Jobs of equal key may share a batch; None shares with nobody."""

    @property
    def cost(self) -> int:
        """Pixels, to bound a batch's memory."""


JobT = TypeVar("JobT", bound=Job)


class Busy(Exception):
    """All places are taken; `retry_after` is an estimate in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class Batcher(Generic[JobT]):
    """One worker thread before `run`. `capacity` counts accepted requests, waiting and running; a batch holds at most
    `max_batch` jobs and `max_cost` pixels (one job may exceed it). Work that would wait longer than `patience` seconds,
    as far as one can tell, is refused like work for which there is no place: its answer would come too late.
    `observe(size, seconds)` is told of every batch."""

    def __init__(
        self,
        run: Callable[[Sequence[JobT]], Sequence[object]],
        capacity: int = 64,
        max_batch: int = 8,
        max_cost: int = 2**20,
        patience: float = math.inf,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.capacity, self.max_batch, self.max_cost, self.patience = capacity, max_batch, max_cost, patience
        self.accepted = 0
        self._run, self._observe = run, observe
        self._line: deque[tuple[JobT, Future[object]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._mean_seconds = 0.1  # of one job, smoothed
        self._worker = threading.Thread(target=self._work, name="model", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        with self._changed:
            return sum(not future.cancelled() for _, future in self._line)

    @property
    def alive(self) -> bool:
        """Whether the worker can still take jobs."""
        return self._worker.is_alive() and not self._closed

    def refuse_if_full(self) -> None:
        """Raises Busy when no place is free or the line too long, before any work is spent on a request."""
        if self.accepted >= self.capacity or self.accepted * self._mean_seconds > self.patience:
            raise Busy(self.retry_after())

    def retry_after(self) -> int:
        """Seconds until the line of now should be done, 1 to 60."""
        return min(60, max(1, math.ceil(self.accepted * self._mean_seconds)))

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the `capacity` places, from acceptance to the finished answer. Raises Busy."""
        with self._changed:
            self.refuse_if_full()
            self.accepted += 1
        try:
            yield
        finally:
            with self._changed:
                self.accepted -= 1

    def submit(self, job: JobT) -> Future[object]:
        """The future result of `job`; cancelling it while it waits takes it out of the line."""
        future: Future[object] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._forget_cancelled()  # or their images would be held until the running batch ends
            self._line.append((job, future))
            self._changed.notify()
        return future

    def _forget_cancelled(self) -> None:
        self._line = deque(one for one in self._line if not one[1].cancelled())

    def close(self) -> None:
        """Finish the line, then stop the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    # -- the worker's thread -------------------------------------------------------------------------------------

    def _take(self) -> list[tuple[JobT, Future[object]]] | None:
        """The oldest job and those equal to it; None once closed and empty."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if self._line:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            batch: list[tuple[JobT, Future[object]]] = []
            rest: deque[tuple[JobT, Future[object]]] = deque()
            cost = 0
            for job, future in self._line:
                # equal to the first that was taken: the one before it in line may have been cancelled meanwhile
                fits = not batch or (
                    job.key is not None
                    and job.key == batch[0][0].key
                    and len(batch) < self.max_batch
                    and cost + job.cost <= self.max_cost
                )
                if not fits:
                    rest.append((job, future))
                elif future.set_running_or_notify_cancel():
                    batch.append((job, future))
                    cost += job.cost
            self._line = rest
            return batch

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[JobT, Future[object]]]) -> None:
        started = time.perf_counter()
        try:
            results = list(self._run([job for job, _ in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} jobs")
        except Exception as error:
            if len(batch) > 1:  # one bad job must not take the others with it
                for one in batch:
                    self._answer([one])
                return
            if not isinstance(error, InputError):
                log.exception("a job failed")
            batch[0][1].set_exception(error)
            return
        seconds = time.perf_counter() - started
        self._mean_seconds += 0.1 * (seconds / len(batch) - self._mean_seconds)
        self._observe(len(batch), seconds)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
