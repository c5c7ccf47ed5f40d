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
import numpy as np
import pytest

from trainers import evaluate as command
from vqunet_tf import runs
from vqunet_tf.config import Config, DataConfig, EvaluationConfig
from vqunet_tf.data import Split
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import Outcome, checks, describe, evaluate, markdown, report, rows, sample, suites
from vqunet_tf.models import VQUNet
from vqunet_tf.models.operations import of_layers
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
    attacks = suites.build("quick", names or ("fgsm", "pgd", "pgd_targeted"), threats, steps=5)
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


def test_unknown_names_and_models_that_do_not_fit_are_refused(problem, averaging):
    classifier, images, labels = problem
    with pytest.raises(UserError, match="unknown threat model 'grey': expected one of black_box, gray_box, white_box"):
        _evaluate(problem, averaging, threat_models=["grey"])
    with pytest.raises(UserError, match=r"no attack here is black_box \(only gray_box, white_box\).*--suite=adaptive"):
        _evaluate(problem, averaging, threat_models=["black_box"])
    with pytest.raises(UserError, match="unknown defense 'jpg': expected one of .*none, .*vqunet"):
        _evaluate(problem, averaging, defenses=["jpg"])
    with pytest.raises(UserError, match="unknown suite 'huge': expected one of adaptive, full, quick, standard"):
        suites.build("huge", [], THREATS, 3)
    with pytest.raises(UserError, match=r"labels 0\.\.3 for the 4 logits.*got labels 6\.\.9"):
        _evaluate((classifier, images, labels + 6), averaging)
    with pytest.raises(UserError, match=r"labels \[60\].*one-hot.*argmax"):
        _evaluate((classifier, images, np.eye(CLASSES)[labels]), averaging)
    with pytest.raises(UserError, match="whole numbers"):
        _evaluate((classifier, images, labels + 0.5), averaging)
    with pytest.raises(UserError, match=r"labels \[60\], one for each image, got \[59\]"):
        _evaluate((classifier, images, labels[1:]), averaging)
    with pytest.raises(UserError, match=r"labels 0\.\.3.*got labels -1\.\.3"):
        _evaluate((classifier, images, np.where(labels, labels, -1)), averaging)
    with pytest.raises(UserError, match=r"uint8 or floats in \[0,1\], got .* to \d\d\d"):
        _evaluate((classifier, 255 * images, labels), averaging)


# === Checks that refuse or fail (the rest is in test_checks.py) ===


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


# === Report ===


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
        f"python -m trainers.evaluate --run_dir=run --suite=quick --attacks=fgsm,pgd --epsilons={8 / 255},0.2 "
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
    _main(f"--run_dir={run_folder.path}", "--iterated_examples=100", "--epsilons=0.1", "--attacks=fgsm")
    assert "--iterated_examples=100 --num_examples=8" in json.loads(run_folder.report.read_text())["command"]
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
    refused("unknown suite 'huge': expected one of adaptive, full, quick, standard", flag, "--suite=huge")
    refused("unknown attack 'pdg': expected one of apgd_ce, .*square", flag, "--attacks=pdg")
    refused("unknown defense 'jpg': expected one of .*jpeg, .*vqunet", flag, "--defenses=jpg")
    refused("unknown threat model 'grey'", flag, "--threat_models=grey")
    refused("no attack here is black_box", flag, "--threat_models=black_box")
    refused("deepfool knows the norm l2, not 'linf'", flag, "--attacks=pgd,deepfool", "--norm=linf")
    refused("linf|l2", flag, "--norm=l1")
    refused("is the evaluated run itself", flag, "--attacks=transfer", f"--surrogate={run_folder.path}")
    refused("transfer needs models to carry images over from: give --surrogate", flag, "--attacks=transfer")
    layers = [keras.Input((32, 32, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    runs.save_model(keras.Sequential(layers), run_folder.classifier)
    refused("the data has 10 classes", flag)
    assert not run_folder.report.exists()


def test_a_run_folder_whose_models_and_config_disagree_is_refused(run_folder, capsys):
    def refused(message: str, changes: dict) -> None:
        run_folder.config.write_text(Config.from_json(text).replace(changes).to_json())
        with pytest.raises(SystemExit) as ended:
            _main(f"--run_dir={run_folder.path}")
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, line), line

    text = run_folder.config.read_text()
    again = "they are of different runs"
    refused(
        rf"config.json is for images \[28, 28, 1\], classifier.keras takes \[32, 32, 1\]: {again}", _shape(28, 28, 1)
    )
    refused(rf"names 3 classes, classifier.keras gives 10 logits: {again}", {"data.class_names": ["a", "b", "c"]})
    runs.save_model(VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1), run_folder.purifier)
    sizes = {"purifier.widths": [4, 4], "purifier.num_embeddings": [8], "purifier.embedding_dim": [2]}
    refused(
        rf"config.json says purifier.num_embeddings \[16, 16\], purifier.keras has \[8, 8\]: {again}",
        {**sizes, "purifier.num_embeddings": [16]},
    )
    refused(r"purifier.skips False, purifier.keras has True", {**sizes, "purifier.skips": False})
    runs.save_model(VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=3), run_folder.purifier)
    refused(r"images \[32, 32, 1\], purifier.keras takes \[any, any, 3\]", {**sizes, **_shape(32, 32, 1)})


def _shape(*sides: int) -> dict:
    return {"data.image_shape": list(sides)}


def test_strict_ends_with_status_3_where_a_check_failed(run_folder, capsys):
    runs.save_model(
        keras.Sequential([keras.Input((32, 32, 1)), Rounding(4, straight_through=False)]), run_folder.purifier
    )
    flags = (f"--run_dir={run_folder.path}", "--attacks=fgsm", "--epsilons=0.1")
    _main(*flags)
    line = "check failed: gradients_not_masked: vqunet gives 100.0% of images no gradient"
    assert line in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        _main(*flags, "--strict")
    assert ended.value.code == 3
    assert line in capsys.readouterr().err and run_folder.report.exists()


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
