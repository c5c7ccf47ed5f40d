"""The loops of CleverHans' gradient attacks, compiled whole; the only importer of `cleverhans`.

CleverHans 4.0.0, "Technical Report on the CleverHans v2.1.0 Adversarial Examples Library",
Papernot et al., https://arxiv.org/abs/1610.00768.

Its attacks draw their start from TensorFlow's global generator, which a compiled function does not let anyone seed, and
called eagerly they return to Python in every step. Here the start and all numbers are arguments of one program. Tests
hold each loop equal to CleverHans' own from the same start.

No `jit_compile`: XLA on CPU gives the body of a loop one thread (5 to 7 times slower, measured), and a step compiled
alone is 15 to 40 % slower than the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.utils import clip_eta, compute_gradient, optimize_linear

from vqunet_tf.attacks.base import Victim
from vqunet_tf.threat import Threat

_ORDER = {"linf": np.inf, "l2": 2}

# A power of two changes no bit of a sign and no direction. For l2 it matters: CleverHans divides the
# gradient by max(length, 1e-6), so that the steps of a confident classifier would shrink to nothing.
_SCALE = 2.0**40


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Of each image with integer labels, scaled; one object, as CleverHans compiles its gradient for each object."""
    return _SCALE * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def margin(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """By how much another class exceeds the labelled one, scaled: it does not flatten where the classifier is sure.

    "Towards Evaluating the Robustness of Neural Networks", Carlini & Wagner, https://arxiv.org/abs/1608.04644 (f6).
    """
    own = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    other = tf.reduce_max(tf.where(own > 0, logits.dtype.min, logits), axis=-1)
    return _SCALE * (other - tf.reduce_sum(own * logits, axis=-1))


LOSSES = {"ce": cross_entropy, "margin": margin}


def input_gradient(victim: Victim, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the gradient `[B,H,W,C]` that these attacks follow: of the loss with respect to the images.

    Zeros where the victim passes no gradient at all.
    """
    labels = tf.constant(labels, tf.int32)
    return compute_gradient(_watched(victim), cross_entropy, tf.constant(images), labels, False).numpy() / _SCALE


def descend(
    victim: Victim,
    threat: Threat,
    start: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    step_size: float,
    steps: int,
    targeted: bool = False,
    loss: str = "ce",
) -> np.ndarray:
    """`projected_gradient_descent` from `start`, one batch `[B,H,W,C]`, towards the labels or away from them."""
    program = _descent(victim, threat.norm, targeted, loss)
    return program(*_tensors(start, images, labels), *_numbers(threat, step_size, steps)).numpy()


def descend_until_fooled(
    victim: Victim,
    threat: Threat,
    start: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray,
    *,
    step_size: float,
    steps: int,
    targeted: bool = False,
    loss: str = "ce",
) -> np.ndarray:
    """`descend`, but an image leaves the loop at the first point that is not given its true class.

    Each image follows the same path, only not to its end. The batch may have any size.
    """
    program = _stopping_descent(victim, threat.norm, targeted, loss, images.shape[1:])
    tensors = (*_tensors(start, images, labels), tf.constant(truth, tf.int32))
    return program(*tensors, *_numbers(threat, step_size, steps)).numpy()


def momentum(
    victim: Victim,
    threat: Threat,
    start: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    step_size: float,
    steps: int,
    decay: float,
) -> np.ndarray:
    """`momentum_iterative_method` from `start`, one batch `[B,H,W,C]`, away from the labels."""
    numbers = (*_numbers(threat, step_size, steps), tf.constant(decay, tf.float32))
    return _momentum(victim, threat.norm)(*_tensors(start, images, labels), *numbers).numpy()


def climb(
    measure: Callable[[Any, Any], Any],
    threat: Threat,
    start: np.ndarray,
    images: np.ndarray,
    *,
    step_size: float,
    steps: int,
) -> np.ndarray:
    """The same steps on something other than a loss of logits: raises `measure(x, images)` → `[B]`."""
    tensors = (tf.constant(start), tf.constant(images))
    return _climb(measure, threat.norm)(*tensors, *_numbers(threat, step_size, steps)).numpy()


def _tensors(start: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[tf.Tensor, ...]:
    return tf.constant(start), tf.constant(images), tf.constant(labels, tf.int32)


def _numbers(threat: Threat, step_size: float, steps: int) -> tuple[tf.Tensor, ...]:
    """As tensors: one program for each victim, whatever the radius, the step and the number of steps."""
    return tf.constant(threat.epsilon, tf.float32), tf.constant(step_size, tf.float32), tf.constant(steps, tf.int32)


# The last few programs are kept, and with them their victims.
_kept = functools.lru_cache(maxsize=16)


@_kept
def _descent(victim: Victim, norm: str, targeted: bool, loss: str) -> Callable[..., tf.Tensor]:
    model_fn, order, loss_fn = _watched(victim), _ORDER[norm], LOSSES[loss]

    def loop(x, images, labels, epsilon, step_size, steps):  # type: ignore[no-untyped-def]
        for _ in tf.range(steps):
            x = fast_gradient_method(
                model_fn, x, step_size, order, loss_fn=loss_fn, clip_min=0.0, clip_max=1.0, y=labels, targeted=targeted
            )
            x = tf.clip_by_value(images + clip_eta(x - images, order, epsilon), 0.0, 1.0)
        return x

    return tf.function(loop)


@_kept
def _stopping_descent(
    victim: Victim, norm: str, targeted: bool, loss: str, shape: tuple[int, ...]
) -> Callable[..., tf.Tensor]:
    model_fn, order, loss_fn = _watched(victim), _ORDER[norm], LOSSES[loss]
    sign = -1.0 if targeted else 1.0
    batch, row, scalar = tf.TensorSpec((None, *shape)), tf.TensorSpec((None,), tf.int32), tf.TensorSpec(())

    def loop(start, images, labels, truth, epsilon, step_size, steps):  # type: ignore[no-untyped-def]
        result, x, rows = start, start, tf.range(tf.shape(start)[0])
        for _ in tf.range(steps):
            tf.autograph.experimental.set_loop_options(
                shape_invariants=[(x, batch.shape), (rows, row.shape), (result, batch.shape)]
            )
            near = tf.gather(images, rows)
            with tf.GradientTape() as tape:
                tape.watch(x)
                logits = model_fn(x)
                objective = loss_fn(labels=tf.gather(labels, rows), logits=logits)
            # Same gradient, same step; the logits of the same forward pass say who has arrived.
            step = optimize_linear(sign * tape.gradient(objective, x), step_size, order)
            moved = tf.clip_by_value(x + step, 0.0, 1.0)
            moved = tf.clip_by_value(near + clip_eta(moved - near, order, epsilon), 0.0, 1.0)
            going = tf.equal(tf.argmax(logits, -1, tf.int32), tf.gather(truth, rows))
            rows, x = tf.boolean_mask(rows, going), tf.boolean_mask(moved, going)
            result = tf.tensor_scatter_nd_update(result, rows[:, tf.newaxis], x)
            if tf.equal(tf.size(rows), 0):
                break
        return result

    whole = tf.TensorSpec((), tf.int32)
    return tf.function(loop, input_signature=[batch, batch, row, row, scalar, scalar, whole])


@_kept
def _momentum(victim: Victim, norm: str) -> Callable[..., tf.Tensor]:
    model_fn, order = _watched(victim), _ORDER[norm]

    def loop(x, images, labels, epsilon, step_size, steps, decay):  # type: ignore[no-untyped-def]
        velocity = tf.zeros_like(x)
        for _ in tf.range(steps):
            gradient = compute_gradient(model_fn, cross_entropy, x, labels, False)
            size = tf.reduce_mean(tf.abs(gradient), axis=[1, 2, 3], keepdims=True)
            velocity = decay * velocity + gradient / tf.maximum(size, 1e-12)
            x = x + optimize_linear(velocity, step_size, order)
            x = tf.clip_by_value(images + clip_eta(x - images, order, epsilon), 0.0, 1.0)
        return x

    return tf.function(loop)


@_kept
def _climb(measure: Callable[[Any, Any], Any], norm: str) -> Callable[..., tf.Tensor]:
    order = _ORDER[norm]

    def loop(x, images, epsilon, step_size, steps):  # type: ignore[no-untyped-def]
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                tape.watch(x)
                objective = _SCALE * tf.cast(measure(x, images), tf.float32)
            gradient = tape.gradient(objective, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            x = tf.clip_by_value(x + optimize_linear(gradient, step_size, order), 0.0, 1.0)
            x = tf.clip_by_value(images + clip_eta(x - images, order, epsilon), 0.0, 1.0)
        return x

    return tf.function(loop)


@_kept
def _watched(victim: Victim) -> Victim:
    """The victim with float32 logits that always depend on the images.

    CleverHans cannot take the gradient None of a victim that passes none (rounding, argmax). Adding zero
    times the images makes it the zeros that it is; a check of the evaluation then names it. The same
    object comes back for the same victim: CleverHans compiles its gradient once for each object it meets.
    """

    def logits(images: tf.Tensor) -> tf.Tensor:
        nothing = 0.0 * tf.reduce_sum(images, axis=[1, 2, 3], keepdims=False)[:, tf.newaxis]
        return tf.cast(victim(images), tf.float32) + nothing

    return logits
