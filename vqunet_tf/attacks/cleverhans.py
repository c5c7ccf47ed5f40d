"""Gradient attacks from CleverHans, compiled whole; the only importer of `cleverhans`.

CleverHans 4.0.0, "Technical Report on the CleverHans v2.1.0 Adversarial Examples Library",
Papernot et al., https://arxiv.org/abs/1610.00768.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.utils import clip_eta, compute_gradient

from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat

_ORDER = {"linf": np.inf, "l2": 2}


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of the whole radius along the gradient.

        linf:  x + epsilon · sign(∇ loss(x, y))

    "Explaining and Harnessing Adversarial Examples", Goodfellow et al., https://arxiv.org/abs/1412.6572.
    """

    name: ClassVar[str] = "fgsm"

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        del rngs  # nothing is random
        return _descend(victim, self.threat, images, images, labels, step_size=self.threat.epsilon, steps=1)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Gradient steps, each followed by a projection into the ball and into [0,1].

        x ← project(x + step_size · sign(∇ loss(x, y)))

    steps: how many.
    step_size: length of one, on the [0,1] scale; None is 2.5 · epsilon / steps, enough to cross the ball.
    random_start: begin at a uniformly drawn point of the ball instead of at the image.

    "Towards Deep Learning Models Resistant to Adversarial Attacks", Madry et al., https://arxiv.org/abs/1706.06083.
    """

    steps: int = 20
    step_size: float | None = None
    random_start: bool = True

    name: ClassVar[str] = "pgd"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"pgd: expected at least one step, got {self.steps}")

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        return _descend(
            victim, self.threat, self.start(images, rngs), images, labels, step_size=self.length, steps=self.steps
        )

    @property
    def length(self) -> float:
        """The step size that is used."""
        return 2.5 * self.threat.epsilon / self.steps if self.step_size is None else self.step_size

    def start(self, images: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
        """Returns where the steps begin, `[B,H,W,C]` inside the budget."""
        if not self.random_start:
            return images
        noise = np.stack([self.threat.sample(rng, images.shape[1:]) for rng in rngs])
        return self.threat.project(images + noise, images)


@dataclass(frozen=True, kw_only=True)
class TargetedPGD(PGD):
    """PGD towards a random other class of each image, instead of away from its own.

    The adversary then carries no trace of the true label, which a purifier could have learned to read
    ("label leaking", Kurakin et al., https://arxiv.org/abs/1611.01236, section 3.2).
    """

    name: ClassVar[str] = "pgd_targeted"

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        begin = self.start(images, rngs)
        classes = int(victim(tf.constant(images[:1])).shape[-1])
        targets = self.targets(labels, classes, rngs)
        return _descend(
            victim, self.threat, begin, images, targets, step_size=self.length, steps=self.steps, targeted=True
        )

    @staticmethod
    def targets(labels: np.ndarray, classes: int, rngs: list[np.random.Generator]) -> np.ndarray:
        """Draws for each image one of the other classes, `[B]` int32."""
        away = np.array([rng.integers(1, classes) for rng in rngs])
        return ((labels + away) % classes).astype(np.int32)


def input_gradient(victim: Victim, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the gradient `[B,H,W,C]` that these attacks follow: of the loss with respect to the images.

    Zeros where the victim passes no gradient at all.
    """
    gradient = compute_gradient(_watched(victim), _loss, tf.constant(images), tf.constant(labels, tf.int32), False)
    return gradient.numpy() / _SCALE


def _descend(
    victim: Victim,
    threat: Threat,
    start: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    step_size: float,
    steps: int,
    targeted: bool = False,
) -> np.ndarray:
    """Runs the compiled loop on one batch `[B,H,W,C]`, towards the labels or away from them."""
    return _program(victim, threat.norm, targeted)(
        tf.constant(start),
        tf.constant(images),
        tf.constant(labels, tf.int32),
        tf.constant(threat.epsilon, tf.float32),
        tf.constant(step_size, tf.float32),
        tf.constant(steps, tf.int32),
    ).numpy()


@functools.lru_cache(maxsize=16)
def _program(victim: Victim, norm: str, targeted: bool) -> Callable[..., tf.Tensor]:
    """One program for each victim, whatever the radius, the step and the number of steps.

    The last few are kept, and with them their victims.
    """
    model_fn = _watched(victim)
    order = _ORDER[norm]

    def loop(x, images, labels, epsilon, step_size, steps):  # type: ignore[no-untyped-def]
        # The loop of CleverHans' projected_gradient_descent, from its own two parts, with the start and
        # the numbers as arguments. CleverHans draws the start from TensorFlow's global generator, which a
        # compiled function does not let anyone seed; a test holds the two loops equal for equal starts.
        for _ in tf.range(steps):
            x = fast_gradient_method(
                model_fn, x, step_size, order, loss_fn=_loss, clip_min=0.0, clip_max=1.0, y=labels, targeted=targeted
            )
            x = tf.clip_by_value(images + clip_eta(x - images, order, epsilon), 0.0, 1.0)
        return x

    # No jit_compile: XLA on CPU gives the body of a loop one thread (5 to 7 times slower, measured), and a
    # step compiled alone is 15 to 40 % slower than the graph.
    return tf.function(loop)


@functools.lru_cache(maxsize=16)
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


# A power of two changes no bit of a sign and no direction. For l2 it matters: CleverHans divides the
# gradient by max(length, 1e-6), so that the steps of a confident classifier would shrink to nothing.
_SCALE = 2.0**40


def _loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of each image with integer labels, scaled; one object, for the same reason as above."""
    return _SCALE * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
