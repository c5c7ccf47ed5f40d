"""The tables of accuracy: what the reports give, line by line, and what a report lacks is said to be lacking."""

import numpy as np
import pytest
from figures import ADAPTIVE_ROWS, BLACK, GRAY, GRAY_ROWS, WHITE, cells, report

from vqunet_tf.evaluation import results
from vqunet_tf.evaluation import rows as rows_of
from vqunet_tf.evaluation.figures import members
from vqunet_tf.evaluation.results import Released
from vqunet_tf.evaluation.rows import Outcome
from vqunet_tf.evaluation.targets import PRESETS
from vqunet_tf.threat import Threat, ThreatModel


def test_one_table_for_two_presets_of_a_data_set():
    both = [
        Released(
            "fashion_mnist", report(GRAY_ROWS), "results/fashion_mnist", frozenset({"report.md", "plots/curves.png"})
        ),
        Released("fashion_mnist_adaptive", report(ADAPTIVE_ROWS, seconds=120.0), "results/fashion_mnist_adaptive"),
    ]
    text = results.accuracy("fashion_mnist", both)
    assert cells(text) == [
        ["epsilon", "defence", "clean", "gray-box worst", "white-box worst", "black-box worst", "n"],
        ["0.1", "none", "94.0 (84.0–100.0)", "0.0 (0.0–10.0)", "0.0 (0.0–10.0)", "–", "1000"],
        ["0.1", "vqunet", "92.0 (82.0–100.0)", "85.0 (75.0–95.0)", "–", "–", "1000"],
        ["0.1", "jpeg", "80.0 (70.0–90.0)", "40.0 (30.0–50.0)", "–", "–", "1000"],
        [
            "0.1",
            "vqunet (adaptive)",
            "89.0 (79.0–99.0)",
            "–",
            "79.0 (69.0–89.0)",
            "82.0 (72.0–92.0)",
            "500 / – / 500 / 200",
        ],
    ]
    for line in (
        "- gray-box worst, ε = 0.1: FGSM, PGD (40) on 1000 images.",
        "- white-box: not measured.",
        "- white-box worst, ε = 0.1: PGD (40) on 500 images.",
        "- black-box worst, ε = 0.1: Square (1000) on 200 images; beside it, on too few images: HopSkipJump (1000) on 50 images.",
        "- All 1 checks passed.",
        "![fashion_mnist: accuracy against epsilon](results/fashion_mnist/plots/curves.png)",
    ):
        assert line in text.splitlines(), line
    assert "[`fashion_mnist`](results/fashion_mnist/report.md): classifier `fast`, 1,234 parameters" in text
    assert "On all 10000 clean test images 94.00% without, 93.00% with the purifier." in text
    assert text.count("curves.png") == 1 and "fashion_mnist_adaptive/report.md" not in text


def test_another_classifier_keeps_its_own_lines_and_failed_checks_are_told():
    failed = [{"name": "no_label_leaking", "passed": False, "detail": "pgd 3 points up"}]
    other = report(ADAPTIVE_ROWS, bare=0.5, checks=failed, notes=["hopskipjump met few"])
    text = results.accuracy(
        "fashion_mnist", [Released("fashion_mnist", report(GRAY_ROWS), "r"), Released("mine", other, "r")]
    )
    assert [line[1] for line in cells(text)[1:]] == ["none", "vqunet", "jpeg", "none (mine)", "vqunet (mine)"]
    assert "- **1 of 1 checks failed**: `no_label_leaking` (pgd 3 points up)." in text
    assert "- Note: hopskipjump met few." in text


def test_where_nothing_was_measured_the_tables_say_so():
    tables = results.tables([])
    assert tables["cifar10"]() == "Not measured yet: no report of `cifar10` lies in `results/`."
    for dataset in ("fashion_mnist", "cifar10"):
        lines = cells(tables[f"targets {dataset}"]())
        assert len(lines) > 8 and all(line[1:] == ["not measured", "–"] for line in lines[1:])
        assert all(line[-3:] == ["–", "–", "not measured"] for line in cells(tables[f"published {dataset}"]())[1:])
    assert all(line[2:] == ["not measured", "–"] for line in cells(tables["claims"]())[1:])
    command_lines = cells(tables["commands"]())
    assert [line[0] for line in command_lines[1:]] == [f"`{preset}`" for preset in PRESETS]
    assert all(line[3] == "not measured yet" for line in command_lines[1:])


def test_the_command_of_a_report_stands_with_its_machine():
    made = Released("fashion_mnist", report(GRAY_ROWS, seconds=601.0), "results/fashion_mnist")
    line = cells(results.commands([made]))[1]
    expected = "`python -m trainers.evaluate --preset=fashion_mnist`"
    assert line == ["`fashion_mnist`", expected, "10 min", "Abacus, 2 cores; TensorFlow 2.21.0"]


# Every attack breaks two images of its own, so that the accuracy of a worst case tells which are in it.
def _outcomes(counts):
    made = []
    for defense in ("none", "vqunet"):
        clean = np.ones(300, bool)
        made.append(Outcome(defense, "none", Threat("linf", 0.0), 0, GRAY, clean, 0.0, 0.0, np.zeros((0,))))
        for k, ((model, attack), n) in enumerate(counts.items()):
            correct = np.ones(n, bool)
            correct[2 * k : 2 * k + 2] = False
            made.append(Outcome(defense, attack, Threat("linf", 0.1), 1, model, correct, 0.1, 0.0, np.zeros((0,))))
    return made


@pytest.mark.parametrize(
    "counts",
    [
        {(GRAY, "fgsm"): 300, (GRAY, "pgd"): 300, (WHITE, "pgd"): 300, (BLACK, "noise"): 300, (BLACK, "square"): 200},
        {
            (GRAY, "fgsm"): 300,
            (GRAY, "cw_l2"): 60,
            (WHITE, "pgd"): 300,
            (WHITE, "apgd_dlr"): 150,
            (BLACK, "square"): 50,
        },
        {(GRAY, "fgsm"): 300, (WHITE, "pgd"): 300, (BLACK, "square"): 200, (BLACK, "hopskipjump"): 50},
        {(GRAY, "fgsm"): 300, (GRAY, "pgd"): 200, (WHITE, "fgsm"): 300, (WHITE, "pgd"): 200, (BLACK, "square"): 200},
    ],
)
def test_the_attacks_said_to_be_in_a_worst_case_are_those_that_were_counted(counts):
    made = rows_of.rows(_outcomes(counts), [GRAY, WHITE, BLACK])
    for model in ThreatModel:
        inside, beside = members(made, "vqunet", model, ("linf", 0.1))
        (worst,) = [
            r for r in made if (r["defense"], r["attack"], r["threat_model"]) == ("vqunet", "worst", model.value)
        ]
        assert worst["n"] == min([300, *(r["n"] for r in inside)])
        assert worst["n"] - round(worst["accuracy"] * worst["n"]) == 2 * len(inside)
        assert {r["threat_model"] for r in beside} <= {model.value} and all(r["n"] < 100 for r in beside)
