"""Attacks of ART with gradients: DeepFool and AutoPGD. The files `art*.py` are the only importers of `art`.

Adversarial Robustness Toolbox 1.20, Nicolae et al., https://arxiv.org/abs/1807.01069.

An image that the victim already gets wrong is returned as it is: nothing has to be done to it, and ART's attacks that
leave what is *predicted* (DeepFool, HopSkipJump) could put it right again.

ART draws from one global generator for a whole batch: where it draws (APGD; Square in `art_queries.py`), the adversary
of an image depends on `batch_size` and on the images beside it. Equal calls give equal adversaries.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.attacks.minimum import MinimumNorm
from vqunet_tf.errors import UserError

if TYPE_CHECKING:
    from vqunet_tf.attacks.art_model import EndToEnd

# ART takes seconds to import: only an attack that runs does.

ORDER: dict[str, Any] = {"linf": np.inf, "l2": 2}


@dataclass(frozen=True, kw_only=True)
class ArtAttack(Attack):
    """What all of them share: the model ART sees, and which images are attacked at all."""

    fills_up: ClassVar[bool] = False
    loss: ClassVar[str] = "ce"
    remember: ClassVar[bool] = False

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        model = self.model(victim, images)
        right = np.flatnonzero(model.predict(images).argmax(axis=1) == labels)
        found = images.copy()
        if len(right):
            found[right] = self.attack(model, images[right], labels[right], [rngs[row] for row in right])
        return found

    def model(self, victim: Victim, images: np.ndarray) -> EndToEnd:
        """The victim as ART sees it."""
        from vqunet_tf.attacks.art_model import EndToEnd

        return EndToEnd(victim, images, loss=self.loss, remember=self.remember)

    @abstractmethod
    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        """Perturbs images `[B,H,W,C]` that the model gets right."""


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimumNorm, ArtAttack):
    """Steps to the nearest border of the classes, each as if the logits were linear.

    steps: at most so many, until the image is given another class; each takes the gradients of `candidates` logits.
    candidates: how many of the most likely classes are looked at.
    overshoot: by which share the sum of the steps is lengthened at the end.

    "DeepFool: a simple and accurate method to fool deep neural networks", Moosavi-Dezfooli et al.,
    https://arxiv.org/abs/1511.04599.
    """

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    name: ClassVar[str] = "deepfool"
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        from art.attacks.evasion import DeepFool as ArtDeepFool

        attack = ArtDeepFool(
            model,
            max_iter=self.steps,
            epsilon=self.overshoot,
            nb_grads=min(self.candidates, model.nb_classes),
            batch_size=len(images),
            verbose=False,
        )
        return attack.generate(images)


@dataclass(frozen=True, kw_only=True)
class APGDCE(ArtAttack):
    """AutoPGD: PGD with momentum that halves its steps, image by image, where they no longer help.

    Starts at a random point of the ball, with steps of 2 · epsilon; the loss is cross-entropy.
    steps: gradients; each costs one more evaluation.
    restarts: tried for the images that still resist.
    until_fooled: an image stops at the first point that fools the victim, as with `PGD`: what later steps lose again counts, and
        most victims are done with in a fraction of the time. Never where the images are shown to another model.

    ART tests the last point only, and returns the random start where that one does not fool. Here such an image
    becomes the point of the largest loss: what another model is shown is then attacked at all.

    "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", Croce & Hein,
    https://arxiv.org/abs/2003.01690.
    """

    steps: int = 50
    restarts: int = 1
    until_fooled: bool = False

    name: ClassVar[str] = "apgd_ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1:
            raise UserError(f"{self.name}: expected at least one restart, got {self.restarts}")

    def model(self, victim: Victim, images: np.ndarray) -> EndToEnd:
        if not self.until_fooled:
            return super().model(victim, images)
        from vqunet_tf.attacks.art_until import UntilFooled

        return UntilFooled(victim, images, loss=self.loss)

    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        from art.attacks.evasion import AutoProjectedGradientDescent

        from vqunet_tf.attacks.art_model import seeded

        found = images.copy()
        resists = np.arange(len(images))
        for turn in range(self.restarts):
            attack = AutoProjectedGradientDescent(
                model,
                norm=ORDER[self.threat.norm],
                eps=self.threat.epsilon,
                eps_step=2.0 * self.threat.epsilon,
                max_iter=self.steps,
                nb_random_init=1,
                batch_size=len(resists),
                loss_type=None,  # the model's own
                verbose=False,
            )
            with seeded(rngs[0]):
                now = model.attacked_by(attack, images[resists], labels[resists])
            fooled = model.predict(now).argmax(axis=1) != labels[resists]
            largest = getattr(attack, "x_max", None)
            if largest is not None and len(largest) == len(now):  # not so where a victim's answers are random
                now[~fooled] = largest[~fooled]
                fooled |= model.predict(now).argmax(axis=1) != labels[resists]
            # The first restart's point of largest loss stands unless a later one fools.
            better = fooled | (turn == 0)
            found[resists[better]] = now[better]
            resists = resists[~fooled]
            if not len(resists):
                break
        return found


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGDCE):
    """AutoPGD with the difference of logits ratio, a loss that does not vanish for a confident classifier.

        (max_{i≠y} z_i - z_y) / (z_1 - z_3),    z_1 ≥ z_2 ≥ ... sorted

    Needs three classes or more.
    """

    name: ClassVar[str] = "apgd_dlr"
    loss: ClassVar[str] = "dlr"

    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        if model.nb_classes < 3:
            raise UserError(f"apgd_dlr compares three logits, this classifier has {model.nb_classes}: take apgd_ce")
        return super().attack(model, images, labels, rngs)
