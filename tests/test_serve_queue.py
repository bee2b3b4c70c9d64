"""The server's line and its memory of sessions, without HTTP."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch

from conftest import build_debug
from fusionsam.errors import InputError
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.session import Session
from fusionsam.server.queue import Batcher, Busy
from fusionsam.server.sessions import Sessions
from fusionsam.types import Prompts


@dataclass
class Add:
    value: int
    key: str | None = "a"
    cost: int = 1


class Gated:
    """Results are value + 1; the first call waits until it is let go, so that a line can form behind it."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()
        self.batches = []

    def __call__(self, jobs):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([job.value for job in jobs])
        if any(job.value < 0 for job in jobs):
            raise InputError("negative")
        return [job.value + 1 for job in jobs]


def line_behind_a_gate(jobs, **settings):
    run = Gated()
    batcher = Batcher(run, **settings)
    first = batcher.submit(Add(0, key=None))
    assert run.begun.wait(30)
    futures = [batcher.submit(job) for job in jobs]
    return run, batcher, first, futures


def test_equal_keys_share_a_batch_in_order_within_number_and_cost():
    jobs = [Add(1), Add(2, "b"), Add(3), Add(4, None), Add(5), Add(6, "b"), Add(7, "b", cost=9), Add(8), Add(9, None)]
    run, batcher, first, futures = line_behind_a_gate(jobs, max_batch=3, max_cost=10)
    run.go.set()
    assert [f.result(30) for f in (first, *futures)] == [1, *(job.value + 1 for job in jobs)]
    assert run.batches == [[0], [1, 3, 5], [2, 6], [4], [7], [8], [9]]
    batcher.close()


def test_a_bad_job_fails_alone():
    run, batcher, _, futures = line_behind_a_gate([Add(1), Add(-1), Add(3)])
    run.go.set()
    assert (futures[0].result(30), futures[2].result(30)) == (2, 4)
    with pytest.raises(InputError, match="negative"):
        futures[1].result(30)
    assert batcher.alive
    batcher.close()


def test_a_cancelled_job_never_runs_and_closing_finishes_the_rest():
    run, batcher, _, futures = line_behind_a_gate([Add(1), Add(2), Add(3, "b")])
    assert futures[0].cancel()
    assert futures[2].cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    run.go.set()
    closing.join(30)
    assert futures[1].result(0) == 3  # was answered before close returned
    assert run.batches == [[0], [2]]
    assert not batcher.alive


def test_a_cancelled_job_is_let_go_before_the_running_batch_ends():
    run, batcher, _, futures = line_behind_a_gate([Add(1), Add(2, "b"), Add(3)])
    left = weakref.ref(futures[1])
    assert futures.pop(1).cancel()
    assert batcher.waiting == 2
    futures.append(batcher.submit(Add(4)))
    gc.collect()
    assert left() is None
    run.go.set()
    assert [future.result(30) for future in futures] == [2, 4, 5]
    batcher.close()


def test_a_cancelled_front_lends_its_key_to_nobody():
    """Cancelled between the look at the line's front and the taking of its jobs."""

    class Fickle(Add):
        future = None

        @property
        def key(self):
            if self.future is not None:
                self.future.cancel()
            return "a"

        @key.setter
        def key(self, value):
            pass

    run = Gated()
    batcher = Batcher(run)
    first = batcher.submit(Add(0, key=None))
    assert run.begun.wait(30)
    front = Fickle(1)
    futures = [batcher.submit(job) for job in (front, Add(2, "b"), Add(3, "a"))]
    front.future = futures[0]
    run.go.set()
    assert (first.result(30), futures[1].result(30), futures[2].result(30)) == (1, 3, 4)
    assert not any(2 in batch and len(batch) > 1 for batch in run.batches)
    batcher.close()


def test_a_line_that_is_too_long_to_be_answered_in_time_is_full():
    run, batcher, _, futures = line_behind_a_gate([Add(1)], capacity=100, patience=0.25)
    with batcher.place(), batcher.place():
        with batcher.place():  # the first guess is 0.1 s a job: 0.2 s are within 0.25
            pass
        with batcher.place(), pytest.raises(Busy), batcher.place():
            pass
    run.go.set()
    assert futures[0].result(30) == 2
    batcher.close()


def test_places_are_bounded_and_come_back():
    batcher = Batcher(lambda jobs: [None for _ in jobs], capacity=2)
    with batcher.place(), batcher.place():
        with pytest.raises(Busy) as refused, batcher.place():
            pass
        assert 1 <= refused.value.retry_after <= 60
        assert batcher.accepted == 2
    with pytest.raises(RuntimeError), batcher.place():
        raise RuntimeError
    assert batcher.accepted == 0
    batcher.close()


@pytest.fixture(scope="module")
def session():
    with torch.inference_mode():
        return FusionSAM(build_debug(), "debug", {}).encode(torch.rand(3, 67, 79), None)


def test_sessions_end_by_time_by_number_and_by_memory(session):
    now = [0.0]
    sessions = Sessions(seconds=10, count=3, max_bytes=10**9, clock=lambda: now[0])
    a, b = sessions.add(session), sessions.add(session)
    now[0] = 8
    assert sessions.get(a.id) is a  # used: its time begins anew
    now[0] = 11
    assert sessions.get(b.id) is None
    assert sessions.get(a.id) is a
    c, d, e = (sessions.add(session) for _ in range(3))
    assert [sessions.get(s.id) is s for s in (a, c, d, e)] == [False, True, True, True]
    assert sessions.remove(d.id)
    assert not sessions.remove(d.id)
    assert len(sessions) == 2

    small = Sessions(seconds=10, count=99, max_bytes=2 * session.nbytes, clock=lambda: now[0])
    kept = [small.add(session) for _ in range(4)]
    assert [small.get(s.id) is s for s in kept] == [False, False, True, True]
    assert small.nbytes == 2 * session.nbytes


@torch.inference_mode()
@pytest.mark.parametrize("size", [(67, 79), (601, 530)])  # the second exceeds debug's max_side
def test_one_encoding_serves_every_prompt_as_forward_does(size):
    network = build_debug()
    visible, infrared = torch.rand(1, 3, *size), torch.rand(1, 1, *size)
    session = Session(FusionSAM(network, "debug", {}), network.encode(visible, infrared))
    own = Prompts(points=torch.tensor([[[31.0, 17.0]]]), point_labels=torch.tensor([[1]]))
    for prompts, mode in ((None, "self"), (own, None), (None, "none"), (None, "self")):
        whole = network(visible, infrared, prompts, mode=mode)
        again = network.decode(session.encoded, prompts, mode)
        for name in ("logits", "fot_logits", "fused"):
            assert torch.equal(getattr(whole, name), getattr(again, name)), (mode, name)
