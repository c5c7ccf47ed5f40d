"""What was measured against targets and published figures: met, missed or open, and never with an easier problem."""

import re

import pytest
from figures import GRAY, GRAY_ROWS, WHITE, cells, report, row

from vqunet_tf.evaluation import comparisons
from vqunet_tf.evaluation.figures import Accuracy, Ahead, Attacked, Cost, Loss
from vqunet_tf.evaluation.published import MEMORY, PUBLISHED, READ, Near
from vqunet_tf.evaluation.targets import ABOVE, AT_LEAST, AT_MOST, CLAIMS, NAMED, PRESETS, TARGETS, Target

FOUR = ("fgsm", "pgd", "pgd_targeted", "mim")


def judged(figure, relation, threshold, rows, **more):
    target = Target("fashion_mnist", "fashion_mnist", "words", figure, relation, threshold)
    return comparisons.judge(target, [("fashion_mnist", report(rows, **more))])


def gray(worst, **shares):
    return [row("vqunet", name, share) for name, share in shares.items()] + [row("vqunet", "worst", worst)]


ALL_FOUR = {"fgsm": 0.95, "pgd": 0.93, "pgd_targeted": 0.94, "mim": 0.92}


@pytest.mark.parametrize(
    ("rows", "threshold", "expected"),
    [
        (gray(0.91, **ALL_FOUR), 0.75, ("91.0 (81.0–100.0), n = 1000", "yes")),
        (gray(0.91, **ALL_FOUR), 0.91, ("91.0 (81.0–100.0), n = 1000", "yes (within chance)")),
        (gray(0.70, **ALL_FOUR), 0.91, ("70.0 (60.0–80.0), n = 1000", "no")),
        # More attacks than were asked for: the figure lies somewhere between.
        (
            gray(0.70, bim=0.75, **ALL_FOUR),
            0.91,
            ("at least 70.0 (60.0–80.0), n = 1000, with BIM in it too; at most 92.0", "open"),
        ),
        (
            gray(0.70, bim=0.75, **ALL_FOUR),
            0.93,  # above 92.0, and below the end of its interval
            ("at least 70.0 (60.0–80.0), n = 1000, with BIM in it too; at most 92.0", "no (within chance)"),
        ),
        # Each on more images than all of them together: no bound from above.
        (
            [{**each, "n": 1000 if each["attack"] == "worst" else 5000} for each in gray(0.70, bim=0.75, **ALL_FOUR)],
            0.91,
            ("at least 70.0 (60.0–80.0), n = 1000, with BIM in it too", "open"),
        ),
        # Fewer: it can only be missed.
        (
            gray(0.80, fgsm=0.95, pgd=0.85, mim=0.9),
            0.91,
            ("at most 80.0 (70.0–90.0), n = 1000 (no targeted PGD)", "no"),
        ),
        (gray(0.95, fgsm=0.97, pgd=0.96, mim=0.96), 0.91, ("not measured (no targeted PGD)", "–")),
        (
            gray(0.40, bim=0.45, fgsm=0.7, pgd=0.5),
            0.65,
            ("at most 50.0 (40.0–60.0), n = 1000 (no targeted PGD, MIM)", "no"),
        ),
        ([row("vqunet", "worst", 0.9, epsilon=0.2)], 0.91, ("not measured (no such radius)", "–")),
        ([row("jpeg", "worst", 0.9)], 0.91, ("not measured (no FGSM, PGD, targeted PGD, MIM)", "–")),
    ],
)
def test_a_worst_case_of_named_attacks(rows, threshold, expected):
    assert judged(Attacked(GRAY, FOUR, epsilon=0.1, steps=40), AT_LEAST, threshold, rows) == expected


def test_fewer_steps_than_asked_for_count_against_it_only():
    weak = [{**each, "steps": min(each["steps"], 20)} for each in gray(0.95, **ALL_FOUR)]
    figure = Attacked(GRAY, FOUR, epsilon=0.1, steps=40)
    assert judged(figure, AT_LEAST, 0.91, weak) == ("not measured (20 steps, not 40)", "–")
    assert judged(figure, AT_LEAST, 0.99, weak)[1] == "no (within chance)"


def test_white_box_counts_with_whatever_else_was_tried():
    figure = Attacked(WHITE, ("pgd", "apgd_dlr"), epsilon=0.1, others=True)
    rows = [row("vqunet", name, share, "white_box") for name, share in (("pgd", 0.8), ("fgsm", 0.9), ("worst", 0.6))]
    assert judged(figure, AT_LEAST, 0.5, rows) == ("not measured (no APGD-DLR)", "–")
    assert judged(figure, AT_LEAST, 0.785, rows) == ("at most 60.0 (50.0–70.0), n = 1000 (no APGD-DLR)", "no")
    rows.append(row("vqunet", "apgd_dlr", 0.9, "gray_box"))  # another attacker's
    assert judged(figure, AT_LEAST, 0.5, rows) == ("not measured (no APGD-DLR)", "–")
    rows.append(row("vqunet", "apgd_dlr", 0.7, "white_box"))
    assert judged(figure, AT_LEAST, 0.45, rows) == ("60.0 (50.0–70.0), n = 1000", "yes")


def test_attacks_one_by_one_within_the_largest_radius():
    figure = Attacked(GRAY, ("cw_l2", "deepfool"), norm="l2", together=False)
    assert judged(figure, AT_LEAST, 0.5, GRAY_ROWS) == ("not measured (no l2 attack)", "–")
    small = [row("vqunet", name, 0.99, epsilon=0.5, norm="l2") for name in ("cw_l2", "deepfool")]
    large = [
        row("vqunet", "cw_l2", 0.9, epsilon=2.0, norm="l2"),
        row("vqunet", "deepfool", 0.7, epsilon=2.0, norm="l2"),
    ]
    expected = "CW 90.0 (80.0–100.0), n = 1000; DeepFool 70.0 (60.0–80.0), n = 1000, radius 2 (l2)"
    assert judged(figure, AT_LEAST, 0.85, small + large) == (expected, "no")
    assert judged(figure, AT_LEAST, 0.55, small + large) == (expected, "yes")
    assert judged(figure, AT_LEAST, 0.55, small + large[:1]) == ("not measured (no DeepFool)", "–")


def test_clean_figures_and_cost():
    assert judged(Loss(), AT_MOST, 0.005, GRAY_ROWS, bare=0.9386, purified=0.9336) == (
        "0.50 points (93.86 → 93.36), n = 10000",
        "yes",
    )
    assert judged(Loss(), AT_MOST, 0.005, GRAY_ROWS, bare=0.9386, purified=0.9335)[1] == "no"
    # Wilson's interval of 9,386 of 10,000 by hand: 93.37 to 94.31.
    assert judged(Accuracy("classifier"), AT_LEAST, 0.935, GRAY_ROWS, bare=0.9386) == (
        "93.86 (93.4–94.3), n = 10000",
        "yes (within chance)",
    )
    assert judged(Accuracy("purifier"), AT_LEAST, 0.88, GRAY_ROWS, purified=0.87)[1] == "no"
    assert judged(Cost(), AT_MOST, 60.0, GRAY_ROWS) == ("not measured (the report has no operation count)", "–")
    counted = report(GRAY_ROWS)
    counted["purifier"]["multiply_accumulates"] = 37_250_000
    cost = Target("fashion_mnist", "fashion_mnist", "words", Cost(), AT_MOST, 60.0)
    assert comparisons.judge(cost, [("fashion_mnist", counted)]) == ("37.2 million", "yes")


def test_ahead_of_every_other_defence():
    over = ("jpeg", "unet")
    rows = [*GRAY_ROWS, row("unet", "worst", 0.8)]
    expected = "+5.0 points to `unet` at 0.1, the least of 2 differences"
    assert judged(Ahead(over), ABOVE, 0.0, rows) == (expected, "yes (within chance)")
    assert judged(Ahead(over), ABOVE, 0.0, [*GRAY_ROWS, row("unet", "worst", 0.6)])[1] == "yes"
    assert judged(Ahead(over), ABOVE, 0.0, [*GRAY_ROWS, row("unet", "worst", 0.85)])[1] == "no (within chance)"
    assert judged(Ahead(over), ABOVE, 0.0, GRAY_ROWS) == ("not measured (no `unet`)", "–")
    behind = judged(Ahead(("unet", "dae")), ABOVE, 0.0, [*GRAY_ROWS, row("unet", "worst", 0.99)])
    assert behind == ("-14.0 points to `unet` at 0.1, the least of 1 differences", "no (within chance)")


def test_ablations_come_from_another_report_on_the_same_classifier():
    claim = Target("fashion_mnist", "fashion_mnist", "words", Ahead(("jpeg", "unet")), ABOVE, 0.0)
    ours, theirs = report(GRAY_ROWS), report([row("unet", "worst", 0.8), row("jpeg", "worst", 0.99)])
    expected = "+5.0 points to `unet` at 0.1, the least of 2 differences"  # of JPEG ours has a row
    assert comparisons.judge(claim, [("fashion_mnist", ours), ("fashion_mnist_before", theirs)])[0] == expected
    # Each from the first report that has it.
    claim = Target("fashion_mnist", "fashion_mnist", "words", Ahead(("unet", "dae")), ABOVE, 0.0)
    older = report([row("unet", "worst", 0.95), row("dae", "worst", 0.7)])
    three = [("fashion_mnist", ours), ("fashion_mnist_ablations", theirs), ("fashion_mnist_before", older)]
    assert comparisons.judge(claim, three)[0] == expected
    theirs["classifier"]["accuracy"] -= 0.001
    unknown = comparisons.judge(claim, [("fashion_mnist", ours), ("fashion_mnist_before", theirs)])
    assert unknown == ("not measured (no `unet`, `dae`)", "–")


def test_targets_of_a_classifier_find_its_report_wherever_it_lies():
    rows = [row("vqunet", "fgsm", 0.63, epsilon=0.3)]
    other = report(rows)
    other["classifier"]["name"] = "defense_gan_b"
    lines = cells(comparisons.targets("fashion_mnist", [("anywhere", other)]))
    measured = {line[0]: line[1:] for line in lines if line[1] != "not measured"}
    assert measured["gray-box FGSM, ε = 0.3, on Defense-GAN's classifier B: above 62.9"] == [
        "63.0 (53.0–73.0), n = 1000",
        "yes (within chance)",
    ]
    assert len(measured) == 2  # and the head


def test_beside_a_published_figure_stands_the_nearest_protocol():
    rows = [
        row("none", "fgsm", 0.2, epsilon=0.1),
        row("none", "fgsm", 0.1, epsilon=0.3),
        row("vqunet", "fgsm", 0.9, epsilon=0.1),
        row("vqunet", "fgsm", 0.7, epsilon=0.3),
        row("vqunet", "worst", 0.6, "white_box", epsilon=0.1),
    ]
    reports = [("fashion_mnist", report(rows))]

    def near(*args, **kwargs):
        return comparisons.nearest("fashion_mnist", Near(*args, **kwargs), reports)

    within = ("93.0", "20.0 → 90.0 (80.0–100.0)", "`fashion_mnist`, gray-box FGSM, ε = 0.1, n = 1000")
    assert near(GRAY, ("fgsm",), 25 / 255) == within
    harder = ("93.0", "10.0 → 70.0 (60.0–80.0)", "`fashion_mnist`, gray-box FGSM, ε = 0.3, n = 1000")
    assert near(GRAY, ("fgsm",), 0.15) == harder  # never an easier problem where there is a harder one
    assert near(GRAY, ("fgsm",), 0.6) == harder
    assert near(GRAY, ("bim", "fgsm"), 0.3) == harder
    assert near(GRAY, ("cw_l2",), 0.5, "l2") == ("–", "–", "not measured")
    assert near(WHITE, ("worst",), 0.1)[1] == "60.0 (50.0–70.0)"
    reports.append(("fashion_mnist_adaptive", report([row("vqunet", "worst", 0.8, "white_box")], purified=0.89)))
    assert near(WHITE, ("worst",), 0.1)[:2] == ("89.0", "80.0 (70.0–90.0)")
    other = report([row("vqunet", "fgsm", 0.5, epsilon=0.3)])
    other["classifier"]["name"] = "defense_gan_a"
    reports.append(("fashion_mnist_a", other))
    assert near(GRAY, ("fgsm",), 0.3, classifier="defense_gan_a")[2].startswith("`fashion_mnist_a`")


def test_every_published_figure_has_its_protocol_and_how_it_is_known():
    assert len(set(PUBLISHED)) == len(PUBLISHED) and {row.dataset for row in PUBLISHED} <= set(PRESETS.values())
    for each in PUBLISHED:
        assert all((each.method, each.protocol, each.threat, each.attacked, each.source)) and each.known in (
            READ,
            MEMORY,
        )
        assert re.search(r"ε = [\d./]+|radius [\d.]+|no bound", each.protocol), each
    for target in (*TARGETS, *CLAIMS):
        assert bool(target.classifier) != ({**PRESETS, **NAMED}.get(target.preset) == target.dataset), target
