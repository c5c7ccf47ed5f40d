"""Carlini and Wagner's l2 attack, compiled whole.

Written out here because no library's runs and works. CleverHans 4.0.0 raises under Keras 3. ART 1.20.1 descends with a
line search in the space of arctanh, where a pixel at 0 or 1 hardly moves: on digits the adversaries it finds are half as
far again as those of Adam, which the paper uses (0.90 against 0.60), farther than DeepFool's. Its bisection also forgets
its lower bound. A test holds the distances to Foolbox's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from vqunet_tf.attacks.answers import answers
from vqunet_tf.attacks.base import Victim
from vqunet_tf.attacks.minimum import MinimumNorm
from vqunet_tf.errors import UserError

_INSIDE = 0.999999  # arctanh is infinite at black and white
_DECAY, _DECAY_SQUARE, _TINY = 0.9, 0.999, 1e-8  # of Adam


@dataclass(frozen=True, kw_only=True)
class CWL2(MinimumNorm):
    """The smallest l2 change that makes another logit the largest.

        minimise  |x' - x|² + c · max(0, z_y - max_{i≠y} z_i),    x' = (1 + tanh w) / 2

    iterations: of Adam for one constant c; the nearest adversary of all of them counts.
    search_steps: constants c tried for each image: ten times more or less until one works and one does not, then
        halfway between them in their logarithms.
    step_size: of Adam, in the space of w. initial_const: the first c.
    `steps` is iterations · search_steps, the gradients taken.

    "Towards Evaluating the Robustness of Neural Networks", Carlini & Wagner, https://arxiv.org/abs/1608.04644.
    """

    iterations: int = 100
    search_steps: int = 5
    step_size: float = 0.1
    initial_const: float = 1.0

    name: ClassVar[str] = "cw_l2"
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.iterations * self.search_steps)
        super().__post_init__()
        if not (self.iterations > 0 and self.step_size > 0.0 and self.initial_const > 0.0):
            raise UserError(f"cw_l2: expected settings above 0, got {self}")

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        del rngs  # nothing is random
        count = len(images)
        wrong = answers(victim, images).argmax(axis=1) != labels  # nothing has to be done to these
        nearest, distance = images.copy(), np.where(wrong, 0.0, np.inf)
        c = np.full(count, self.initial_const)
        below, above = np.zeros(count), np.full(count, np.inf)  # the largest that did not work, the smallest that did
        numbers = tf.constant(self.step_size, tf.float32), tf.constant(self.iterations, tf.int32)
        tensors = tf.constant(images), tf.constant(labels, tf.int32)
        for _ in range(self.search_steps):
            found, squared = _program(victim)(*tensors, tf.constant(c, tf.float32), *numbers)
            far = np.sqrt(squared.numpy().astype(np.float64))
            better = far < distance
            nearest[better], distance[better] = found.numpy()[better], far[better]
            works = np.isfinite(far)
            above, below = np.where(works, c, above), np.where(works, below, c)
            with np.errstate(invalid="ignore"):
                between = np.sqrt(below * above)
            c = np.where(np.isinf(above), 10.0 * c, np.where(below == 0.0, 0.1 * c, between))
        return nearest


@functools.lru_cache(maxsize=16)
def _program(victim: Victim) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """One program for each victim: the nearest adversary `[B,H,W,C]` for constants `[B]`, and its squared distance.

    The distance is infinite where none was found.
    """

    def descend(images, labels, c, step_size, iterations):  # type: ignore[no-untyped-def]
        start = tf.atanh((2.0 * images - 1.0) * _INSIDE)
        w, mean, square = start, tf.zeros_like(start), tf.zeros_like(start)
        nearest, distance = images, tf.fill(tf.shape(labels), np.float32(np.inf))
        for turn in tf.range(1, iterations + 1):
            with tf.GradientTape() as tape:
                tape.watch(w)
                candidate = 0.5 * (1.0 + tf.tanh(w))
                logits = tf.cast(victim(candidate), tf.float32)
                own = tf.one_hot(labels, logits.shape[-1])
                other = tf.reduce_max(tf.where(own > 0.0, logits.dtype.min, logits), axis=-1)
                ahead = tf.reduce_sum(own * logits, axis=-1) - other
                squared = tf.reduce_sum(tf.square(candidate - images), axis=[1, 2, 3])
                loss = squared + c * tf.maximum(0.0, ahead)
            better = tf.logical_and(ahead < 0.0, squared < distance)
            nearest = tf.where(better[:, tf.newaxis, tf.newaxis, tf.newaxis], candidate, nearest)
            distance = tf.where(better, squared, distance)
            gradient = tape.gradient(loss, w)
            mean = _DECAY * mean + (1.0 - _DECAY) * gradient
            square = _DECAY_SQUARE * square + (1.0 - _DECAY_SQUARE) * tf.square(gradient)
            power = tf.cast(turn, tf.float32)
            first, second = mean / (1.0 - _DECAY**power), square / (1.0 - _DECAY_SQUARE**power)
            w -= step_size * first / (tf.sqrt(second) + _TINY)
        return nearest, distance

    return tf.function(descend)
