"""A classifier with a fragile habit, its images, and purifiers that cure it, or cheat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from vqunet_tf.evaluation import evaluate, suites
from vqunet_tf.threat import Threat

CLASSES, SHAPE, N = 4, (8, 8, 1), 60
THREATS = [Threat("linf", 0.1), Threat("linf", 0.3)]


@keras.saving.register_keras_serializable("tests")
class Rounding(keras.layers.Layer):
    """Rounds to `levels` grey levels; the gradient is the identity, or as for rounding, nothing."""

    def __init__(self, levels: int = 4, straight_through: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.levels, self.straight_through = levels, straight_through

    def call(self, images):
        rounded = keras.ops.round(images * self.levels) / self.levels
        return images + keras.ops.stop_gradient(rounded - images) if self.straight_through else rounded

    def get_config(self):
        return {**super().get_config(), "levels": self.levels, "straight_through": self.straight_through}


def purifier_of(*layers: keras.layers.Layer) -> keras.Model:
    """A purifier of these layers."""
    return keras.Sequential([keras.Input(SHAPE), *layers], name="purifier")


def averaging() -> keras.Model:
    """2×2 averages, then grey levels: takes away most of what is added pixel by pixel."""
    return purifier_of(keras.layers.AveragePooling2D(2), keras.layers.UpSampling2D(2), Rounding(16))


def problem() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """A linear classifier, images of blocks of 2×2 pixels with a little noise, and their labels.

    The classifier looks for the blocks (-2 |x - prototype|² up to |x|²), but also, and harder, for checkers
    inside the blocks, which no image has: a fragile habit that averaging over blocks cures.
    """
    rng = np.random.default_rng(0)
    prototypes = np.kron(rng.uniform(0.25, 0.75, (CLASSES, 4, 4)), np.ones((2, 2)))[..., None]
    checkers = np.kron(rng.choice([-3.0, 3.0], (CLASSES, 4, 4)), [[1, -1], [-1, 1]])
    labels = (np.arange(N) % CLASSES).astype(np.int32)
    images = (prototypes[labels] + rng.uniform(-0.03, 0.03, (N, *SHAPE))).astype(np.float32)
    inputs = keras.Input(SHAPE)
    dense = keras.layers.Dense(CLASSES)
    classifier = keras.Model(inputs, dense(keras.layers.Flatten()(inputs)), name="linear")
    flat = prototypes.reshape(CLASSES, -1)
    dense.set_weights([4 * flat.T + checkers.reshape(CLASSES, -1).T, -2 * np.square(flat).sum(axis=1)])
    return classifier, images, labels


def evaluated(problem: tuple, purifier: Any, *, names: Sequence[str] = (), threats=THREATS, **options: Any):
    """The evaluation of a purifier; without names by three attacks."""
    classifier, images, labels = problem
    attacks = suites.build("quick", names or ("fgsm", "pgd", "pgd_targeted"), threats, steps=5)
    return evaluate(classifier, purifier, images, labels, attacks=attacks, keep=N, **{"batch_size": 32, **options})


def failed(evaluation) -> set[str]:
    """The names of the checks that failed."""
    return {check.name for check in evaluation.checks if not check.passed}
