"""Attacks by name. An attack knows its victim only as a function images → logits.

To add one: write a subclass of `base.Attack` and give it a line in `ATTACKS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqunet_tf.attacks.art import APGDCE, APGDDLR, DeepFool
from vqunet_tf.attacks.art_queries import HopSkipJump, Square
from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.attacks.carlini import CWL2
from vqunet_tf.attacks.gradient import BIM, FGSM, MIM, PGD, TargetedPGD
from vqunet_tf.attacks.mismatch import MismatchPGD
from vqunet_tf.attacks.noise import Noise
from vqunet_tf.attacks.transfer import Transfer
from vqunet_tf.errors import UserError, choice
from vqunet_tf.threat import Threat


@dataclass(frozen=True)
class Maker:
    """Makes one kind of attack from a threat and a number of steps.

    kind: its class. takes_steps: whether it has the number it is told; if not, it keeps one of its own.
    """

    kind: type[Attack]
    takes_steps: bool = True

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms it knows."""
        return self.kind.norms

    def __call__(self, threat: Threat, steps: int) -> Attack:
        settings = {"steps": steps} if self.takes_steps else {}
        return self.kind(threat=threat, **settings)


class NeedsSurrogate(Maker):
    """An attack that cannot be made from a name."""

    def __call__(self, threat: Threat, steps: int) -> Attack:
        raise UserError(f"{self.kind.name} needs a surrogate model: make it as attacks.Transfer(...)")


ATTACKS: dict[str, Maker] = {
    "fgsm": Maker(FGSM, takes_steps=False),
    "bim": Maker(BIM),
    "pgd": Maker(PGD),
    "pgd_targeted": Maker(TargetedPGD),
    "mim": Maker(MIM),
    "cw_l2": Maker(CWL2, takes_steps=False),
    "deepfool": Maker(DeepFool, takes_steps=False),
    "apgd_ce": Maker(APGDCE),
    "apgd_dlr": Maker(APGDDLR),
    "square": Maker(Square, takes_steps=False),
    "hopskipjump": Maker(HopSkipJump, takes_steps=False),
    "noise": Maker(Noise, takes_steps=False),
    "transfer": NeedsSurrogate(Transfer),
}


def build(name: str, threat: Threat, steps: int) -> Attack:
    """Returns the attack `name` within `threat`.

    steps: of the iterated gradient attacks; one with a number of its own ignores it.
    Raises a `UserError` for an unknown name (the known ones are listed), for a norm the attack does not have (those it
    has are named), and for `transfer`, which needs a surrogate.
    """
    return ATTACKS[choice("attack", name, ATTACKS)](threat, steps)


__all__ = [
    "APGDCE",
    "APGDDLR",
    "ATTACKS",
    "BIM",
    "CWL2",
    "FGSM",
    "MIM",
    "PGD",
    "Attack",
    "DeepFool",
    "HopSkipJump",
    "MismatchPGD",
    "Noise",
    "Square",
    "TargetedPGD",
    "Transfer",
    "Victim",
    "build",
]
