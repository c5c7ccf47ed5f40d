"""What became of every image under one attack, and the rows of a report that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqunet_tf.evaluation.statistics import wilson
from vqunet_tf.threat import Threat, ThreatModel

CLEAN = "none"  # the name of no attack in a row
WORST = "worst"  # of all attacks, image by image
UNDEFENDED = "none"  # the name of no defence

# An attack that met fewer images than this, where others met more, stands beside the worst case, not in it.
FEW = 100


@dataclass(frozen=True, eq=False)
class Outcome:
    """One attack, one defence, one threat model.

    correct: `[N]` booleans, which images are still classified as they should be. A slow attack meets the first few
        images only: then N is smaller than elsewhere.
    distance: how far the farthest image was moved, in the norm of `threat`.
    seconds: crafting the images (shared by all defences of a gray-box attack) and classifying them.
    adversarial: the first few adversarial images `[k,H,W,C]` float32, for pictures and for proof.
    variant: which gradient or loss made the images (`straight_through`, `identity`, ...), or for a transfer the
        surrogate; empty where there is one way only. Of several the strongest counts: see `merged`.
    """

    defense: str
    attack: str
    threat: Threat
    steps: int
    threat_model: ThreatModel
    correct: np.ndarray
    distance: float
    seconds: float
    adversarial: np.ndarray
    variant: str = ""

    @property
    def accuracy(self) -> float:
        """Share of images still classified right, in [0,1]."""
        return float(self.correct.mean())


def rows(outcomes: Sequence[Outcome], threat_models: Sequence[ThreatModel]) -> list[dict[str, Any]]:
    """The rows of report.json: clean, each attack, and the worst case, defence by defence.

    A clean row has no attacker: epsilon 0, no steps, and the first of `threat_models`. So has the
    undefended classifier only one kind of attacker who knows its gradients: its rows are there once, under
    the first of `threat_models`, and stand for gray-box and white-box alike.
    The row of an attack that was made with several gradients counts an image as right only if it is under each;
    `variants` holds their accuracies one by one.
    """
    result = []
    for defense in dict.fromkeys(outcome.defense for outcome in outcomes):
        for model in threat_models:
            own = [outcome for outcome in outcomes if outcome.defense == defense and outcome.threat_model is model]
            for outcome in sorted(merged(own), key=lambda outcome: outcome.threat.epsilon):
                made = [other for other in own if _place(other) == _place(outcome) and other.variant]
                row = _row(outcome)
                result.append({**row, "variants": {o.variant: o.accuracy for o in made}} if made else row)
            for threat in threats(own):
                stronger = attackers(outcomes, defense, model, threat)
                result.append(_row(worst_case(stronger, model)))
    return result


def merged(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome for each attack: of several variants, per image the minimum; in the order of the first of each."""
    groups: dict[object, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_place(outcome), []).append(outcome)
    return [_all_of(group, group[0].attack, group[0].threat_model) for group in groups.values()]


def threats(outcomes: Iterable[Outcome]) -> list[Threat]:
    """The budgets that were attacked with, smallest first."""
    found = {outcome.threat for outcome in outcomes if outcome.attack != CLEAN}
    return sorted(found, key=lambda threat: (threat.norm, threat.epsilon))


def attackers(outcomes: Iterable[Outcome], defense: str, model: ThreatModel, threat: Threat) -> list[Outcome]:
    """Everything an attacker of this kind can do: nothing, each attack, and what those who know less can do.

    A white-box attacker can also use the gray-box images, and black-box ones, where these are as many as the worst case
    of the white-box attacks is counted on.
    """
    here = [
        outcome
        for outcome in outcomes
        if outcome.defense == defense and (outcome.attack == CLEAN or outcome.threat == threat)
    ]
    own = [o for o in here if o.attack == CLEAN or o.threat_model is model]
    if model is not ThreatModel.WHITE_BOX:
        return own
    counted = len(worst_case(own, model).correct)
    return own + [o for o in here if o not in own and len(o.correct) >= counted]


def worst_case(outcomes: Sequence[Outcome], model: ThreatModel) -> Outcome:
    """Per image the minimum over the outcomes: right only if right under every one of them.

    It is counted on the images that all of them met. An attack that met fewer than `FEW` where others met more is
    left out: it would take away most of the images.
    """
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    least = enough(len(outcome.correct) for outcome in attacked)
    return _all_of([outcome for outcome in outcomes if len(outcome.correct) >= least], WORST, model)


def enough(counts: Iterable[int]) -> int:
    """How many images an attack must have met to count in a worst case, by how many each of them met."""
    return min(FEW, max(counts, default=0))


def _all_of(outcomes: Sequence[Outcome], name: str, model: ThreatModel) -> Outcome:
    """One outcome in which an image is right if it is in all of these, on the images that all of them met."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN] or outcomes
    strongest = min(attacked, key=lambda outcome: outcome.accuracy)
    n = min(len(outcome.correct) for outcome in outcomes)
    return Outcome(
        defense=strongest.defense,
        attack=name,
        threat=strongest.threat,
        steps=max(outcome.steps for outcome in attacked),
        threat_model=model,
        correct=np.logical_and.reduce([outcome.correct[:n] for outcome in outcomes]),
        distance=max(outcome.distance for outcome in attacked),
        seconds=sum(outcome.seconds for outcome in outcomes),
        adversarial=strongest.adversarial[:0] if name == WORST else strongest.adversarial,
    )


def _place(outcome: Outcome) -> object:
    return outcome.defense, outcome.threat_model, outcome.attack, outcome.threat


def _row(outcome: Outcome) -> dict[str, Any]:
    n, correct = len(outcome.correct), int(outcome.correct.sum())
    return {
        "defense": outcome.defense,
        "attack": outcome.attack,
        "norm": outcome.threat.norm,
        "epsilon": outcome.threat.epsilon,
        "steps": outcome.steps,
        "threat_model": outcome.threat_model.value,
        "n": n,
        "accuracy": correct / n,
        "interval": [round(limit, 4) for limit in wilson(correct, n)],
        "worst_case": outcome.attack == WORST,
        "seconds": round(outcome.seconds, 2),
    }
