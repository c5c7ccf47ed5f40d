"""Attacks by name. An attack knows its victim only as a function images → logits.

To add one: write a subclass of `base.Attack` and give it a line in `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Callable

from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.attacks.cleverhans import FGSM, PGD, TargetedPGD
from vqunet_tf.errors import choice
from vqunet_tf.threat import Threat

# name → (threat, steps) → attack; an attack with a number of steps of its own ignores the second.
ATTACKS: dict[str, Callable[[Threat, int], Attack]] = {
    "fgsm": lambda threat, steps: FGSM(threat=threat),
    "pgd": lambda threat, steps: PGD(threat=threat, steps=steps),
    "pgd_targeted": lambda threat, steps: TargetedPGD(threat=threat, steps=steps),
}


def build(name: str, threat: Threat, steps: int) -> Attack:
    """Returns the attack `name` within `threat`; an unknown name raises a `UserError` that lists the known ones."""
    return ATTACKS[choice("attack", name, ATTACKS)](threat, steps)


__all__ = ["ATTACKS", "FGSM", "PGD", "Attack", "TargetedPGD", "Victim", "build"]
