"""Accuracy class by class: clean, purified, and in the worst case of each attacker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST, Outcome, attackers, threats, worst_case
from vqunet_tf.evaluation.summary import protagonist
from vqunet_tf.threat import ThreatModel


def per_class(
    outcomes: Sequence[Outcome], truth: np.ndarray, threat_models: Iterable[ThreatModel], classes: int = 0
) -> dict[str, Any]:
    """The entry `per_class` of report.json: how many images of each class, and the share classified right.

    truth: `[N]` true classes, in the order of each outcome's `correct`. classes: how many there are, if some
    may not occur. Only the undefended classifier and the defence that the report is about.

    Returns `n`, one number per class, and `rows` with `accuracy`, one share per class, None where there are no
    images, and its own `n`: slow attacks meet the first few images only.
    """
    n = np.bincount(truth, minlength=classes)
    names = list(dict.fromkeys(outcome.defense for outcome in outcomes))
    rows = []
    for name in dict.fromkeys((UNDEFENDED, protagonist(names))):
        own = [outcome for outcome in outcomes if outcome.defense == name]
        untouched = next((outcome for outcome in own if outcome.attack == CLEAN), None)
        if untouched is not None:
            rows.append(_row(untouched, CLEAN, truth, len(n)))
        for model in threat_models:
            for threat in threats(outcome for outcome in own if outcome.threat_model is model):
                worst = worst_case(attackers(outcomes, name, model, threat), model)
                rows.append(_row(worst, WORST, truth, len(n)))
    return {"n": n.tolist(), "rows": rows}


def first(row: Mapping[str, Any], n: Sequence[int]) -> str:
    """` (first 1000)` for a row of `per_class` of fewer images than there are, `n` of each class; else nothing."""
    return f" (first {sum(row['n'])})" if sum(row["n"]) < sum(n) else ""


def truth(evaluation: Any) -> np.ndarray | None:
    """The true class of every image of an evaluation, if it kept them."""
    found = getattr(evaluation, "truth", None)
    found = evaluation.labels if found is None else found
    return np.asarray(found) if len(found) == evaluation.n else None


def _row(outcome: Outcome, attack: str, truth: np.ndarray, classes: int) -> dict[str, Any]:
    met = truth[: len(outcome.correct)]
    n, right = (np.bincount(some, minlength=classes).tolist() for some in (met, met[outcome.correct]))
    return {
        "defense": outcome.defense,
        "attack": attack,
        "norm": outcome.threat.norm,
        "epsilon": outcome.threat.epsilon,
        "threat_model": outcome.threat_model.value,
        "n": n,
        "accuracy": [k / total if total else None for k, total in zip(right, n, strict=True)],
    }
