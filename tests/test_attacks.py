"""Gradient attacks: equal to the same thing written out by hand, within budget, and seen to work."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from cleverhans.tf2.attacks import projected_gradient_descent as cleverhans_pgd
from cleverhans.tf2.attacks.basic_iterative_method import basic_iterative_method
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method

from vqunet_tf import attacks
from vqunet_tf.attacks import ATTACKS, BIM, FGSM, MIM, PGD, Attack, TargetedPGD
from vqunet_tf.attacks.base import batches
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat

LINF, L2 = Threat("linf", 0.05), Threat("l2", 0.5)
CLASSES, SHAPE = 4, (6, 6, 2)
GRADIENT = (
    "fgsm",
    "bim",
    "pgd",
    "pgd_targeted",
    "mim",
)  # test_attacks_art.py and test_attacks_other.py hold the others
ORDER = {"linf": np.inf, "l2": 2}


@pytest.fixture(scope="module")
def victim():
    """A small network of smooth layers: no gradient is exactly zero, so every sign is certain."""
    keras.utils.set_random_seed(1)
    images = keras.Input(SHAPE)
    h = keras.layers.Conv2D(5, 3, activation="tanh")(images)
    model = keras.Model(images, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(h)))
    return lambda x: model(x, training=False)


@pytest.fixture
def batch():
    rng = np.random.default_rng(2)
    return rng.random((7, *SHAPE), np.float32), rng.integers(0, CLASSES, 7).astype(np.int32)


def _gradient(victim: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the cross-entropy, written out with a tape and log-softmax."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        picked = tf.gather(tf.nn.log_softmax(victim(x)), labels, axis=1, batch_dims=1)
        loss = -tf.reduce_sum(picked)
    return tape.gradient(loss, x).numpy()


def _loss(victim: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -tf.gather(tf.nn.log_softmax(victim(tf.constant(x))), labels, axis=1, batch_dims=1).numpy()


# === The same thing by hand ===


def test_fgsm_is_the_sign_of_the_gradient(victim, batch):
    images, labels = batch
    expected = np.clip(images + 0.05 * np.sign(_gradient(victim, images, labels)), 0, 1)
    np.testing.assert_allclose(FGSM(threat=LINF)(victim, images, labels), expected, atol=1e-6)


def test_fgsm_in_l2_is_the_gradient_at_the_length_of_epsilon(victim, batch):
    images, labels = batch
    images = 0.3 + 0.4 * images  # away from the faces of the box, where clipping would shorten it
    gradient = _gradient(victim, images, labels)
    length = np.linalg.norm(gradient.reshape(7, -1), axis=1)[:, None, None, None]
    expected = images + 0.1 * gradient / length
    np.testing.assert_allclose(FGSM(threat=Threat("l2", 0.1))(victim, images, labels), expected, atol=1e-5)


@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_is_its_formula_step_by_step(victim, batch, targeted: bool):
    images, labels = batch
    attack = (TargetedPGD if targeted else PGD)(threat=LINF, steps=5, step_size=0.02)
    rngs = [np.random.default_rng((3, i)) for i in range(7)]
    x = attack.start(images, rngs)
    aim, sign = (attack.targets(labels, CLASSES, rngs), -1) if targeted else (labels, 1)
    for _ in range(5):
        x = x + sign * 0.02 * np.sign(_gradient(victim, x, aim))
        x = np.clip(np.clip(x, images - 0.05, images + 0.05), 0, 1).astype(np.float32)
    np.testing.assert_allclose(attack(victim, images, labels, seed=3), x, atol=1e-6)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_pgd_is_cleverhans_loop_from_the_same_start(victim, batch, threat: Threat, monkeypatch):
    images, labels = batch
    attack = PGD(threat=threat, steps=6)
    start = attack.start(images, [np.random.default_rng((0, i)) for i in range(7)])
    monkeypatch.setattr(cleverhans_pgd, "random_lp_vector", lambda *args, **kwargs: tf.constant(start - images))
    order = ORDER[threat.norm]
    expected = cleverhans_pgd.projected_gradient_descent(
        victim, images, threat.epsilon, attack.length, 6, order, clip_min=0.0, clip_max=1.0, y=labels, rand_init=True
    )
    np.testing.assert_allclose(attack(victim, images, labels, seed=0), expected, atol=2e-6)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize(
    ("kind", "original"), [(BIM, basic_iterative_method), (MIM, momentum_iterative_method)], ids=["bim", "mim"]
)
def test_bim_and_mim_are_cleverhans_called_eagerly(victim, batch, threat: Threat, kind: Any, original: Any):
    images, labels = batch
    attack = kind(threat=threat, steps=6)
    numbers = {"eps": threat.epsilon, "eps_iter": attack.length, "nb_iter": 6, "norm": ORDER[threat.norm]}
    expected = original(
        victim, tf.constant(images), **numbers, clip_min=0.0, clip_max=1.0, y=labels, sanity_checks=False
    )
    np.testing.assert_allclose(attack(victim, images, labels), expected, atol=2e-6)
    assert (np.abs(expected - images) > 0.01).any()


def test_the_decay_of_mim_is_followed(victim, batch):
    images, labels = batch
    attack = MIM(threat=LINF, steps=6, decay=0.5)
    expected = momentum_iterative_method(
        victim, tf.constant(images), 0.05, attack.length, 6, np.inf, 0.0, 1.0, labels, decay_factor=0.5
    )
    found = attack(victim, images, labels)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (np.abs(found - MIM(threat=LINF, steps=6)(victim, images, labels)) > 0.01).any()


def test_the_default_step_crosses_the_ball():
    assert PGD(threat=LINF, steps=10).length == pytest.approx(2.5 * 0.05 / 10)
    assert PGD(threat=LINF, steps=10, step_size=0.01).length == 0.01
    with pytest.raises(UserError, match="at least one step, got 0"):
        PGD(threat=LINF, steps=0)
    with pytest.raises(UserError, match=r"bim: expected a step size above 0, got -0.1"):
        BIM(threat=LINF, step_size=-0.1)


# === What holds for all ===

EVERY = [ATTACKS[name](threat, 4) for name in GRADIENT for threat in (LINF, L2)]


@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_every_attack_moves_every_image_and_stays_within_its_budget(victim, batch, attack: Attack):
    images, labels = batch
    before = images.copy()
    found = attack(victim, images, labels)
    assert found.dtype == np.float32
    assert attack.threat.within(found, images).all()
    assert (attack.threat.distance(found, images) > 0.5 * attack.threat.epsilon).all()
    np.testing.assert_array_equal(images, before)  # the caller's images are not touched


@pytest.mark.parametrize("name", GRADIENT)
def test_a_budget_of_zero_returns_the_image_and_asks_nobody(batch, name: str):
    images, labels = batch

    def nobody(x: Any) -> Any:
        raise AssertionError("the victim was called")

    for norm in ("linf", "l2"):
        np.testing.assert_array_equal(ATTACKS[name](Threat(norm, 0.0), 4)(nobody, images, labels), images)


@pytest.mark.parametrize("name", GRADIENT)
def test_neither_batches_nor_company_change_an_adversary(victim, batch, name: str):
    images, labels = batch
    attack = ATTACKS[name](LINF, 4)
    whole = attack(victim, images, labels, batch_size=7, seed=5)
    np.testing.assert_allclose(attack(victim, images, labels, batch_size=3, seed=5), whole, atol=1e-6)
    np.testing.assert_allclose(attack(victim, images[:2], labels[:2], seed=5), whole[:2], atol=1e-6)
    np.testing.assert_array_equal(attack(victim, images, labels, batch_size=7, seed=5), whole)


@pytest.mark.parametrize("name", ["pgd", "pgd_targeted"])
def test_the_seed_decides_what_is_random(victim, batch, name: str):
    images, labels = batch
    attack = ATTACKS[name](LINF, 1)
    assert np.abs(attack(victim, images, labels, seed=0) - attack(victim, images, labels, seed=1)).max() > 0.01


def test_untargeted_raises_the_loss_and_targeted_lowers_that_of_its_target(victim, batch):
    images, labels = batch
    away = PGD(threat=LINF, steps=10)(victim, images, labels)
    assert (_loss(victim, away, labels) > _loss(victim, images, labels)).all()
    attack = TargetedPGD(threat=LINF, steps=10, random_start=False)
    targets = attack.targets(labels, CLASSES, [np.random.default_rng((0, i)) for i in range(7)])
    towards = attack(victim, images, labels, seed=0)
    assert (_loss(victim, towards, targets) < _loss(victim, images, targets)).all()


def test_targets_are_all_the_other_classes_and_never_the_own():
    labels = np.repeat(np.arange(CLASSES), 100)
    targets = TargetedPGD.targets(labels, CLASSES, [np.random.default_rng((0, i)) for i in range(len(labels))])
    assert not (targets == labels).any()
    for label in range(CLASSES):
        assert set(targets[labels == label]) == set(range(CLASSES)) - {label}


def test_a_program_is_traced_once_for_all_batches_budgets_and_steps(batch):
    images, labels = batch
    weights = tf.constant(np.random.default_rng(0).normal(size=(np.prod(SHAPE), CLASSES)), tf.float32)
    shapes = []

    def recording(x: Any) -> Any:
        shapes.append(tuple(x.shape))
        return tf.reshape(x, (-1, np.prod(SHAPE))) @ weights

    for threat, steps in ((LINF, 2), (LINF, 5), (Threat("linf", 0.2), 3)):
        PGD(threat=threat, steps=steps)(
            recording, images, labels, batch_size=4
        )  # 7 images: the last batch is filled up
    assert set(shapes) == {(4, *SHAPE)}
    assert len(shapes) == 1


def test_accuracy_of_a_classifier_that_was_right_falls_to_nothing():
    """Four prototypes, each the nearest to its own noisy images; PGD crosses every border."""
    rng = np.random.default_rng(0)
    prototypes = rng.random((CLASSES, *SHAPE), np.float32)
    labels = np.arange(80) % CLASSES
    images = np.clip(prototypes[labels] + rng.normal(0, 0.05, (80, *SHAPE)), 0, 1).astype(np.float32)

    def nearest(x: Any) -> Any:
        return -tf.reduce_sum((x[:, None] - prototypes) ** 2, axis=(2, 3, 4))

    def accuracy(x: np.ndarray) -> float:
        return float(np.mean(np.argmax(nearest(x), axis=1) == labels))

    assert accuracy(images) == 1.0
    noise = np.clip(images + rng.uniform(-0.4, 0.4, images.shape), 0, 1).astype(np.float32)
    assert accuracy(noise) > 0.9  # the budget alone does nothing
    for name in GRADIENT:
        assert accuracy(ATTACKS[name](Threat("linf", 0.4), 10)(nearest, images, labels)) <= 0.05, name


# === Victims that resist without being robust ===


def test_a_sure_classifier_does_not_stop_an_l2_attack(victim, batch):
    """Its gradient is around 1e-9: CleverHans alone would divide it by 1e-6 and stand still."""
    images, _ = batch

    def sure(x: Any) -> Any:
        return 40.0 * victim(x)

    labels = np.argmax(sure(images), axis=1)
    gradient = np.linalg.norm(_gradient(sure, images, labels).reshape(7, -1), axis=1)
    tiny = (gradient > 0) & (gradient < 1e-7)
    assert tiny.any()
    images, labels = images[tiny], labels[tiny]
    found = FGSM(threat=Threat("l2", 0.1))(sure, images, labels)
    assert (Threat("l2", 0.1).distance(found, images) > 0.05).all()


def test_a_victim_without_a_gradient_is_attacked_without_an_error(victim, batch):
    images, labels = batch

    def rounding(x: Any) -> Any:
        return victim(tf.round(x))

    np.testing.assert_array_equal(input_gradient(rounding, images, labels), np.zeros_like(images))
    np.testing.assert_array_equal(FGSM(threat=LINF)(rounding, images, labels), images)


def test_the_gradient_that_is_checked_is_the_gradient_that_is_followed(victim, batch):
    images, labels = batch
    np.testing.assert_allclose(
        input_gradient(victim, images, labels), _gradient(victim, images, labels), rtol=1e-4, atol=1e-7
    )


def test_an_attack_that_leaves_its_budget_is_brought_back(victim, batch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wild(Attack):
        name: ClassVar[str] = "wild"

        def run(self, victim, images, labels, rngs):
            found = images + 10.0
            found[0] = np.nan
            return found

    images, labels = batch
    found = Wild(threat=LINF)(victim, images, labels)
    assert LINF.within(found, images).all()
    np.testing.assert_array_equal(found[0], images[0])


# === Small things ===


def test_an_attack_is_a_value_that_says_what_it_does():
    attack = attacks.build("pgd", LINF, 7)
    assert attack == PGD(threat=LINF, steps=7)
    assert repr(attack) == (
        "PGD(threat=Threat(norm='linf', epsilon=0.05), steps=7, step_size=None, random_start=True, restarts=1, "
        "loss='ce', until_fooled=False)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3
    for name, maker in ATTACKS.items():
        assert maker.kind.name == name
        assert name == "transfer" or maker(Threat(maker.norms[0], 0.1), 3).name == name
    with pytest.raises(
        UserError, match="unknown attack 'cw': expected one of apgd_ce, apgd_dlr, bim, cw_l2, deepfool,"
    ):
        attacks.build("cw", LINF, 7)


def test_an_attack_without_that_norm_names_those_it_has():
    for name in ("cw_l2", "deepfool"):
        with pytest.raises(UserError, match=f"{name} knows the norm l2, not 'linf'"):
            attacks.build(name, LINF, 7)
    assert [name for name in ATTACKS if ATTACKS[name].norms != ("linf", "l2")] == ["cw_l2", "deepfool"]


def test_steps_are_those_of_attacks_that_take_them():
    told = {name: attacks.build(name, L2, 7).steps for name in ATTACKS if name != "transfer"}
    assert {name for name, steps in told.items() if steps == 7} == {
        "bim", "pgd", "pgd_targeted", "mim", "apgd_ce", "apgd_dlr",
    }  # fmt: skip
    assert told["fgsm"] == 1


def test_batches_see_every_row_once_at_one_size():
    seen = [(rows.tolist(), count) for rows, count in batches(5, 2)]
    assert seen == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]
    assert [(rows.tolist(), count) for rows, count in batches(2, 9)] == [([0, 1], 2)]
    assert list(batches(0, 4)) == []
    with pytest.raises(UserError, match="batch size of at least 1, got 0"):
        list(batches(5, 0))


def test_progress_counts_images_and_wrong_arrays_are_refused(victim, batch):
    images, labels = batch
    counts = []
    FGSM(threat=LINF)(victim, images, labels, batch_size=3, on_batch=counts.append)
    assert counts == [3, 3, 1]
    with pytest.raises(ValueError, match=r"expected float32 images \[N,H,W,C\], got uint8"):
        FGSM(threat=LINF)(victim, (255 * images).astype(np.uint8), labels)
    with pytest.raises(ValueError, match=r"expected labels of shape \(7,\), got \(7, 4\)"):
        FGSM(threat=LINF)(victim, images, np.eye(CLASSES)[labels])
