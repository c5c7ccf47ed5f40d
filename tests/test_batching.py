"""Dynamic batching: what waits together runs together, the queue is bounded, and nothing runs for nobody."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from served import until

from serving.batching import Batcher, BatchingOptions
from serving.refusal import Refused


class Counting:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.length = 0
        self.batches = []

    def waiting(self, images):
        self.length = images

    def ran(self, images, queued_seconds, run_seconds):
        self.batches.append(images)


class Gated:
    """Doubles numbers, but only while its gate is open; keeps the batches it was given."""

    def __init__(self):
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.seen = []

    def __call__(self, inputs):
        self.seen.append(inputs["x"].tolist())
        self.started.release()
        assert self.gate.wait(30)
        if -1 in inputs["x"]:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "minus one")
        return {"y": 2 * inputs["x"]}


@pytest.fixture
def make():
    """Makes batchers and ends their threads."""
    made = []

    def make(**options):
        observer = Counting()
        made.append(Batcher(BatchingOptions(**{"num_batch_threads": 1, **options}), observer))
        return made[-1], observer

    yield make
    for batcher in made:
        batcher.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def ask(batcher, function, numbers, seconds=30.0, watch=lambda cancel: None):
    return batcher.run(function, {"x": np.array(numbers)}, seconds, watch)["y"].tolist()


def blocked(batcher, pool):
    """A function whose first batch is running and stays there, so that what comes next must wait."""
    function = Gated()
    first = pool.submit(ask, batcher, function, [0])
    assert function.started.acquire(timeout=30)
    return function, first


def test_what_waits_runs_together_and_each_gets_its_own(make, pool):
    batcher, observer = make(max_batch_size=8)
    function, first = blocked(batcher, pool)
    asked = [[1], [2, 3], [4], [5, 6, 7]]
    answers = []
    for place, numbers in enumerate(asked):
        answers.append(pool.submit(ask, batcher, function, numbers))
        until(lambda place=place: observer.length == 1 + sum(map(len, asked[: place + 1])))
        time.sleep(0.01)  # from being taken in to being in the queue
    function.gate.set()
    assert [answer.result(30) for answer in answers] == [[2], [4, 6], [8], [10, 12, 14]]
    assert first.result(30) == [0]
    assert function.seen == [[0], [1, 2, 3, 4, 5, 6, 7]]
    until(lambda: observer.length == 0)
    assert observer.batches == [1, 7]


def test_batches_are_not_larger_than_allowed(make, pool):
    batcher, observer = make(max_batch_size=4)
    function, _ = blocked(batcher, pool)
    answers = [pool.submit(ask, batcher, function, [i, i, i]) for i in range(1, 6)]
    until(lambda: observer.length == 16)
    function.gate.set()
    assert [answer.result(30) for answer in answers] == [[2 * i] * 3 for i in range(1, 6)]
    assert max(map(len, function.seen)) == 3  # two requests of 3 do not fit into 4


def test_a_larger_request_is_run_in_parts(make):
    batcher, observer = make(max_batch_size=4)
    function = Gated()
    function.gate.set()
    assert ask(batcher, function, range(10)) == list(range(0, 20, 2))
    assert [len(batch) for batch in function.seen] == [4, 4, 2]
    assert observer.length == 0


def test_a_full_queue_refuses_at_once_and_stays_as_long_as_it_is(make, pool):
    batcher, observer = make(max_batch_size=2, max_enqueued_batches=3)
    function, first = blocked(batcher, pool)
    waiting = [pool.submit(ask, batcher, function, [i]) for i in range(5)]
    until(lambda: observer.length == 6)
    start = time.monotonic()
    for _ in range(100):
        with pytest.raises(Refused, match="the queue is full: 6 images wait, 6 may") as refused:
            ask(batcher, function, [9])
        assert refused.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert time.monotonic() - start < 1
    assert observer.length == 6
    function.gate.set()
    assert sorted(answer.result(30)[0] for answer in waiting) == [0, 2, 4, 6, 8]
    assert ask(batcher, function, [9]) == [18]
    assert 9 not in [number for batch in function.seen[:-1] for number in batch]


def test_a_request_larger_than_the_queue_runs_when_it_is_alone(make):
    batcher, _ = make(max_batch_size=2, max_enqueued_batches=1)
    function = Gated()
    function.gate.set()
    assert ask(batcher, function, range(7)) == list(range(0, 14, 2))


def test_waiting_for_others_ends_with_the_timeout_or_a_full_batch(make, pool):
    batcher, _ = make(max_batch_size=3, batch_timeout_micros=300_000)
    function = Gated()
    function.gate.set()
    start = time.monotonic()
    alone = ask(batcher, function, [1])
    assert alone == [2] and time.monotonic() - start >= 0.29
    together = [pool.submit(ask, batcher, function, [i]) for i in (2, 3)]
    assert [answer.result(30) for answer in together] == [[4], [6]]
    assert sorted(function.seen[-1]) == [2, 3]
    start = time.monotonic()
    full = ask(batcher, function, [4, 5, 6])
    assert full == [8, 10, 12] and time.monotonic() - start < 0.29


def test_what_is_cancelled_or_late_never_runs(make, pool):
    batcher, observer = make()
    function, first = blocked(batcher, pool)
    watched = []
    cancelled = pool.submit(ask, batcher, function, [1], 30.0, watched.append)
    late = pool.submit(ask, batcher, function, [2], 0.1)
    kept = pool.submit(ask, batcher, function, [3])
    until(lambda: observer.length >= 3 and watched)
    with pytest.raises(Refused) as refused:
        late.result(30)
    assert refused.value.code == grpc.StatusCode.DEADLINE_EXCEEDED  # while the worker is still busy
    watched[0]()
    with pytest.raises(Refused) as refused:
        cancelled.result(30)
    assert refused.value.code == grpc.StatusCode.CANCELLED
    function.gate.set()
    assert (kept.result(30), first.result(30)) == ([6], [0])
    assert function.seen == [[0], [3]]


def test_one_bad_request_fails_alone(make, pool):
    batcher, observer = make()
    function, _ = blocked(batcher, pool)
    answers = [pool.submit(ask, batcher, function, [number]) for number in (1, -1, 2)]
    until(lambda: observer.length == 4)
    time.sleep(0.02)
    function.gate.set()
    assert (answers[0].result(30), answers[2].result(30)) == ([2], [4])
    with pytest.raises(Refused, match="minus one"):
        answers[1].result(30)


def test_functions_are_not_mixed_and_the_oldest_runs_first(make, pool):
    batcher, observer = make()
    busy, _ = blocked(batcher, pool)
    order = []
    functions = {name: lambda inputs, name=name: order.append(name) or {"y": inputs["x"] + ord(name)} for name in "ab"}
    answers = []
    for place, name in enumerate("baab"):
        answers.append(pool.submit(ask, batcher, functions[name], [0]))
        until(lambda place=place: observer.length == place + 2)
        time.sleep(0.01)
    busy.gate.set()
    assert [answer.result(30) for answer in answers] == [[ord(name)] for name in "baab"]
    assert order == ["b", "a"]  # one batch of two each


def test_what_nobody_waits_for_leaves_the_queue_at_once(make, pool):
    batcher, observer = make(max_batch_size=2, max_enqueued_batches=2)
    function, first = blocked(batcher, pool)
    for _ in range(20):  # more than may wait, one after the other, while the worker is busy
        with pytest.raises(Refused, match="deadline"):
            ask(batcher, function, [1], 0.005)
    assert batcher._queues == {} and observer.length == 1
    function.gate.set()
    assert first.result(30) == [0] and ask(batcher, function, [2]) == [4]
    assert function.seen == [[0], [2]]


@pytest.mark.parametrize("answer", [np.float32(1.0), np.ones(7), np.ones((1, 4))])
def test_an_answer_that_is_not_one_row_for_each_image_is_refused_and_the_thread_lives(make, answer):
    batcher, _ = make()
    with pytest.raises(Refused, match=r"output 'y' has shape .* for a batch of 3: expected one row") as refused:
        ask(batcher, lambda inputs: {"y": answer}, [1, 2, 3])
    assert refused.value.code == grpc.StatusCode.INTERNAL
    assert ask(batcher, lambda inputs: {"y": 2 * inputs["x"]}, [1, 2, 3]) == [2, 4, 6]


def test_closing_runs_what_waits_and_refuses_what_comes(make, pool):
    batcher, observer = make(batch_timeout_micros=60_000_000)
    function = Gated()
    function.gate.set()
    waiting = pool.submit(ask, batcher, function, [1])
    until(lambda: observer.length == 1)
    batcher.close()
    assert waiting.result(30) == [2]
    with pytest.raises(Refused, match="stopping"):
        ask(batcher, function, [2])


def test_many_at_once_all_get_their_own(make, pool):
    batcher, observer = make(max_batch_size=16, num_batch_threads=2)
    function = Gated()
    function.gate.set()
    asked = [list(range(i, i + 1 + i % 5)) for i in range(400)]
    answers = pool.map(lambda numbers: ask(batcher, function, numbers), asked)
    assert list(answers) == [[2 * number for number in numbers] for numbers in asked]
    assert observer.length == 0
    assert sum(observer.batches) == sum(map(len, asked))
