"""Who must beat whom: attackers who know more, take more steps or have a larger budget leave no more right.

Outcomes are compared image by image, on the images that both cover; of the variants of an attack the
minimum counts, as in its row. The worst-case rows give a white-box attacker the gray-box images too and are in
order by construction, so the attacks themselves are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from vqunet_tf.evaluation.findings import (
    GRADIENT,
    IDENTITY,
    ITERATED,
    NOISE,
    SINGLE_STEP,
    Check,
    common,
    compared,
    minimum,
    place,
    told,
    where,
)
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, Outcome, merged, threats
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.threat import ThreatModel

MISSED = 0.02  # share of images that a weaker attacker may break and the stronger not: nobody finds everything

# Where, the stronger attacker's `[m]` booleans, the weaker's.
Pair = tuple[str, np.ndarray, np.ndarray]


def iterative_beats_single_step(outcomes: Sequence[Outcome]) -> Check | None:
    """An iterated attack leaves no more right than FGSM, where it had the gradient of what it met.

    Left out for gray-box attacks on a defence: carrying over to a model it was not made for, one coarse
    step often does better, and that says nothing about hidden gradients.
    """
    wrong, pairs, table = [], 0, merged(outcomes)
    for ours in table:
        if ours.attack in ITERATED and (ours.defense == UNDEFENDED or ours.threat_model is ThreatModel.WHITE_BOX):
            for theirs in _beside(table, ours, SINGLE_STEP):
                pairs += 1
                one, two = common(ours.correct, theirs.correct)
                if above(one, two):
                    wrong.append(f"{where(ours)}: {ours.attack} {one.mean():.1%}, fgsm {two.mean():.1%}")
    return compared("iterative_beats_single_step", "iterated attacks leave no more right than fgsm", pairs, wrong)


def white_box_beats_gray_box(outcomes: Sequence[Outcome]) -> Check | None:
    """Who follows the gradient through the defence breaks what those break who do not know of it.

    Attack by attack for those that go for the most damage, and all attacks of each kind together.
    """
    table = [outcome for outcome in merged(outcomes) if outcome.attack not in (CLEAN, NOISE)]
    pairs: list[Pair] = []
    for white, gray in _two(table, ThreatModel.WHITE_BOX, ThreatModel.GRAY_BOX):
        for ours in white:
            pairs += [
                (f"{where(ours)} {ours.attack}", ours.correct, theirs.correct)
                for theirs in gray
                if theirs.attack == ours.attack and ours.attack in ITERATED
            ]
        pairs.append((f"{where(white[0])} all attacks", _worst(white), _worst(gray)))
    return _in_order("white_box_beats_gray_box", "white-box", "gray-box", pairs)


def white_box_beats_identity(outcomes: Sequence[Outcome]) -> Check | None:
    """A gradient through the defence, or a stand-in for it, breaks what the one that ignores the defence (BPDA) breaks."""
    whites = [o for o in outcomes if o.threat_model is ThreatModel.WHITE_BOX and o.attack != CLEAN]
    through = merged(outcome for outcome in whites if outcome.variant != IDENTITY)
    pairs = [
        (f"{where(ours)} {ours.attack}", ours.correct, theirs.correct)
        for theirs in merged(outcome for outcome in whites if outcome.variant == IDENTITY)
        for ours in _beside(through, theirs, theirs.attack)
    ]
    return _in_order("white_box_beats_identity", "the gradient through it", "identity BPDA", pairs)


def white_box_beats_black_box(outcomes: Sequence[Outcome]) -> Check | None:
    """Who has gradients breaks what those break who only ask or transfer: else the gradients are no use.

    On the bare classifier the attacks themselves say which is which.
    """
    table, pairs = merged(outcomes), []
    for theirs in table:
        is_bare = theirs.defense == UNDEFENDED
        is_black = theirs.attack not in GRADIENT if is_bare else theirs.threat_model is ThreatModel.BLACK_BOX
        if theirs.attack in (CLEAN, NOISE) or not is_black:
            continue
        gradient = _with_gradients(table, theirs)
        if gradient is not None:
            pairs.append((f"{where(theirs)} {theirs.attack}", gradient, theirs.correct))
    return _in_order("white_box_beats_black_box", "gradients", "the black-box attack", pairs)


def noise_weaker_than_gradients(outcomes: Sequence[Outcome]) -> Check | None:
    """Gradients break more than random noise of the same size does, and never less."""
    table = merged(outcomes)
    found = []
    for noise in (outcome for outcome in table if outcome.attack == NOISE):
        gradient = _with_gradients(table, noise)
        if gradient is not None:
            found.append((where(noise), gradient, noise.correct))
    return noise_check(found)


def noise_check(pairs: Sequence[Pair]) -> Check | None:
    """The finding on pairs of what gradients and what noise leave right."""
    results = []
    for at, gradient, noise in pairs:
        ours, theirs = common(gradient, noise)
        figures = f"{at}: gradients leave {ours.mean():.1%}, noise {theirs.mean():.1%} of {len(ours)} images"
        results.append((not above(ours, theirs), figures))
    return told("noise_weaker_than_gradients", "gradients leave no more right than noise", results)


def monotone_in_epsilon(outcomes: Sequence[Outcome]) -> Check | None:
    """A larger budget never helps the defender; the clean images are epsilon 0.

    From one budget to the next only attacks that were made in both are counted.
    """
    wrong, pairs, table = [], 0, merged(outcomes)
    for defense, model in dict.fromkeys((o.defense, o.threat_model) for o in table if o.attack != CLEAN):
        own = [o for o in table if (o.defense, o.threat_model) == (defense, model) and o.attack != CLEAN]
        clean = next(o.correct for o in table if o.attack == CLEAN and o.defense == defense)
        for norm in dict.fromkeys(threat.norm for threat in threats(own)):
            budgets = [threat for threat in threats(own) if threat.norm == norm and threat.epsilon > 0]
            curve = [(t.epsilon, {o.attack: o.correct for o in own if o.threat == t}) for t in budgets]
            curve.insert(0, (0.0, dict.fromkeys([o.attack for o in own], clean)))
            for (small, before), (large, after) in pairwise(curve):
                both = [name for name in after if name in before]
                if not both:
                    continue
                pairs += 1
                one, two = common(minimum([before[name] for name in both]), minimum([after[name] for name in both]))
                if above(two, one):
                    shares = f"{one.mean():.1%} at {small:.4g}, {two.mean():.1%} at {large:.4g}"
                    wrong.append(f"{defense} {model.value} {norm}: {shares}")
    return compared("monotone_in_epsilon", "accuracy never rises with epsilon", pairs, wrong)


def _in_order(name: str, stronger: str, weaker: str, pairs: Sequence[Pair]) -> Check | None:
    """Fails where more than MISSED of the images, beyond chance, fall to the weaker attacker alone."""
    wrong, largest = [], 0.0
    for at, ours, theirs in pairs:
        strong, weak = common(ours, theirs)
        missed = strong & ~weak
        largest = max(largest, float(missed.mean()))
        if wilson(int(missed.sum()), len(missed))[0] > MISSED:
            shares = f"{strong.mean():.1%} right under {stronger}, {weak.mean():.1%} under {weaker}"
            wrong.append(f"{at}: only {weaker} breaks {missed.mean():.1%} of {len(missed)} images ({shares})")
    return compared(name, f"at most {largest:.1%} of the images fall to {weaker} alone", len(pairs), wrong)


def _two(outcomes: Sequence[Outcome], one: ThreatModel, two: ThreatModel) -> Iterable[tuple[list[Outcome], ...]]:
    """The outcomes of two threat models for each defence and budget that both attacked."""
    for defense in dict.fromkeys(outcome.defense for outcome in outcomes if outcome.defense != UNDEFENDED):
        for threat in threats(outcomes):
            here = [o for o in outcomes if (o.defense, o.threat) == (defense, threat)]
            found = tuple([o for o in here if o.threat_model is model] for model in (one, two))
            if all(found):
                yield found


def _with_gradients(table: Sequence[Outcome], outcome: Outcome) -> np.ndarray | None:
    """Per image the minimum over all attacks of that defence and budget that had its gradient."""
    found = [
        o.correct
        for o in table
        if (o.defense, o.threat) == (outcome.defense, outcome.threat)
        and o.attack in GRADIENT
        and (o.defense == UNDEFENDED or o.threat_model is ThreatModel.WHITE_BOX)
    ]
    return minimum(found) if found else None


def _beside(outcomes: Sequence[Outcome], outcome: Outcome, attack: str) -> list[Outcome]:
    """What another attack did in the same place."""
    return [other for other in outcomes if other.attack == attack and place(other) == place(outcome)]


def _worst(outcomes: Sequence[Outcome]) -> np.ndarray:
    return minimum([outcome.correct for outcome in outcomes])
