"""ART's attacks and Carlini-Wagner's: the same as by hand or by another library, repeatable, and seen to work."""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf.attacks import APGDCE, APGDDLR, ATTACKS, CWL2, Attack, DeepFool, HopSkipJump, Square, square_l2
from vqunet_tf.attacks.art import ArtAttack
from vqunet_tf.attacks.art_model import EndToEnd, difference_of_logits_ratio, seeded
from vqunet_tf.attacks.base import generators
from vqunet_tf.errors import UserError
from vqunet_tf.threat import Threat

N, CLASSES, SHAPE = 16, 10, (10, 10, 1)
LINF, L2 = Threat("linf", 0.2), Threat("l2", 1.0)
# What is run here, with few steps, and the accuracy that must not be left of 100 %.
WORKS = [
    (CWL2(threat=L2, iterations=60, search_steps=3), 0.15),
    (DeepFool(threat=L2), 0.15),
    (APGDCE(threat=LINF, steps=10), 0.15),
    (APGDCE(threat=L2, steps=10), 0.15),
    (APGDDLR(threat=LINF, steps=10), 0.15),
    (APGDDLR(threat=L2, steps=10), 0.15),
    (Square(threat=LINF, steps=150), 0.3),
    (Square(threat=L2, steps=150), 0.5),
    (HopSkipJump(threat=LINF, steps=500), 0.6),
    (HopSkipJump(threat=L2, steps=500), 0.6),
]
EACH = pytest.mark.parametrize("attack", [attack for attack, _ in WORKS], ids=lambda a: f"{a.name}-{a.threat.norm}")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.pad(found.images / 16.0, ((0, 0), (1, 1), (1, 1)))[..., None]
    return images.astype(np.float32), found.target.astype(np.int32)


@pytest.fixture(scope="module")
def model(digits) -> keras.Model:
    """Smooth, so that no gradient is exactly zero; trained for a second."""
    images, labels = digits
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    hidden = keras.layers.Dense(32, activation="tanh")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images[:1500], labels[:1500], epochs=5, batch_size=64, verbose=0)
    return model


@pytest.fixture(scope="module")
def victim(model) -> Any:
    return lambda x: model(x, training=False)


@pytest.fixture(scope="module")
def batch(digits, model) -> tuple[np.ndarray, np.ndarray]:
    """Test images that the model gets right."""
    images, labels = digits[0][1500:], digits[1][1500:]
    right = np.flatnonzero(model(images).numpy().argmax(axis=1) == labels)[:N]
    return images[right], labels[right]


def _classes(victim: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(victim(images)).argmax(axis=1)


# === What holds for all ===


@pytest.mark.parametrize(
    ("attack", "most"), WORKS, ids=lambda it: f"{it.name}-{it.threat.norm}" if hasattr(it, "name") else ""
)
def test_it_works_repeatably_within_its_budget_and_in_silence(victim, batch, attack: Attack, most: float, capfd):
    slow = attack.name == "hopskipjump"  # which walks image by image
    images, labels = (array[:8] if slow else array for array in batch)
    before, python = np.random.get_state()[1].copy(), random.getstate()
    found = attack(victim, images, labels, seed=1)
    assert np.mean(_classes(victim, found) == labels) <= most
    assert attack.threat.within(found, images).all()
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert random.getstate() == python
    few = slice(2) if slow else slice(None)
    np.random.seed(99)
    np.testing.assert_array_equal(attack(victim, images[few], labels[few], seed=1), found[few])
    captured = capfd.readouterr()
    assert "it/s" not in captured.err  # no progress bars
    assert captured.out == ""


@pytest.mark.parametrize("attack", [APGDCE(threat=LINF, steps=3), Square(threat=LINF, steps=20)], ids=lambda a: a.name)
def test_the_seed_decides_what_is_random(victim, batch, attack: Attack):
    images, labels = batch
    assert np.abs(attack(victim, images, labels, seed=0) - attack(victim, images, labels, seed=1)).max() > 0.01


@EACH
def test_an_image_that_is_wrong_already_is_left_as_it_is(victim, batch, attack: Attack):
    """Also in the middle of a batch."""
    images, labels = batch[0][:3], batch[1][:3].copy()
    labels[1] = (labels[1] + 1) % CLASSES
    found = attack(victim, images, labels, batch_size=2)
    np.testing.assert_array_equal(found[1], images[1])


def test_a_last_batch_is_not_filled_up_and_generators_follow_their_images(victim, batch):
    """Walking the same image a hundred times would cost what a hundred images cost."""
    seen = []

    class Recording(ArtAttack):
        name = "recording"

        def attack(self, model, images, labels, rngs):
            seen.append((len(images), [rng.integers(1000) for rng in rngs]))
            return images

    images, labels = batch[0][:5], batch[1][:5].copy()
    labels[2] = (labels[2] + 1) % CLASSES
    Recording(threat=LINF)(victim, images, labels, batch_size=3, seed=7)
    assert [size for size, _ in seen] == [2, 2]
    first, second = ([np.random.default_rng((7, row)).integers(1000) for row in rows] for rows in ((0, 1), (3, 4)))
    assert [drawn for _, drawn in seen] == [first, second]


@EACH
def test_a_budget_of_zero_returns_the_image_and_asks_nobody(batch, attack: Attack):
    images, labels = batch

    def nobody(x: Any) -> Any:
        raise AssertionError("the victim was called")

    nothing = ATTACKS[attack.name](Threat(attack.threat.norm, 0.0), 4)
    np.testing.assert_array_equal(nothing(nobody, images, labels), images)


def test_probabilities_are_refused(model, batch):
    images, labels = batch
    with pytest.raises(UserError, match="expected logits .*, the victim gives probabilities"):
        DeepFool(threat=L2)(lambda x: tf.nn.softmax(model(x)), images, labels)


# === The model that ART sees ===


def test_it_answers_what_arts_own_classifier_answers(model, victim, batch):
    from art.estimators.classification import TensorFlowV2Classifier

    images, labels = batch
    ours = EndToEnd(victim, images)
    theirs = TensorFlowV2Classifier(model, CLASSES, SHAPE, keras.losses.CategoricalCrossentropy(from_logits=True))
    onehot = np.eye(CLASSES, dtype=np.float32)[labels]
    np.testing.assert_allclose(ours.predict(images), theirs.predict(images), atol=1e-5)
    for label in (None, 3, labels):
        np.testing.assert_allclose(
            ours.class_gradient(images, label), theirs.class_gradient(images, label), rtol=1e-4, atol=1e-6
        )
    gradient = ours.loss_gradient(images, onehot) / 2.0**40 / N  # ART's is of the mean
    np.testing.assert_allclose(gradient, theirs.loss_gradient(images, onehot), rtol=1e-3, atol=1e-7)
    assert ours.queries == 2 * N - N  # `predict` only


def test_a_victim_without_a_gradient_has_zeros(victim, batch):
    ours = EndToEnd(lambda x: victim(tf.round(x)), batch[0])
    np.testing.assert_array_equal(ours.class_gradient(batch[0]), np.zeros((N, CLASSES, *SHAPE)))


def test_what_is_remembered_is_not_asked_again_and_not_kept_for_ever(victim, batch):
    images, _ = batch
    ours = EndToEnd(victim, images, remember=True)
    first = ours.predict(images[:8])
    assert ours.queries == 8
    np.testing.assert_array_equal(ours.predict(images[4:10])[:4], first[4:])
    assert ours.queries == 10
    rng = np.random.default_rng(0)
    for _ in range(10):
        ours.predict(rng.random((8, *SHAPE), np.float32))
    assert len(ours._known) <= 32
    np.testing.assert_allclose(ours.predict(images[:8]), first, atol=1e-6)


def test_the_ratio_of_logits_is_its_formula_and_survives_equal_logits():
    logits = np.array([[4.0, 1.0, 3.0, 2.0], [0.0, 5.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    found = difference_of_logits_ratio(tf.constant([0, 3, 2]), tf.constant(logits)).numpy()
    np.testing.assert_allclose(found, [(3 - 4) / (4 - 2), (5 - 2) / (5 - 1), 0.0], rtol=1e-6)


# === AutoPGD ===


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.6)], ids=lambda threat: threat.norm)
@pytest.mark.parametrize(("kind", "name"), [(APGDCE, "cross_entropy"), (APGDDLR, "difference_logits_ratio")])
def test_apgd_is_that_of_art_used_directly(model, victim, batch, threat: Threat, kind: Any, name: str):
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import TensorFlowV2Classifier

    images, labels = batch
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    classifier = TensorFlowV2Classifier(model, CLASSES, SHAPE, loss, clip_values=(0.0, 1.0))
    direct = AutoProjectedGradientDescent(
        classifier, norm={"linf": np.inf, "l2": 2}[threat.norm], eps=threat.epsilon, eps_step=2 * threat.epsilon,
        max_iter=6, nb_random_init=1, batch_size=N, loss_type=name, verbose=False,
    )  # fmt: skip
    with seeded(generators(5, [0])[0]):
        expected = direct.generate(images, labels)
    found = kind(threat=threat, steps=6)(victim, images, labels, seed=5)
    fooled = _classes(victim, expected) != labels
    assert 3 < fooled.sum() < N
    np.testing.assert_allclose(found[fooled], expected[fooled], atol=1e-5)
    # Where ART gives back a random start, ours is the point of the largest loss that it has seen.
    measure = EndToEnd(victim, images, loss=kind.loss)
    ours, theirs = (measure.compute_loss(x, np.eye(CLASSES)[labels])[~fooled] for x in (found, expected))
    assert (ours > theirs).all()
    np.testing.assert_allclose(found[~fooled], direct.x_max[~fooled], atol=1e-5)


def test_restarts_of_apgd_go_to_what_resists(victim, batch):
    images, labels = batch
    threat = Threat("linf", 0.06)
    one = APGDCE(threat=threat, steps=3)(victim, images, labels, seed=0)
    five = APGDCE(threat=threat, steps=3, restarts=5)(victim, images, labels, seed=0)
    fooled = _classes(victim, one) != labels
    np.testing.assert_array_equal(five[fooled], one[fooled])
    assert (_classes(victim, five) != labels)[fooled].all()
    with pytest.raises(UserError, match="apgd_ce: expected at least one restart, got 0"):
        APGDCE(threat=threat, restarts=0)


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.6)], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("kind", [APGDCE, APGDDLR])
def test_apgd_until_fooled_keeps_the_first_point_of_each_path_that_fools(monkeypatch, victim, batch, threat, kind):
    """All that ART looks at is written down; the first misclassified point of each image is what comes back."""
    images, labels = batch
    path: list[np.ndarray] = []
    whole = EndToEnd.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            EndToEnd, "compute_loss", lambda self, x, y, **more: (path.append(x.copy()), whole(self, x, y))[1]
        )
        ends = kind(threat=threat, steps=12)(victim, images, labels, seed=5)
    wrong = np.stack([_classes(victim, x) != labels for x in path])
    first, ever = wrong.argmax(axis=0), wrong.any(axis=0)
    assert 3 < ever.sum() < N and len(set(first[ever])) > 1
    found = kind(threat=threat, steps=12, until_fooled=True)(victim, images, labels, seed=5)
    np.testing.assert_allclose(found[ever], np.stack(path)[first, np.arange(N)][ever], atol=1e-5)
    np.testing.assert_allclose(found[~ever], ends[~ever], atol=1e-5)
    assert (_classes(victim, found) != labels)[_classes(victim, ends) != labels].all()


def test_apgd_until_fooled_asks_less(victim, batch):
    images, labels = batch
    sizes: list[int] = []

    def counting(x: Any) -> Any:
        tf.py_function(lambda seen: sizes.append(len(seen)), [x], [])
        return victim(x)

    def asked(attack: Attack) -> int:
        sizes.clear()
        found = attack(counting, images, labels)
        assert (_classes(victim, found) != labels).all()
        return sum(sizes)

    far = Threat("linf", 0.5)
    assert asked(APGDCE(threat=far, steps=40, until_fooled=True)) < asked(APGDCE(threat=far, steps=40)) / 5
    # Restarts go to what resists, a new batch each time; images wrong untouched are left alone.
    wrong = np.where(np.arange(N) < 3, (labels + 1) % CLASSES, labels)
    near, kept = Threat("linf", 0.06), {"steps": 3, "restarts": 3}
    found = APGDCE(threat=near, until_fooled=True, **kept)(victim, images, wrong, seed=0)
    np.testing.assert_array_equal(found[:3], images[:3])
    plain = APGDCE(threat=near, **kept)(victim, images, wrong, seed=0)
    assert (_classes(victim, found) != wrong)[_classes(victim, plain) != wrong].all()


def test_two_classes_have_no_ratio_of_three_logits(victim, batch):
    images, _ = batch
    two = lambda x: victim(x)[:, :2]  # noqa: E731
    with pytest.raises(UserError, match="apgd_dlr compares three logits, this classifier has 2: take apgd_ce"):
        APGDDLR(threat=LINF, steps=2)(two, images, _classes(two, images))


# === Minimum norm ===


@pytest.mark.parametrize("attack", [DeepFool(threat=L2), CWL2(threat=L2)], ids=lambda a: a.name)
def test_the_distance_to_a_linear_border_is_found(attack: Any):
    """Nearest prototype: the border to class b is |d|/2 + ... away, in closed form; the box is far."""
    rng = np.random.default_rng(0)
    prototypes = (0.5 + rng.uniform(-0.2, 0.2, (4, *SHAPE))).astype(np.float32)
    labels = np.arange(8) % 4
    images = (prototypes[labels] + rng.normal(0, 0.02, (8, *SHAPE))).astype(np.float32)

    def nearest(x: Any) -> Any:
        return -tf.reduce_sum((x[:, None] - prototypes) ** 2, axis=(2, 3, 4))

    squared = -nearest(images).numpy()
    between = np.sqrt(((prototypes[labels][:, None] - prototypes) ** 2).sum(axis=(2, 3, 4)))
    with np.errstate(divide="ignore", invalid="ignore"):
        border = (squared - squared[np.arange(8), labels][:, None]) / (2 * between)
    expected = np.nanmin(border, axis=1)
    found = attack.unbounded(nearest, images, labels)
    assert (_classes(nearest, found) != labels).all()
    np.testing.assert_allclose(attack.threat.distance(found, images), expected, rtol=0.03)


@pytest.mark.parametrize("name", ["deepfool", "cw_l2"])
def test_mean_distances_are_those_of_foolbox(model, victim, batch, name: str):
    foolbox = pytest.importorskip("foolbox")
    images, labels = batch[0][:8], batch[1][:8]
    ours, theirs = {
        "deepfool": (DeepFool(threat=L2), foolbox.attacks.L2DeepFoolAttack()),
        "cw_l2": (CWL2(threat=L2), foolbox.attacks.L2CarliniWagnerAttack(4, 100, stepsize=0.1, initial_const=1.0)),
    }[name]
    fast = tf.function(victim)
    seen = foolbox.TensorFlowModel(fast, bounds=(0, 1))
    # 64-bit labels: eagerpy mixes types with a function that NumPy 2 no longer has.
    _, expected, success = theirs(seen, tf.constant(images), tf.constant(labels, tf.int64), epsilons=None)
    found = ours.unbounded(victim, images, labels)
    assert success.numpy().all()
    assert (_classes(victim, found) != labels).all()
    mean, known = (L2.distance(np.asarray(x), images).mean() for x in (found, expected))
    assert mean == pytest.approx(known, rel=0.05)


def test_beyond_the_budget_an_adversary_is_projected(victim, batch):
    images, labels = batch
    attack = DeepFool(threat=Threat("l2", 0.3))
    free, kept = attack.unbounded(victim, images, labels), attack(victim, images, labels)
    distance = L2.distance(free, images)
    assert distance.max() > 0.35
    np.testing.assert_allclose(L2.distance(kept, images), np.minimum(distance, 0.3), rtol=1e-4)


def test_carlini_wagner_does_not_depend_on_batches(victim, batch):
    images, labels = batch[0][:5], batch[1][:5]
    attack = CWL2(threat=L2, iterations=30, search_steps=2)
    assert attack.steps == 60
    whole = attack.unbounded(victim, images, labels)
    np.testing.assert_allclose(attack.unbounded(victim, images, labels, batch_size=2), whole, atol=1e-4)
    with pytest.raises(UserError, match="cw_l2: expected settings above 0, got"):
        CWL2(threat=L2, step_size=0.0)


# === Queries ===


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("kind", [Square, HopSkipJump])
def test_no_image_costs_more_queries_than_steps(victim, batch, threat: Threat, kind: Any, monkeypatch):
    """And none needs a gradient."""
    images, labels = batch[0][:3], batch[1][:3]
    asked: list[EndToEnd] = []
    made = EndToEnd.__init__

    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        asked.append(self)

    monkeypatch.setattr(EndToEnd, "__init__", remembering)
    monkeypatch.setattr(EndToEnd, "loss_gradient", None)
    monkeypatch.setattr(EndToEnd, "class_gradient", None)
    attack = kind(threat=threat, steps=400)
    attack(victim, images, labels, batch_size=2)
    # The first look at the batch, and ART's two looks back at each image, are not part of the walk.
    assert 3 * 10 < sum(model.queries for model in asked) <= 3 * (400 + 6)


def test_a_walk_depends_on_its_own_generator_only(victim, batch):
    images, labels = batch[0][:3], batch[1][:3]
    attack = HopSkipJump(threat=LINF, steps=300)
    whole = attack(victim, images, labels, seed=2)
    np.testing.assert_array_equal(attack(victim, images, labels, seed=2, batch_size=2), whole)
    assert np.abs(attack(victim, images[:1], labels[:1], seed=3) - whole[:1]).max() > 0.01


def test_a_walk_begins_at_another_image_where_noise_has_no_other_class(victim, batch):
    """All noise is class 0 here, and so is the image: dark images are what the model says."""
    images, labels = batch

    def bright_is_zero(x: Any) -> Any:
        bright = tf.reduce_mean(x, axis=[1, 2, 3]) > 0.4
        return tf.where(bright[:, None], 50.0 * tf.one_hot([0], CLASSES), victim(x))

    zeros = np.flatnonzero(labels == 0)
    assert len(zeros)
    attack = HopSkipJump(threat=Threat("l2", 3.0), steps=400)
    found = attack(bright_is_zero, images, labels)
    assert (_classes(bright_is_zero, found[zeros]) != 0).all()
    alone = images[zeros], labels[zeros]  # no image of another class, nothing to begin at
    np.testing.assert_array_equal(attack(bright_is_zero, *alone), alone[0])


def test_a_walk_on_random_answers_ends(batch):
    images, labels = batch[0][:2], batch[1][:2]
    count = iter(range(10**9))

    def moody(x: Any) -> Any:
        def answer(seen: Any) -> Any:
            # Right when it first sees the batch and for every single image, wrong for crowds: no step ever succeeds.
            next(count)
            right = len(seen) < 20
            return 9 * np.eye(CLASSES, dtype=np.float32)[(labels[0] + (not right)) % CLASSES * np.ones(len(seen), int)]

        logits = tf.numpy_function(answer, [x], tf.float32)
        return tf.ensure_shape(logits, (None, CLASSES))

    HopSkipJump(threat=L2, steps=100)(moody, images[:1], labels[:1])
    assert next(count) < 3000


def test_a_move_of_square_keeps_what_lies_outside_its_windows_and_fills_the_budget():
    rng = np.random.default_rng(0)
    image = np.full((12, 14, 3), 0.5, np.float32)
    best = square_l2._begin(image, 0.5, rng)
    assert np.linalg.norm(best - image) == pytest.approx(0.5, rel=1e-4)
    for _ in range(20):
        moved = square_l2._move(image, best, 0.5, 5, rng)
        assert np.linalg.norm(moved - image) == pytest.approx(0.5, rel=1e-4)
        changed = np.any(np.abs(moved - best) > 1e-4, axis=-1)
        assert 9 <= changed.sum() <= 50  # two windows of 25, which may overlap
        best = moved


def test_windows_shrink_and_stay_odd_and_inside():
    sides = [square_l2._window((28, 28), 0.8, progress) for progress in (0.0, 0.003, 0.03, 0.3, 0.9)]
    assert sides == [25, 19, 9, 3, 3]
    assert square_l2._window((10, 12), 0.8, 0.0) == 9
    assert square_l2._window((10, 10), 0.99, 0.0) == 9


def test_square_in_l2_does_not_depend_on_batches(victim, batch):
    images, labels = batch[0][:5], batch[1][:5]
    attack = Square(threat=L2, steps=30)
    whole = attack(victim, images, labels)
    np.testing.assert_allclose(attack(victim, images, labels, batch_size=2), whole, atol=1e-5)


def test_small_images_have_no_tiles(victim):
    images, labels = np.full((2, 8, 8, 1), 0.5, np.float32), np.zeros(2, np.int64)
    pad = lambda x: victim(tf.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))  # noqa: E731
    labels = _classes(pad, images)
    with pytest.raises(UserError, match=r"square in l2 needs 10 pixels on each side, got images \(8, 8\)"):
        Square(threat=L2)(pad, images, labels)
