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


@dataclass(frozen=True, eq=False)
class Outcome:
    """One attack, one defence, one threat model.

    correct: `[N]` booleans, which images are still classified as they should be.
    distance: how far the farthest image was moved, in the norm of `threat`.
    seconds: crafting the images (shared by all defences of a gray-box attack) and classifying them.
    adversarial: the first few adversarial images `[k,H,W,C]` float32, for pictures and for proof.
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

    @property
    def accuracy(self) -> float:
        """Share of images still classified right, in [0,1]."""
        return float(self.correct.mean())


def rows(outcomes: Sequence[Outcome], threat_models: Sequence[ThreatModel]) -> list[dict[str, Any]]:
    """The rows of report.json: clean, each attack, and the worst case, defence by defence.

    A clean row has no attacker: epsilon 0, no steps, and the first of `threat_models`. So has the
    undefended classifier only one kind of attacker who knows its gradients: its rows are there once, under
    the first of `threat_models`, and stand for gray-box and white-box alike.
    """
    result = []
    for defense in dict.fromkeys(outcome.defense for outcome in outcomes):
        for model in threat_models:
            own = [outcome for outcome in outcomes if outcome.defense == defense and outcome.threat_model is model]
            result += [_row(outcome) for outcome in sorted(own, key=lambda outcome: outcome.threat.epsilon)]
            for threat in threats(own):
                stronger = attackers(outcomes, defense, model, threat)
                result.append(_row(worst_case(stronger, model)))
    return result


def threats(outcomes: Iterable[Outcome]) -> list[Threat]:
    """The budgets that were attacked with, smallest first."""
    found = {outcome.threat for outcome in outcomes if outcome.attack != CLEAN}
    return sorted(found, key=lambda threat: (threat.norm, threat.epsilon))


def attackers(outcomes: Iterable[Outcome], defense: str, model: ThreatModel, threat: Threat) -> list[Outcome]:
    """Everything an attacker of this kind can do: nothing, each attack, and what those who know less can do.

    A white-box attacker can also use the gray-box images.
    """
    allowed = {model, ThreatModel.GRAY_BOX} if model is ThreatModel.WHITE_BOX else {model}
    return [
        outcome
        for outcome in outcomes
        if outcome.defense == defense
        and (outcome.attack == CLEAN or (outcome.threat == threat and outcome.threat_model in allowed))
    ]


def worst_case(outcomes: Sequence[Outcome], model: ThreatModel) -> Outcome:
    """Per image the minimum over the outcomes: right only if right under every one of them."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    return Outcome(
        defense=attacked[0].defense,
        attack=WORST,
        threat=attacked[0].threat,
        steps=max(outcome.steps for outcome in attacked),
        threat_model=model,
        correct=np.logical_and.reduce([outcome.correct for outcome in outcomes]),
        distance=max(outcome.distance for outcome in attacked),
        seconds=sum(outcome.seconds for outcome in outcomes),
        adversarial=attacked[0].adversarial[:0],
    )


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
