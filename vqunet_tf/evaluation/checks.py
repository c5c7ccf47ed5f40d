"""The evaluation suspects itself: what must hold if attacks work and gradients are not hidden.

After "On Evaluating Adversarial Robustness", Carlini et al., https://arxiv.org/abs/1902.06705, and
"Obfuscated Gradients Give a False Sense of Security", Athalye et al., https://arxiv.org/abs/1802.00420.
Accuracies are compared on the same images, and a check fails only where the difference is more than chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, Outcome, threats
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.threat import TOLERANCE, ThreatModel

LEAK_MARGIN = 0.015  # untargeted may lie this much above targeted: targets are random, not leaking
DEAD_SHARE = 0.01  # of images without a usable gradient
FADED = 1e-4  # median gradient of the defended model over that of the classifier


@dataclass(frozen=True)
class Check:
    """A statement about an evaluation that held or did not, and the numbers behind it."""

    name: str
    passed: bool
    detail: str


def from_outcomes(outcomes: Sequence[Outcome]) -> list[Check]:
    """All checks that the outcomes allow; one that would compare nothing is left out."""
    found = (
        attacks_work_undefended(outcomes),
        iterative_beats_single_step(outcomes),
        white_box_beats_gray_box(outcomes),
        no_label_leaking(outcomes),
        monotone_in_epsilon(outcomes),
        budget_held(outcomes),
    )
    return [check for check in found if check is not None]


def attacks_work_undefended(outcomes: Sequence[Outcome]) -> Check | None:
    """At the largest epsilon every attack costs the bare classifier something, and one costs it half.

    An attack that does not is broken, not resisted. (A classifier that is robust by itself fails this too:
    then the attacks need a larger epsilon to be seen working.)
    """
    bare = [outcome for outcome in outcomes if outcome.defense == UNDEFENDED]
    clean = next((outcome.accuracy for outcome in bare if outcome.attack == CLEAN), 0.0)
    largest = threats(bare)[-1] if threats(bare) else None
    if largest is None or largest.epsilon == 0.0:
        return None
    attacked = [outcome for outcome in bare if outcome.threat == largest and outcome.attack != CLEAN]
    idle = [outcome.attack for outcome in attacked if outcome.accuracy >= clean > 0.0]
    best = min(attacked, key=lambda outcome: outcome.accuracy)
    weak = wilson(int(best.correct.sum()), len(best.correct))[0] > clean / 2
    detail = f"undefended {clean:.1%} clean, {best.accuracy:.1%} under {best.attack} at epsilon {largest.epsilon:.4g}"
    return Check(
        "attacks_work_undefended", not idle and not weak, _because(detail, [f"{name} changes nothing" for name in idle])
    )


def iterative_beats_single_step(outcomes: Sequence[Outcome]) -> Check | None:
    """PGD leaves no more right than FGSM, where the attack had the gradient of what it met.

    Left out for gray-box attacks on a defence: carrying over to a model it was not made for, one coarse
    step often does better, and that says nothing about hidden gradients.
    """
    wrong, pairs = [], 0
    for ours in outcomes:
        if ours.attack == "pgd" and (ours.defense == UNDEFENDED or ours.threat_model is ThreatModel.WHITE_BOX):
            for theirs in _like(outcomes, ours, attack="fgsm"):
                pairs += 1
                if above(ours.correct, theirs.correct):
                    wrong.append(f"{_place(ours)}: pgd {ours.accuracy:.1%}, fgsm {theirs.accuracy:.1%}")
    return _check("iterative_beats_single_step", wrong, f"pgd leaves no more right than fgsm ({pairs} compared)", pairs)


def white_box_beats_gray_box(outcomes: Sequence[Outcome]) -> Check | None:
    """An attacker who follows the gradient through the defence does at least as well as one who does not."""
    wrong, pairs = [], 0
    for defense in dict.fromkeys(outcome.defense for outcome in outcomes if outcome.defense != UNDEFENDED):
        for threat in threats(outcomes):
            white, gray = (
                _worst(o for o in outcomes if (o.defense, o.threat, o.threat_model) == (defense, threat, model))
                for model in (ThreatModel.WHITE_BOX, ThreatModel.GRAY_BOX)
            )
            if white is not None and gray is not None:
                pairs += 1
                if above(white, gray):
                    shares = f"white-box {white.mean():.1%}, gray-box {gray.mean():.1%}"
                    wrong.append(f"{defense} epsilon {threat.epsilon:.4g}: {shares}")
    return _check("white_box_beats_gray_box", wrong, f"white-box leaves no more right ({pairs} compared)", pairs)


def no_label_leaking(outcomes: Sequence[Outcome]) -> Check | None:
    """No attack raises accuracy, and behind a defence aiming away from the label is no worse than aiming elsewhere.

    An image crafted with its true label carries it, and a purifier can learn to read it there
    (Kurakin et al., https://arxiv.org/abs/1611.01236, section 3.2).
    """
    wrong, pairs = [], 0
    for outcome in outcomes:
        if outcome.attack == CLEAN:
            continue
        pairs += 1
        clean = next(o for o in outcomes if o.attack == CLEAN and o.defense == outcome.defense)
        if above(outcome.correct, clean.correct):
            wrong.append(f"{_place(outcome)}: {outcome.attack} {outcome.accuracy:.1%} above clean {clean.accuracy:.1%}")
        is_gray = outcome.defense != UNDEFENDED and outcome.threat_model is ThreatModel.GRAY_BOX
        if is_gray and outcome.attack == "pgd":
            for targeted in _like(outcomes, outcome, attack="pgd_targeted"):
                if above(outcome.correct, targeted.correct, LEAK_MARGIN):
                    wrong.append(f"{_place(outcome)}: pgd {outcome.accuracy:.1%}, pgd_targeted {targeted.accuracy:.1%}")
    return _check("no_label_leaking", wrong, f"no attack raises accuracy ({pairs} compared with clean)", pairs)


def monotone_in_epsilon(outcomes: Sequence[Outcome]) -> Check | None:
    """A larger budget never helps the defender; the clean images are epsilon 0."""
    wrong, pairs = [], 0
    for defense, model in dict.fromkeys((o.defense, o.threat_model) for o in outcomes if o.attack != CLEAN):
        own = [o for o in outcomes if o.defense == defense and (o.attack == CLEAN or o.threat_model is model)]
        for norm in dict.fromkeys(threat.norm for threat in threats(own)):
            curve = [(0.0, next(o.correct for o in own if o.attack == CLEAN))]
            for threat in threats(own):
                worst = _worst(o for o in own if o.threat == threat and o.attack != CLEAN)
                if threat.norm == norm and threat.epsilon > 0 and worst is not None:
                    curve.append((threat.epsilon, worst))
            for (small, before), (large, after) in pairwise(curve):
                pairs += 1
                if above(after, before):
                    shares = f"{before.mean():.1%} at {small:.4g}, {after.mean():.1%} at {large:.4g}"
                    wrong.append(f"{defense} {model.value} {norm}: {shares}")
    return _check("monotone_in_epsilon", wrong, f"accuracy never rises with epsilon ({pairs} steps)", pairs)


def budget_held(outcomes: Sequence[Outcome]) -> Check | None:
    """Every adversarial image was measured to lie inside its ball."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    wrong = [
        f"{_place(o)}: {o.attack} moved an image by {o.distance:.6g}"
        for o in attacked
        if not o.distance <= o.threat.epsilon + TOLERANCE
    ]
    return _check("budget_held", wrong, f"all images within epsilon ({len(attacked)} measurements)", len(attacked))


def logits_not_probabilities(logits: np.ndarray) -> Check:
    """Raises a `UserError` for rows that are probabilities: a softmax before the loss flattens every gradient."""
    if logits.min() >= 0.0 and np.allclose(logits.sum(axis=1), 1.0, atol=1e-3):
        raise UserError(
            "the classifier gives probabilities: expected logits (attacks would see flattened gradients), "
            "remove its last softmax and save it again"
        )
    return Check("logits_not_probabilities", True, f"outputs run from {logits.min():.3g} to {logits.max():.3g}")


def deterministic(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Check:
    """Two calls of each defended model on the same images gave the same logits, up to the order of sums."""
    wrong = [name for name, (one, two) in pairs.items() if not np.allclose(one, two, rtol=1e-3, atol=1e-3)]
    detail = f"two calls agree for {', '.join(pairs)}"
    return Check("deterministic", not wrong, _because(detail, [f"{name} answers differently" for name in wrong]))


def gradients_not_masked(gradients: dict[str, np.ndarray]) -> Check:
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
    return Check("gradients_not_masked", not wrong, _because("; ".join(said), wrong))


def _like(outcomes: Sequence[Outcome], outcome: Outcome, attack: str) -> Iterator[Outcome]:
    """Outcomes of another attack in the same place."""
    for other in outcomes:
        if other.attack == attack and _key(other) == _key(outcome):
            yield other


def _key(outcome: Outcome) -> tuple[object, ...]:
    return outcome.defense, outcome.threat_model, outcome.threat


def _place(outcome: Outcome) -> str:
    return f"{outcome.defense} {outcome.threat_model.value} epsilon {outcome.threat.epsilon:.4g}"


def _worst(outcomes: Iterator[Outcome]) -> np.ndarray | None:
    correct = [outcome.correct for outcome in outcomes]
    return np.logical_and.reduce(correct) if correct else None


def _check(name: str, wrong: list[str], fine: str, pairs: int) -> Check | None:
    if not pairs:
        return None
    return Check(name, not wrong, "; ".join(wrong) or fine)


def _because(detail: str, wrong: list[str]) -> str:
    return "; ".join([*wrong, detail])
