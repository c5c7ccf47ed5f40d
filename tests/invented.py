"""Outcomes of attacks that were made up, for tests of what is concluded from outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np

from vqunet_tf.evaluation import Outcome
from vqunet_tf.threat import Threat, ThreatModel


def outcome(
    share: float,
    attack: str = "pgd",
    defense: str = "none",
    model: str = "gray_box",
    epsilon: float = 0.1,
    norm: str = "linf",
    distance: float | None = None,
    n: int = 400,
    variant: str = "",
) -> Outcome:
    """An outcome with the first share of its images right, so that outcomes are nested."""
    threat = Threat(norm, 0.0 if attack == "none" else epsilon)
    return Outcome(
        defense=defense,
        attack=attack,
        threat=threat,
        steps=1,
        threat_model=ThreatModel(model),
        correct=np.arange(n) < share * n,
        distance=threat.epsilon if distance is None else distance,
        seconds=0.0,
        adversarial=np.zeros((0, 1, 1, 1), np.float32),
        variant=variant,
    )


def others(share: float, *arguments: Any, **options: Any) -> Outcome:
    """The same with the last share of its images right."""
    found = outcome(share, *arguments, **options)
    found.correct[:] = found.correct[::-1].copy()
    return found


WHITE = {"defense": "vqunet", "model": "white_box"}
GRAY = {"defense": "vqunet", "model": "gray_box"}
BLACK = {"defense": "vqunet", "model": "black_box"}
UNET = {"defense": "unet", "model": "gray_box"}
CLEAN = [outcome(0.9, "none"), outcome(0.9, "none", **GRAY), outcome(0.9, "none", **UNET)]
