"""Attacks a classifier with and without its defences, and keeps what became of every image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from vqunet_tf import defenses as registry
from vqunet_tf.attacks import PGD, Attack
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.data import Split
from vqunet_tf.defenses import Purify
from vqunet_tf.errors import UserError, choice
from vqunet_tf.evaluation import checks, inputs, probes, rows
from vqunet_tf.evaluation.bench import Bench, Progress
from vqunet_tf.evaluation.cache import Cache
from vqunet_tf.evaluation.checks import Check
from vqunet_tf.evaluation.jobs import Job, jobs
from vqunet_tf.evaluation.rows import UNDEFENDED, Outcome
from vqunet_tf.evaluation.suites import Plan
from vqunet_tf.evaluation.victims import DRAWS, Chain
from vqunet_tf.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All outcomes, the checks on them, and the first few images.

    threat_models: those asked for, and reported.
    images: `[k,H,W,C]` float32, labels: `[k]`; the adversaries of each outcome are those of these images.
    truth: `[N]` int32, the true class of every image.
    seconds: spent on crafting and answering, now or by an earlier call whose results were kept.
    notes: sentences that a reader must know: what was left out, what is random.
    purifiers: what was measured, by the name of its defence: functions images → images.
    """

    outcomes: tuple[Outcome, ...]
    threat_models: tuple[ThreatModel, ...]
    checks: tuple[Check, ...]
    images: np.ndarray
    labels: np.ndarray
    seed: int
    truth: np.ndarray
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    purifiers: Mapping[str, Purify] = field(default_factory=dict)

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
    purifier: keras.Model | None,
    images: Any,
    labels: Any,
    *,
    attacks: Plan | Sequence[Attack],
    threat_models: Sequence[str] = (),
    defenses: Sequence[str] | Mapping[str, Purify] = ("none", "vqunet"),
    surrogates: Mapping[str, Chain] | None = None,
    folder: Any = None,
    cache: Cache | None = None,
    batch_size: int = 100,
    seed: int = 0,
    keep: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures robust accuracy; equal arguments give equal rows.

    Gray-box images are crafted once, against the classifier alone, and shown to every defence. White-box
    images are crafted for each defence, through it and the classifier, with every gradient that the plan asks for and the
    defence offers (see `victims.py`); the strongest counts, image by image. Black-box images come from the answers of
    each chain or from surrogates. The undefended classifier is always measured, and
    gray-box images are made for white-box rows too: an attack that does not work on the bare classifier says nothing
    about a defence, and a white-box attacker can use the gray-box images too.

    classifier: images `[B,H,W,C]` in [0,1] → logits `[B,K]`. purifier: images → images, or None where `defenses` brings
        its own.
    images: `[N,H,W,C]` uint8, or floats in [0,1]. labels: `[N]` true classes in 0..K-1.
    attacks: a plan from `suites.build`; or attacks, each made gray-box and white-box.
    threat_models: by name; without any, those that the plan has attacks for. defenses: by name, or functions images → images by name.
    surrogates: the attacker's own models by name, for attacks that are carried over.
    folder: the `RunFolder` in which trained ablations lie.
    cache: where adversaries and answers are kept, to go on from when the evaluation is given again.
    batch_size: images attacked at a time; results depend on it by rounding only.
    seed: of random starts and random targets.
    keep: how many images, the first, to keep with their adversaries.

    Raises a `UserError` for unknown names, images on another scale, labels that are none, and a classifier that gives
    probabilities or does not fit.
    """
    plan = attacks if isinstance(attacks, Plan) else Plan(tuple(attacks), tuple(attacks))
    asked = _asked(plan, threat_models)
    unit = inputs.unit_images(images)
    purifiers = _defenses(defenses, purifier, folder)
    chains = {UNDEFENDED: Chain(classifier), **{name: Chain(classifier, each) for name, each in purifiers.items()}}
    few = {name: inputs.answers(chain, name, unit[:batch_size], batch_size) for name, chain in chains.items()}
    checks.logits_not_probabilities(few)
    truth = inputs.true_labels(labels, len(unit), few[UNDEFENDED].shape[1])
    used = surrogates if ThreatModel.BLACK_BOX in asked and plan.carried else None
    bench = Bench(
        chains,
        unit,
        truth,
        batch_size=batch_size,
        seed=seed,
        keep=keep,
        progress=progress,
        cache=cache,
        surrogates=used,
    )
    found = [checks.logits_not_probabilities(bench.clean_logits)]

    outcomes = [bench.clean(name, asked[0], plan.attacks[0].threat.norm) for name in chains]
    work = jobs(plan, bench, asked)
    if not work:
        raise UserError("transfer needs models to carry images over from: give --surrogate=RUN_DIR, another run")
    steps = max((job.attack.steps for job in work if job.attack.name == PGD.name), default=probes.STEPS)
    bench.total = sum(job.cost(bench) for job in work) + probes.work(bench, steps)
    for job in work:
        outcomes += job.run(bench)

    found += checks.from_outcomes(outcomes)
    found += [_deterministic(bench), _gradients(bench)]
    found += probes.run(bench, outcomes, bench.advance)
    bench.finish()
    return Evaluation(
        tuple(outcomes),
        tuple(asked),
        tuple(dataclasses.replace(check, passed=bool(check.passed)) for check in found),  # NumPy's are not JSON's
        unit[:keep],
        truth[:keep],
        seed,
        truth,
        bench.seconds,
        _notes(bench, plan, asked, work),
        purifiers,
    )


def sample(split: Split, n: int) -> Split:
    """Returns the first n of a fixed permutation of a split: the same n images whatever the seed of a run.

    Raises a `UserError` if the split does not hold n images.
    """
    available = len(split.labels)
    if not 1 <= n <= available:
        raise UserError(f"expected between 1 and {available} examples (the split has {available}), got {n}")
    order = np.random.RandomState(0).permutation(available)[:n]  # RandomState: its stream never changes
    return Split(split.images[order], split.labels[order], split.class_names)


def buildable(folder: Any = None) -> list[str]:
    """The defences that can be made for a run folder: all but ablations that were not trained in it."""
    return registry.available(folder)


def _asked(plan: Plan, names: Sequence[str]) -> list[ThreatModel]:
    """The threat models by name, in the order of reports; all that the plan has attacks for if none is named."""
    known = [model.value for model in ThreatModel]
    wanted = [choice("threat model", name, known) for name in names] or [model.value for model in plan.models]
    asked = [model for model in ThreatModel if model.value in wanted]
    if not asked:
        raise UserError("expected at least one attack and one threat model, got none")
    for model in asked:
        if model not in plan.models:
            able = ", ".join(each.value for each in plan.models) or "none"
            raise UserError(
                f"no attack here is {model.value} (only {able}): choose other --threat_models, "
                "--suite=adaptive, or --attacks such as pgd and square"
            )
    return asked


def _defenses(
    given: Sequence[str] | Mapping[str, Purify], purifier: keras.Model | None, folder: Any
) -> dict[str, Purify]:
    """Functions images → images by name, without the one that does nothing."""
    if isinstance(given, Mapping):
        return {name: purify for name, purify in given.items() if name != UNDEFENDED}
    return {name: registry.build(name, purifier, folder) for name in dict.fromkeys(given) if name != UNDEFENDED}


def _deterministic(bench: Bench) -> Check:
    found = checks.deterministic(bench.twice)
    said = [f"gradients of {name} are means over {DRAWS} draws" for name in _random(bench)]
    return dataclasses.replace(found, detail="; ".join([found.detail, *said]))


def _gradients(bench: Bench) -> Check:
    few = slice(bench.batch_size)
    return checks.gradients_not_masked(
        {
            name: input_gradient(chain.through(), bench.images[few], bench.labels[few])
            for name, chain in bench.victims.items()
        }
    )


def _random(bench: Bench) -> list[str]:
    return [name for name, chain in bench.victims.items() if chain.is_random]


def _notes(bench: Bench, plan: Plan, asked: Sequence[ThreatModel], work: Sequence[Job]) -> tuple[str, ...]:
    """What a reader must know beside the rows."""
    notes = [
        f"{name} answers differently each time: its gradients are means over {DRAWS} draws" for name in _random(bench)
    ]
    if ThreatModel.BLACK_BOX in asked and plan.carried and not bench.surrogates:
        notes.append("transfer was left out: no surrogate was given (--surrogate=RUN_DIR, a run with another seed)")
    met: dict[int, dict[str, None]] = {}
    for job in work:
        if job.limit is not None and job.limit < bench.count():
            met.setdefault(job.limit, {})[job.attack.name] = None
    notes += [f"{', '.join(names)} met the first {limit} images only" for limit, names in met.items()]
    return tuple(notes)
