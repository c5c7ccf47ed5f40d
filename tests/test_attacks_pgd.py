"""What PGD can be told: another loss, several restarts, and to stop for an image once it fools."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf.attacks import PGD, TargetedPGD
from vqunet_tf.attacks.answers import Best, answers, losses
from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat

LINF, L2 = Threat("linf", 0.03), Threat("l2", 0.3)
CLASSES, SHAPE, N = 4, (6, 6, 2), 24


@pytest.fixture(scope="module")
def victim():
    keras.utils.set_random_seed(1)
    images = keras.Input(SHAPE)
    h = keras.layers.Conv2D(5, 3, activation="tanh")(images)
    model = keras.Model(images, 3.0 * keras.layers.Dense(CLASSES)(keras.layers.Flatten()(h)))
    return lambda x: model(x, training=False)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).random((N, *SHAPE), np.float32)


@pytest.fixture(scope="module")
def labels(victim, images) -> np.ndarray:
    """What the victim says: it is right everywhere, and not everywhere sure."""
    return np.argmax(victim(images), axis=1).astype(np.int32)


def _wrong(victim: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.argmax(victim(x), axis=1) != labels


def test_losses_are_their_formulas():
    logits, labels = np.array([[1.0, 3.0, 2.0], [800.0, 0.0, 1.0]], np.float32), np.array([2, 1])
    expected = -tf.nn.log_softmax(logits).numpy()[[0, 1], labels]
    np.testing.assert_allclose(losses(logits, labels, "ce"), expected, rtol=1e-6)
    np.testing.assert_allclose(losses(logits, labels, "margin"), [1.0, 800.0])
    np.testing.assert_array_equal(logits[0], [1.0, 3.0, 2.0])  # the caller's logits are not touched


@pytest.mark.parametrize("targeted", [False, True])
def test_the_margin_is_climbed_step_by_step(victim, images, labels, targeted: bool):
    attack = (TargetedPGD if targeted else PGD)(threat=LINF, steps=4, step_size=0.01, loss="margin")
    rngs = [np.random.default_rng((0, i)) for i in range(N)]
    x = attack.start(images, rngs)
    aim, sign = (attack.targets(labels, CLASSES, rngs), -1) if targeted else (labels, 1)
    for _ in range(4):
        at = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(at)
            logits = victim(at)
            others = tf.reduce_max(logits - 1e9 * tf.one_hot(aim, CLASSES), axis=1)
            objective = others - tf.gather(logits, aim, batch_dims=1)
        x = x + sign * 0.01 * np.sign(tape.gradient(objective, at))
        x = np.clip(np.clip(x, images - 0.03, images + 0.03), 0, 1).astype(np.float32)
    np.testing.assert_allclose(attack(victim, images, labels, seed=0), x, atol=1e-6)


def test_a_restart_is_kept_where_it_fools_and_else_where_the_loss_is_largest(victim, images, labels):
    attack = PGD(threat=LINF, steps=2, restarts=3)
    rngs = [np.random.default_rng((0, i)) for i in range(N)]
    tries = np.stack([attack.once(victim, images, labels, rngs) for _ in range(3)])
    logits = np.stack([victim(x).numpy() for x in tries])
    fools = logits.argmax(axis=2) != labels
    loss = np.stack([losses(each, labels, "ce") for each in logits])
    chosen = np.where(fools, loss, -np.inf).argmax(axis=0)
    chosen = np.where(fools.any(axis=0), chosen, loss.argmax(axis=0))
    assert fools.any(axis=0).any()
    assert not fools.any(axis=0).all()
    assert len(set(chosen)) == 3
    found = attack(victim, images, labels, seed=0)
    np.testing.assert_allclose(found, tries[chosen, np.arange(N)], atol=1e-6)
    once = PGD(threat=LINF, steps=2)(victim, images, labels, seed=0)
    np.testing.assert_allclose(once, tries[0], atol=1e-6)  # the first restart is what there is without


def test_fooling_beats_a_larger_loss():
    logits = {0: [3.0, 2.9, 2.9], 1: [1.0, 1.1, -9.0]}  # of class 0: a large loss but right, a small one and wrong

    def victim(x: Any) -> Any:
        return tf.gather(tf.constant(list(logits.values())), tf.cast(x[:, 0, 0, 0], tf.int32))

    first, second = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
    labels = np.array([0])
    assert losses(answers(victim, first), labels, "ce") > losses(answers(victim, second), labels, "ce")
    for order in ([first, second], [second, first]):
        best = Best(victim, labels, "ce")
        for offered in order:
            best.offer(offered)
        assert best.images[0, 0, 0, 0] == 1.0
        assert best.fooled.all()


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("kind", [PGD, TargetedPGD])
def test_until_fooled_stops_each_image_on_its_own_path(victim, images, labels, threat: Threat, kind: type[PGD]):
    """Step by step: the point after k steps is that of a run of k steps, and the first that fools is returned."""
    steps, length = 6, threat.epsilon / 3
    begin = kind(threat=threat, steps=1).start(images, [np.random.default_rng((0, i)) for i in range(N)])
    path = [begin] + [
        kind(threat=threat, steps=k, step_size=length)(victim, images, labels, seed=0) for k in range(1, steps + 1)
    ]
    wrong = np.stack([_wrong(victim, x, labels) for x in path])
    wrong[-1] = True  # the last point is returned whatever it does
    first = wrong.argmax(axis=0)
    assert len(set(first)) > 2
    found = kind(threat=threat, steps=steps, step_size=length, until_fooled=True)(victim, images, labels, seed=0)
    np.testing.assert_allclose(found, np.stack(path)[first, np.arange(N)], atol=2e-6)


def test_until_fooled_asks_less(victim, images, labels):
    """Every image is fooled at once by a huge budget: one look at each, not 200."""
    sizes: list[int] = []

    def counting(x: Any) -> Any:
        tf.py_function(lambda seen: sizes.append(len(seen)), [x], [])
        return victim(x)

    PGD(threat=Threat("linf", 0.9), steps=200, until_fooled=True)(counting, images, labels)
    assert 0 < sum(sizes) < 20 * N
    few = PGD(threat=LINF, steps=2, restarts=3)(victim, images, labels, seed=0)
    stopping = PGD(threat=LINF, steps=2, restarts=3, until_fooled=True)(victim, images, labels, seed=0)
    resists = ~_wrong(victim, few, labels)
    np.testing.assert_array_equal(_wrong(victim, stopping, labels)[resists], False)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="unknown loss 'hinge': expected one of ce, margin"):
        PGD(threat=LINF, loss="hinge")
    with pytest.raises(UserError, match="pgd: expected at least one restart, got 0"):
        PGD(threat=LINF, restarts=0)
    with pytest.raises(UserError, match="3 restarts without a random start are all the same"):
        PGD(threat=LINF, restarts=3, random_start=False)
