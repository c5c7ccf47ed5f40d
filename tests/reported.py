"""A report that was made up: random images, three defences and who attacked them, and models that learned nothing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from vqunet_tf.config import Config, DataConfig
from vqunet_tf.evaluation import report, rows
from vqunet_tf.evaluation.checks import Check
from vqunet_tf.evaluation.rows import Outcome
from vqunet_tf.models import VQUNet
from vqunet_tf.threat import Threat, ThreatModel

GRAY, WHITE, BLACK = ThreatModel
EPSILONS, N, KEPT, SHAPE = (0.1, 0.3), 40, 7, (16, 16, 1)
NAMES = ("cat", "<script>alert(1)</script>", 'a "dog" & co', "never seen")


def untrained() -> tuple[keras.Model, VQUNet]:
    """A classifier and a purifier for these images."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    classifier = keras.Model(inputs, keras.layers.Dense(len(NAMES))(keras.layers.Flatten()(inputs)), name="linear")
    return classifier, VQUNet(widths=(4, 4), num_embeddings=(8, 16), embedding_dim=2, channels=1)


def evaluation() -> SimpleNamespace:
    """Three defences; JPEG was not attacked white-box, and nothing was attacked black-box."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (KEPT, *SHAPE)).astype(np.float32)
    truth = rng.integers(0, 3, N)

    def outcome(defense, attack, epsilon, model, share):
        threat = Threat("linf", epsilon)
        moved = threat.project(images + rng.uniform(-epsilon, epsilon, images.shape).astype(np.float32), images)
        correct = rng.uniform(size=N) < share
        return Outcome(
            defense=defense,
            attack=attack,
            threat=threat,
            steps=10,
            threat_model=model,
            correct=correct,
            distance=epsilon,
            seconds=1.5,
            adversarial=moved,
        )

    outcomes = [outcome(name, "none", 0.0, GRAY, 0.9) for name in ("none", "vqunet", "jpeg")]
    for epsilon in EPSILONS:
        for attack in ("fgsm", "pgd"):
            outcomes.append(outcome("none", attack, epsilon, GRAY, 0.2))
            outcomes += [outcome(name, attack, epsilon, GRAY, 0.8 - epsilon) for name in ("vqunet", "jpeg")]
            outcomes.append(outcome("vqunet", attack, epsilon, WHITE, 0.5 - epsilon))
    return SimpleNamespace(
        outcomes=tuple(outcomes),
        threat_models=(GRAY, WHITE),
        checks=(Check("fine", np.bool_(True), "as it should be"), Check("deterministic", True, "two calls agree")),
        images=images,
        labels=truth[:KEPT],
        truth=truth,
        seed=3,
        n=N,
        rows=rows.rows(outcomes, (GRAY, WHITE)),
    )


def config() -> Config:
    """A configuration that says where things lie on somebody's machine."""
    config = Config(
        data=DataConfig(dataset="/home/somebody/pictures", data_dir="/home/somebody/tfds", class_names=NAMES)
    )
    return dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, path="/home/somebody/c.keras"))


def finished(config: Config, evaluation: SimpleNamespace) -> dict:
    """report.json as a dict."""
    classifier = {"name": "linear", "params": 1234, "accuracy": 0.9, "n": 500}
    purifier = {"name": "vqunet", "params": 5678, "clean_accuracy": 0.85, "n": 500, "codebook_usage": [0.5, 0.75]}
    purifier["code_counts"] = [[5, 0, 3, 0], [1, 1, 0, 6]]
    return report.build(config, evaluation, classifier, purifier, command="python -m trainers.evaluate --run_dir=x")


def row_of(found: list[dict], **wanted: Any) -> dict:
    """The first row that has what is wanted."""
    return next(row for row in found if wanted.items() <= row.items())
