"""Attacks that follow the gradient of a loss within a budget: FGSM, BIM, PGD, its targeted form, MIM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vqunet_tf.attacks import cleverhans
from vqunet_tf.attacks.answers import Best, answers
from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.errors import UserError, choice


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of the whole radius along the gradient.

        linf:  x + epsilon · sign(∇ loss(x, y))

    "Explaining and Harnessing Adversarial Examples", Goodfellow et al., https://arxiv.org/abs/1412.6572.
    """

    name: ClassVar[str] = "fgsm"

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        del rngs  # nothing is random
        return cleverhans.descend(victim, self.threat, images, images, labels, step_size=self.threat.epsilon, steps=1)


@dataclass(frozen=True, kw_only=True)
class _Iterated(Attack):
    """Many steps of one length.

    steps: how many.
    step_size: length of one, on the [0,1] scale; None is 2.5 · epsilon / steps, enough to cross the ball.
    """

    steps: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not self.step_size > 0.0:
            raise UserError(f"{self.name}: expected a step size above 0, got {self.step_size}")

    @property
    def length(self) -> float:
        """The step size that is used."""
        return 2.5 * self.threat.epsilon / self.steps if self.step_size is None else self.step_size


@dataclass(frozen=True, kw_only=True)
class BIM(_Iterated):
    """Gradient steps from the image itself, each followed by a projection; nothing is random.

    "Adversarial examples in the physical world", Kurakin et al., https://arxiv.org/abs/1607.02533.
    """

    name: ClassVar[str] = "bim"

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        return cleverhans.descend(victim, self.threat, images, images, labels, step_size=self.length, steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class MIM(_Iterated):
    """Steps along a running sum of gradients, each divided by the mean of its absolute values.

        g ← decay · g + ∇ loss / mean |∇ loss|,    x ← project(x + step_size · sign(g))

    decay: what is left of the sum after each step.

    "Boosting Adversarial Attacks with Momentum", Dong et al., https://arxiv.org/abs/1710.06081.
    """

    decay: float = 1.0

    name: ClassVar[str] = "mim"

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        return cleverhans.momentum(
            victim, self.threat, images, images, labels, step_size=self.length, steps=self.steps, decay=self.decay
        )


@dataclass(frozen=True, kw_only=True)
class PGD(_Iterated):
    """Gradient steps, each followed by a projection into the ball and into [0,1].

        x ← project(x + step_size · sign(∇ loss(x, y)))

    random_start: begin at a uniformly drawn point of the ball instead of at the image.
    restarts: how often to begin anew; each image keeps a restart that fools the victim, else that of the largest
        loss. `steps` are those of one restart.
    loss: `ce`, cross-entropy, or `margin`, by how much the strongest other logit exceeds that of the true class.
    until_fooled: stop for an image at the first point that fools the victim. In a fraction of the time, and images
        that later steps would lose again count as fooled: few of a smooth victim, more of one whose answers jump; for another
        model, which only sees the images, they are weaker. So never where images crafted on one model are shown to
        another.

    "Towards Deep Learning Models Resistant to Adversarial Attacks", Madry et al., https://arxiv.org/abs/1706.06083.
    """

    random_start: bool = True
    restarts: int = 1
    loss: str = "ce"
    until_fooled: bool = False

    name: ClassVar[str] = "pgd"
    losses: ClassVar[tuple[str, ...]] = tuple(cleverhans.LOSSES)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("loss", self.loss, self.losses)
        if self.restarts < 1:
            raise UserError(f"{self.name}: expected at least one restart, got {self.restarts}")
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"{self.name}: {self.restarts} restarts without a random start are all the same")

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        if self.restarts == 1:
            return self.once(victim, images, labels, rngs)
        best = Best(victim, labels, self.loss)
        for turn in range(self.restarts):
            rows = np.flatnonzero(~best.fooled) if self.until_fooled and turn else np.arange(len(images))
            if len(rows):
                found = self.once(victim, images[rows], labels[rows], [rngs[row] for row in rows])
                best.offer(np.asarray(found), rows)
        return best.images

    def once(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        """One restart."""
        return self.descend(victim, self.start(images, rngs), images, labels, labels)

    def descend(
        self,
        victim: Victim,
        start: np.ndarray,
        images: np.ndarray,
        labels: np.ndarray,
        truth: np.ndarray,
        targeted: bool = False,
    ) -> np.ndarray:
        """The steps from `start`, away from the labels or towards them."""
        loop: Callable[..., np.ndarray] = cleverhans.descend
        arrays: tuple[np.ndarray, ...] = (start, images, labels)
        if self.until_fooled:
            loop, arrays = cleverhans.descend_until_fooled, (*arrays, truth)
        return loop(
            victim,
            self.threat,
            *arrays,
            step_size=self.length,
            steps=self.steps,
            targeted=targeted,
            loss=self.loss,
        )

    def start(self, images: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
        """Returns where the steps begin, `[B,H,W,C]` inside the budget."""
        if not self.random_start:
            return images
        noise = np.stack([self.threat.sample(rng, images.shape[1:]) for rng in rngs])
        return self.threat.project(images + noise, images)


@dataclass(frozen=True, kw_only=True)
class TargetedPGD(PGD):
    """PGD towards a random other class of each image, instead of away from its own; each restart draws again.

    The adversary then carries no trace of the true label, which a purifier could have learned to read
    ("label leaking", Kurakin et al., https://arxiv.org/abs/1611.01236, section 3.2).
    """

    name: ClassVar[str] = "pgd_targeted"

    def once(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        begin = self.start(images, rngs)
        classes = int(answers(victim, images[:1]).shape[-1])
        return self.descend(victim, begin, images, self.targets(labels, classes, rngs), labels, targeted=True)

    @staticmethod
    def targets(labels: np.ndarray, classes: int, rngs: list[np.random.Generator]) -> np.ndarray:
        """Draws for each image one of the other classes, `[B]` int32."""
        away = np.array([rng.integers(1, classes) for rng in rngs])
        return ((labels + away) % classes).astype(np.int32)
