"""The one seam to a Keras backend: replicas, input gradients, compilation. Nothing else asks which backend runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras


def replica() -> tuple[Any, int]:
    """Returns (index of this replica, number of replicas in step with it); (0, 1) without `tf.distribute`."""
    context = _tf_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return 0, 1
    return context.replica_id_in_sync_group, context.num_replicas_in_sync


def sum_over_replicas(*tensors: Any) -> list[Any]:
    """Sums each tensor over the replicas of a `tf.distribute` strategy, in one all-reduce.

    With one replica the tensors come back as they are. Under JAX a sharded array is global already.
    """
    context = _tf_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return list(tensors)
    return list(context.all_reduce("SUM", list(tensors)))


def share_of_loss(loss: Any) -> Any:
    """A replica's mean loss as its share of the mean over all: what a `compute_loss` of one's own must return.

    Keras sums gradients over replicas and divides only the losses it computes itself. The shares must be equal: a
    batch is a multiple of the replicas.
    """
    return loss / replica()[1]


def for_mean_over_workers(logs: dict[str, Any]) -> dict[str, Any]:
    """What a training step returns, in the shape that Keras can average over several workers.

    There Keras 3.15 takes the mean along axis 0, which a scalar does not have; it gives scalars back.
    """
    context = _tf_replica_context()
    several = context is not None and getattr(context.strategy.extended, "_in_multi_worker_mode", lambda: False)()
    return {name: value[None] for name, value in logs.items()} if several else logs


def feed(batches: keras.utils.PyDataset) -> Any:
    """Batches of one shape and a known number, as `fit` is to take them: made ahead of the steps, in other threads.

    Under TensorFlow a `tf.data.Dataset`. Keras makes one of its own, whose tuning thread sleeps for up to a minute at a time:
    the end of every epoch waits until it wakes. This one is not tuned.
    """
    if not is_tensorflow():
        return _Ahead(batches)
    import tensorflow as tf

    signature = keras.tree.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batches[0])
    count = len(batches)
    dataset = tf.data.Dataset.from_generator(lambda: (batches[i] for i in range(count)), output_signature=signature)
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2).with_options(options)


class _Ahead(keras.utils.PyDataset):
    """The same batches, the next few of an epoch made while the step before them runs."""

    ahead = 4

    def __init__(self, batches: keras.utils.PyDataset):
        super().__init__()
        self.batches = batches
        self.pool = ThreadPoolExecutor(self.ahead // 2)
        self.made: dict[int, Future[Any]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        if index not in self.made:  # an epoch begins, perhaps in another order
            self.made = {}
        for i in range(index, min(index + self.ahead, len(self))):
            if i not in self.made:
                self.made[i] = self.pool.submit(self.batches.__getitem__, i)
        return self.made.pop(index).result()


def argmax(scores: Any) -> Any:
    """Index of the largest number along the last axis, int32; the first of equals.

    `keras.ops.argmax` ranks -0.0 below 0.0, which takes it several passes over the scores; to us they are equal.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return tf.argmax(scores, axis=-1, output_type=tf.int32)
    if name == "jax":
        import jax.numpy as jnp

        return jnp.argmax(scores, axis=-1).astype("int32")
    return keras.ops.cast(keras.ops.argmax(scores, axis=-1), "int32")


def is_tensorflow() -> bool:
    """Whether TensorFlow runs the models, so that other things of it may be used beside them."""
    return keras.backend.backend() == "tensorflow"


def needs_jit() -> bool:
    """Whether models are to be compiled with the backend's own compiler, asked for or not.

    JAX is nothing without it. TensorFlow's graphs and PyTorch answer at once instead of after seconds of compilation.
    """
    return keras.backend.backend() == "jax"


def is_concrete(tensor: Any) -> bool:
    """Whether the values of a tensor can be looked at now: False while a function or a model is being traced."""
    name = keras.backend.backend()
    if isinstance(tensor, keras.KerasTensor):
        return False
    if name == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly()
    if name == "jax":
        import jax

        return not isinstance(tensor, jax.core.Tracer)
    return True


def input_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `g(x, *args)`: the gradient with respect to x of `sum(function(x, *args))`."""
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        def gradient(x: Any, *args: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.reduce_sum(function(x, *args))
            return tape.gradient(total, x)

    elif name == "jax":
        import jax

        def gradient(x: Any, *args: Any) -> Any:
            return jax.grad(lambda at: keras.ops.sum(function(at, *args)))(x)

    elif name == "torch":
        import torch

        def gradient(x: Any, *args: Any) -> Any:
            with torch.enable_grad():
                at = x.detach().requires_grad_(True)
                return torch.autograd.grad(function(at, *args).sum(), at)[0]

    else:
        raise ValueError(f"expected the Keras backend tensorflow, jax or torch, got {name!r}")
    return gradient


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of tensors where the backend can; its Keras variables must be frozen.

    TensorFlow compiles to a graph, not with XLA: on CPUs its loops and narrow convolutions were slower.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if name == "jax":
        import jax

        return jax.jit(function)
    return function


def make_deterministic() -> None:
    """Asks the backend for operations that repeat to the last bit, for the rest of the process."""
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif name == "torch":
        import torch

        torch.use_deterministic_algorithms(True)


def _tf_replica_context() -> Any:
    """The `tf.distribute` replica context, or None (another backend, or a model being built)."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()
