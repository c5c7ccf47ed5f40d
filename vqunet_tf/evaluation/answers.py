"""What victims answer and which gradients they pass: logits, the same ones twice, and gradients that are there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation.findings import Check, because
from vqunet_tf.evaluation.rows import UNDEFENDED

DEAD_SHARE = 0.01  # of images without a usable gradient
FADED = 1e-4  # median gradient of the defended model over that of the classifier


def logits_not_probabilities(answers: np.ndarray | Mapping[str, np.ndarray]) -> Check:
    """Nobody answers with probabilities: a softmax before the loss flattens every gradient.

    answers: `[N,K]` of the bare classifier, or of every victim by the name of its defence.
    Raises a `UserError` where it is the bare classifier; a defence that does so fails the check.
    """
    named = answers if isinstance(answers, Mapping) else {UNDEFENDED: answers}
    flat = [name for name, logits in named.items() if _probabilities(logits)]
    if UNDEFENDED in flat:
        raise UserError(
            "the classifier gives probabilities: expected logits (attacks would see flattened gradients), "
            "remove its last softmax and save it again"
        )
    low, high = min(logits.min() for logits in named.values()), max(logits.max() for logits in named.values())
    wrong = [f"{name} gives probabilities" for name in flat]
    return Check("logits_not_probabilities", not wrong, because(f"outputs run from {low:.3g} to {high:.3g}", wrong))


def deterministic(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Check:
    """Two calls of each defended model on the same images gave the same logits, up to the order of sums."""
    wrong = [name for name, (one, two) in pairs.items() if not agree(one, two)]
    detail = f"two calls compared for {', '.join(pairs)}"
    return Check("deterministic", not wrong, because(detail, [f"{name} answers differently" for name in wrong]))


def agree(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two answers `[N,K]` are the same, up to the order of sums."""
    return bool(np.allclose(one, two, rtol=1e-3, atol=1e-3, equal_nan=True))


def gradients_not_masked(gradients: Mapping[str, np.ndarray]) -> Check:
    """The input gradients `[B,H,W,C]` that white-box attacks follow exist, by defence.

    Fails if more than one image in a hundred has a gradient that is zero everywhere or not finite, or if
    the median gradient of a defended model is under a ten-thousandth of the classifier's own.
    """
    wrong, said = [], []
    lengths = {name: np.sqrt(np.square(g, dtype=np.float64).sum(axis=(1, 2, 3))) for name, g in gradients.items()}
    bare = float(np.median(lengths[UNDEFENDED]))
    for name, length in lengths.items():
        dead = float(np.mean(~np.isfinite(length) | (length == 0.0)))
        faded = float(np.median(length)) / bare if bare > 0.0 else 1.0
        said.append(f"{name}: {dead:.1%} of images without, {np.mean(gradients[name] == 0.0):.1%} of pixels zero")
        if dead > DEAD_SHARE:
            wrong.append(f"{name} gives {dead:.1%} of images no gradient")
        elif not faded >= FADED:
            wrong.append(f"{name} shrinks gradients to {faded:.1e}")
    return Check("gradients_not_masked", not wrong, because("; ".join(said), wrong))


def _probabilities(logits: np.ndarray) -> bool:
    return bool(logits.min() >= 0.0 and np.allclose(logits.sum(axis=1), 1.0, atol=1e-3))
