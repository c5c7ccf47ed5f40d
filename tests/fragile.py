"""A classifier with a fragile habit, its images, and layers for purifiers that cure it, or cheat."""

from __future__ import annotations

import keras
import numpy as np

CLASSES, SHAPE, N = 4, (8, 8, 1), 60


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
    return keras.Sequential([keras.Input(SHAPE), *layers], name="purifier")


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
