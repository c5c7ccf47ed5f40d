"""Adversaries made for one model and shown to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vqunet_tf.attacks.base import Attack, Victim
from vqunet_tf.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Images crafted on a surrogate of the attacker's own; the victim is never asked.

    attack: what crafts them, within the same budget.
    surrogates: the surrogate, as a dictionary of one name and victim, or a sequence of one victim. Its name stands in the
        `repr`, so give each a name of its own ("classifier, seed 1"). For several, `Transfer.each` makes one value for
        each: the caller scores them one by one, and the strongest counts for each image.

    "Delving into Transferable Adversarial Examples and Black-box Attacks", Liu et al.,
    https://arxiv.org/abs/1611.02770.
    """

    attack: Attack
    surrogates: Mapping[str, Victim] | Sequence[Victim] = field(repr=False)
    surrogate: str = field(default="", init=False)

    name: ClassVar[str] = "transfer"

    def __post_init__(self) -> None:
        pairs = _pairs(self.surrogates)
        if len(pairs) != 1:
            raise UserError(f"transfer: expected one surrogate, got {len(pairs)}: Transfer.each makes a value for each")
        if self.attack.threat != self.threat:
            raise UserError(f"transfer: expected an attack within {self.threat}, got one within {self.attack.threat}")
        # A tuple compares and hashes; a dictionary would not.
        object.__setattr__(self, "surrogates", (pairs[0][1],))
        object.__setattr__(self, "surrogate", pairs[0][0])
        object.__setattr__(self, "steps", self.attack.steps)
        super().__post_init__()

    @classmethod
    def each(cls, attack: Attack, surrogates: Mapping[str, Victim] | Sequence[Victim]) -> list[Transfer]:
        """Returns one `Transfer` for each surrogate, within the budget of the attack."""
        return [cls(threat=attack.threat, attack=attack, surrogates={name: it}) for name, it in _pairs(surrogates)]

    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        del victim
        ((_, surrogate),) = _pairs(self.surrogates)
        return self.attack.run(surrogate, images, labels, rngs)


def _pairs(surrogates: Mapping[str, Victim] | Sequence[Victim]) -> list[tuple[str, Victim]]:
    """Name and victim; in a sequence the place is the name."""
    if isinstance(surrogates, Mapping):
        return list(surrogates.items())
    return [(str(place), victim) for place, victim in enumerate(surrogates)]
