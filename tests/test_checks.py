"""The checks of an evaluation, met by what they are made to catch: outcomes that were made up."""

from __future__ import annotations

import pytest
from invented import BLACK, CLEAN, GRAY, UNET, WHITE, others, outcome

from vqunet_tf.evaluation import checks
from vqunet_tf.threat import ThreatModel


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (checks.attacks_work_undefended, [outcome(0.4)], [outcome(0.6)]),  # more than half of clean is left
        (
            checks.attacks_work_undefended,
            [outcome(0.1), outcome(0.8, "fgsm")],
            [outcome(0.1), outcome(0.9, "fgsm")],
        ),
        (  # each attack at its own largest radius of each norm
            checks.attacks_work_undefended,
            [outcome(0.9, "fgsm", epsilon=0.01), outcome(0.3, "fgsm"), outcome(0.6, "cw_l2", norm="l2")],
            [outcome(0.3), outcome(0.9, "cw_l2", norm="l2")],
        ),
        (  # on the few images that a slow attack met, of which 9 in 10 were right before
            checks.attacks_work_undefended,
            [outcome(0.1), outcome(0.8, "hopskipjump", n=40)],
            [outcome(0.1), outcome(1.0, "hopskipjump", n=40)],
        ),
        (
            checks.iterative_beats_single_step,
            [outcome(0.2), outcome(0.3, "fgsm")],
            [outcome(0.3), outcome(0.2, "fgsm")],
        ),
        (
            checks.iterative_beats_single_step,
            [outcome(0.8, **GRAY), outcome(0.7, "fgsm", **GRAY), outcome(0.2), outcome(0.2, "fgsm")],
            [outcome(0.8, **WHITE), outcome(0.7, "fgsm", **WHITE)],
        ),
        (  # the strongest gradient of an attack counts, not each
            checks.iterative_beats_single_step,
            [outcome(v, **WHITE, variant=f"v{v}") for v in (0.8, 0.4)] + [outcome(0.5, "fgsm", **WHITE)],
            [outcome(v, **WHITE, variant=f"v{v}") for v in (0.8, 0.6)] + [outcome(0.5, "fgsm", **WHITE)],
        ),
        (
            checks.white_box_beats_gray_box,
            [outcome(0.5, **WHITE), outcome(0.8, **GRAY)],
            [outcome(0.8, **WHITE), outcome(0.5, **GRAY)],
        ),
        (  # as many right, but not the same: image by image gray-box breaks what white-box does not
            checks.white_box_beats_gray_box,
            [outcome(0.5, **WHITE), outcome(0.5, **GRAY)],
            [outcome(0.5, **WHITE), others(0.5, **GRAY)],
        ),
        (  # the worst case of a white-box attacker has the gray-box images; the attack itself has not
            checks.white_box_beats_gray_box,
            [outcome(0.8, "fgsm", **WHITE), outcome(0.5, **WHITE), outcome(0.5, "fgsm", **GRAY)],
            [outcome(0.8, **WHITE), outcome(0.5, "apgd_dlr", **WHITE), outcome(0.5, **GRAY)],
        ),
        (
            checks.white_box_beats_identity,
            [outcome(0.4, **WHITE, variant="soft"), outcome(0.5, **WHITE, variant="identity")],
            [outcome(0.5, **WHITE, variant="soft"), outcome(0.4, **WHITE, variant="identity")],
        ),
        (
            checks.white_box_beats_black_box,
            [outcome(0.5, **WHITE), outcome(0.6, "square", **BLACK)],
            [outcome(0.5, **WHITE), outcome(0.4, "square", **BLACK)],
        ),
        (  # on the first 50 images, where white-box leaves all
            checks.white_box_beats_black_box,
            [outcome(0.5, **WHITE), outcome(1.0, "hopskipjump", **BLACK, n=50)],
            [outcome(0.5, **WHITE), outcome(0.8, "hopskipjump", **BLACK, n=50)],
        ),
        (
            checks.white_box_beats_black_box,
            [outcome(0.3), outcome(0.4, "transfer", model="black_box")],
            [outcome(0.5), outcome(0.4, "transfer", model="black_box")],
        ),
        (
            checks.noise_weaker_than_gradients,
            [outcome(0.5, **WHITE), outcome(0.5, "noise", **BLACK)],
            [outcome(0.5, **WHITE), outcome(0.4, "noise", **BLACK)],
        ),
        (checks.no_label_leaking, [outcome(0.9, **GRAY)], [outcome(0.95, **GRAY)]),  # above clean
        (
            checks.no_label_leaking,
            [outcome(0.85, **GRAY), outcome(0.84, "pgd_targeted", **GRAY)],
            [outcome(0.85, **GRAY), outcome(0.8, "pgd_targeted", **GRAY)],
        ),
        (
            checks.monotone_in_epsilon,
            [outcome(0.5), outcome(0.4, epsilon=0.2)],
            [outcome(0.4), outcome(0.5, epsilon=0.2)],
        ),
        (  # an attack that was made at one radius only proves nothing about the next
            checks.monotone_in_epsilon,
            [outcome(0.5), outcome(0.1, "square", n=50), outcome(0.4, epsilon=0.2)],
            [outcome(0.4), outcome(0.1, "square", n=50), outcome(0.5, epsilon=0.2)],
        ),
        (checks.budget_held, [outcome(0.5)], [outcome(0.5, distance=0.11)]),
        (checks.budget_held, [outcome(0.5)], [outcome(0.5, distance=float("nan"))]),
        (  # the strongest variant alone does not excuse another that left the ball
            checks.budget_held,
            [outcome(0.5, variant="a"), outcome(0.1, variant="b")],
            [outcome(0.5, variant="a", distance=0.11), outcome(0.1, variant="b")],
        ),
        (
            checks.beats_ablations,
            [outcome(0.8, **GRAY), outcome(0.7, **UNET)],
            [outcome(0.7, **GRAY), outcome(0.8, **UNET)],
        ),
        (
            checks.beats_ablations,
            [outcome(0.71, **GRAY), outcome(0.7, **UNET)],
            [outcome(0.7, **GRAY, n=400), outcome(0.7, **UNET)],
        ),
    ],
)
def test_each_check_passes_what_is_fine_and_fails_what_is_not(check, fine, wrong):
    assert check([*CLEAN, *fine]).passed
    failed = check([*CLEAN, *wrong])
    assert not failed.passed
    assert failed.name == check.__name__
    assert "%" in failed.detail or "moved" in failed.detail


def test_clean_accuracy_may_fall_by_a_point_or_by_chance():
    def kept(bare: float, purified: float, n: int = 400):
        outcomes = [outcome(bare, "none", n=n), outcome(purified, "none", **GRAY, n=n)]
        return checks.clean_accuracy_kept([*outcomes, outcome(0.3, "none", defense="jpeg", n=n)])

    assert kept(0.9, 0.89).passed
    assert kept(0.9, 0.91).passed
    assert not kept(0.9, 0.86).passed
    assert kept(0.9, 0.86, n=50).passed  # two images
    # What others cost is said and is their business.
    assert kept(0.9, 0.89).detail == "90.0% without, 89.0% with vqunet, 30.0% with jpeg, on 400 images"
    assert kept(0.9, 0.86).detail.startswith("vqunet costs 4.0 points of clean accuracy; 90.0% without")
    assert checks.clean_accuracy_kept([outcome(0.9, "none")]) is None


def test_a_difference_that_may_be_chance_fails_nothing():
    assert checks.no_label_leaking([*CLEAN, outcome(0.91, **GRAY)]).passed  # 4 of 400 images
    assert checks.monotone_in_epsilon([*CLEAN, outcome(0.40), outcome(0.41, epsilon=0.2)]).passed
    assert checks.attacks_work_undefended([outcome(0.9, "none", n=20), outcome(0.5, n=20)]).passed
    for missed, passed in ((0.02, True), (0.03, True), (0.05, False)):  # of 400 images 2 in 100 may be, and chance
        white, gray = outcome(0.5, **WHITE), outcome(0.5 - missed, **GRAY)
        assert checks.white_box_beats_gray_box([*CLEAN, white, gray]).passed is passed


def test_untargeted_below_targeted_is_said_and_fails_nothing():
    found = checks.no_label_leaking([*CLEAN, outcome(0.7, **GRAY), outcome(0.8, "pgd_targeted", **GRAY)])
    assert found.passed
    assert "pgd 70.0%, pgd_targeted 80.0%: no leak" in found.detail


def test_a_lead_that_may_be_chance_is_called_so():
    said = [
        checks.beats_ablations([*CLEAN, outcome(ours, **GRAY), outcome(0.7, **UNET)]).detail for ours in (0.71, 0.8)
    ]
    assert said[0].endswith("unet 70.0% against 71.0% (may be chance)")
    assert said[1].endswith("unet 70.0% against 80.0%")


def test_ablations_are_compared_under_the_attacks_that_both_met():
    only_ours = outcome(0.1, "deepfool", **GRAY)
    assert checks.beats_ablations([*CLEAN, outcome(0.8, **GRAY), only_ours, outcome(0.7, **UNET)]).passed
    # Budgets are pooled: 0.8 and 0.4 against 0.9 and 0.2.
    ours = [outcome(0.8, **GRAY), outcome(0.4, **GRAY, epsilon=0.2)]
    assert checks.beats_ablations([*ours, outcome(0.9, **UNET), outcome(0.2, **UNET, epsilon=0.2)]).passed


def test_worst_cases_are_compared_on_the_images_that_all_of_their_attacks_met():
    """Iterated attacks met the first 200 of 2,000 images, and say nothing of those after them."""
    step, steps = {"attack": "fgsm", "n": 2000}, {"n": 200}
    # On all images the U-Net would look worse than it is where everything was tried: only FGSM met most of them.
    ours = [outcome(0.7, **step, **GRAY), outcome(0.95, **steps, **GRAY)]
    theirs = [outcome(0.6, **step, **UNET), outcome(0.99, **steps, **UNET)]
    found = checks.beats_ablations([*ours, *theirs])
    assert not found.passed and "unet 99.0% against 95.0%" in found.detail
    # White-box FGSM leaves more of the later images than gray-box FGSM does, which proves nothing.
    white = [outcome(0.6, **step, **WHITE), outcome(0.0, **steps, **WHITE)]
    gray = [outcome(0.5, **step, **GRAY), outcome(0.3, **steps, **GRAY)]
    assert checks.white_box_beats_gray_box([*white, *gray]).passed
    larger = [outcome(0.7, **step, **GRAY, epsilon=0.2), outcome(0.2, **steps, **GRAY, epsilon=0.2)]
    clean = outcome(0.9, "none", **GRAY, n=2000)
    assert checks.monotone_in_epsilon([clean, *gray, *larger]).passed
    larger[1] = outcome(0.5, **steps, **GRAY, epsilon=0.2)
    assert not checks.monotone_in_epsilon([clean, *gray, *larger]).passed


def test_noise_and_transfer_need_not_work():
    idle = [outcome(0.9, "noise", model="black_box"), outcome(0.9, "transfer", model="black_box")]
    assert checks.attacks_work_undefended([*CLEAN, outcome(0.1), *idle]).passed
    assert not checks.attacks_work_undefended([*CLEAN, outcome(0.1), outcome(0.9, "square")]).passed


def test_worst_cases_are_lowest_and_say_by_how_much():
    found = checks.worst_case_is_lowest([*CLEAN, outcome(0.7, **GRAY), others(0.7, "fgsm", **GRAY)])
    assert found.passed
    assert "up to 30.0 points more" in found.detail  # 0.4 are right under both


def test_worst_cases_that_were_averaged_are_caught(monkeypatch):
    outcomes = [*CLEAN, outcome(0.7, **GRAY), outcome(0.2, "fgsm", **GRAY)]
    table = checks.rows.rows(outcomes, [ThreatModel.GRAY_BOX])
    averaged = [{**row, "accuracy": 0.45} if row["worst_case"] else row for row in table]
    monkeypatch.setattr(checks.rows, "rows", lambda *_: averaged)
    found = checks.worst_case_is_lowest(outcomes)
    assert not found.passed
    assert "worst case 45.0%, a single attack 20.0%" in found.detail


def test_who_attacked_and_who_did_not_is_said():
    white = [outcome(0.5, **WHITE, variant=name) for name in ("straight_through", "soft")]
    found = checks.attackers_tried([*CLEAN, *white, outcome(0.5, "square", **BLACK, n=200)])
    assert found.passed
    assert found.detail == (
        "several gradients: straight_through, soft; score queries: square on 200 images; "
        "not tried: margin loss, decision queries, transfer"
    )
    assert checks.attackers_tried([*CLEAN, outcome(0.5, **GRAY)]) is None


def test_a_check_that_would_compare_nothing_is_left_out():
    names = {check.name for check in checks.from_outcomes([*CLEAN, outcome(0.1), outcome(0.8, **GRAY)])}
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
        *CLEAN,
        *(outcome(0.1, name) for name in ("pgd", "fgsm")),
        *(outcome(0.8, name, **place) for name in ("pgd", "pgd_targeted") for place in (GRAY, UNET)),
        *(outcome(0.3, "pgd", **WHITE, variant=name) for name in ("soft", "identity")),
        *(outcome(0.4, name, **BLACK) for name in ("square", "noise")),
    ]
    names = [check.name for check in checks.from_outcomes(outcomes)]
    measured = {"deterministic", "gradients_not_masked", "logits_not_probabilities"}
    assert set(names) == set(checks.__all__) - {"Check", "from_outcomes"} - measured
    assert len(names) == len(set(names))
    assert {type(check.passed) for check in checks.from_outcomes(outcomes)} == {bool}  # JSON knows no other
