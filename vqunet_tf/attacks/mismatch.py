"""A white-box attack on what a purifier encodes, not on what the classifier answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vqunet_tf.attacks import cleverhans
from vqunet_tf.attacks.base import Victim
from vqunet_tf.attacks.gradient import PGD
from vqunet_tf.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MismatchPGD(PGD):
    """PGD that drives the code of an image away from the code of the clean one.

        x ← project(x + step_size · sign(∇ mismatch(x, clean)))

    A quantizer may hide the gradient of the classifier; the distance between encodings is smooth. The victim offers
    `mismatch(images, reference)` → `[B]`, how far the encoder's features of two batches are apart; one without raises a
    `UserError`. It starts at random: at the clean image the mismatch is at its minimum and has no gradient.

    "On Adaptive Attacks to Adversarial Example Defenses", Tramèr et al., https://arxiv.org/abs/2002.08347 (feature-level
    objectives).
    """

    loss: str = field(default="mismatch", init=False)
    random_start: bool = field(default=True, init=False)
    until_fooled: bool = field(default=False, init=False)

    losses: ClassVar[tuple[str, ...]] = ("mismatch",)

    def once(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        measure = getattr(victim, "mismatch", None)
        if measure is None:
            raise UserError(
                "the mismatch attack needs a victim with mismatch(images, reference): "
                f"{type(victim).__name__} has none, attack a purifier with codes or leave this attack out"
            )
        return cleverhans.climb(
            measure, self.threat, self.start(images, rngs), images, step_size=self.length, steps=self.steps
        )
