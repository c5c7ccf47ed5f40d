"""The evaluation: its numbers from the images themselves, its checks against what they are made to catch."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.image
import numpy as np
import pytest

from trainers import evaluate as command
from vqunet_tf import runs
from vqunet_tf.config import Config, DataConfig, EvaluationConfig
from vqunet_tf.data import Split
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import Outcome, checks, describe, evaluate, markdown, plots, report, rows, sample, suites
from vqunet_tf.evaluation.statistics import above, wilson
from vqunet_tf.models import VQUNet
from vqunet_tf.threat import Threat, ThreatModel

CLASSES, SHAPE, N = 4, (8, 8, 1), 60
THREATS = [Threat("linf", 0.1), Threat("linf", 0.3)]
WORDS = ("gray_box", "white_box")


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


def _purifier(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input(SHAPE), *layers], name="purifier")


def _averaging() -> keras.Model:
    """2×2 averages, then grey levels: takes away most of what is added pixel by pixel."""
    return _purifier(keras.layers.AveragePooling2D(2), keras.layers.UpSampling2D(2), Rounding(16))


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


def _evaluate(problem, purifier, *, names=(), threats=THREATS, **options):
    classifier, images, labels = problem
    attacks = suites.build("quick", names, threats, steps=5)
    return evaluate(classifier, purifier, images, labels, attacks=attacks, keep=N, **{"batch_size": 32, **options})


@pytest.fixture(scope="module")
def averaging():
    return _averaging()


@pytest.fixture(scope="module")
def evaluation(problem, averaging):
    return _evaluate(problem, averaging)


@pytest.fixture(scope="module")
def finished(problem, averaging, evaluation):
    """report.json as a dict."""
    classifier, images, labels = problem
    split = Split(np.round(255 * images).astype(np.uint8), labels, tuple("abcd"))
    config = Config(data=DataConfig(dataset=f"{Path.home()}/pictures"))
    return report.build(config, evaluation, *describe(classifier, averaging, split, 32), command="again")


def _row(rows, **wanted):
    return next(row for row in rows if wanted.items() <= row.items())


def _failed(evaluation) -> set[str]:
    return {check.name for check in evaluation.checks if not check.passed}


# === Rows ===


def test_rows_are_what_the_kept_images_say(problem, averaging, evaluation):
    classifier, images, labels = problem
    purify = {"none": lambda x: x, "vqunet": lambda x: averaging.predict(x, verbose=0)}
    assert len(evaluation.outcomes) == 2 + 6 * 3  # clean; six attacks: none, vqunet gray-box, vqunet white-box
    for outcome in evaluation.outcomes:
        assert outcome.threat.within(outcome.adversarial, images).all()
        answers = classifier.predict(purify[outcome.defense](outcome.adversarial), verbose=0).argmax(axis=1)
        row = _row(
            evaluation.rows,
            defense=outcome.defense,
            attack=outcome.attack,
            epsilon=outcome.threat.epsilon,
            threat_model=outcome.threat_model.value,
        )
        assert row["accuracy"] == np.mean(answers == labels)
        assert (row["n"], row["worst_case"]) == (N, False)


def test_gray_box_images_know_no_purifier_and_white_box_images_do(evaluation):
    by_key = {(o.defense, o.threat_model, o.attack, o.threat): o.adversarial for o in evaluation.outcomes}
    for threat in THREATS:
        for attack in ("fgsm", "pgd", "pgd_targeted"):
            bare = by_key["none", ThreatModel.GRAY_BOX, attack, threat]
            np.testing.assert_array_equal(by_key["vqunet", ThreatModel.GRAY_BOX, attack, threat], bare)
            assert np.abs(by_key["vqunet", ThreatModel.WHITE_BOX, attack, threat] - bare).max() > 0.05
    blocks = by_key["vqunet", ThreatModel.WHITE_BOX, "fgsm", THREATS[0]] - evaluation.images
    np.testing.assert_allclose(blocks[:, ::2], blocks[:, 1::2], atol=1e-6)  # through the averages: equal within a block


def test_the_purifier_helps_against_those_who_do_not_know_it_only(evaluation):
    """What the rest of this file rests on: the example shows every phenomenon."""
    assert evaluation.checks and _failed(evaluation) == set()
    accuracy = {
        (row["defense"], row["threat_model"]): row["accuracy"]
        for row in evaluation.rows
        if row["attack"] == "worst" and row["epsilon"] == 0.3
    }
    assert accuracy["none", "gray_box"] < 0.1
    assert accuracy["vqunet", "white_box"] < 0.1
    assert accuracy["vqunet", "gray_box"] > accuracy["vqunet", "white_box"]


def test_the_worst_case_is_a_minimum_for_each_image(evaluation):
    for threat in THREATS:
        for defense, model in (("none", "gray_box"), ("vqunet", "gray_box"), ("vqunet", "white_box")):
            can = {"gray_box"} if model == "gray_box" else {"gray_box", "white_box"}  # who knows more can do more
            members = [
                o.correct
                for o in evaluation.outcomes
                if o.defense == defense and (o.attack == "none" or (o.threat == threat and o.threat_model.value in can))
            ]
            assert len(members) == 1 + 3 * len(can)
            wanted = {"defense": defense, "threat_model": model, "attack": "worst", "epsilon": threat.epsilon}
            row = _row(evaluation.rows, **wanted)
            assert row["worst_case"] is True
            assert row["accuracy"] == np.mean(np.min(members, axis=0))
            assert row["accuracy"] <= min(np.mean(member) for member in members)


def test_who_knows_more_can_also_do_what_those_can_who_know_less():
    gray, white = _outcome(1.0, **_GRAY), _outcome(1.0, **_WHITE)
    gray.correct[:100], white.correct[200:300] = False, False  # each breaks a quarter of 400, not the same
    found = rows.rows([_outcome(1.0, "none", **_GRAY), gray, white], [ThreatModel(word) for word in WORDS])
    worst = {row["threat_model"]: row["accuracy"] for row in found if row["attack"] == "worst"}
    assert worst == {"gray_box": 0.75, "white_box": 0.5}


def test_the_bare_classifier_has_one_set_of_rows(problem, averaging, evaluation):
    assert {row["threat_model"] for row in evaluation.rows if row["defense"] == "none"} == {"gray_box"}
    options = {"names": ["pgd"], "threats": THREATS[:1]}
    white = _evaluate(problem, averaging, threat_models=["white_box"], **options)
    assert {row["threat_model"] for row in white.rows} == {"white_box"}
    for defense in ("none", "vqunet"):  # asked or not, a white-box attacker may use the gray-box images
        wanted = {"defense": defense, "attack": "worst", "epsilon": 0.1}
        model = "gray_box" if defense == "none" else "white_box"
        both = _evaluate(problem, averaging, **options)
        expected = _row(both.rows, **wanted, threat_model=model)["accuracy"]
        assert _row(white.rows, **wanted)["accuracy"] == expected
    alone = _evaluate(problem, averaging, defenses=["vqunet"], threat_models=["gray_box"], **options)
    assert [row["attack"] for row in alone.rows if row["defense"] == "none"] == ["none", "pgd", "worst"]


def test_equal_arguments_give_equal_rows_whatever_the_batches(problem, averaging, evaluation):
    def numbers(found):
        return [{**row, "seconds": 0} for row in found.rows]

    assert numbers(_evaluate(problem, averaging)) == numbers(evaluation)
    assert numbers(_evaluate(problem, averaging, batch_size=25)) == numbers(evaluation)


def test_bytes_and_floats_are_the_same_images(problem, averaging):
    classifier, images, labels = problem
    as_bytes = np.round(255 * images).astype(np.uint8)
    options = {"names": ["fgsm"], "threats": THREATS[:1]}
    one = _evaluate((classifier, as_bytes, labels), averaging, **options)
    two = _evaluate((classifier, as_bytes.astype(np.float64) / 255, labels), averaging, **options)
    np.testing.assert_allclose(one.images, two.images, atol=1e-7)
    assert [row["accuracy"] for row in one.rows] == [row["accuracy"] for row in two.rows]


def test_progress_ends_at_the_total(problem, averaging):
    seen = []
    _evaluate(problem, averaging, names=["fgsm", "pgd"], progress=lambda *state: seen.append(state))
    assert seen[-1][1] == seen[-1][2] == 2 * N * 2 * (1 + 5)  # two epsilons, two victims, fgsm and five steps
    assert {name for name, _, _ in seen} >= {"gray-box fgsm 0.1", "white-box vqunet pgd 0.3"}


def test_the_sample_is_fixed_and_within_the_split():
    split = Split(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.arange(50, dtype=np.int32), ("a",) * 50)
    ten, twenty = sample(split, 10), sample(split, 20)
    np.testing.assert_array_equal(twenty.labels[:10], ten.labels)
    assert sorted(sample(split, 50).labels) == list(range(50))
    assert list(ten.labels) != list(range(10))
    np.testing.assert_array_equal(ten.images.ravel(), ten.labels)
    for n in (0, -1, 51):
        with pytest.raises(UserError, match=f"between 1 and 50 examples.*got {n}"):
            sample(split, n)


def test_unknown_names_and_models_that_do_not_fit_are_refused(problem, averaging):
    classifier, images, labels = problem
    with pytest.raises(UserError, match="unknown threat model 'black_box': expected one of gray_box, white_box"):
        _evaluate(problem, averaging, threat_models=["black_box"])
    with pytest.raises(UserError, match="unknown defense 'jpg': expected one of bit_depth, dae"):
        _evaluate(problem, averaging, defenses=["jpg"])
    with pytest.raises(UserError, match="unknown suite 'huge': expected one of quick"):
        suites.build("huge", [], THREATS, 3)
    with pytest.raises(UserError, match=r"labels 0\.\.9, the classifier gives \[60, 4\]"):
        _evaluate((classifier, images, labels + 6), averaging)
    with pytest.raises(UserError, match=r"uint8 or floats in \[0,1\], got .* to \d\d\d"):
        _evaluate((classifier, 255 * images, labels), averaging)


# === Checks, met by what they are made to catch ===


def test_a_purifier_that_hides_its_gradient_is_caught(problem):
    masked = _evaluate(problem, _purifier(Rounding(4, straight_through=False)), names=["fgsm", "pgd"])
    assert {"gradients_not_masked", "white_box_beats_gray_box"} <= _failed(masked)
    open_ = _evaluate(problem, _purifier(Rounding(4, straight_through=True)), names=["fgsm", "pgd"])
    assert not {"gradients_not_masked", "white_box_beats_gray_box"} & _failed(open_)


def test_a_gradient_that_is_shrunk_or_not_a_number_is_caught():
    ones = np.ones((50, 2, 2, 1), np.float32)
    assert checks.gradients_not_masked({"none": ones, "vqunet": 0.01 * ones}).passed
    assert not checks.gradients_not_masked({"none": ones, "vqunet": 1e-6 * ones}).passed
    for value in (np.nan, np.inf, 0.0):  # in one image of 25
        broken = ones.copy()
        broken[:2] = value
        assert not checks.gradients_not_masked({"none": ones, "vqunet": broken}).passed


def test_a_classifier_that_gives_probabilities_is_refused(problem, averaging):
    classifier, images, labels = problem
    softmax = keras.Sequential([classifier, keras.layers.Softmax()])
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        _evaluate((softmax, images, labels), averaging)
    assert checks.logits_not_probabilities(np.array([[0.5, 0.5], [2.0, 1.0]])).passed


def test_a_purifier_that_is_random_is_caught(problem):
    class Noise(keras.layers.Layer):
        def call(self, images):
            return images + 0.1 * keras.random.normal(keras.ops.shape(images))

    found = _evaluate(problem, _purifier(Noise()), names=["fgsm"], threats=THREATS[:1])
    assert "deterministic" in _failed(found)


def test_answers_that_are_not_numbers_are_no_success(problem):
    classifier, images, labels = problem
    broken = _purifier(keras.layers.Lambda(lambda x: x + float("nan")))
    zeros = np.zeros_like(labels)  # argmax of NaN is 0: every answer would be right
    found = _evaluate((classifier, images, zeros), broken, names=["fgsm"], threats=THREATS[:1])
    assert {row["accuracy"] for row in found.rows if row["defense"] == "vqunet"} == {0.0}


def _outcome(
    share: float, attack="pgd", defense="none", model="gray_box", epsilon=0.1, distance=None, n=400
) -> Outcome:
    """An outcome with the first share of its images right, so that outcomes are nested."""
    threat = Threat("linf", 0.0 if attack == "none" else epsilon)
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
    )


_WHITE = {"defense": "vqunet", "model": "white_box"}
_GRAY = {"defense": "vqunet", "model": "gray_box"}
_CLEAN = [_outcome(0.9, "none"), _outcome(0.9, "none", **_GRAY)]


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (checks.attacks_work_undefended, [_outcome(0.4)], [_outcome(0.6)]),  # more than half of clean is left
        (
            checks.attacks_work_undefended,
            [_outcome(0.1), _outcome(0.8, "fgsm")],
            [_outcome(0.1), _outcome(0.9, "fgsm")],
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
        (
            checks.white_box_beats_gray_box,
            [_outcome(0.5, **_WHITE), _outcome(0.8, **_GRAY)],
            [_outcome(0.8, **_WHITE), _outcome(0.5, **_GRAY)],
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
        (checks.budget_held, [_outcome(0.5)], [_outcome(0.5, distance=0.11)]),
        (checks.budget_held, [_outcome(0.5)], [_outcome(0.5, distance=float("nan"))]),
    ],
)
def test_each_check_passes_what_is_fine_and_fails_what_is_not(check, fine, wrong):
    assert check([*_CLEAN, *fine]).passed
    failed = check([*_CLEAN, *wrong])
    assert not failed.passed
    assert failed.name == check.__name__
    assert "%" in failed.detail or "moved" in failed.detail


def test_a_difference_that_may_be_chance_fails_nothing():
    assert checks.no_label_leaking([*_CLEAN, _outcome(0.91, **_GRAY)]).passed  # 4 of 400 images
    assert checks.monotone_in_epsilon([*_CLEAN, _outcome(0.40), _outcome(0.41, epsilon=0.2)]).passed
    assert checks.attacks_work_undefended([_outcome(0.9, "none", n=20), _outcome(0.5, n=20)]).passed


def test_a_check_that_would_compare_nothing_is_left_out():
    names = {check.name for check in checks.from_outcomes([*_CLEAN, _outcome(0.1), _outcome(0.8, **_GRAY)])}
    assert names == {"attacks_work_undefended", "no_label_leaking", "monotone_in_epsilon", "budget_held"}


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


# === Report ===


def test_report_json_has_the_schema_that_others_read(finished):
    again = json.loads(json.dumps(finished, allow_nan=False))
    assert again == finished
    assert {name: type(value) for name, value in again.items()} == {
        "schema": int,
        "dataset": str,
        "split": str,
        "seed": int,
        "objective": str,
        "selection": str,
        "classifier": dict,
        "purifier": dict,
        "rows": list,
        "checks": list,
        "command": str,
        "host": dict,
        "versions": dict,
    }
    assert again["schema"] == 1
    assert set(again["classifier"]) == {"name", "params", "accuracy", "n"}
    assert set(again["purifier"]) == {"name", "params", "clean_accuracy", "n", "codebook_usage"}
    kinds = {
        "defense": str,
        "attack": str,
        "norm": str,
        "epsilon": float,
        "steps": int,
        "threat_model": str,
        "n": int,
        "accuracy": float,
        "interval": list,
        "worst_case": bool,
        "seconds": float,
    }
    for row in again["rows"]:
        assert {name: type(value) for name, value in row.items()} == kinds
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert all(set(check) == {"name", "passed", "detail"} for check in again["checks"])
    assert {"python", "vqunet_tf", "tensorflow", "keras", "cleverhans", "numpy"} == set(again["versions"])


def test_the_report_tells_nobody_whose_machine_it_was(finished):
    text = json.dumps(finished["host"]) + json.dumps(finished["versions"]) + finished["dataset"]
    for secret in (str(Path.home()), platform.node(), f'"{getpass.getuser()}"', "/"):
        assert secret not in text
    assert finished["dataset"] == "pictures"


def test_the_first_table_is_honest(finished):
    text = markdown.render(finished)
    first = next(block for block in text.split("\n\n") if block.startswith("|"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    assert lines[0] == ["epsilon", "attacker", "attack", "none", "vqunet"]
    assert [line[:2] for line in lines[2:]] == [
        ["0", "nobody"],
        ["0.1", "gray-box"],
        ["0.1", "white-box"],
        ["0.3", "gray-box"],
        ["0.3", "white-box"],
    ]
    row = _row(finished["rows"], defense="vqunet", attack="worst", epsilon=0.3, threat_model="white_box")
    assert lines[-1][-1].startswith(f"{100 * row['accuracy']:.1f} (")
    assert lines[-1][-2] == lines[-2][-2]  # without a defence the attackers are one
    assert "Gray-box accuracy is not robustness." in text
    assert all(ThreatModel(word).knowledge in text for word in WORDS)
    assert "not measured" not in text
    gray = {**finished, "rows": [row for row in finished["rows"] if row["threat_model"] == "gray_box"]}
    assert "White-box attacks were **not measured**" in markdown.render(gray)


def test_failed_checks_come_first_and_are_counted(finished):
    found = [{"name": "a", "passed": True, "detail": ""}, {"name": "b", "passed": False, "detail": "why"}]
    text = markdown.render({**finished, "checks": found})
    assert "1 of 2 failed" in text
    assert text.index("`b`") < text.index("`a`")


def test_epsilons_read_as_people_write_them(finished):
    rows = [{**row, "epsilon": 8 / 255} if row["epsilon"] else row for row in finished["rows"]]
    assert "| 8/255 " in markdown.headline({**finished, "rows": rows})


def test_a_model_is_described_on_the_whole_split(problem):
    classifier, images, labels = problem
    split = Split(np.round(255 * images).astype(np.uint8), labels, tuple("abcd"))
    keras.utils.set_random_seed(0)
    purifier = VQUNet(widths=(4, 4), num_embeddings=(8, 16), embedding_dim=2, channels=1)
    about, purified = describe(classifier, purifier, split, batch_size=25)
    assert about == {"name": "linear", "params": 65 * 4, "accuracy": 1.0, "n": N}
    assert purified["name"] == "vqunet" and purified["n"] == N
    answers = classifier.predict(purifier.purify(split.images), verbose=0).argmax(axis=1)
    assert purified["clean_accuracy"] == np.mean(answers == labels)
    indices = purifier.graph(split.images.astype(np.float32) / 255, training=False)["indices"]
    used = [len(np.unique(indices["level_0"])) / 8, len(np.unique(indices["level_1"])) / 16]
    assert purified["codebook_usage"] == used


# === Pictures ===


def test_pictures_and_curves_are_drawn(problem, averaging, evaluation, tmp_path):
    classifier, _, _ = problem
    figure = plots.pictures(evaluation, classifier, averaging, ("a", "b", "c", "d"))
    plots.save(figure, tmp_path / "plots" / "pictures.png")
    assert matplotlib.image.imread(tmp_path / "plots" / "pictures.png").shape[1] == 1000
    assert len(figure.axes) == 7 * 6  # clean; adversarial, purified, difference for each threat model
    purified = figure.axes[2 * 6].images[0].get_array()
    shown = next(o for o in evaluation.outcomes if (o.defense, o.attack, o.threat) == ("vqunet", "pgd", THREATS[1]))
    expected = averaging.predict(shown.adversarial[:1], verbose=0)[0, ..., 0]
    np.testing.assert_allclose(purified, expected, atol=1e-6)
    answer = classifier.predict(averaging.predict(shown.adversarial[:1], verbose=0), verbose=0).argmax()
    assert figure.axes[2 * 6].get_xlabel().startswith("abcd"[answer])

    lines = {line.get_label(): line.get_ydata() for line in plots.curves(evaluation.rows).axes[0].lines}
    assert set(lines) == {"no defence", "vqunet, gray-box", "vqunet, white-box"}
    worst = [_row(evaluation.rows, attack="worst", threat_model="white_box", epsilon=e)["accuracy"] for e in (0.1, 0.3)]
    np.testing.assert_allclose(lines["vqunet, white-box"][1:], 100 * np.array(worst))
    assert plots.curves([row for row in evaluation.rows if row["epsilon"] != 0.3]) is None


# === Command ===


@pytest.fixture
def run_folder(tmp_path):
    """A run on the digits with an untrained linear classifier: what is measured does not matter here."""
    config = Config(
        data=DataConfig(dataset="digits"),
        evaluation=EvaluationConfig(epsilons=(0.1, 0.2), pgd_steps=2, num_examples=8, batch_size=8),
    )
    run = runs.RunFolder(tmp_path / "run")
    run.create(config)
    shape = (32, 32, 1)
    keras.utils.set_random_seed(0)
    layers = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(10)]
    runs.save_model(keras.Sequential(layers), run.classifier)
    runs.save_model(keras.Sequential([keras.Input(shape), Rounding(4)]), run.purifier)
    return run


def _main(*flags: str) -> None:
    command.console(["evaluate", *flags])


def test_the_command_writes_the_report_where_it_is_told(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    _main(f"--run_dir={run_folder.path}", "--epsilons=8/255,0.2", "--attacks=fgsm,pgd", f"--output_dir={out}")
    found = json.loads((out / "report.json").read_text())
    assert {row["epsilon"] for row in found["rows"]} == {0.0, 8 / 255, 0.2}
    assert {row["attack"] for row in found["rows"]} == {"none", "fgsm", "pgd", "worst"}
    assert found["command"] == (
        f"python -m trainers.evaluate --run_dir=run --attacks=fgsm,pgd --epsilons={8 / 255},0.2 "
        "--threat_models=gray_box,white_box --defenses=none,vqunet --num_examples=8 --seed=0"
    )
    assert str(tmp_path) not in (out / "report.md").read_text() + (out / "report.json").read_text()
    assert (out / "plots" / "pictures.png").stat().st_size > 10_000
    assert (out / "plots" / "curves.png").exists()
    printed = capsys.readouterr().out
    assert markdown.headline(found) in printed
    assert f"done: {out} holds" in printed

    _main(f"--run_dir={run_folder.path}", "--num_examples=5", "--threat_models=gray_box")  # all else is the run's
    found = json.loads(run_folder.report.read_text())
    assert {row["epsilon"] for row in found["rows"]} == {0.0, 0.1, 0.2}
    assert {row["n"] for row in found["rows"]} == {5}
    assert {row["steps"] for row in found["rows"]} == {0, 1, 2}

    assert (run_folder.path / "plots" / "curves.png").exists()
    _main(f"--run_dir={run_folder.path}", "--epsilons=0.1", "--attacks=fgsm")
    assert not (run_folder.path / "plots" / "curves.png").exists()  # one epsilon is no curve, and the old one is wrong


def test_the_command_refuses_what_cannot_be_measured(run_folder, tmp_path, capsys):
    def refused(message: str, *flags: str) -> None:
        with pytest.raises(SystemExit) as ended:
            _main(*flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, line), line

    flag = f"--run_dir={run_folder.path}"
    refused(r"between 1 and .* examples.*got 100000", flag, "--num_examples=100000")
    refused(r"\[0,1\] scale.*got 8.0", flag, "--epsilons=8")
    refused("is not a run folder", f"--run_dir={tmp_path / 'nothing'}")
    layers = [keras.Input((32, 32, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    runs.save_model(keras.Sequential(layers), run_folder.classifier)
    refused("the data has 10 classes", flag)
    assert not run_folder.report.exists()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "trainers.evaluate", "--run_dir=x", "--epsilon=0.1"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "error: Unknown command line flag 'epsilon'. Did you mean: epsilons ? (--help lists the flags)"
    ]


def test_an_outcome_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _outcome(0.5).seconds = 1.0
