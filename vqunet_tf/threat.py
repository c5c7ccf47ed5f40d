"""Who attacks, and how far an image may be changed: the threat models and the ball around an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import keras
import numpy as np

from vqunet_tf.errors import UserError, choice

NORMS = ("linf", "l2")

# A float32 image that sits on the face of the ball measures up to a few 1e-7 beyond it.
TOLERANCE = 1e-6


class ThreatModel(Enum):
    """What the attacker knows; the value is the word used in reports and flags."""

    GRAY_BOX = "gray_box"
    WHITE_BOX = "white_box"
    BLACK_BOX = "black_box"

    @property
    def knowledge(self) -> str:
        """One clause: what an attacker of this kind has."""
        return _KNOWLEDGE[self]


_KNOWLEDGE = {
    ThreatModel.GRAY_BOX: "has the classifier's weights and gradients and does not know of the purifier",
    ThreatModel.WHITE_BOX: "has purifier, codebooks and classifier, and follows the gradient through all of them",
    ThreatModel.BLACK_BOX: "sees answers only, or attacks models of its own and hopes that the images carry over",
}


@dataclass(frozen=True)
class Threat:
    """The set of images an attacker may use: a ball around the original, cut with the box [0,1].

        linf:  max |candidate - original| <= epsilon
        l2:    sqrt(sum (candidate - original)^2) <= epsilon

    Arrays are `[B, ...]` floats on the [0,1] scale; the norm is taken per image. NumPy arrays give NumPy
    arrays, tensors of the running Keras backend give tensors.

    norm: `linf` or `l2`.
    epsilon: the radius on the [0,1] scale, 8/255 is 0.0314. For linf at most 1.

    Raises a `UserError` for another norm, and for an epsilon that is negative, infinite or (linf) above 1.
    """

    norm: str = "linf"
    epsilon: float = 8 / 255

    def __post_init__(self) -> None:
        choice("norm", self.norm, NORMS)
        largest = 1.0 if self.norm == "linf" else math.inf
        if not (0.0 <= self.epsilon <= largest and math.isfinite(self.epsilon)):
            raise UserError(
                f"epsilon is a radius on the [0,1] scale: expected something like 8/255 = 0.0314, got {self.epsilon!r}"
            )

    def distance(self, candidate: Any, original: Any) -> Any:
        """Returns how far each image has moved, `[B]`."""
        ops = _namespace(candidate)
        axes = tuple(range(1, len(candidate.shape)))
        difference = candidate - original
        if self.norm == "linf":
            return ops.max(ops.abs(difference), axis=axes)
        return ops.sqrt(ops.sum(ops.square(difference), axis=axes))

    def project(self, candidate: Any, original: Any) -> Any:
        """Returns the candidate moved into the ball around `original` and into [0,1]; never farther away.

        A pixel that is not a number (an attack that divided by a vanished gradient) falls back to the
        original pixel, so that it cannot pass for an attack.
        """
        ops = _namespace(candidate)
        difference = ops.where(ops.isnan(candidate), ops.zeros_like(candidate), candidate - original)
        if self.norm == "linf":
            difference = ops.clip(difference, -self.epsilon, self.epsilon)
        else:
            axes = tuple(range(1, len(candidate.shape)))
            length = ops.sqrt(ops.sum(ops.square(difference), axis=axes, keepdims=True))
            # Shrink onto the ball, never stretch; the floor only guards the division.
            difference = difference * ops.minimum(1.0, self.epsilon / ops.maximum(length, 1e-12))
        return ops.clip(original + difference, 0.0, 1.0)

    def within(self, candidate: Any, original: Any) -> Any:
        """Returns `[B]` booleans: inside the ball and inside [0,1], up to rounding."""
        ops = _namespace(candidate)
        axes = tuple(range(1, len(candidate.shape)))
        near = self.distance(candidate, original) <= self.epsilon + TOLERANCE
        boxed = ops.logical_and(ops.min(candidate, axis=axes) >= 0.0, ops.max(candidate, axis=axes) <= 1.0)
        return ops.logical_and(near, boxed)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws one perturbation uniformly from the ball, float32 of `shape`.

        l2: a random direction times epsilon · u^(1/d), u uniform, so that volume is uniform
        ("On the uniform distribution in l_p balls", Calafiore et al. 1998).
        """
        if self.norm == "linf":
            return rng.uniform(-self.epsilon, self.epsilon, shape).astype(np.float32)
        direction = rng.normal(size=shape)
        radius = self.epsilon * rng.uniform() ** (1.0 / direction.size)
        return (direction * (radius / np.linalg.norm(direction))).astype(np.float32)


def parse_epsilon(text: str) -> float:
    """Reads `0.1` or `8/255`; anything else raises a `UserError`."""
    above, slash, below = text.strip().partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"expected an epsilon such as 0.1 or 8/255, got {text!r}") from None


def _namespace(array: Any) -> Any:
    """NumPy for NumPy arrays, `keras.ops` for tensors."""
    return np if isinstance(array, np.ndarray) else keras.ops
