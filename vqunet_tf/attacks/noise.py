"""Random noise of a given norm: what a budget does without any intent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vqunet_tf.attacks.answers import Best
from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """The strongest of some random perturbations of each image: one that fools, else the one of the largest margin.

    Every second draw lies on the far side of the ball (linf: a random corner; l2: a random point of the sphere), the
    others are uniform in it. Gradient attacks must beat this.

    draws: how many; as many queries as steps.
    """

    draws: int = 10

    name: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"noise: expected at least one draw, got {self.draws}")
        object.__setattr__(self, "steps", self.draws)
        super().__post_init__()

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        best = Best(victim, labels, "margin")
        for turn in range(self.draws):
            draw = self.threat.sample if turn % 2 else self.far
            noise = np.stack([draw(rng, images.shape[1:]) for rng in rngs])
            best.offer(self.threat.project(images + noise, images))
        return best.images

    def far(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws one perturbation of length epsilon, float32 of `shape`."""
        if self.threat.norm == "linf":
            return np.where(rng.random(shape) < 0.5, -self.threat.epsilon, self.threat.epsilon).astype(np.float32)
        direction = rng.normal(size=shape)
        return (direction * (self.threat.epsilon / np.linalg.norm(direction))).astype(np.float32)
