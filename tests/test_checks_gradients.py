"""The checks of answers and gradients: probabilities, chance, gradients that are gone or do not match differences."""

from __future__ import annotations

import numpy as np
import pytest

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import checks, differences


def test_a_gradient_that_is_shrunk_or_not_a_number_is_caught():
    ones = np.ones((50, 2, 2, 1), np.float32)
    assert checks.gradients_not_masked({"none": ones, "vqunet": 0.01 * ones}).passed
    assert not checks.gradients_not_masked({"none": ones, "vqunet": 1e-6 * ones}).passed
    for value in (np.nan, np.inf, 0.0):  # in one image of 25
        broken = ones.copy()
        broken[:2] = value
        assert not checks.gradients_not_masked({"none": ones, "vqunet": broken}).passed


def test_probabilities_are_refused_of_the_classifier_and_caught_behind_it():
    logits, probabilities = np.array([[0.5, 0.5], [2.0, 1.0]]), np.array([[0.5, 0.5], [0.1, 0.9]])
    assert checks.logits_not_probabilities(logits).passed
    assert checks.logits_not_probabilities({"none": logits, "vqunet": logits}).passed
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        checks.logits_not_probabilities(probabilities)
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        checks.logits_not_probabilities({"none": probabilities})
    found = checks.logits_not_probabilities({"none": logits, "vqunet": probabilities})
    assert not found.passed
    assert found.detail.startswith("vqunet gives probabilities")


def test_answers_that_differ_are_caught():
    one = np.array([[1.0, 2.0]])
    assert checks.deterministic({"vqunet": (one, one + 1e-5)}).passed
    found = checks.deterministic({"none": (one, one), "vqunet": (one, one + 0.1)})
    assert not found.passed
    assert found.detail.startswith("vqunet answers differently")


@pytest.fixture
def curve(rng):
    """A smooth function images → logits, its gradient of the cross-entropy, images and labels."""
    weights = rng.normal(size=(2, 36, 3))

    def answer(images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        return np.tanh(flat @ weights[0]) + flat @ weights[1]

    images, labels = rng.random((16, 6, 6, 1)).astype(np.float32), np.arange(16) % 3
    flat = images.reshape(16, -1).astype(np.float64)
    logits = answer(images)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(3)[labels]
    slope = share * (1 - np.tanh(flat @ weights[0]) ** 2)
    gradient = (slope @ weights[0].T + share @ weights[1].T).reshape(images.shape)
    return answer, gradient, images, labels


def test_a_right_gradient_agrees_with_finite_differences(curve):
    answer, gradient, images, labels = curve
    assert differences.slope_error(answer, gradient, images, labels) < 1e-3


@pytest.mark.parametrize(
    "break_",
    [
        lambda gradient: np.zeros_like(gradient),
        lambda gradient: 0.5 * gradient,
        lambda gradient: -gradient,
        lambda gradient: gradient * (np.arange(6) < 3)[:, None, None],  # half of the pixels: along itself it is right
        lambda gradient: np.full_like(gradient, np.nan),
        lambda gradient: gradient + np.roll(gradient, 1, axis=1),
    ],
)
def test_a_wrong_gradient_does_not(curve, break_):
    answer, gradient, images, labels = curve
    error = differences.slope_error(answer, break_(gradient), images, labels)
    assert error > differences.TOLERANCE
    found = differences.gradients_match_differences({"none": 0.01, "vqunet": error})
    assert not found.passed
    assert found.detail.startswith("vqunet is off by")


def test_no_verdict_where_there_is_no_slope(curve):
    answer, gradient, images, labels = curve
    for levels in (4, 1000):  # flat between the jumps; a jump every few steps
        stairs = differences.slope_error(lambda x, n=levels: answer(np.round(x * n) / n), gradient, images, labels)
        assert stairs is None
    found = differences.gradients_match_differences({"none": 0.01, "vqunet": None})
    assert found.passed
    assert "vqunet has no slope" in found.detail
