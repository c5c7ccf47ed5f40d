"""Several processes that train one model in step: who they are, how they wait for each other, what ends them.

    TF_CONFIG='{"cluster": {"worker": ["host-a:2222", "host-b:2222"]}, "task": {"type": "worker", "index": 0}}'

Worker 0 is the chief: it alone writes into the run folder, which must lie on a file system that all workers share. The
others wait for it and read what it wrote. Without a cluster everything here does nothing: one process is its own chief.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from vqunet_tf.errors import UserError
from vqunet_tf.training import rendezvous

EXAMPLE = '{"cluster": {"worker": ["host-a:2222", "host-b:2222"]}, "task": {"type": "worker", "index": 0}}'

_JOIN_SECONDS = 600  # TensorFlow's own is an hour
_HEARTBEAT_SECONDS = 10  # without a sign of life for so long, a worker is gone
_FILE_SECONDS = 90  # network file systems show new files late


@dataclass(frozen=True)
class Worker:
    """One process of a cluster."""

    index: int
    addresses: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.addresses)


@dataclass
class _Joined:
    """The cluster of this process: TensorFlow lets a process join one, once."""

    worker: Worker
    strategy: Any
    active: bool = True


_joined: _Joined | None = None


def described(text: str | None) -> Worker:
    """The worker that a TF_CONFIG describes; a `UserError` says what is wrong with it."""
    if not text:
        raise UserError(f"strategy multi_worker expects TF_CONFIG in the environment, got none: set it like {EXAMPLE}")
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"TF_CONFIG is not JSON ({error}): expected the like of {EXAMPLE}") from None
    cluster, task = _part(tree, "cluster"), _part(tree, "task")
    addresses = cluster.get("worker")
    if not isinstance(addresses, list) or not addresses or not all(map(_is_address, addresses)):
        raise UserError(f"TF_CONFIG: expected cluster.worker to list host:port of every worker, got {addresses!r}")
    if set(cluster) != {"worker"}:
        raise UserError(f"TF_CONFIG: expected a cluster of workers alone, got {', '.join(sorted(cluster))}")
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG: expected another host:port for every worker, got {', '.join(addresses)}")
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(addresses) or task.get("type") != "worker":
        raise UserError(
            f'TF_CONFIG: expected task {{"type": "worker", "index": 0 to {len(addresses) - 1}}}, got {json.dumps(task)}'
        )
    return Worker(index, tuple(addresses))


def join(say: Callable[[str], Any] = lambda line: None) -> Any:
    """The strategy of this process's cluster; the first call waits until all workers are there.

    It must come before TensorFlow computes anything in this process.
    """
    global _joined
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"strategy multi_worker expects the Keras backend tensorflow, got {keras.backend.backend()}: "
            "set KERAS_BACKEND=tensorflow, or train with --strategy=none"
        )
    worker = described(os.environ.get("TF_CONFIG"))
    if _joined is None:
        say(f"worker {worker.index} of {worker.count}: waiting for the others, {_JOIN_SECONDS // 60} minutes at most")
        rendezvous.meet(worker.index, worker.addresses, _JOIN_SECONDS)
        _joined = _Joined(worker, _strategy(worker))
    _joined.active = True
    return _joined.strategy


def leave() -> None:
    """What comes next in this process is trained by it alone."""
    if _joined is not None:
        _joined.active = False


def is_chief() -> bool:
    """Whether this process writes files: of several workers only the first does."""
    cluster = _cluster()
    return cluster is None or cluster.worker.index == 0


@contextlib.contextmanager
def chief_first() -> Iterator[None]:
    """The chief goes through the block alone, then the others do and find what it wrote."""
    if not is_chief():
        wait()
    yield
    if is_chief():
        wait()


def wait() -> None:
    """Returns when all workers have come here. Until then a signal ends the process: there is nothing to save."""
    with _mortal():
        _sums(0)


def appears(path: Path) -> None:
    """Returns when this worker sees a file that the chief has written; a `UserError` if it does not come."""
    end = time.monotonic() + (0 if is_chief() else _FILE_SECONDS)
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    if not path.exists() and not is_chief():
        raise UserError(
            f"{path}, which worker 0 wrote, is not to be seen on this one: give a --run_dir on a file system that all "
            "workers share"
        )


def agreed(stop: Callable[[], str | None]) -> Callable[[], str | None]:
    """`stop` of any worker as the `stop` of all, so that all end at the same step: each call waits for all workers.

    Args:
        stop: gives the name of the signal that came to this process, or None.
    """

    def stop_of_any() -> str | None:
        if _cluster() is None:
            return stop()
        names = ("SIGINT", "SIGTERM")
        counts = _sums(*(int(stop() == name) for name in names))
        return next((name for name, count in zip(names, counts, strict=True) if count), None)

    return stop_of_any


def same(what: str, value: int) -> None:
    """Raises a `UserError` on every worker unless all have the same number, which is `what`."""
    cluster = _cluster()
    if cluster is None:
        return
    mine = [value if i == cluster.worker.index else 0 for i in range(cluster.worker.count)]
    found = _sums(*mine)
    if len(set(found)) > 1:
        raise UserError(
            f"the workers differ in {what}: {', '.join(map(str, found))}; expected one run folder that all of them "
            "share: give a --run_dir on a shared file system"
        )


@contextlib.contextmanager
def loss_is_an_error(kept: object) -> Iterator[None]:
    """A worker that is gone ends this one with a `UserError`.

    TensorFlow notices it by missing heartbeats or a closed connection, and aborts what waits for that worker.

    Args:
        kept: where the checkpoints lie.
    """
    if _cluster() is None:
        yield
        return
    import tensorflow as tf

    gone = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
    )
    try:
        yield
    except (*gone, tf.errors.InternalError, tf.errors.FailedPreconditionError) as error:
        if not isinstance(error, gone) and "ollective" not in str(error):
            raise
        raise UserError(
            f"another worker is gone (it died, was stopped, or says why itself): the last checkpoint in {kept} is kept, "
            "give the same command again on all workers to go on"
        ) from error


def _cluster() -> _Joined | None:
    return _joined if _joined is not None and _joined.active else None


@contextlib.contextmanager
def _mortal() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the process at once: Python's handlers do not run while TensorFlow waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _part(tree: Any, name: str) -> dict[str, Any]:
    """The object `name` in a JSON tree; empty if there is none."""
    part = tree.get(name) if isinstance(tree, dict) else None
    return part if isinstance(part, dict) else {}


def _is_address(text: object) -> bool:
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return bool(host and colon) and port.isdecimal() and 0 < int(port) < 65536


def _sums(*values: int) -> list[int]:
    """Each number summed over all workers."""
    cluster = _cluster()
    if cluster is None:
        return list(values)
    import tensorflow as tf

    strategy = cluster.strategy
    # One value a replica: those of a worker beyond its first add nothing.
    first = cluster.worker.index * (strategy.num_replicas_in_sync // cluster.worker.count)

    def value_of(context: Any) -> Any:
        mine = context.replica_id_in_sync_group == first
        return tf.constant(values if mine else [0] * len(values), tf.float64)

    held = strategy.experimental_distribute_values_from_function(value_of)
    return [round(float(total)) for total in strategy.reduce("SUM", held, axis=None)]


def _strategy(worker: Worker) -> Any:
    import tensorflow as tf
    from tensorflow.python.eager import context  # the only way to the time-outs

    kinds = tf.distribute.experimental.CommunicationImplementation
    kind = kinds.AUTO if tf.config.list_physical_devices("GPU") else kinds.RING
    try:
        context.context().configure_coordination_service(
            "standalone",
            service_leader="/job:worker/replica:0/task:0",
            cluster_register_timeout_in_ms=1000 * _JOIN_SECONDS,
            heartbeat_timeout_in_ms=1000 * _HEARTBEAT_SECONDS,
            coordinated_jobs=[_job(worker.count)],
        )
        options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
        with _mortal():
            return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except RuntimeError as error:
        raise UserError(f"strategy multi_worker must come first in its process ({error}): train in a new one") from None
    except (tf.errors.OpError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"worker {worker.index} could not join {', '.join(worker.addresses)} ({first}): expected all workers to be "
            "started with the same cluster, each at its own address and able to reach the others"
        ) from None


def _job(count: int) -> Any:
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2

    return coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=count)
