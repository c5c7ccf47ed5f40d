"""Attacks that are not on the classifier's gradient: random noise, transfer, and the distance between codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf import attacks
from vqunet_tf.attacks import PGD, MismatchPGD, Noise, Transfer
from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat

LINF, L2 = Threat("linf", 0.2), Threat("l2", 1.0)
CLASSES, SHAPE, N = 3, (5, 4, 1), 12
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)


class Linear:
    """Logits that are a fixed linear function of the image."""

    def __init__(self, seed: int):
        self.weights = np.random.default_rng(seed).normal(size=(np.prod(SHAPE), CLASSES)).astype(np.float32)

    def __call__(self, x: Any) -> Any:
        return tf.reshape(x, (-1, np.prod(SHAPE))) @ self.weights


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(2).random((N, *SHAPE), np.float32)


def _margin(victim: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = victim(x).numpy()
    own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    np.put_along_axis(logits, labels[:, None], -np.inf, axis=1)
    return logits.max(axis=1) - own


# === Noise ===


@BOTH
def test_noise_is_the_draw_of_the_largest_margin(images, threat: Threat):
    victim, labels = Linear(0), np.arange(N) % CLASSES
    noise = Noise(threat=threat, draws=4)
    rngs = [np.random.default_rng((7, i)) for i in range(N)]
    tries = []
    for turn in range(4):
        draw = threat.sample if turn % 2 else noise.far
        tries.append(threat.project(images + np.stack([draw(rng, SHAPE) for rng in rngs]), images))
    margins = np.stack([_margin(victim, x, labels) for x in tries])
    expected = np.stack(tries)[margins.argmax(axis=0), np.arange(N)]
    np.testing.assert_allclose(noise(victim, images, labels, seed=7), expected, atol=1e-7)
    np.testing.assert_allclose(noise(victim, images, labels, seed=7, batch_size=5), expected, atol=1e-7)
    assert np.abs(noise(victim, images, labels, seed=8) - expected).max() > 0.01
    assert noise.steps == 4


@BOTH
def test_the_far_side_is_at_the_length_of_epsilon(threat: Threat):
    drawn = np.stack([Noise(threat=threat).far(np.random.default_rng(i), SHAPE) for i in range(400)])
    np.testing.assert_allclose(threat.distance(drawn, 0 * drawn), threat.epsilon, rtol=1e-5)
    assert drawn.dtype == np.float32
    assert np.abs(drawn.mean(axis=0)).max() < 0.15 * threat.epsilon  # no side is preferred


def test_more_draws_are_never_weaker_and_no_draw_is_refused(images):
    victim, labels = Linear(0), np.arange(N) % CLASSES
    few, many = (_margin(victim, Noise(threat=L2, draws=d)(victim, images, labels), labels) for d in (3, 9))
    assert (many >= few).all()
    assert (many > few).any()
    with pytest.raises(UserError, match="noise: expected at least one draw, got 0"):
        Noise(threat=L2, draws=0)


# === Transfer ===


def test_transferred_images_are_those_of_the_surrogate_and_the_victim_is_never_asked(images):
    surrogate, labels = Linear(1), np.arange(N) % CLASSES
    inner = PGD(threat=LINF, steps=5)

    def nobody(x: Any) -> Any:
        raise AssertionError("the victim was asked")

    attack = Transfer(threat=LINF, attack=inner, surrogates={"classifier, seed 1": surrogate})
    found = attack(nobody, images, labels, seed=3, batch_size=5)
    np.testing.assert_array_equal(found, inner(surrogate, images, labels, seed=3, batch_size=5))
    assert attack.steps == 5
    assert attack.name == "transfer"


def test_a_transfer_is_a_value_with_a_short_name():
    first, second = Linear(1), Linear(2)
    inner = PGD(threat=LINF, steps=5)
    attack = Transfer(threat=LINF, attack=inner, surrogates={"seed 1": first})
    assert repr(attack) == f"Transfer(threat={LINF!r}, steps=5, attack={inner!r}, surrogate='seed 1')"
    same, other = (Transfer(threat=LINF, attack=inner, surrogates={"seed 1": it}) for it in (first, second))
    assert attack == same
    assert attack != other
    assert len({attack, same, other}) == 2
    assert Transfer.each(inner, {"seed 1": first, "seed 2": second}) == [
        attack,
        Transfer(threat=LINF, attack=inner, surrogates={"seed 2": second}),
    ]
    assert [each.surrogate for each in Transfer.each(inner, [first, second])] == ["0", "1"]


def test_transfer_says_what_it_needs():
    inner = PGD(threat=LINF)
    with pytest.raises(UserError, match="transfer needs a surrogate model"):
        attacks.build("transfer", LINF, 5)
    for surrogates in ({}, {"a": Linear(0), "b": Linear(1)}):
        with pytest.raises(UserError, match=f"transfer: expected one surrogate, got {len(surrogates)}"):
            Transfer(threat=LINF, attack=inner, surrogates=surrogates)
    with pytest.raises(UserError, match="transfer: expected an attack within .*0.1.*, got one within .*0.2"):
        Transfer(threat=Threat("linf", 0.1), attack=inner, surrogates={"a": Linear(0)})


# === Codes ===


class Coded(Linear):
    """Its code of an image is the sum of its rows, rounded to nothing by the classifier."""

    def __call__(self, x: Any) -> Any:
        return super().__call__(tf.round(x))

    @staticmethod
    def mismatch(x: Any, reference: Any) -> Any:
        return tf.reduce_sum(tf.square(tf.reduce_sum(x - reference, axis=1)), axis=(1, 2))


def test_the_mismatch_is_climbed_step_by_step(images):
    victim, labels = Coded(0), np.zeros(N, np.int64)
    attack = MismatchPGD(threat=LINF, steps=4, step_size=0.05)
    x = attack.start(images, [np.random.default_rng((0, i)) for i in range(N)])
    for _ in range(4):
        gradient = np.broadcast_to(2 * (x - images).sum(axis=1, keepdims=True), x.shape)
        x = np.clip(np.clip(x + 0.05 * np.sign(gradient), images - 0.2, images + 0.2), 0, 1).astype(np.float32)
    found = attack(victim, images, labels, seed=0)
    np.testing.assert_allclose(found, x, atol=1e-6)
    assert attack.name == "pgd"
    assert repr(attack).startswith("MismatchPGD(")
    # It has a gradient where the classifier has none.
    still = PGD(threat=LINF, steps=4, random_start=False)(victim, images, labels)
    np.testing.assert_array_equal(still, images)
    assert (victim.mismatch(found, images).numpy() > 0.5).all()


@BOTH
def test_mismatch_stays_in_its_budget_and_takes_restarts(images, threat: Threat):
    victim, labels = Coded(0), np.zeros(N, np.int64)
    attack = MismatchPGD(threat=threat, steps=3, restarts=2)
    assert threat.within(attack(victim, images, labels), images).all()


def test_a_victim_without_codes_is_refused(images):
    with pytest.raises(UserError, match=r"needs a victim with mismatch\(images, reference\): Linear has none"):
        MismatchPGD(threat=LINF, steps=2)(Linear(0), images, np.zeros(N, np.int64))
