"""The evaluation: its numbers from the images themselves, and what the report says of models and machines."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
from pathlib import Path

import invented
import keras
import numpy as np
import pytest
from fragile import THREATS, N, evaluated, failed

from vqunet_tf.config import Config, DataConfig
from vqunet_tf.data import Split
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import describe, evaluate, report, rows, sample, suites
from vqunet_tf.models import VQUNet
from vqunet_tf.models.operations import of_layers
from vqunet_tf.threat import ThreatModel

WORDS = ("gray_box", "white_box")


@pytest.fixture(scope="module")
def evaluation(problem, averaging):
    return evaluated(problem, averaging)


@pytest.fixture(scope="module")
def finished(problem, averaging, evaluation):
    """report.json as a dict."""
    classifier, images, labels = problem
    split = Split(np.round(255 * images).astype(np.uint8), labels, tuple("abcd"))
    config = Config(data=DataConfig(dataset=f"{Path.home()}/pictures"))
    return report.build(config, evaluation, *describe(classifier, averaging, split, 32), command="again")


def _row(rows, **wanted):
    return next(row for row in rows if wanted.items() <= row.items())


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
    assert evaluation.checks and failed(evaluation) == set()
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
    gray, white = invented.outcome(1.0, **invented.GRAY), invented.outcome(1.0, **invented.WHITE)
    gray.correct[:100], white.correct[200:300] = False, False  # each breaks a quarter of 400, not the same
    found = rows.rows(
        [invented.outcome(1.0, "none", **invented.GRAY), gray, white], [ThreatModel(word) for word in WORDS]
    )
    worst = {row["threat_model"]: row["accuracy"] for row in found if row["attack"] == "worst"}
    assert worst == {"gray_box": 0.75, "white_box": 0.5}


def test_the_bare_classifier_has_one_set_of_rows(problem, averaging, evaluation):
    assert {row["threat_model"] for row in evaluation.rows if row["defense"] == "none"} == {"gray_box"}
    options = {"names": ["pgd"], "threats": THREATS[:1]}
    white = evaluated(problem, averaging, threat_models=["white_box"], **options)
    assert {row["threat_model"] for row in white.rows} == {"white_box"}
    for defense in ("none", "vqunet"):  # asked or not, a white-box attacker may use the gray-box images
        wanted = {"defense": defense, "attack": "worst", "epsilon": 0.1}
        model = "gray_box" if defense == "none" else "white_box"
        both = evaluated(problem, averaging, **options)
        expected = _row(both.rows, **wanted, threat_model=model)["accuracy"]
        assert _row(white.rows, **wanted)["accuracy"] == expected
    alone = evaluated(problem, averaging, defenses=["vqunet"], threat_models=["gray_box"], **options)
    assert [row["attack"] for row in alone.rows if row["defense"] == "none"] == ["none", "pgd", "worst"]


def test_attacks_that_meet_the_first_images_only_say_so_and_equal_those_that_meet_all(problem, averaging, evaluation):
    classifier, images, labels = problem
    whole = suites.build("quick", ["fgsm", "pgd"], THREATS, steps=5)
    plan = dataclasses.replace(whole, suite=dataclasses.replace(whole.suite, limits={"pgd": 20}))
    found = evaluate(classifier, averaging, images, labels, attacks=plan, keep=N, batch_size=32)
    assert {(row["attack"], row["n"]) for row in found.rows if row["attack"] != "worst"} == {
        ("none", N),
        ("fgsm", N),
        ("pgd", 20),
    }
    assert found.notes == ("pgd met the first 20 images only",)
    known = {(o.defense, o.attack, o.threat, o.threat_model, o.variant): o.correct for o in evaluation.outcomes}
    for o in found.outcomes:
        wanted = known[o.defense, o.attack, o.threat, o.threat_model, o.variant][: len(o.correct)]
        np.testing.assert_array_equal(o.correct, wanted)


def test_equal_arguments_give_equal_rows_whatever_the_batches(problem, averaging, evaluation):
    def numbers(found):
        return [{**row, "seconds": 0} for row in found.rows]

    assert numbers(evaluated(problem, averaging)) == numbers(evaluation)
    assert numbers(evaluated(problem, averaging, batch_size=25)) == numbers(evaluation)


def test_bytes_and_floats_are_the_same_images(problem, averaging):
    classifier, images, labels = problem
    as_bytes = np.round(255 * images).astype(np.uint8)
    options = {"names": ["fgsm"], "threats": THREATS[:1]}
    one = evaluated((classifier, as_bytes, labels), averaging, **options)
    two = evaluated((classifier, as_bytes.astype(np.float64) / 255, labels), averaging, **options)
    np.testing.assert_allclose(one.images, two.images, atol=1e-7)
    assert [row["accuracy"] for row in one.rows] == [row["accuracy"] for row in two.rows]


def test_progress_ends_at_the_total(problem, averaging):
    seen = []
    evaluated(problem, averaging, names=["fgsm", "pgd"], progress=lambda *state: seen.append(state))
    crafted, shown = 2 * (1 + 5), 2 * 3  # on two victims, fgsm and five steps; each to none, vqunet, vqunet
    # The checks: pgd again, twice the steps, without quantizers, draws of noise, huge epsilons.
    probed = 5 + 2 * 5 + 5 + 10 + 6 * 20
    assert seen[-1][1] == seen[-1][2] == 2 * N * (crafted + shown) + N * probed  # two epsilons
    assert {name for name, _, _ in seen} >= {"gray-box fgsm 0.1", "white-box vqunet own pgd 0.3"}


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


def test_the_report_tells_nobody_whose_machine_it_was(finished):
    text = json.dumps(finished["host"]) + json.dumps(finished["versions"]) + finished["dataset"]
    for secret in (str(Path.home()), platform.node(), f'"{getpass.getuser()}"', "/"):
        assert secret not in text
    assert finished["dataset"] == "pictures"


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
    codes = purifier.codes(split.images[:1])
    search = codes["level_0"].size * 8 * 2 + codes["level_1"].size * 16 * 2
    kernels = of_layers(purifier.graph, split.images.shape[1:])
    assert purified["multiply_accumulates"] == kernels + search


def test_an_outcome_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        invented.outcome(0.5).seconds = 1.0
