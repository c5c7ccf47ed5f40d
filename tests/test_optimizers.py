"""Muon's step against NumPy, and that everything else takes AdamW's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from vqunet_tf.training import optimizers


def _orthogonal(x: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps as in Jordan et al. 2024, written down again."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / (np.linalg.norm(wide) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def _network() -> keras.Model:
    x = keras.Input((6, 6, 3))
    h = layers.Conv2D(5, 3, name="inner")(layers.Conv2D(4, 3, name="stem")(x))
    model = keras.Model(x, h)
    for variable in model.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(np.full(variable.shape, 0.5, "float32"))
    return model


def _gradients(model: keras.Model, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.normal(size=variable.shape).astype("float32") for variable in model.trainable_variables]


def _step(model: keras.Model, gradients: list[np.ndarray], muon: float, rate: float = 0.01) -> dict[str, np.ndarray]:
    """The weights by path after one step."""
    optimizer = optimizers.build(rate * (muon or 1.0), weight_decay=0.1, muon=muon)
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.convert_to_tensor(part) for part in gradients], model.trainable_variables)
    return {variable.path: np.array(variable) for variable in model.trainable_variables}


@pytest.mark.parametrize("muon", [1.0, 4.0])
def test_one_step_is_numpys_for_inner_kernels_and_adamws_for_all_else(muon: float, rng: np.random.Generator) -> None:
    model = _network()
    before = {variable.path: np.array(variable) for variable in model.trainable_variables}
    gradients = _gradients(model, rng)
    after = _step(model, gradients, muon)
    for variable in model.trainable_variables:
        variable.assign(before[variable.path])
    adamw = _step(model, gradients, 0.0)
    found = dict(zip(before, gradients, strict=True))
    for path in before:
        if path == "inner/kernel":
            gradient = found[path].reshape(-1, 5)
            step = 0.01 * muon * 0.2 * np.sqrt(max(gradient.shape)) * _orthogonal(1.95 * gradient)
            wanted = before[path] * (1 - 0.01 * 0.1) - step.reshape(before[path].shape)
            assert np.abs(after[path] - adamw[path]).max() > 1e-3
        else:
            wanted = adamw[path]
        np.testing.assert_allclose(after[path], wanted, atol=2e-6)


def test_the_step_has_all_directions_alike(rng: np.random.Generator) -> None:
    values = np.linalg.svd(_orthogonal(rng.normal(size=(36, 5)) * [1, 1, 5, 1, 30]), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.4


def test_momentum_is_kept_from_step_to_step(rng: np.random.Generator) -> None:
    model = _network()
    kernel = next(variable for variable in model.trainable_variables if variable.path == "inner/kernel")
    optimizer = optimizers.build(0.01, weight_decay=0.0, muon=1.0)
    optimizer.build(model.trainable_variables)
    momentum = np.zeros((36, 5), "float32")
    for _ in range(3):
        gradients = _gradients(model, rng)
        before = np.array(kernel)
        optimizer.apply([keras.ops.convert_to_tensor(part) for part in gradients], model.trainable_variables)
        gradient = gradients[[v.path for v in model.trainable_variables].index("inner/kernel")].reshape(36, 5)
        momentum = 0.95 * momentum + gradient
        step = 0.01 * 0.2 * 6 * _orthogonal(gradient + 0.95 * momentum)
        np.testing.assert_allclose(np.array(kernel), before - step.reshape(before.shape), atol=2e-6)
