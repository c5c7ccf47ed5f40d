"""The work of an evaluation as a list: what is crafted on whom, with which gradient, and who is shown it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vqunet_tf.attacks import APGDCE, PGD, Attack, MismatchPGD, Transfer
from vqunet_tf.evaluation.bench import Bench
from vqunet_tf.evaluation.rows import UNDEFENDED, Outcome
from vqunet_tf.evaluation.suites import Plan
from vqunet_tf.evaluation.victims import ELSEWHERE, MISMATCH, Chain
from vqunet_tf.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Job:
    """One attack on one victim.

    victim: name of a defence or of a surrogate. label: what the progress bar calls it.
    variant: the gradient, one of the victim's. limit: images it meets; None is all.
    shown: the defences whose answers to the images are rows, each with the threat model of the row.
    """

    attack: Attack
    victim: str
    label: str
    shown: tuple[tuple[str, ThreatModel], ...]
    variant: str = ""
    limit: int | None = None

    def run(self, bench: Bench) -> list[Outcome]:
        """Crafts, and shows to all."""
        crafted = bench.craft(self.attack, self.victim, self.label, self.variant, self.limit)
        return [bench.score(crafted, defense, model) for defense, model in self.shown]

    def cost(self, bench: Bench) -> int:
        """The work of `run`."""
        return bench.cost(self.attack, self.victim, self.limit) + len(self.shown) * bench.count(self.limit)


def jobs(plan: Plan, bench: Bench, asked: Sequence[ThreatModel]) -> list[Job]:
    """All the work for the threat models `asked`.

    Gray-box images are crafted once, on the bare classifier, and shown to every defence. They are made for the
    white-box rows too: who knows the purifier can use them all the same.
    """
    first, defended = asked[0], [name for name in bench.victims if name != UNDEFENDED]
    found: list[Job] = []
    if ThreatModel.GRAY_BOX in asked or ThreatModel.WHITE_BOX in asked:
        found += _gray(plan, defended, first)
    if ThreatModel.WHITE_BOX in asked:
        found += _white(plan, bench, defended)
    if ThreatModel.BLACK_BOX in asked:
        found += _black(plan, bench, defended)
    return found


def _gray(plan: Plan, defended: Sequence[str], first: ThreatModel) -> Iterator[Job]:
    shown = ((UNDEFENDED, first), *((name, ThreatModel.GRAY_BOX) for name in defended))
    for attack in plan.gray:
        yield Job(attack, UNDEFENDED, "gray-box", shown, limit=_limit(plan, attack))


def _white(plan: Plan, bench: Bench, defended: Sequence[str]) -> Iterator[Job]:
    """Victim by victim and gradient by gradient: each is compiled once, used, and left."""
    for name in defended:
        chain = bench.victims[name]
        wanted = [_variants(plan, attack, chain) for attack in plan.white]
        for variant in chain.variants:
            for attack, variants in zip(plan.white, wanted, strict=True):
                if variant in variants:
                    made = _with(attack, variant, chain)
                    shown = ((name, ThreatModel.WHITE_BOX),)
                    yield Job(made, name, f"white-box {name}", shown, variant, _limit(plan, attack))


def _black(plan: Plan, bench: Bench, defended: Sequence[str]) -> Iterator[Job]:
    everyone = (UNDEFENDED, *defended)
    for attack in plan.carried:
        for surrogate, chain in bench.surrogates.items():
            made = _transfer(attack, surrogate, chain)
            shown = tuple((name, ThreatModel.BLACK_BOX) for name in everyone)
            yield Job(made, surrogate, "transfer from", shown, limit=_limit(plan, made))
    for attack in plan.black:
        for name in everyone:
            yield Job(attack, name, f"black-box {name}", ((name, ThreatModel.BLACK_BOX),), limit=_limit(plan, attack))


def _variants(plan: Plan, attack: Attack, chain: Chain) -> Sequence[str]:
    """The gradients of one attack on one victim: those of the suite that it offers, else the first it offers."""
    wanted = plan.suite.variants.get(attack.name, ())
    found = [name for name in chain.variants if name in wanted]
    if type(attack) is not PGD:
        found = [name for name in found if name != MISMATCH]
    return found or chain.variants[:1]


def _with(attack: Attack, variant: str, chain: Chain) -> Attack:
    """The attack as this gradient needs it."""
    if variant == MISMATCH and isinstance(attack, PGD):
        settings = {name: getattr(attack, name) for name in ("threat", "steps", "step_size", "restarts")}
        return MismatchPGD(**settings)
    # Forward it is the real chain: a fooled image is fooled for good. (Of the variants in ELSEWHERE that is not known.)
    if variant not in ELSEWHERE and not chain.is_random and isinstance(attack, PGD | APGDCE):
        return dataclasses.replace(attack, until_fooled=True)
    return attack


def _transfer(attack: Attack, surrogate: str, chain: Chain) -> Attack:
    return Transfer(threat=attack.threat, attack=attack, surrogates={surrogate: chain.through()})


def _limit(plan: Plan, attack: Attack) -> int | None:
    return plan.suite.limits.get(attack.name)
