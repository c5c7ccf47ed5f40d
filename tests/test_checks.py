"""The checks of an evaluation, met by what they are made to catch: invented outcomes, and defences that cheat."""

from __future__ import annotations

import functools
import types

import keras
import numpy as np
import pytest

from vqunet_tf import VectorQuantizer
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import Outcome, checks, differences, evaluate, probes
from vqunet_tf.evaluation.findings import common, minimum
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.evaluation.suites import build
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.threat import Threat, ThreatModel

# === Invented outcomes ===


def _outcome(
    share: float,
    attack: str = "pgd",
    defense: str = "none",
    model: str = "gray_box",
    epsilon: float = 0.1,
    norm: str = "linf",
    distance: float | None = None,
    n: int = 400,
    variant: str = "",
) -> Outcome:
    """An outcome with the first share of its images right, so that outcomes are nested."""
    threat = Threat(norm, 0.0 if attack == "none" else epsilon)
    return Outcome(
        defense=defense,
        attack=attack,
        threat=threat,
        steps=1,
        threat_model=ThreatModel(model),
        correct=np.arange(n) < share * n,
        distance=threat.epsilon if distance is None else distance,
        seconds=0.0,
        adversarial=np.zeros((0, 1, 1, 1), np.float32),
        variant=variant,
    )


def _others(share: float, *arguments, **options) -> Outcome:
    """The same with the last share of its images right."""
    outcome = _outcome(share, *arguments, **options)
    outcome.correct[:] = outcome.correct[::-1].copy()
    return outcome


_WHITE = {"defense": "vqunet", "model": "white_box"}
_GRAY = {"defense": "vqunet", "model": "gray_box"}
_BLACK = {"defense": "vqunet", "model": "black_box"}
_UNET = {"defense": "unet", "model": "gray_box"}
_CLEAN = [_outcome(0.9, "none"), _outcome(0.9, "none", **_GRAY), _outcome(0.9, "none", **_UNET)]


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (checks.attacks_work_undefended, [_outcome(0.4)], [_outcome(0.6)]),  # more than half of clean is left
        (
            checks.attacks_work_undefended,
            [_outcome(0.1), _outcome(0.8, "fgsm")],
            [_outcome(0.1), _outcome(0.9, "fgsm")],
        ),
        (  # each attack at its own largest radius of each norm
            checks.attacks_work_undefended,
            [_outcome(0.9, "fgsm", epsilon=0.01), _outcome(0.3, "fgsm"), _outcome(0.6, "cw_l2", norm="l2")],
            [_outcome(0.3), _outcome(0.9, "cw_l2", norm="l2")],
        ),
        (  # on the few images that a slow attack met, of which 9 in 10 were right before
            checks.attacks_work_undefended,
            [_outcome(0.1), _outcome(0.8, "hopskipjump", n=40)],
            [_outcome(0.1), _outcome(1.0, "hopskipjump", n=40)],
        ),
        (
            checks.iterative_beats_single_step,
            [_outcome(0.2), _outcome(0.3, "fgsm")],
            [_outcome(0.3), _outcome(0.2, "fgsm")],
        ),
        (
            checks.iterative_beats_single_step,
            [_outcome(0.8, **_GRAY), _outcome(0.7, "fgsm", **_GRAY), _outcome(0.2), _outcome(0.2, "fgsm")],
            [_outcome(0.8, **_WHITE), _outcome(0.7, "fgsm", **_WHITE)],
        ),
        (  # the strongest gradient of an attack counts, not each
            checks.iterative_beats_single_step,
            [_outcome(v, **_WHITE, variant=f"v{v}") for v in (0.8, 0.4)] + [_outcome(0.5, "fgsm", **_WHITE)],
            [_outcome(v, **_WHITE, variant=f"v{v}") for v in (0.8, 0.6)] + [_outcome(0.5, "fgsm", **_WHITE)],
        ),
        (
            checks.white_box_beats_gray_box,
            [_outcome(0.5, **_WHITE), _outcome(0.8, **_GRAY)],
            [_outcome(0.8, **_WHITE), _outcome(0.5, **_GRAY)],
        ),
        (  # as many right, but not the same: image by image gray-box breaks what white-box does not
            checks.white_box_beats_gray_box,
            [_outcome(0.5, **_WHITE), _outcome(0.5, **_GRAY)],
            [_outcome(0.5, **_WHITE), _others(0.5, **_GRAY)],
        ),
        (  # the worst case of a white-box attacker has the gray-box images; the attack itself has not
            checks.white_box_beats_gray_box,
            [_outcome(0.8, "fgsm", **_WHITE), _outcome(0.5, **_WHITE), _outcome(0.5, "fgsm", **_GRAY)],
            [_outcome(0.8, **_WHITE), _outcome(0.5, "apgd_dlr", **_WHITE), _outcome(0.5, **_GRAY)],
        ),
        (
            checks.white_box_beats_identity,
            [_outcome(0.4, **_WHITE, variant="soft"), _outcome(0.5, **_WHITE, variant="identity")],
            [_outcome(0.5, **_WHITE, variant="soft"), _outcome(0.4, **_WHITE, variant="identity")],
        ),
        (
            checks.white_box_beats_black_box,
            [_outcome(0.5, **_WHITE), _outcome(0.6, "square", **_BLACK)],
            [_outcome(0.5, **_WHITE), _outcome(0.4, "square", **_BLACK)],
        ),
        (  # on the first 50 images, where white-box leaves all
            checks.white_box_beats_black_box,
            [_outcome(0.5, **_WHITE), _outcome(1.0, "hopskipjump", **_BLACK, n=50)],
            [_outcome(0.5, **_WHITE), _outcome(0.8, "hopskipjump", **_BLACK, n=50)],
        ),
        (
            checks.white_box_beats_black_box,
            [_outcome(0.3), _outcome(0.4, "transfer", model="black_box")],
            [_outcome(0.5), _outcome(0.4, "transfer", model="black_box")],
        ),
        (
            checks.noise_weaker_than_gradients,
            [_outcome(0.5, **_WHITE), _outcome(0.5, "noise", **_BLACK)],
            [_outcome(0.5, **_WHITE), _outcome(0.4, "noise", **_BLACK)],
        ),
        (checks.no_label_leaking, [_outcome(0.9, **_GRAY)], [_outcome(0.95, **_GRAY)]),  # above clean
        (
            checks.no_label_leaking,
            [_outcome(0.85, **_GRAY), _outcome(0.84, "pgd_targeted", **_GRAY)],
            [_outcome(0.85, **_GRAY), _outcome(0.8, "pgd_targeted", **_GRAY)],
        ),
        (
            checks.monotone_in_epsilon,
            [_outcome(0.5), _outcome(0.4, epsilon=0.2)],
            [_outcome(0.4), _outcome(0.5, epsilon=0.2)],
        ),
        (  # an attack that was made at one radius only proves nothing about the next
            checks.monotone_in_epsilon,
            [_outcome(0.5), _outcome(0.1, "square", n=50), _outcome(0.4, epsilon=0.2)],
            [_outcome(0.4), _outcome(0.1, "square", n=50), _outcome(0.5, epsilon=0.2)],
        ),
        (checks.budget_held, [_outcome(0.5)], [_outcome(0.5, distance=0.11)]),
        (checks.budget_held, [_outcome(0.5)], [_outcome(0.5, distance=float("nan"))]),
        (  # the strongest variant alone does not excuse another that left the ball
            checks.budget_held,
            [_outcome(0.5, variant="a"), _outcome(0.1, variant="b")],
            [_outcome(0.5, variant="a", distance=0.11), _outcome(0.1, variant="b")],
        ),
        (
            checks.beats_ablations,
            [_outcome(0.8, **_GRAY), _outcome(0.7, **_UNET)],
            [_outcome(0.7, **_GRAY), _outcome(0.8, **_UNET)],
        ),
        (
            checks.beats_ablations,
            [_outcome(0.71, **_GRAY), _outcome(0.7, **_UNET)],
            [_outcome(0.7, **_GRAY, n=400), _outcome(0.7, **_UNET)],
        ),
    ],
)
def test_each_check_passes_what_is_fine_and_fails_what_is_not(check, fine, wrong):
    assert check([*_CLEAN, *fine]).passed
    failed = check([*_CLEAN, *wrong])
    assert not failed.passed
    assert failed.name == check.__name__
    assert "%" in failed.detail or "moved" in failed.detail


def test_clean_accuracy_may_fall_by_a_point_or_by_chance():
    def kept(bare: float, purified: float, n: int = 400):
        outcomes = [_outcome(bare, "none", n=n), _outcome(purified, "none", **_GRAY, n=n)]
        return checks.clean_accuracy_kept([*outcomes, _outcome(0.3, "none", defense="jpeg", n=n)])

    assert kept(0.9, 0.89).passed
    assert kept(0.9, 0.91).passed
    assert not kept(0.9, 0.86).passed
    assert kept(0.9, 0.86, n=50).passed  # two images
    # What others cost is said and is their business.
    assert kept(0.9, 0.89).detail == "90.0% without, 89.0% with vqunet, 30.0% with jpeg, on 400 images"
    assert kept(0.9, 0.86).detail.startswith("vqunet costs 4.0 points of clean accuracy; 90.0% without")
    assert checks.clean_accuracy_kept([_outcome(0.9, "none")]) is None


def test_a_difference_that_may_be_chance_fails_nothing():
    assert checks.no_label_leaking([*_CLEAN, _outcome(0.91, **_GRAY)]).passed  # 4 of 400 images
    assert checks.monotone_in_epsilon([*_CLEAN, _outcome(0.40), _outcome(0.41, epsilon=0.2)]).passed
    assert checks.attacks_work_undefended([_outcome(0.9, "none", n=20), _outcome(0.5, n=20)]).passed
    for missed, passed in ((0.02, True), (0.03, True), (0.05, False)):  # of 400 images 2 in 100 may be, and chance
        white, gray = _outcome(0.5, **_WHITE), _outcome(0.5 - missed, **_GRAY)
        assert checks.white_box_beats_gray_box([*_CLEAN, white, gray]).passed is passed


def test_untargeted_below_targeted_is_said_and_fails_nothing():
    found = checks.no_label_leaking([*_CLEAN, _outcome(0.7, **_GRAY), _outcome(0.8, "pgd_targeted", **_GRAY)])
    assert found.passed
    assert "pgd 70.0%, pgd_targeted 80.0%: no leak" in found.detail


def test_a_lead_that_may_be_chance_is_called_so():
    said = [
        checks.beats_ablations([*_CLEAN, _outcome(ours, **_GRAY), _outcome(0.7, **_UNET)]).detail
        for ours in (0.71, 0.8)
    ]
    assert said[0].endswith("unet 70.0% against 71.0% (may be chance)")
    assert said[1].endswith("unet 70.0% against 80.0%")


def test_ablations_are_compared_under_the_attacks_that_both_met():
    only_ours = _outcome(0.1, "deepfool", **_GRAY)
    assert checks.beats_ablations([*_CLEAN, _outcome(0.8, **_GRAY), only_ours, _outcome(0.7, **_UNET)]).passed
    # Budgets are pooled: 0.8 and 0.4 against 0.9 and 0.2.
    ours = [_outcome(0.8, **_GRAY), _outcome(0.4, **_GRAY, epsilon=0.2)]
    assert checks.beats_ablations([*ours, _outcome(0.9, **_UNET), _outcome(0.2, **_UNET, epsilon=0.2)]).passed


def test_arrays_of_fewer_images_are_the_first_ones():
    three, five = np.array([True, False, True]), np.array([True, True, False, False, True])
    assert [part.tolist() for part in common(five, three)] == [[True, True, False], three.tolist()]


def test_a_minimum_is_of_the_images_that_all_met_but_for_attacks_that_met_few():
    many, some, few = np.arange(300) % 2 > 0, np.arange(150) % 3 > 0, np.zeros(99, bool)
    for order in ([many, some, few], [few, many, some]):
        assert minimum(order).tolist() == (many[:150] & some).tolist()
    assert len(minimum([few, few[:50]])) == 99  # of the most that there is


def test_worst_cases_are_compared_on_the_images_that_all_of_their_attacks_met():
    """Iterated attacks met the first 200 of 2,000 images, and say nothing of those after them."""
    step, steps = {"attack": "fgsm", "n": 2000}, {"n": 200}
    # On all images the U-Net would look worse than it is where everything was tried: only FGSM met most of them.
    ours = [_outcome(0.7, **step, **_GRAY), _outcome(0.95, **steps, **_GRAY)]
    theirs = [_outcome(0.6, **step, **_UNET), _outcome(0.99, **steps, **_UNET)]
    found = checks.beats_ablations([*ours, *theirs])
    assert not found.passed and "unet 99.0% against 95.0%" in found.detail
    # White-box FGSM leaves more of the later images than gray-box FGSM does, which proves nothing.
    white = [_outcome(0.6, **step, **_WHITE), _outcome(0.0, **steps, **_WHITE)]
    gray = [_outcome(0.5, **step, **_GRAY), _outcome(0.3, **steps, **_GRAY)]
    assert checks.white_box_beats_gray_box([*white, *gray]).passed
    larger = [_outcome(0.7, **step, **_GRAY, epsilon=0.2), _outcome(0.2, **steps, **_GRAY, epsilon=0.2)]
    clean = _outcome(0.9, "none", **_GRAY, n=2000)
    assert checks.monotone_in_epsilon([clean, *gray, *larger]).passed
    larger[1] = _outcome(0.5, **steps, **_GRAY, epsilon=0.2)
    assert not checks.monotone_in_epsilon([clean, *gray, *larger]).passed


def test_noise_and_transfer_need_not_work():
    idle = [_outcome(0.9, "noise", model="black_box"), _outcome(0.9, "transfer", model="black_box")]
    assert checks.attacks_work_undefended([*_CLEAN, _outcome(0.1), *idle]).passed
    assert not checks.attacks_work_undefended([*_CLEAN, _outcome(0.1), _outcome(0.9, "square")]).passed


def test_worst_cases_are_lowest_and_say_by_how_much():
    found = checks.worst_case_is_lowest([*_CLEAN, _outcome(0.7, **_GRAY), _others(0.7, "fgsm", **_GRAY)])
    assert found.passed
    assert "up to 30.0 points more" in found.detail  # 0.4 are right under both


def test_worst_cases_that_were_averaged_are_caught(monkeypatch):
    outcomes = [*_CLEAN, _outcome(0.7, **_GRAY), _outcome(0.2, "fgsm", **_GRAY)]
    table = checks.rows.rows(outcomes, [ThreatModel.GRAY_BOX])
    averaged = [{**row, "accuracy": 0.45} if row["worst_case"] else row for row in table]
    monkeypatch.setattr(checks.rows, "rows", lambda *_: averaged)
    found = checks.worst_case_is_lowest(outcomes)
    assert not found.passed
    assert "worst case 45.0%, a single attack 20.0%" in found.detail


def test_who_attacked_and_who_did_not_is_said():
    white = [_outcome(0.5, **_WHITE, variant=name) for name in ("straight_through", "soft")]
    found = checks.attackers_tried([*_CLEAN, *white, _outcome(0.5, "square", **_BLACK, n=200)])
    assert found.passed
    assert found.detail == (
        "several gradients: straight_through, soft; score queries: square on 200 images; "
        "not tried: margin loss, decision queries, transfer"
    )
    assert checks.attackers_tried([*_CLEAN, _outcome(0.5, **_GRAY)]) is None


def test_a_check_that_would_compare_nothing_is_left_out():
    names = {check.name for check in checks.from_outcomes([*_CLEAN, _outcome(0.1), _outcome(0.8, **_GRAY)])}
    assert names == {
        "attacks_work_undefended",
        "no_label_leaking",
        "monotone_in_epsilon",
        "budget_held",
        "worst_case_is_lowest",
        "clean_accuracy_kept",
    }


def test_every_check_of_outcomes_is_asked():
    outcomes = [
        *_CLEAN,
        *(_outcome(0.1, name) for name in ("pgd", "fgsm")),
        *(_outcome(0.8, name, **place) for name in ("pgd", "pgd_targeted") for place in (_GRAY, _UNET)),
        *(_outcome(0.3, "pgd", **_WHITE, variant=name) for name in ("soft", "identity")),
        *(_outcome(0.4, name, **_BLACK) for name in ("square", "noise")),
    ]
    names = [check.name for check in checks.from_outcomes(outcomes)]
    measured = {"deterministic", "gradients_not_masked", "logits_not_probabilities"}
    assert set(names) == set(checks.__all__) - {"Check", "from_outcomes"} - measured
    assert len(names) == len(set(names))
    assert {type(check.passed) for check in checks.from_outcomes(outcomes)} == {bool}  # JSON knows no other


def test_wilson_intervals_are_those_of_the_tables():
    np.testing.assert_allclose(wilson(0, 10), (0.0, 0.2775), atol=5e-4)
    np.testing.assert_allclose(wilson(5, 10), (0.2366, 0.7634), atol=5e-4)
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-4)  # Newcombe 1998, Table I
    assert wilson(0, 0) == (0.0, 1.0)


def test_equals_are_told_apart_by_chance_as_rarely_as_promised():
    rng = np.random.default_rng(0)
    draws = rng.random((2, 4000, 300)) < 0.7
    false_alarms = np.mean([above(a, b) for a, b in zip(*draws, strict=True)])
    assert 0.001 < false_alarms < 0.01  # once in 200
    assert above(np.arange(300) < 200, np.arange(300) < 180)
    assert not above(np.arange(300) < 200, np.arange(300) < 180, margin=0.07)


# === Answers and gradients ===


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


# === Finite differences ===


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


# === Defences ===

CLASSES, SHAPE, N = 4, (8, 8, 1), 60
_LARGE = {"large_epsilon_succeeds", "unbounded_attack_succeeds"}


class Rounding(keras.layers.Layer):
    """Rounds to `levels` grey levels; the gradient is the identity, or as for rounding, nothing."""

    def __init__(self, levels: int = 4, straight_through: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.levels, self.straight_through = levels, straight_through

    def call(self, images):
        rounded = keras.ops.round(images * self.levels) / self.levels
        return images + keras.ops.stop_gradient(rounded - images) if self.straight_through else rounded


def _layer(function) -> keras.layers.Layer:
    return keras.layers.Lambda(function, output_shape=SHAPE)


def _purifier(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input(SHAPE), *layers], name="purifier")


def _quantized() -> keras.Model:
    """2×2 averages, each replaced by the nearest of 17 grey levels in a code book."""
    images = keras.Input(SHAPE)
    quantizer = VectorQuantizer(17, 1)
    found = quantizer(keras.layers.AveragePooling2D(2)(images))["quantized"]
    model = keras.Model(images, keras.layers.UpSampling2D(2)(found), name="quantized")
    quantizer.placed.assign(np.linspace(0, 1, 17)[:, None])
    return model


@pytest.fixture(scope="module")
def problem():
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


def _suspicions(problem, purify, outcomes=None, **changes):
    """What fails for a defence: checks of gradients and answers, and all probes at epsilon 0.1."""
    classifier, images, labels = problem
    chains = {"none": Chain(classifier), "vqunet": Chain(classifier, purify)}
    bench = types.SimpleNamespace(victims=chains, images=images, labels=labels, batch_size=32, seed=0)
    twice = {name: tuple(chain.logits(images, 32) for _ in range(2)) for name, chain in chains.items()}
    chains["vqunet"].is_random = not checks.deterministic(twice).passed
    gradients = {name: input_gradient(chain.through(), images, labels) for name, chain in chains.items()}
    found = [
        checks.logits_not_probabilities({name: pair[0] for name, pair in twice.items()}),
        checks.deterministic(twice),
        checks.gradients_not_masked(gradients),
        *probes.run(bench, outcomes or [_outcome(0.5, n=N)], **changes),
    ]
    return {check.name: check for check in found}


def _failed(found) -> set[str]:
    return {name for name, check in found.items() if not check.passed}


def test_a_sound_chain_raises_no_suspicion(problem):
    seen = []
    purify = functools.partial(_quantized(), training=False)
    found = _suspicions(problem, purify, advance=lambda words, work: seen.append(work))
    assert _failed(found) == set()
    assert {type(check.passed) for check in found.values()} == {bool}
    assert "after 1 steps" in found["more_steps_change_little"].detail
    assert set(found) == {
        "logits_not_probabilities",
        "deterministic",
        "gradients_not_masked",
        "more_steps_change_little",
        "noise_weaker_than_gradients",
        "large_epsilon_succeeds",
        "unbounded_attack_succeeds",
        "falls_without_quantizers",
        "quantizers_hide_nothing",
        "gradients_match_differences",
    }
    detail = found["gradients_match_differences"].detail
    assert "vqunet has no slope" in detail  # stairs
    assert "vqunet without quantizers 0." in detail
    bench = types.SimpleNamespace(victims=dict.fromkeys(("none", "vqunet")), images=problem[1])
    assert sum(seen) == probes.work(bench, steps=1) and min(seen) >= 0


@pytest.mark.parametrize(
    ("purifier", "caught"),
    [
        (_purifier(_layer(keras.ops.stop_gradient)), {"gradients_not_masked", "gradients_match_differences", *_LARGE}),
        (_purifier(Rounding(4, straight_through=False)), {"gradients_not_masked", *_LARGE}),
        # A gradient is there, for the left half of the image only.
        (
            _purifier(_layer(lambda x: keras.ops.concatenate([x[:, :, :4], keras.ops.stop_gradient(x[:, :, 4:])], 2))),
            {"gradients_match_differences"},
        ),
        # A gradient is there and points the wrong way.
        (_purifier(_layer(lambda x: keras.ops.stop_gradient(2 * x) - x)), {"gradients_match_differences", *_LARGE}),
    ],
    ids=["none", "rounding", "half", "reversed"],
)
def test_a_defence_that_masks_its_gradient_is_caught(problem, purifier, caught):
    assert caught <= _failed(_suspicions(problem, purifier))


def test_a_stand_in_for_a_gradient_that_leads_nowhere_is_no_mask(problem):
    def purify(images):
        return keras.ops.round(images * 16) / 16

    assert "large_epsilon_succeeds" in _failed(_suspicions(problem, purify))
    purify.differentiable = False
    found = _suspicions(problem, purify)
    assert _failed(found) == set()
    assert "vqunet" not in found["gradients_match_differences"].detail


def test_a_random_defence_is_caught(problem):
    class Noise(keras.layers.Layer):
        def call(self, images):
            return images + 0.1 * keras.random.normal(keras.ops.shape(images))

    assert "deterministic" in _failed(_suspicions(problem, _purifier(Noise())))


def test_a_softmax_is_caught(problem):
    classifier, images, labels = problem
    softmax = keras.Sequential([classifier, keras.layers.Softmax()])
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        _suspicions((softmax, images, labels), _quantized())
    answers = {"none": Chain(classifier).logits(images, 32), "vqunet": Chain(softmax).logits(images, 32)}
    assert not checks.logits_not_probabilities(answers).passed


def test_quantizers_that_are_not_what_protects_are_found_out(problem):
    """Switched off they leave a network that a gradient still does not get through."""
    images = keras.Input(SHAPE)
    rounded = Rounding(8, straight_through=False)(images)
    quantizer = VectorQuantizer(17, 1)
    model = keras.Model(images, quantizer(rounded)["quantized"])
    quantizer.placed.assign(np.linspace(0, 1, 17)[:, None])
    assert "falls_without_quantizers" in _failed(_suspicions(problem, model))


def test_what_was_measured_is_not_asked_again(problem):
    classifier, images, labels = problem
    bench = types.SimpleNamespace(
        victims={"none": classifier, "vqunet": classifier}, images=images, labels=labels, batch_size=N, seed=0
    )
    noise = _outcome(0.9, "noise", **_BLACK, n=N)
    for outcomes, asked in (([_outcome(0.5)], True), ([_outcome(0.5), noise], False)):
        names = [check.name for check in probes.run(bench, outcomes)]
        assert ("noise_weaker_than_gradients" in names) is asked
        assert "falls_without_quantizers" not in names  # it has none
    assert probes.run(types.SimpleNamespace(victims={"none": None}, images=images), [_outcome(0.5)]) == []
    assert probes.run(bench, [_outcome(0.9, "none")]) == []  # no budget


def test_the_probed_budget_is_the_one_that_tells_most():
    budgets = [Threat("linf", epsilon) for epsilon in (0.1, 0.2, 0.3)]
    outcomes = [_outcome(share, **_WHITE, epsilon=e) for share, e in ((0.9, 0.1), (0.4, 0.2), (0.0, 0.3))]
    assert probes.telling(outcomes, "vqunet", budgets) == budgets[1]
    # Of several gradients the strongest: what is left of 0.4 and 0.1.
    weaker = [_outcome(0.1, **_WHITE, epsilon=0.2, variant="soft")]
    assert probes.telling([*outcomes, *weaker], "vqunet", budgets) == budgets[0]
    assert probes.telling([], "vqunet", budgets) == budgets[0]


class _Invented(probes.Probe):
    """A probe whose results are made up: which share is right, by the attack (and by whether the quantizers are off)."""

    def __init__(self, share):
        super().__init__(np.zeros((200, 1, 1, 1), np.float32), np.zeros(200, np.int32))
        object.__setattr__(self, "share", share)

    def right(self, victim, attack):
        off = (victim is _SUBJECT.unquantized,) if self.share.__code__.co_argcount > 1 else ()
        return np.arange(200) < 200 * self.share(attack, *off)

    def correct(self, victim, images):
        return np.ones(200, bool)


_SUBJECT = probes.Subject("vqunet", lambda x: x, lambda x: x)
_BUDGET = Threat("linf", 0.1)


@pytest.mark.parametrize(
    ("check", "arguments", "fine", "wrong"),
    [
        (
            probes.more_steps_change_little,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.5 - 0.01 * (attack.steps > 20),
            lambda attack: 0.5 - 0.1 * (attack.steps > 20),
        ),
        (
            probes.more_steps_change_little,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.5 - 0.02 * (attack.steps > 20),  # chance
            lambda attack: 0.5 + 0.1 * (attack.steps > 20),  # and steps do not repair
        ),
        (
            probes.noise_weaker_than_gradients,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.9 if attack.name == "noise" else 0.2,
            lambda attack: 0.1 if attack.name == "noise" else 0.2,
        ),
        (
            probes.large_epsilon_succeeds,
            ([_SUBJECT],),
            lambda attack: 0.12,  # up to 10 %, and chance
            lambda attack: 0.2,
        ),
        (
            probes.unbounded_attack_succeeds,
            ([_SUBJECT],),
            lambda attack: 0.0 if attack.threat.epsilon == 1.0 and attack.steps > 20 else 0.2,
            lambda attack: 0.005,  # one image
        ),
        (
            probes.falls_without_quantizers,
            ([_SUBJECT], _BUDGET),
            lambda attack: 0.5 if attack.threat == _BUDGET else 0.0,  # trained to resist, but not more
            lambda attack: 0.2,
        ),
        (
            probes.quantizers_hide_nothing,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack, off: 0.5 - 0.05 * off,
            lambda attack, off: 0.5 - 0.2 * off,
        ),
        (
            probes.quantizers_hide_nothing,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack, off: 0.5 + 0.2 * off,  # more without them hides nothing
            lambda attack, off: 0.2 * (not off),
        ),
    ],
)
def test_each_probe_passes_what_is_fine_and_fails_what_is_not(check, arguments, fine, wrong):
    assert check(_Invented(fine), *arguments).passed
    failed = check(_Invented(wrong), *arguments)
    assert not failed.passed
    assert failed.name == check.__name__
    assert "vqunet" in failed.detail


def test_nothing_is_switched_off_where_there_are_no_quantizers():
    bare = probes.Subject("vqunet", lambda x: x)
    probe = _Invented(lambda attack: 0.0)
    assert probes.falls_without_quantizers(probe, [bare], _BUDGET) is None
    assert probes.quantizers_hide_nothing(probe, [(bare, _BUDGET)], 20) is None


def test_what_hides_is_seen_on_images_that_are_right_both_ways_and_with_all_gradients():
    def hidden(known, *outcomes):
        probe = _Invented(lambda attack, off: 0.2 * (not off))
        object.__setattr__(probe, "correct", lambda victim, images: known)
        return probes.quantizers_hide_nothing(probe, [(_SUBJECT, _BUDGET)], 20, outcomes)

    first, rest = np.arange(200) < 40, np.arange(200) >= 40
    assert not hidden(first).passed and not hidden(first | rest).passed
    assert hidden(rest).passed  # those that the quantizers keep were wrong without them from the start
    assert hidden(np.arange(200) < 19) is None
    found = _outcome(0.0, **_WHITE, epsilon=0.1, variant="soft", n=200)
    assert hidden(first, found).passed
    for other in ({"epsilon": 0.2}, {"n": 100}):
        assert not hidden(first, _outcome(0.0, **{**_WHITE, "epsilon": 0.1, "n": 200, **other})).passed


# === The evaluation ===


def test_an_evaluation_catches_a_purifier_that_hides_its_gradient(problem):
    def failed(purifier):
        classifier, images, labels = problem
        attacks = build("quick", ["fgsm", "pgd"], [Threat("linf", 0.1), Threat("linf", 0.3)], steps=5)
        found = evaluate(classifier, purifier, images, labels, attacks=attacks, batch_size=32)
        return {check.name for check in found.checks if not check.passed}

    caught = {"gradients_not_masked", "white_box_beats_gray_box"}
    assert caught <= failed(_purifier(Rounding(4, straight_through=False)))
    assert not caught & failed(_purifier(Rounding(4, straight_through=True)))
