"""The evaluation suspects itself: what must hold if attacks work and gradients are not hidden.

After "On Evaluating Adversarial Robustness", Carlini et al., https://arxiv.org/abs/1902.06705, and
"Obfuscated Gradients Give a False Sense of Security", Athalye et al., https://arxiv.org/abs/1802.00420.
Accuracies are compared on the same images, and a check fails only where the difference is more than chance.
Here is what follows from an evaluation's outcomes; `probes.py` measures what needs images of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vqunet_tf.evaluation import rows
from vqunet_tf.evaluation.answers import deterministic, gradients_not_masked, logits_not_probabilities
from vqunet_tf.evaluation.findings import (
    DECISIONS,
    NOISE,
    OURS,
    SCORES,
    TRANSFER,
    Check,
    because,
    common,
    compared,
    judged,
    minimum,
    place,
    points,
    where,
)
from vqunet_tf.evaluation.orderings import (
    iterative_beats_single_step,
    monotone_in_epsilon,
    noise_weaker_than_gradients,
    white_box_beats_black_box,
    white_box_beats_gray_box,
    white_box_beats_identity,
)
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, Outcome, merged, threats
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.threat import TOLERANCE, ThreatModel

LEAK_MARGIN = 0.015  # untargeted may lie this much above targeted: targets are random, not leaking
CLEAN_LOSS = 0.01  # of accuracy on clean images, that a purifier may cost
NEED_NOT_WORK = (TRANSFER, NOISE)  # on the bare classifier: they never saw it


__all__ = [
    "Check",
    "attackers_tried",
    "attacks_work_undefended",
    "beats_ablations",
    "budget_held",
    "clean_accuracy_kept",
    "deterministic",
    "from_outcomes",
    "gradients_not_masked",
    "iterative_beats_single_step",
    "logits_not_probabilities",
    "monotone_in_epsilon",
    "no_label_leaking",
    "noise_weaker_than_gradients",
    "white_box_beats_black_box",
    "white_box_beats_gray_box",
    "white_box_beats_identity",
    "worst_case_is_lowest",
]


def from_outcomes(outcomes: Sequence[Outcome]) -> list[Check]:
    """All checks that the outcomes allow; one that would compare nothing is left out."""
    found = (
        attacks_work_undefended(outcomes),
        iterative_beats_single_step(outcomes),
        white_box_beats_gray_box(outcomes),
        white_box_beats_identity(outcomes),
        white_box_beats_black_box(outcomes),
        noise_weaker_than_gradients(outcomes),
        no_label_leaking(outcomes),
        monotone_in_epsilon(outcomes),
        budget_held(outcomes),
        worst_case_is_lowest(outcomes),
        clean_accuracy_kept(outcomes),
        beats_ablations(outcomes),
        attackers_tried(outcomes),
    )
    return [check for check in found if check is not None]


def attacks_work_undefended(outcomes: Sequence[Outcome]) -> Check | None:
    """At its largest epsilon every attack costs the bare classifier something, and one costs it half.

    An attack that does not is broken, not resisted. (A classifier that is robust by itself fails this too:
    then the attacks need a larger epsilon to be seen working.) Noise and transfer are let off.
    """
    bare = [outcome for outcome in merged(outcomes) if outcome.defense == UNDEFENDED]
    clean = next((outcome.correct for outcome in bare if outcome.attack == CLEAN), np.zeros(0, bool))
    largest: dict[tuple[str, str], Outcome] = {}
    for outcome in sorted(bare, key=lambda outcome: outcome.threat.epsilon):
        if outcome.attack not in (CLEAN, *NEED_NOT_WORK) and outcome.threat.epsilon > 0.0:
            largest[outcome.attack, outcome.threat.norm] = outcome
    if not largest or not clean.any():
        return None
    idle, shares = [], []
    for outcome in largest.values():
        after, before = common(outcome.correct, clean)
        shares.append((wilson(int(after.sum()), len(after))[0] - before.mean() / 2, after.mean(), outcome))
        if after.sum() >= before.sum() > 0:
            idle.append(f"{outcome.attack} ({outcome.threat.norm} {outcome.threat.epsilon:.4g}) changes nothing")
    _, left, best = min(shares, key=lambda share: share[1])
    at = f"{best.attack} at {best.threat.norm} epsilon {best.threat.epsilon:.4g}"
    detail = f"undefended {clean.mean():.1%} clean, {left:.1%} under {at}; {len(largest)} attacks seen working"
    passed = not idle and bool(min(share[0] for share in shares) <= 0.0)
    return Check("attacks_work_undefended", passed, because(detail.replace("; 1 attacks", "; 1 attack"), idle))


def no_label_leaking(outcomes: Sequence[Outcome]) -> Check | None:
    """No attack raises accuracy, and behind a defence aiming away from the label is no worse than aiming elsewhere.

    An image crafted with its true label carries it, and a purifier can learn to read it there
    (Kurakin et al., https://arxiv.org/abs/1611.01236, section 3.2). Untargeted far *below* targeted is no
    leak and is only said.
    """
    wrong, notes, pairs, table = [], [], 0, merged(outcomes)
    clean = {outcome.defense: outcome.correct for outcome in table if outcome.attack == CLEAN}
    for outcome in (outcome for outcome in table if outcome.attack != CLEAN):
        pairs += 1
        after, before = common(outcome.correct, clean[outcome.defense])
        if above(after, before):
            wrong.append(f"{where(outcome)}: {outcome.attack} {after.mean():.1%} above clean {before.mean():.1%}")
        is_gray = outcome.defense != UNDEFENDED and outcome.threat_model is ThreatModel.GRAY_BOX
        if not is_gray or outcome.attack != "pgd":
            continue
        for targeted in (o for o in table if o.attack == "pgd_targeted" and place(o) == place(outcome)):
            away, towards = common(outcome.correct, targeted.correct)
            text = f"{where(outcome)}: pgd {away.mean():.1%}, pgd_targeted {towards.mean():.1%}"
            if above(away, towards, LEAK_MARGIN):
                wrong.append(text)
            elif above(towards, away, LEAK_MARGIN):
                notes.append(f"{text}: no leak, but helped less against attacks away from the label")
    return compared("no_label_leaking", "no attack raises accuracy", pairs, wrong, "; ".join(notes))


def budget_held(outcomes: Sequence[Outcome]) -> Check | None:
    """Every adversarial image was measured to lie inside its ball."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    wrong = [
        f"{where(o)}: {o.attack} moved an image by {o.distance:.6g}"
        for o in attacked
        if not o.distance <= o.threat.epsilon + TOLERANCE
    ]
    return compared("budget_held", "all images within epsilon", len(attacked), wrong)


def worst_case_is_lowest(outcomes: Sequence[Outcome]) -> Check | None:
    """The worst-case rows count each image's own worst attack: at most any single row of that attacker."""
    models = [model for model in ThreatModel if any(outcome.threat_model is model for outcome in outcomes)]
    table, wrong, pairs, gap = rows.rows(outcomes, models), [], 0, 0.0
    for worst in (row for row in table if row["worst_case"]):
        same = [
            row["accuracy"]
            for row in table
            if not row["worst_case"]
            and all(row[key] == worst[key] for key in ("defense", "threat_model", "norm", "epsilon", "n"))
        ]
        if same:
            pairs += 1
            gap = max(gap, min(same) - worst["accuracy"])
            if worst["accuracy"] > min(same):
                at = f"{worst['defense']} {worst['threat_model']} {worst['norm']} epsilon {worst['epsilon']:.4g}"
                wrong.append(f"{at}: worst case {worst['accuracy']:.1%}, a single attack {min(same):.1%}")
    rule = f"image by image the worst attack counts, which takes up to {points(gap)} more than the best single one"
    return compared("worst_case_is_lowest", rule, pairs, wrong)


def clean_accuracy_kept(outcomes: Sequence[Outcome]) -> Check | None:
    """The purifier costs at most a point of accuracy on clean images, or no more than chance could."""
    clean = {outcome.defense: outcome.correct for outcome in outcomes if outcome.attack == CLEAN}
    if UNDEFENDED not in clean:
        return None
    bare, wrong = clean.pop(UNDEFENDED), []
    said = [f"{bare.mean():.1%} without", *(f"{kept.mean():.1%} with {name}" for name, kept in clean.items())]
    for name in judged(clean):
        loss = float(bare.mean() - clean[name].mean())
        if loss > CLEAN_LOSS and above(bare, clean[name]):
            wrong.append(f"{name} costs {points(loss)} of clean accuracy")
    text = because(f"{', '.join(said)}, on {len(bare)} images", wrong)
    return Check("clean_accuracy_kept", not wrong, text) if clean else None


def beats_ablations(outcomes: Sequence[Outcome]) -> Check | None:
    """Against the gray-box worst case VQUNet leaves more right than every other defence measured beside it.

    All budgets are pooled. A claim to be better has to be seen: a tie fails. What may be chance is said.
    """
    gray = [o for o in merged(outcomes) if o.threat_model is ThreatModel.GRAY_BOX and o.attack not in (CLEAN, NOISE)]
    wrong, said, pairs = [], [], 0
    for other in dict.fromkeys(outcome.defense for outcome in gray):
        ours, theirs = _pooled(gray, OURS, other)
        if other in (UNDEFENDED, OURS) or not ours.size:
            continue
        pairs += 1
        text = f"{other} {theirs.mean():.1%} against {ours.mean():.1%}"
        if not ours.mean() > theirs.mean():
            wrong.append(text)
        else:
            said.append(text if above(ours, theirs) else f"{text} (may be chance)")
    rule = f"gray-box worst case, {OURS} leaves more right than each other defence"
    return compared("beats_ablations", rule, pairs, wrong, "; ".join(said))


def attackers_tried(outcomes: Sequence[Outcome]) -> Check | None:
    """Says which kinds of adaptive attacks met the judged defences, and which did not; it fails nothing."""
    attacked = [o for o in outcomes if o.attack != CLEAN and o.threat_model is not ThreatModel.GRAY_BOX]
    attacked = [o for o in attacked if o.defense in judged(o.defense for o in outcomes)]
    if not attacked:
        return None
    whites = [o for o in attacked if o.threat_model is ThreatModel.WHITE_BOX]
    variants = list(dict.fromkeys(o.variant for o in whites if o.variant))
    kinds = {
        "several gradients": variants if len(variants) > 1 else [],
        "margin loss": _covered(whites, "apgd_dlr"),
        "score queries": _covered(attacked, SCORES),
        "decision queries": _covered(attacked, DECISIONS),
        "transfer": _covered(attacked, TRANSFER),
    }
    tried = [f"{kind}: {', '.join(what)}" for kind, what in kinds.items() if what]
    missing = [kind for kind, what in kinds.items() if not what]
    said = "; ".join([*tried, *([f"not tried: {', '.join(missing)}"] if missing else [])])
    return Check("attackers_tried", True, said)


def _pooled(gray: Sequence[Outcome], one: str, two: str) -> tuple[np.ndarray, np.ndarray]:
    """The worst cases of two defences under the attacks that both met, one budget after the other."""
    ours, theirs = [np.zeros(0, bool)], [np.zeros(0, bool)]
    for threat in threats(gray):
        first, second = (
            {o.attack: o.correct for o in gray if (o.defense, o.threat) == (d, threat)} for d in (one, two)
        )
        both = [name for name in first if name in second]
        if both:
            pair = common(minimum([first[name] for name in both]), minimum([second[name] for name in both]))
            ours.append(pair[0])
            theirs.append(pair[1])
    return np.concatenate(ours), np.concatenate(theirs)


def _covered(outcomes: Sequence[Outcome], attack: str) -> list[str]:
    """An attack by name and how many images it met, if it was made."""
    counts = [len(outcome.correct) for outcome in outcomes if outcome.attack == attack]
    return [f"{attack} on {max(counts)} images"] if counts else []
