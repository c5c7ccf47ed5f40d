"""What a suite does: which attack meets whom, with which gradients, and how rows are counted from that."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf import VQUNet
from vqunet_tf.attacks import ATTACKS, MismatchPGD
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import Outcome, rows, suites
from vqunet_tf.evaluation.bench import Bench
from vqunet_tf.evaluation.jobs import jobs
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.threat import Threat, ThreatModel

SHAPE, CLASSES, N = (8, 8, 1), 3, 6
THREATS = [Threat("linf", 0.1), Threat("linf", 0.2), Threat("l2", 2.0)]
GRAY, WHITE, BLACK = ThreatModel
EVERY = {"straight_through", "rotation", "soft", "identity", "unquantized", "mismatch"}


@pytest.fixture(scope="module")
def bench():
    """Nobody is attacked here: only who would be counts."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    classifier = keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(inputs)))
    purifier = VQUNet(widths=(4,), num_embeddings=8, embedding_dim=2, stem=1, channels=1)

    def hard(images):
        return tf.round(images)

    def staircase(images):
        return tf.round(images)

    hard.differentiable = staircase.differentiable = False
    staircase.smooth = tf.square
    victims = {"none": None, "vqunet": purifier, "blur": lambda images: 0.9 * images, "hard": hard, "near": staircase}
    return Bench(
        {name: Chain(classifier, purify) for name, purify in victims.items()},
        np.zeros((N, *SHAPE), np.float32),
        np.zeros(N, np.int32),
        batch_size=N,
        seed=0,
        keep=0,
        surrogates={"other_classifier": Chain(classifier), "other_purified": Chain(classifier, purifier)},
    )


def _jobs(bench, name, names=(), models=tuple(ThreatModel), threats=THREATS):
    plan = suites.build(name, names, threats, steps=3)
    return jobs(plan, bench, [model for model in plan.models if model in models])


def _white(work, defense):
    """attack → the variants with which it is made through this defence."""
    found: dict[str, set[str]] = {}
    for job in work:
        if job.shown == ((defense, WHITE),):
            found.setdefault(job.attack.name, set()).add(job.variant)
    return found


def test_every_name_in_a_suite_is_an_attack():
    for suite in suites.SUITES.values():
        for model in ThreatModel:
            assert set(suite.names(model)) <= set(ATTACKS)
            # What follows gradients must be seen to work on the bare classifier.
            assert model is BLACK or set(suite.names(model)) <= set(suite.gray)
        assert set(suite.limits) <= set(suite.black)


def test_quick_follows_one_gradient(bench):
    work = _jobs(bench, "quick")
    assert _white(work, "vqunet") == {"fgsm": {"straight_through"}, "pgd": {"straight_through"}}
    assert _white(work, "blur") == {"fgsm": {"own"}, "pgd": {"own"}}
    assert _white(work, "near") == {"fgsm": {"smooth"}, "pgd": {"smooth"}}
    assert _white(work, "hard") == {"fgsm": {"identity"}, "pgd": {"identity"}}
    gray = [job for job in work if job.label == "gray-box"]
    assert [job.attack.name for job in gray] == 2 * ["fgsm", "pgd", "pgd_targeted"]
    for job in gray:  # crafted once, on the bare classifier, and shown to all
        assert job.victim == "none"
        assert job.shown == (("none", GRAY), ("vqunet", GRAY), ("blur", GRAY), ("hard", GRAY), ("near", GRAY))
    assert len(work) == 6 + 4 * 4


def test_standard_tries_several_gradients_and_minimum_norm_attacks_in_l2(bench):
    work = _jobs(bench, "standard")
    assert _white(work, "vqunet")["pgd"] == {"straight_through", "soft", "identity", "unquantized"}
    assert _white(work, "vqunet")["apgd_dlr"] == {"straight_through", "soft"}
    assert _white(work, "blur")["pgd"] == {"own", "identity"}
    threats = {job.attack.name: job.attack.threat for job in work}
    assert threats["cw_l2"] == threats["deepfool"] == Threat("l2", 2.0)
    assert {job.attack.threat.norm for job in work if job.attack.name == "pgd"} == {"linf"}
    assert not any(model is BLACK for job in work for _, model in job.shown)
    assert suites.SUITES["standard"].defenses is None  # all that can be built


@pytest.mark.parametrize("suite", ["standard", "adaptive"])
def test_what_has_a_smooth_stand_in_is_attacked_through_it_and_by_pgd_through_the_identity_too(bench, suite):
    found = _white(_jobs(bench, suite), "near")
    assert found.pop("pgd") == {"smooth", "identity"}
    assert set(map(frozenset, found.values())) == {frozenset({"smooth"})}


def test_adaptive_tries_everything(bench):
    work = _jobs(bench, "adaptive")
    found = _white(work, "vqunet")
    assert found["pgd"] == EVERY and found["apgd_ce"] == found["apgd_dlr"] == {"straight_through", "soft"}
    assert _white(work, "blur")["pgd"] == {"own", "identity"}
    black = [job for job in work if job.shown[0][1] is BLACK]
    assert {(job.attack.name, job.limit) for job in black} == {
        ("transfer", None),
        ("noise", None),
        ("square", 200),
        ("hopskipjump", 50),
    }
    carried = [job for job in black if job.attack.name == "transfer"]
    assert [job.victim for job in carried] == 2 * ["other_classifier", "other_purified"]  # two radii
    assert all([name for name, _ in job.shown] == ["none", "vqunet", "blur", "hard", "near"] for job in carried)
    asked = [job for job in black if job.attack.name == "square"]
    assert [job.victim for job in asked] == 2 * ["none", "vqunet", "blur", "hard", "near"]
    assert all(job.shown == ((job.victim, BLACK),) for job in asked)


def test_an_image_that_is_fooled_is_left_only_where_the_fooled_is_the_real_chain(bench):
    work = _jobs(bench, "adaptive", models=[WHITE])
    for job in work:
        if job.shown == (("vqunet", WHITE),) and job.attack.name == "pgd":
            assert job.attack.until_fooled == (job.variant not in ("unquantized", "mismatch"))
            assert isinstance(job.attack, MismatchPGD) == (job.variant == "mismatch")
        elif job.shown == (("vqunet", WHITE),) and job.attack.name.startswith("apgd"):
            assert job.attack.until_fooled
        elif job.label == "gray-box":  # shown to others: made to the end
            assert not getattr(job.attack, "until_fooled", False)


def test_attacks_by_name_take_the_way_they_know(bench):
    work = _jobs(bench, "quick", ["pgd", "square", "deepfool"])
    assert {(job.attack.name, job.label.partition(" ")[0]) for job in work} == {
        ("pgd", "gray-box"),
        ("pgd", "white-box"),
        ("deepfool", "gray-box"),
        ("deepfool", "white-box"),
        ("square", "black-box"),
    }
    assert _white(_jobs(bench, "adaptive", ["pgd"]), "vqunet") == {"pgd": EVERY}
    only = _jobs(bench, "quick", ["pgd"], threats=[Threat("l2", 1.0)])
    assert {job.attack.threat for job in only} == {Threat("l2", 1.0)}
    with pytest.raises(UserError, match="cw_l2 knows the norm l2, not 'linf'"):
        suites.build("quick", ["cw_l2"], THREATS[:2], steps=3)
    with pytest.raises(UserError, match="unknown attack 'pdg': expected one of apgd_ce, .*transfer"):
        suites.build("quick", ["pdg"], THREATS, steps=3)


def test_white_box_attacks_can_be_others():
    for names in ([], ["pgd", "mim"]):
        usual, fewer = (
            suites.build("standard", names, THREATS, steps=3, white=white) for white in ([], ["fgsm", "pgd"])
        )
        assert [attack.name for attack in fewer.gray] == [attack.name for attack in usual.gray]
        assert {attack.name for attack in fewer.white} == {"fgsm", "pgd"} != {attack.name for attack in usual.white}
        assert fewer.suite.variants == usual.suite.variants
    with pytest.raises(UserError, match="unknown white-box attack 'square': expected one of apgd_ce, .*pgd_targeted"):
        suites.build("standard", [], THREATS, steps=3, white=["square"])
    with pytest.raises(UserError, match="deepfool knows the norm l2, not 'linf'"):
        suites.build("standard", [], THREATS[:2], steps=3, white=["deepfool"])


def test_a_suite_leaves_out_attacks_that_do_not_know_the_norm():
    whole, part = (suites.build("standard", [], threats, steps=3) for threats in (THREATS, THREATS[:2]))
    assert THREATS[2].norm == "l2" and {threat.norm for threat in THREATS[:2]} == {"linf"}
    left_out = {attack.name for attack in whole.attacks} - {attack.name for attack in part.attacks}
    assert left_out == {"cw_l2", "deepfool"}


# === Rows ===


def _outcome(correct, attack="pgd", model=WHITE, variant="", defense="vqunet", epsilon=0.1):
    threat = Threat("linf", 0.0 if attack == "none" else epsilon)
    correct = np.array(correct, bool)
    return Outcome(defense, attack, threat, 3, model, correct, epsilon, 1.0, np.zeros((0, 1, 1, 1)), variant)


def test_of_several_variants_the_strongest_counts_image_by_image():
    outcomes = [
        _outcome([1, 1, 1, 1], "none", GRAY),
        _outcome([1, 0, 1, 1], variant="straight_through"),
        _outcome([0, 1, 1, 1], variant="soft"),
        _outcome([1, 1, 1, 0], "apgd_ce", variant="straight_through"),
        _outcome([1, 1, 1, 1], model=GRAY),
    ]
    found = rows.rows(outcomes, [GRAY, WHITE])
    by = {(row["threat_model"], row["attack"]): row for row in found}
    assert by["white_box", "pgd"]["accuracy"] == 0.5
    assert by["white_box", "pgd"]["variants"] == {"straight_through": 0.75, "soft": 0.75}
    assert by["white_box", "apgd_ce"]["accuracy"] == 0.75
    assert by["white_box", "worst"]["accuracy"] == 0.25
    assert "variants" not in by["gray_box", "pgd"]
    assert [row["attack"] for row in found] == ["none", "pgd", "worst", "pgd", "apgd_ce", "worst"]
    assert by["white_box", "pgd"]["seconds"] == 2.0
    one = rows.merged(outcomes[1:3])
    assert [o.variant for o in one] == [""] and list(one[0].correct) == [0, 0, 1, 1]


def test_a_worst_case_is_counted_on_the_images_that_all_of_its_attacks_met():
    n, many = 400, np.ones
    outcomes = [
        _outcome(many(n), "none", GRAY),
        _outcome(np.arange(n) % 2, "pgd", WHITE),
        _outcome(np.arange(200) % 4, "square", BLACK),
        _outcome(many(n), "transfer", BLACK, variant="a"),
        _outcome(np.zeros(50), "hopskipjump", BLACK),  # met too few: it stands beside
    ]
    worst = {row["threat_model"]: row for row in rows.rows(outcomes, [WHITE, BLACK]) if row["worst_case"]}
    assert (worst["white_box"]["n"], worst["white_box"]["accuracy"]) == (400, 0.5)
    assert (worst["black_box"]["n"], worst["black_box"]["accuracy"]) == (200, 0.75)
    few = [_outcome(o.correct[:50], o.attack, o.threat_model) for o in outcomes]
    assert rows.rows(few, [BLACK])[-1]["accuracy"] == 0.0  # all met the same few: all count

    # An attacker who knows all can do what a black-box one does, where it was done on as many images.
    equal = [*outcomes[:2], _outcome(np.arange(n) % 4, "square", BLACK)]
    assert rows.rows(equal, [WHITE])[-1]["accuracy"] == 0.5
    equal[1] = _outcome(np.arange(n) % 3, "pgd", WHITE)
    assert rows.rows(equal, [WHITE])[-1]["accuracy"] == np.mean((np.arange(n) % 4 > 0) & (np.arange(n) % 3 > 0))

    # Iterated attacks met fewer than the single step did: the gray-box ones count for those who know more all the same.
    iterated = [
        _outcome(many(n), "none", GRAY),
        _outcome(np.arange(n) % 5, "fgsm", GRAY),
        _outcome(np.arange(200) % 4, "pgd", GRAY),
        _outcome(np.arange(200) % 3, "pgd", WHITE),
    ]
    worst = {row["threat_model"]: row for row in rows.rows(iterated, [GRAY, WHITE]) if row["worst_case"]}
    both = (np.arange(200) % 5 > 0) & (np.arange(200) % 4 > 0)
    assert (worst["gray_box"]["n"], worst["gray_box"]["accuracy"]) == (200, np.mean(both))
    assert (worst["white_box"]["n"], worst["white_box"]["accuracy"]) == (200, np.mean(both & (np.arange(200) % 3 > 0)))


def test_iterated_attacks_can_be_held_to_the_first_images(bench):
    plan = suites.build("full", [], THREATS, steps=3, iterated_examples=120)
    limits = {(job.attack.name, job.limit) for job in jobs(plan, bench, plan.models)}
    held = {(name, 120) for name in ("noise", "pgd", "cw_l2", "square")}
    assert {*held, ("fgsm", None), ("hopskipjump", 50)} <= limits
    assert len(limits) == len({name for name, _ in limits})  # one for each attack, gray-box or white-box
    one = suites.build("full", ["fgsm"], THREATS[:1], steps=3, iterated_examples=120)
    assert {job.limit for job in jobs(one, bench, one.models)} == {None}
    with pytest.raises(UserError, match="expected at least 100 images, got 99"):
        suites.build("full", [], THREATS, steps=3, iterated_examples=99)


def test_attacks_that_ask_for_answers_may_ask_more_often():
    usual, more = (suites.build("full", [], THREATS[:1], steps=3, queries=queries) for queries in (None, 5000))
    changed = {
        attack.name: (attack.steps, other.steps)
        for attack, other in zip(usual.attacks, more.attacks, strict=True)
        if attack != other
    }
    assert changed == {"square": (1000, 5000), "hopskipjump": (1000, 5000)}
    assert more.suite.limits == usual.suite.limits
    with pytest.raises(UserError, match="at least 200 for each image of square and hopskipjump, got 199"):
        suites.build("full", [], THREATS, steps=3, queries=199)
    with pytest.raises(UserError, match="at least 3 for each image of square, got 2"):
        suites.build("full", ["square"], THREATS, steps=3, queries=2)
    with pytest.raises(UserError, match="expected square or hopskipjump among the attacks.*got neither"):
        suites.build("quick", [], THREATS, steps=3, queries=5000)
