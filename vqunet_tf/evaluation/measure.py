"""Attacks a classifier with and without its defences, and keeps what became of every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from vqunet_tf import defenses as registry
from vqunet_tf import pixels
from vqunet_tf.attacks import Attack
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.data import Split
from vqunet_tf.errors import UserError, choice
from vqunet_tf.evaluation import checks, rows
from vqunet_tf.evaluation.bench import Bench, Chain, Progress
from vqunet_tf.evaluation.checks import Check
from vqunet_tf.evaluation.rows import UNDEFENDED, Outcome
from vqunet_tf.threat import ThreatModel

MEASURED = (ThreatModel.GRAY_BOX, ThreatModel.WHITE_BOX)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All outcomes, the checks on them, and the first few images.

    threat_models: those asked for, and reported.
    images: `[k,H,W,C]` float32, labels: `[k]`; the adversaries of each outcome are those of these images.
    """

    outcomes: tuple[Outcome, ...]
    threat_models: tuple[ThreatModel, ...]
    checks: tuple[Check, ...]
    images: np.ndarray
    labels: np.ndarray
    seed: int

    @property
    def n(self) -> int:
        """How many images were measured."""
        return len(self.outcomes[0].correct)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of report.json."""
        return rows.rows(self.outcomes, self.threat_models)


def evaluate(
    classifier: keras.Model,
    purifier: keras.Model,
    images: Any,
    labels: Any,
    *,
    attacks: Sequence[Attack],
    threat_models: Sequence[str] = ("gray_box", "white_box"),
    defenses: Sequence[str] = ("none", "vqunet"),
    batch_size: int = 100,
    seed: int = 0,
    keep: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures robust accuracy; equal arguments give equal rows.

    Gray-box images are crafted once, against the classifier alone, and shown to every defence. White-box
    images are crafted for each defence, through it and the classifier, with the gradient that the defence
    itself passes (straight-through for a quantizer). The undefended classifier is always measured, and
    gray-box images are always made: an attack that does not work on the bare classifier says nothing
    about a defence, and a white-box attacker can use the gray-box images too.

    classifier: images `[B,H,W,C]` in [0,1] → logits `[B,K]`. purifier: images → images.
    images: `[N,H,W,C]` uint8, or floats in [0,1]. labels: `[N]` true classes in 0..K-1.
    attacks: each with the budget it may use.
    threat_models, defenses: by name.
    batch_size: images attacked at a time; results depend on it by rounding only.
    seed: of random starts and random targets.
    keep: how many images, the first, to keep with their adversaries.

    Raises a `UserError` for unknown names, images on another scale, and a classifier that gives
    probabilities or does not fit.
    """
    names = [choice("threat model", name, [model.value for model in MEASURED]) for name in threat_models]
    asked = [model for model in MEASURED if model.value in names]
    if not asked or not attacks:
        raise UserError("expected at least one attack and one threat model, got none")
    defended = [name for name in dict.fromkeys(defenses) if name != UNDEFENDED]
    chains = {name: Chain(classifier, registry.build(name, purifier)) for name in (UNDEFENDED, *defended)}
    through = defended if ThreatModel.WHITE_BOX in asked else []
    unit, truth = np.array(keras.ops.convert_to_numpy(pixels.to_unit(images))), np.asarray(labels, np.int32)
    if not (unit.min() >= 0.0 and unit.max() <= 1.0):  # not a number fails both
        raise UserError(f"expected images as uint8 or floats in [0,1], got {unit.min():.4g} to {unit.max():.4g}")
    work = len(unit) * (1 + len(through)) * sum(attack.steps for attack in attacks)
    bench = Bench(chains, unit, truth, batch_size=batch_size, seed=seed, keep=keep, progress=progress, total=work)
    _check_fit(bench.clean_logits[UNDEFENDED], truth)
    found = [checks.logits_not_probabilities(bench.clean_logits[UNDEFENDED])]

    outcomes = [bench.clean(name, asked[0], attacks[0].threat.norm) for name in chains]
    for attack in attacks:
        oblivious = bench.craft(attack, UNDEFENDED, label="gray-box")
        outcomes.append(bench.score(oblivious, UNDEFENDED, asked[0]))
        outcomes += [bench.score(oblivious, name, ThreatModel.GRAY_BOX) for name in defended]
        for name in through:
            adaptive = bench.craft(attack, name, label=f"white-box {name}")
            outcomes.append(bench.score(adaptive, name, ThreatModel.WHITE_BOX))

    found += checks.from_outcomes(outcomes)
    few = slice(batch_size)
    again = {
        name: (bench.clean_logits[name][few], chain.logits(unit[few], batch_size)) for name, chain in chains.items()
    }
    gradients = {name: input_gradient(chain, unit[few], truth[few]) for name, chain in chains.items()}
    found += [checks.deterministic(again), checks.gradients_not_masked(gradients)]
    return Evaluation(tuple(outcomes), tuple(asked), tuple(found), unit[:keep], truth[:keep], seed)


def sample(split: Split, n: int) -> Split:
    """Returns the first n of a fixed permutation of a split: the same n images whatever the seed of a run.

    Raises a `UserError` if the split does not hold n images.
    """
    available = len(split.labels)
    if not 1 <= n <= available:
        raise UserError(f"expected between 1 and {available} examples (the test split has {available}), got {n}")
    order = np.random.RandomState(0).permutation(available)[:n]  # RandomState: its stream never changes
    return Split(split.images[order], split.labels[order], split.class_names)


def _check_fit(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.max() >= logits.shape[1]:
        raise UserError(
            f"expected logits [{len(labels)}, classes] for labels 0..{labels.max()}, the classifier gives "
            f"{list(logits.shape)}: give the classifier of this data set"
        )
