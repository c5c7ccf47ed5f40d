"""The ball around an image: numbers by hand, NumPy's norms, and what no projection may do."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat, ThreatModel, parse_epsilon

NORMS = {"linf": np.inf, "l2": 2}


def _pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Candidates far outside of everything, and originals in [0,1]; `[5,4,4,3]`."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.5, 1.0, (5, 4, 4, 3)).astype(np.float32), rng.random((5, 4, 4, 3), np.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_numpys_norm_of_each_image(norm: str):
    a, b = _pair()
    expected = np.linalg.norm((a - b).reshape(5, -1), ord=NORMS[norm], axis=1)
    np.testing.assert_allclose(Threat(norm, 0.1).distance(a, b), expected, rtol=1e-6)


def test_projection_by_hand():
    original = np.array([[[[0.5]], [[0.95]]]], np.float32)  # one image of two pixels
    candidate = np.array([[[[0.9]], [[1.35]]]], np.float32)  # 0.4 away in each
    linf = Threat("linf", 0.1).project(candidate, original)
    np.testing.assert_allclose(linf.ravel(), [0.6, 1.0], atol=1e-7)  # the second: 1.05, then the box
    l2 = Threat("l2", 0.2 * 2**0.5).project(candidate, original)
    np.testing.assert_allclose(l2.ravel(), [0.7, 1.0], atol=1e-6)  # half of the way, then the box


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.3])
def test_projection_lands_inside_and_rests_there(norm: str, epsilon: float):
    threat = Threat(norm, epsilon)
    a, b = _pair()
    assert not threat.within(a, b).any()
    once = threat.project(a, b)
    assert once.dtype == np.float32
    assert threat.within(once, b).all()
    np.testing.assert_allclose(threat.project(once, b), once, atol=1e-6)
    assert (threat.distance(once, b) <= threat.distance(a, b)).all()


def test_a_budget_of_zero_leaves_the_original_bit_by_bit():
    a, b = _pair()
    for norm in NORMS:
        np.testing.assert_array_equal(Threat(norm, 0.0).project(a, b), b)


def test_what_is_not_a_number_is_not_an_attack():
    a, b = _pair()
    a[0] = np.nan
    projected = Threat("linf", 0.1).project(a, b)
    np.testing.assert_array_equal(projected[0], b[0])
    assert not Threat("linf", 0.1).within(a, b)[0]


def test_within_sees_the_box_as_well():
    original = np.full((1, 2, 2, 1), 0.99, np.float32)
    assert not Threat("linf", 0.1).within(original + 0.05, original).any()
    assert Threat("linf", 0.1).within(original - 0.05, original).all()


@pytest.mark.parametrize("norm", NORMS)
def test_tensors_give_what_arrays_give(norm: str):
    threat = Threat(norm, 0.1)
    a, b = _pair()
    tensors = keras.ops.convert_to_tensor(a), keras.ops.convert_to_tensor(b)
    for method in ("distance", "project", "within"):
        found = keras.ops.convert_to_numpy(getattr(threat, method)(*tensors))
        np.testing.assert_allclose(found, getattr(threat, method)(a, b), atol=1e-6)


def test_samples_fill_the_ball_evenly():
    rng, shape = np.random.default_rng(0), (2, 2, 1)
    cube = np.stack([Threat("linf", 0.3).sample(rng, shape) for _ in range(4000)])
    assert np.abs(cube).max() <= 0.3
    np.testing.assert_allclose(cube.std(axis=0), 0.3 / 3**0.5, rtol=0.05)  # of a uniform distribution
    ball = np.stack([Threat("l2", 0.3).sample(rng, shape) for _ in range(4000)])
    radii = np.linalg.norm(ball.reshape(4000, -1), axis=1)
    assert radii.max() <= 0.3 + 1e-6
    np.testing.assert_allclose(radii.mean(), 0.3 * 4 / 5, rtol=0.02)  # d/(d+1) of the radius in d dimensions
    np.testing.assert_allclose(ball.mean(axis=0), 0.0, atol=0.01)


@pytest.mark.parametrize("epsilon", [-0.1, 8.0, float("nan"), float("inf")])
def test_an_epsilon_off_the_scale_is_refused(epsilon: float):
    with pytest.raises(UserError, match=r"\[0,1\] scale.*got"):
        Threat("linf", epsilon)


def test_l2_may_be_longer_than_one_and_other_norms_are_refused():
    assert Threat("l2", 2.0).epsilon == 2.0
    with pytest.raises(UserError, match="unknown norm 'l1': expected one of l2, linf"):
        Threat("l1", 0.1)


def test_epsilons_as_people_write_them():
    assert parse_epsilon("8/255") == 8 / 255
    assert parse_epsilon(" 0.1") == 0.1
    for text in ("a", "1/0", "", "1/2/3"):
        with pytest.raises(UserError, match="expected an epsilon such as"):
            parse_epsilon(text)


def test_every_threat_model_says_what_its_attacker_knows():
    assert [model.value for model in ThreatModel] == ["gray_box", "white_box", "black_box"]
    assert len({model.knowledge for model in ThreatModel}) == 3
