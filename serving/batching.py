"""Dynamic batching: what waits at the same time is run at once, a bounded queue, nothing run for nobody.

Requests for one function of one model wait in a queue of their own. A batch is formed when a worker is free and either
`max_batch_size` images wait or the oldest has waited `batch_timeout_micros`; so under load, batches fill while the
model runs, and alone a request waits for nothing. What is cancelled or past its deadline is dropped before it runs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np

from serving.model import Arrays
from serving.refusal import EXHAUSTED, Refused

LONGEST_WAIT = 3600.0  # seconds for a request without a deadline; a lock cannot wait for ever in one go

Function = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class BatchingOptions:
    """The names and meanings are those of TF Serving's batching parameters.

    max_batch_size: images run at once; a larger request is run in parts of this size.
    batch_timeout_micros: how long an image may wait for others while a worker is free.
    max_enqueued_batches: batches that may wait; beyond, requests are refused at once.
    num_batch_threads: batches run at the same time. One is enough on a CPU, where TensorFlow spreads a batch over the
        cores by itself: with two, batches stay smaller and cost more.
    """

    max_batch_size: int = 32
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 64
    num_batch_threads: int = 1

    @property
    def max_waiting(self) -> int:
        """Images that may wait."""
        return self.max_batch_size * self.max_enqueued_batches


class Observer(Protocol):
    """What is told of the work; see `serving.metrics`."""

    def waiting(self, images: int) -> None: ...

    def ran(self, images: int, queued_seconds: float, run_seconds: float) -> None: ...


@dataclass(eq=False)
class _Task:
    inputs: Arrays
    size: int
    deadline: float
    future: Future[Arrays] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs functions on batches, in threads of its own; `close` ends them."""

    def __init__(self, options: BatchingOptions, observer: Observer):
        self.options = options
        self._observer = observer
        self._changed = threading.Condition()
        self._queues: dict[Function, deque[_Task]] = {}
        self._admitted = 0  # images taken in and not yet run
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True)
            for number in range(options.num_batch_threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Function, inputs: Arrays, seconds: float, watch: Callable[[Callable], Any]) -> Arrays:
        """Returns `function(inputs)`, computed together with what else waits for `function`.

        seconds: until nobody waits for the answer.
        watch: is given a function to call if the client goes away.

        Raises a `Refused`: at once if too much waits, and when the time is over or the client is gone.
        """
        deadline = time.monotonic() + min(seconds, LONGEST_WAIT)
        size, most = len(next(iter(inputs.values()))), self.options.max_batch_size
        self._admit(size)
        left = size
        try:
            parts = []
            for start in range(0, size, most):
                part = {name: array[start : start + most] for name, array in inputs.items()} if size > most else inputs
                task = _Task(part, min(most, size - start), deadline)
                parts.append(self._answer(function, task, watch))
                left -= task.size
                self._release(task.size)
            if len(parts) == 1:
                return parts[0]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        finally:
            self._release(left)

    def close(self) -> None:
        """Ends the threads once they have run what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _admit(self, size: int) -> None:
        """Takes a request in, unless more than may wait would wait; one that is larger than that has to be alone."""
        with self._changed:
            if self._closed:
                raise Refused(grpc.StatusCode.UNAVAILABLE, "the server is stopping: ask another one")
            if self._admitted and self._admitted + size > self.options.max_waiting:
                words = f"the queue is full: {self._admitted} images wait, {self.options.max_waiting} may"
                raise Refused(EXHAUSTED, f"{words}: try again later, or slow down")
            self._admitted += size
            self._observer.waiting(self._admitted)

    def _release(self, size: int) -> None:
        with self._changed:
            self._admitted -= size
            self._observer.waiting(self._admitted)

    def _answer(self, function: Function, task: _Task, watch: Callable[[Callable], Any]) -> Arrays:
        watch(task.future.cancel)
        with self._changed:
            self._queues.setdefault(function, deque()).append(task)
            self._changed.notify()
        try:
            return task.future.result(max(0.0, task.deadline - time.monotonic()))
        except TimeoutError:
            self._forget(function, task)
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer was there"
            ) from None
        except CancelledError:
            self._forget(function, task)
            raise Refused(grpc.StatusCode.CANCELLED, "the client has gone") from None

    def _forget(self, function: Function, task: _Task) -> None:
        """Takes off the queue what nobody waits for, so that the queue holds no more than was admitted."""
        task.future.cancel()
        with self._changed:
            queue = self._queues.get(function)
            if queue and task in queue:
                queue.remove(task)
                if not queue:
                    del self._queues[function]

    # === Worker threads ===

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            function, tasks = batch
            if tasks:
                self._run(function, tasks)

    def _next(self) -> tuple[Function, list[_Task]] | None:
        """Waits for a batch; None once closed and nothing waits."""
        with self._changed:
            while True:
                function, wait = self._ripest()
                if function is not None and wait <= 0:
                    return function, self._take(function)
                if function is None and self._closed:
                    return None
                self._changed.wait(wait if function is not None else None)

    def _ripest(self) -> tuple[Function | None, float]:
        """The function whose batch is to run first, and in how many seconds."""
        now, patience = time.monotonic(), self.options.batch_timeout_micros / 1e6
        best: tuple[Function | None, float] = (None, 0.0)
        for function, queue in self._queues.items():
            full = sum(task.size for task in queue) >= self.options.max_batch_size
            wait = queue[0].since - now + (0.0 if full or self._closed else patience)
            if best[0] is None or wait < best[1]:
                best = (function, wait)
        return best

    def _take(self, function: Function) -> list[_Task]:
        """Takes what fits into a batch off the queue, and leaves out what nobody waits for."""
        queue, tasks, room = self._queues[function], [], self.options.max_batch_size
        now = time.monotonic()
        while queue and queue[0].size <= room:
            task = queue.popleft()
            if task.deadline > now and task.future.set_running_or_notify_cancel():
                tasks.append(task)
                room -= task.size
        if not queue:
            del self._queues[function]
        return tasks

    def _run(self, function: Function, tasks: list[_Task]) -> None:
        start = time.monotonic()
        try:
            parts = list(_split(function(_joined(tasks)), tasks))
        except Exception as error:
            if len(tasks) == 1:
                tasks[0].future.set_exception(error)
            else:  # one of them is to blame, and only that one is to hear of it
                for task in tasks:
                    self._run(function, [task])
            return
        size = sum(task.size for task in tasks)
        self._observer.ran(size, start - tasks[0].since, time.monotonic() - start)
        for task, part in zip(tasks, parts, strict=True):
            task.future.set_result(part)


def _joined(tasks: list[_Task]) -> Arrays:
    if len(tasks) == 1:
        return tasks[0].inputs
    return {name: np.concatenate([task.inputs[name] for task in tasks]) for name in tasks[0].inputs}


def _split(answer: Arrays, tasks: list[_Task]) -> Iterator[Arrays]:
    start, size = 0, sum(task.size for task in tasks)
    for name, array in answer.items():
        if array.shape[:1] != (size,):
            words = f"the model's output {name!r} has shape {list(array.shape)} for a batch of {size}: expected one row for each"
            raise Refused(grpc.StatusCode.INTERNAL, words)
    for task in tasks:
        yield {name: array[start : start + task.size] for name, array in answer.items()}
        start += task.size
