"""What a check says, and how outcomes are put side by side before they are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vqunet_tf.evaluation.rows import UNDEFENDED, Outcome, enough

OURS = "vqunet"  # the defence whose claims are judged, where it is among those measured

# Attacks by what they use. Targeted and minimum-norm attacks follow gradients too, but not to the most damage.
SINGLE_STEP = "fgsm"
ITERATED = ("bim", "pgd", "mim", "apgd_ce")
GRADIENT = (SINGLE_STEP, *ITERATED, "apgd_dlr", "pgd_targeted", "cw_l2", "deepfool")
SCORES, DECISIONS = "square", "hopskipjump"  # query attacks: that see logits, that see the answer only
TRANSFER, NOISE = "transfer", "noise"
IDENTITY = "identity"  # the variant that takes the defence's gradient for the identity (BPDA)


@dataclass(frozen=True)
class Check:
    """A statement about an evaluation that held or did not, and the numbers behind it."""

    name: str
    passed: bool
    detail: str


def compared(name: str, rule: str, pairs: int, wrong: Sequence[str], figures: str = "") -> Check | None:
    """A check of `pairs` pairs: the rule they keep, or those that do not; None if there was nothing to compare."""
    if not pairs:
        return None
    said = f"{rule} ({pairs} compared)" if not wrong else f"{len(wrong)} of {pairs} compared"
    return Check(name, not wrong, "; ".join([*wrong, said, *filter(None, [figures])]))


def told(name: str, rule: str, results: Sequence[tuple[bool, str]]) -> Check | None:
    """A check of several results, each whether it is as it must be, and its figures; None if there are none."""
    wrong, fine = ([text for passed, text in results if bool(passed) is wanted] for wanted in (False, True))
    return compared(name, rule, len(results), wrong, "; ".join(fine))


def because(detail: str, wrong: Sequence[str]) -> str:
    """What was wrong first, then the figures."""
    return "; ".join([*wrong, detail])


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.1f} points"


def place(outcome: Outcome) -> tuple[object, ...]:
    """Where attacks can be compared: the same defence, knowledge and budget."""
    return outcome.defense, outcome.threat_model, outcome.threat


def where(outcome: Outcome) -> str:
    """The same in words."""
    threat = outcome.threat
    return f"{outcome.defense} {outcome.threat_model.value} {threat.norm} epsilon {threat.epsilon:.4g}"


def minimum(corrects: Sequence[np.ndarray]) -> np.ndarray:
    """Per image the minimum over `[m_i]` booleans, each of the first m_i images, on those that all of them cover.

    As in a worst case, what covers fewer than `FEW` where others cover more is left out.
    """
    least = enough(len(correct) for correct in corrects)
    counted = [correct for correct in corrects if len(correct) >= least]
    n = min(len(correct) for correct in counted)
    return np.logical_and.reduce([correct[:n] for correct in counted])


def common(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of two `[m]` arrays that speaks of the same images: the first ones."""
    count = min(len(one), len(two))
    return one[:count], two[:count]


def judged(names: Iterable[str]) -> list[str]:
    """The defences whose claims are judged: ours, or without it all."""
    found = [name for name in dict.fromkeys(names) if name != UNDEFENDED]
    return [OURS] if OURS in found else found
