"""Checks that need attacks of their own, on a few images: a much larger budget, twice the steps, noise, the same
network without its quantizers, and slopes.

"Obfuscated Gradients Give a False Sense of Security", Athalye et al., https://arxiv.org/abs/1802.00420, section 3.1;
"On Evaluating Adversarial Robustness", Carlini et al., https://arxiv.org/abs/1902.06705, sections 3 to 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vqunet_tf.attacks import PGD, Attack, Noise, Victim
from vqunet_tf.attacks.answers import answers
from vqunet_tf.attacks.base import batches
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.evaluation import differences
from vqunet_tf.evaluation.findings import NOISE, Check, judged, points, told
from vqunet_tf.evaluation.orderings import noise_check
from vqunet_tf.evaluation.rows import UNDEFENDED, Outcome, merged, threats
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.threat import Threat, ThreatModel

N = 100  # images of a probe
FEW = 32  # images whose slopes are taken
STEPS = 20  # of PGD, where no number is at stake
LARGE = Threat("linf", 0.5)  # from any pixel to the middle: nothing need be left of an image
UNBOUNDED = Threat("linf", 1.0)
NOTHING = 0.05  # about
ENOUGH = 20  # images, to compare what is left of them
BROKEN = 0.1  # at most this share is right at LARGE: ten classes by chance
CHANGE = 0.01  # of accuracy, by twice the steps
UNQUANTIZED = "unquantized"  # the variant of a victim whose quantizers are switched off

# Called with what is running and the work just done; one image and one gradient step are 1.
Advance = Callable[[str, int], Any]


class Bench(Protocol):
    """What probes need of an evaluation: victims by name of their defence, images `[N,H,W,C]` and labels `[N]`."""

    victims: Any
    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    seed: int


@dataclass(frozen=True, eq=False)
class Subject:
    """One judged defence.

    victim: the defended model, with the gradient that attackers follow.
    unquantized: the same weights with the quantizers switched off; None where there are none.
    differentiable: whether that gradient is meant to be the victim's own, and no stand-in.
    """

    name: str
    victim: Victim
    unquantized: Victim | None = None
    differentiable: bool = True


def run(bench: Bench, outcomes: Sequence[Outcome] = (), advance: Advance | None = None) -> list[Check]:
    """Probes the defences whose claims are judged on the first `N` images; without a defence or a budget, nothing.

    outcomes: what was measured already. Budgets and steps come from there, and what is answered there is not asked again.
    advance: told of all the `work`, what turned out to be needless too.
    """
    budgets = [threat for threat in threats(outcomes) if threat.epsilon > 0.0]
    subjects = [subject(name, bench.victims[name]) for name in judged(bench.victims)]
    if not budgets or not subjects:
        return []
    steps = max((outcome.steps for outcome in outcomes if outcome.attack == "pgd"), default=STEPS)
    probe = Probe(bench.images[:N], bench.labels[:N], bench.batch_size, bench.seed, advance)
    places = [(one, telling(outcomes, one.name, budgets)) for one in subjects]
    found = [more_steps_change_little(probe, places, steps)]
    if not any(outcome.attack == NOISE for outcome in outcomes):
        found.append(noise_weaker_than_gradients(probe, places, steps))
    found += [
        large_epsilon_succeeds(probe, subjects),
        unbounded_attack_succeeds(probe, subjects),
        falls_without_quantizers(probe, subjects, max(budgets, key=lambda threat: (threat.norm, threat.epsilon))),
        quantizers_hide_nothing(probe, places, steps, outcomes),
        gradients_match_differences(probe, bench.victims[UNDEFENDED], subjects),
    ]
    if advance is not None:
        advance("checks", work(bench, steps) - probe.done())
    return [check for check in found if check is not None]


def work(bench: Bench, steps: int = STEPS) -> int:
    """The most that `run` does, in images times gradient steps; `steps`: of PGD in the evaluation."""
    one = steps + 2 * steps + steps + Noise(threat=LARGE).steps + 6 * STEPS
    return len(judged(bench.victims)) * len(bench.images[:N]) * one


def subject(name: str, victim: Any) -> Subject:
    """One of an evaluation's victims; a function without variants is taken as it is."""
    variants = getattr(victim, "variants", ())
    differentiable = bool(getattr(getattr(victim, "purify", None), "differentiable", True))
    # Of a victim that answers at random one draw is followed: probes look for what is wrong, at a tenth of the cost.
    one_draw = getattr(victim, "is_random", False) and differentiable
    through = victim.through() if variants and not one_draw else victim
    return Subject(name, through, victim.through(UNQUANTIZED) if UNQUANTIZED in variants else None, differentiable)


def telling(outcomes: Sequence[Outcome], defense: str, budgets: Sequence[Threat]) -> Threat:
    """The budget at which white-box PGD left nearest to half of the images right: there a change shows most."""
    seen = {
        outcome.threat: abs(outcome.accuracy - 0.5)
        for outcome in merged(outcomes)
        if (outcome.defense, outcome.attack, outcome.threat_model) == (defense, "pgd", ThreatModel.WHITE_BOX)
    }
    return min(budgets, key=lambda threat: (seen.get(threat, 1.0), threat.epsilon))


@dataclass(frozen=True, eq=False)
class Probe:
    """Images `[N,H,W,C]` with labels `[N]`, and what attacks did to them, each made once."""

    images: np.ndarray
    labels: np.ndarray
    batch_size: int = N
    seed: int = 0
    advance: Advance | None = None
    _made: dict[tuple[Victim, Attack], np.ndarray] = field(default_factory=dict)

    def right(self, victim: Victim, attack: Attack) -> np.ndarray:
        """Which images `[N]` this victim still gets right under an attack on it."""
        if (victim, attack) not in self._made:
            adversarial = attack(victim, self.images, self.labels, batch_size=self.batch_size, seed=self.seed)
            self._made[victim, attack] = self.correct(victim, adversarial)
            if self.advance is not None:
                self.advance(f"checks {attack.name} {attack.threat.epsilon:.4g}", len(self.images) * attack.steps)
        return self._made[victim, attack]

    def done(self) -> int:
        """The work of all attacks so far."""
        return sum(len(self.images) * attack.steps for _, attack in self._made)

    def correct(self, victim: Victim, images: np.ndarray) -> np.ndarray:
        """Which of some versions of the images are answered right; what is not a number is no answer."""
        logits = self.logits(victim, images)
        return (logits.argmax(axis=1) == self.labels) & np.isfinite(logits).all(axis=1)

    def logits(self, victim: Victim, images: np.ndarray) -> np.ndarray:
        """Logits `[N,K]`, a batch at a time."""
        parts = [answers(victim, images[rows])[:count] for rows, count in batches(len(images), self.batch_size)]
        return np.concatenate(parts)


def pgd(threat: Threat, steps: int = STEPS) -> PGD:
    """The attack of the probes; an image that is fooled is done with."""
    return PGD(threat=threat, steps=steps, until_fooled=True)


def more_steps_change_little(probe: Probe, places: Sequence[tuple[Subject, Threat]], steps: int) -> Check | None:
    """PGD with twice the steps leaves as much right, within a point or what chance can do: it had converged."""
    results = []
    for one, threat in places:
        once, twice = (probe.right(one.victim, pgd(threat, count)) for count in (steps, 2 * steps))
        figures = f"{once.mean():.1%} after {steps} steps, {twice.mean():.1%} after {2 * steps}"
        little = bool(abs(once.mean() - twice.mean()) <= CHANGE) or not (above(once, twice) or above(twice, once))
        results.append((little, f"{one.name} {_at(threat)}: {figures}, on {len(once)} images"))
    return told("more_steps_change_little", "twice the steps change nothing beyond chance", results)


def noise_weaker_than_gradients(probe: Probe, places: Sequence[tuple[Subject, Threat]], steps: int) -> Check | None:
    """Random noise of the same size, the worst of a few draws, breaks no more than PGD does."""
    return noise_check(
        [
            (
                f"{one.name} {_at(threat)}",
                probe.right(one.victim, pgd(threat, steps)),
                probe.right(one.victim, Noise(threat=threat)),
            )
            for one, threat in places
        ]
    )


def large_epsilon_succeeds(probe: Probe, subjects: Sequence[Subject]) -> Check | None:
    """A budget that can turn every image grey leaves no more right than guessing does."""
    results = []
    for one in subjects:
        right = probe.right(one.victim, pgd(LARGE))
        figures = f"{one.name} {_at(LARGE)}: {right.mean():.1%} of {len(right)} images right"
        results.append((wilson(int(right.sum()), len(right))[0] <= BROKEN, figures))
    return told("large_epsilon_succeeds", f"at most {BROKEN:.0%} is left", results)


def unbounded_attack_succeeds(probe: Probe, subjects: Sequence[Subject]) -> Check | None:
    """An attacker who may change pixels at will leaves nothing right; the images made within LARGE are his too."""
    results = []
    for one in subjects:
        right, last = probe.right(one.victim, pgd(LARGE)), pgd(LARGE)
        # Then twice as many steps: an attacker without limits need not be quick.
        for attack in (pgd(UNBOUNDED), pgd(UNBOUNDED, 2 * STEPS)):
            if right.any():
                right, last = right & probe.right(one.victim, attack), attack
        how = f"{last.steps} steps within {_at(last.threat)}"
        results.append((not right.any(), f"{one.name}: {right.sum()} of {len(right)} images right after {how}"))
    return told("unbounded_attack_succeeds", "nothing is left", results)


def falls_without_quantizers(probe: Probe, subjects: Sequence[Subject], threat: Threat) -> Check | None:
    """With its quantizers switched off, attacked and measured so, the network falls to about nothing.

    If it does not, something else than the quantizers is in the attacker's way. A network that was trained to
    resist is given the larger budget.
    """
    results = []
    for name, victim in [(one.name, one.unquantized) for one in subjects]:
        if victim is None:
            continue
        clean = probe.correct(victim, probe.images)
        right = probe.right(victim, pgd(threat))
        figures = f"{name} without quantizers: {clean.mean():.1%} clean, {right.mean():.1%} at {_at(threat)}"
        if right.mean() > NOTHING:
            right = right & probe.right(victim, pgd(LARGE))
            figures = f"{figures}, {right.mean():.1%} at {_at(LARGE)}"
        results.append((wilson(int(right.sum()), len(right))[0] <= NOTHING, figures))
    return told("falls_without_quantizers", f"at most {NOTHING:.0%} is left", results)


def quantizers_hide_nothing(
    probe: Probe, places: Sequence[tuple[Subject, Threat]], steps: int, outcomes: Sequence[Outcome] = ()
) -> Check | None:
    """PGD through the quantizers, with every gradient that was tried, leaves no more right than PGD with them switched off.

    Beyond chance and by more than a few points, of the images that are right both ways before the attack: then the jumps stop
    the attack and not the network, and an attack that gets past them would find less.
    """
    results = []
    for one, threat in places:
        if one.unquantized is None:
            continue
        known = probe.correct(one.victim, probe.images) & probe.correct(one.unquantized, probe.images)
        if known.sum() < ENOUGH:
            continue
        on, off = (probe.right(victim, pgd(threat, steps)) for victim in (one.victim, one.unquantized))
        for outcome in outcomes:
            place = outcome.defense, outcome.attack, outcome.threat_model, outcome.threat
            if place == (one.name, "pgd", ThreatModel.WHITE_BOX, threat) and len(outcome.correct) >= len(on):
                on = on & outcome.correct[: len(on)]
        figures = f"{on[known].sum()} of {known.sum()} images right after {steps} steps, {off[known].sum()} without quantizers"
        results.append((not above(on[known], off[known], NOTHING), f"{one.name} {_at(threat)}: {figures}"))
    rule = f"attacked through quantizers at most {points(NOTHING)} more are right than without them"
    return told("quantizers_hide_nothing", rule, results)


def gradients_match_differences(probe: Probe, bare: Victim, subjects: Sequence[Subject]) -> Check:
    """The gradients of the classifier, of each defence that has slopes, and of it without quantizers are slopes."""
    functions = {UNDEFENDED: bare}
    for one in subjects:
        if one.differentiable:
            functions[one.name] = one.victim
        if one.unquantized is not None:
            functions[f"{one.name} without quantizers"] = one.unquantized
    images, labels = differences.inside(probe.images[:FEW]), probe.labels[:FEW]
    errors = {}
    for name, victim in functions.items():
        gradient = input_gradient(victim, images, labels)
        answer = functools.partial(answers, victim)
        errors[name] = differences.slope_error(answer, gradient, images, labels, probe.seed)
    return differences.gradients_match_differences(errors)


def _at(threat: Threat) -> str:
    return f"{threat.norm} epsilon {threat.epsilon:.4g}"
