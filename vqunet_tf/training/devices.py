"""Which devices train: a `tf.distribute` strategy by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from vqunet_tf.errors import choice
from vqunet_tf.training import workers

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


def start(name: str, say: Callable[[str], Any] = lambda line: None) -> None:
    """Joins the other workers of `multi_worker`; call it before anything is computed. Nothing for other names."""
    choice("strategy", name, STRATEGIES)
    if name == "multi_worker":
        workers.join(say)
    else:
        workers.leave()


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """The scope in which models are made and trained.

    `auto` mirrors over the GPUs when there are several, `mirrored` over all GPUs (or logical CPUs), `none` is one
    device, `multi_worker` all GPUs (or one CPU) of every worker in TF_CONFIG. Backends other than TensorFlow always
    train on one.
    """
    choice("strategy", name, STRATEGIES)
    if name == "multi_worker":
        return workers.join().scope()
    if name == "none" or keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    if name == "auto" and len(gpus) < 2:
        return contextlib.nullcontext()
    devices = gpus or tf.config.list_logical_devices("CPU")
    return _mirrored(tuple(device.name for device in devices)).scope()


def replicas(name: str) -> int:
    """How many devices train in step under this strategy."""
    with scope(name) as strategy:
        return 1 if strategy is None else strategy.num_replicas_in_sync


@contextlib.contextmanager
def normalised_together(model: keras.Model, name: str) -> Iterator[None]:
    """Inside, batch normalisation takes its moments over the batch of all replicas, as one device would.

    Otherwise every replica keeps moving statistics of its own and those of the first are saved.
    """
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    several = replicas(name) > 1
    for layer in norms:
        layer.synchronized = several
    try:
        yield
    finally:
        for layer in norms:
            layer.synchronized = False


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Inside, layers are made with this dtype policy, such as `mixed_bfloat16`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


is_chief = workers.is_chief


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """One strategy for the whole process: two would number their all-reduces alike, and TensorFlow mixes them up."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(list(devices))
