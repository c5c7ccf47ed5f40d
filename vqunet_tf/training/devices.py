"""Which devices train: a `tf.distribute` strategy by name."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import keras

from vqunet_tf.errors import choice

STRATEGIES = ("auto", "none", "mirrored")


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """The scope in which models are made and trained.

    `auto` mirrors over the GPUs when there are several, `mirrored` over all GPUs (or logical CPUs), `none` is one
    device. Backends other than TensorFlow always train on one.
    """
    choice("strategy", name, STRATEGIES)
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


def is_chief() -> bool:
    """Whether this process writes files: of several workers only the first does."""
    return True


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """One strategy for the whole process: two would number their all-reduces alike, and TensorFlow mixes them up."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(list(devices))
