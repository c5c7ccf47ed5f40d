"""What happened to a few images: attacked, purified, answered, and written in codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from vqunet_tf.evaluation import palette
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, Outcome
from vqunet_tf.evaluation.summary import ATTACKERS, protagonist
from vqunet_tf.models import VQUNet
from vqunet_tf.threat import ThreatModel

GAIN = 5  # of the differences shown


@dataclass(frozen=True)
class Answer:
    """What the classifier makes of an image, how sure it is, and whether that is right."""

    name: str
    confidence: float
    right: bool


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind of picture of the same images: `[k,H,W,C]` float32 in [0,1], with answers or without."""

    title: str
    images: np.ndarray
    answers: list[Answer] | None = None


@dataclass(frozen=True, eq=False)
class Strip:
    """One attack on the first images: clean, attacked, purified, and the differences times GAIN, grey for none."""

    outcome: Outcome
    panels: list[Panel]


@dataclass(frozen=True, eq=False)
class CodeMaps:
    """Code maps of one level by what was shown: `clean`, or a threat model; and the share of codes that changed.

    maps: colours `[k,h,w,3]` uint8, close ones for codes that are close.
    """

    level: int
    maps: dict[str, np.ndarray]
    changed: dict[str, float]


def strips(
    evaluation: Evaluation, classifier: keras.Model, purifier: Any, class_names: Sequence[str], count: int = 6
) -> list[Strip]:
    """The first images of the sample, whichever way they went, under each threat model's attack at the largest epsilon."""
    images, labels = evaluation.images[:count], evaluation.labels[:count]
    defense = protagonist([outcome.defense for outcome in evaluation.outcomes])
    purify = _purify(evaluation, defense, purifier)

    def answered(title: str, shown: np.ndarray) -> Panel:
        return Panel(title, shown, answers(classifier, shown, labels, class_names))

    result = []
    for outcome in _shown_of_each(evaluation, defense):
        adversarial = outcome.adversarial[:count]
        panels = [answered("clean", images), answered("attacked", adversarial)]
        if purify is not None:
            purified = np.asarray(purify(adversarial), np.float32)
            panels += [answered("purified", purified), difference("added", adversarial - images)]
            panels.append(difference("left", purified - images))
        else:
            panels.append(difference("added", adversarial - images))
        result.append(Strip(outcome, panels))
    return result


def answers(
    classifier: keras.Model, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> list[Answer]:
    """The classifier's answers to images `[k,H,W,C]`."""
    logits = np.asarray(classifier(images, training=False), np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    return [Answer(str(class_names[k]), float(shares[i, k]), bool(k == labels[i])) for i, k in enumerate(best)]


def difference(title: str, change: np.ndarray) -> Panel:
    """A change `[k,H,W,C]` as a picture: times GAIN around grey, cut where that leaves the scale."""
    return Panel(f"{title} ×{GAIN}", np.clip(0.5 + GAIN * change, 0.0, 1.0).astype(np.float32))


def code_maps(evaluation: Evaluation, purifier: Any, count: int = 3) -> list[CodeMaps]:
    """Code maps of the first images, clean and as `shown` attacks left them; empty without a code book.

    The share of changed codes is over all the images that the evaluation kept. Several groups at a place count
    as one code: changed if one of them did.
    """
    if not isinstance(purifier, VQUNet) or not purifier.quantizers:
        return []
    defense = protagonist([outcome.defense for outcome in evaluation.outcomes])
    shown = {"clean": evaluation.images}
    shown |= {outcome.threat_model.value: outcome.adversarial for outcome in _shown_of_each(evaluation, defense)}
    found = {name: purifier.codes(images) for name, images in shown.items()}
    result = []
    for level, quantizer in zip(sorted(found["clean"]), purifier.quantizers, strict=True):
        maps = {name: levels[level] for name, levels in found.items()}
        places = {name: one.reshape(*one.shape[:3], -1) for name, one in maps.items()}  # [k,h,w,groups]
        changed = {
            name: float(np.mean(np.any(one != places["clean"], axis=-1)))
            for name, one in places.items()
            if name != "clean"
        }
        book = np.asarray(keras.ops.convert_to_numpy(quantizer.codebook))
        few = {name: _colored(one[:count], book) for name, one in places.items()}
        result.append(CodeMaps(int(level.rpartition("_")[2]), few, changed))
    return result


def shown(outcomes: Sequence[Outcome], defense: str, model: ThreatModel) -> Outcome | None:
    """PGD at the largest linf epsilon if it was run, else whatever was strongest there; None without an attack."""
    here = [o for o in outcomes if o.defense == defense and o.threat_model is model and o.attack != CLEAN]
    here = [o for o in here if o.threat.norm == "linf"] or here
    here = [o for o in here if o.threat.epsilon == max(other.threat.epsilon for other in here)]
    return min(here, key=lambda outcome: (outcome.attack != "pgd", outcome.accuracy), default=None)


def _purify(evaluation: Evaluation, defense: str, purifier: Any) -> Callable[[Any], Any] | None:
    """What that defence does to images; None for nothing."""
    if defense == UNDEFENDED:
        return None
    return getattr(evaluation, "purifiers", {}).get(defense, purifier)


def _shown_of_each(evaluation: Evaluation, defense: str) -> list[Outcome]:
    found = (shown(evaluation.outcomes, defense, model) for model in ATTACKERS if model in evaluation.threat_models)
    return [outcome for outcome in found if outcome is not None]


def _colored(indices: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Colours `[k,h,w,3]` of indices `[k,h,w,G]`; of several groups at a place the mean."""
    return np.rint(palette.codes(book)[indices].mean(axis=3)).astype(np.uint8)
