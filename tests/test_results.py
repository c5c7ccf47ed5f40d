"""RESULTS.md: its tables are what the reports give, line by line, and what a report lacks is said to be lacking."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from commands import results as command
from vqunet_tf.evaluation import comparisons, results
from vqunet_tf.evaluation import rows as rows_of
from vqunet_tf.evaluation.figures import Accuracy, Ahead, Attacked, Cost, Loss, members
from vqunet_tf.evaluation.published import MEMORY, PUBLISHED, READ, Near
from vqunet_tf.evaluation.results import Released
from vqunet_tf.evaluation.rows import Outcome
from vqunet_tf.evaluation.targets import ABOVE, AT_LEAST, AT_MOST, CLAIMS, PRESETS, TARGETS, Target
from vqunet_tf.threat import Threat, ThreatModel

ROOT = Path(__file__).resolve().parents[1]
GRAY, WHITE, BLACK = ThreatModel.GRAY_BOX, ThreatModel.WHITE_BOX, ThreatModel.BLACK_BOX


def row(defense, attack, share, model="gray_box", epsilon=0.1, n=1000, norm="linf", steps=40):
    """A row as in a report; its interval is 10 points to each side, to be recognised."""
    return {
        "defense": defense,
        "attack": attack,
        "norm": norm,
        "epsilon": 0.0 if attack == "none" else epsilon,
        "steps": 0 if attack == "none" else 1 if attack == "fgsm" else steps,
        "threat_model": model,
        "n": n,
        "accuracy": share,
        "interval": [max(0.0, share - 0.1), min(1.0, share + 0.1)],
        "worst_case": attack == "worst",
        "seconds": 1.0,
    }


def report(rows, dataset="fashion_mnist", bare=0.94, purified=0.93, **more):
    """A report with these rows."""
    return {
        "schema": 1,
        "dataset": dataset,
        "seed": 3,
        "objective": "gray_box",
        "classifier": {"name": "fast", "params": 1234, "accuracy": bare, "n": 10000},
        "purifier": {"name": "vqunet", "params": 5678, "clean_accuracy": purified, "n": 10000},
        "rows": rows,
        "checks": [{"name": "budget_held", "passed": True, "detail": "fine"}],
        "command": "python -m trainers.evaluate --preset=fashion_mnist",
        "host": {"processor": "Abacus", "cores": 2, "accelerators": []},
        "versions": {"tensorflow": "2.21.0"},
        **more,
    }


GRAY_ROWS = [
    row("none", "none", 0.94),
    row("none", "fgsm", 0.2),
    row("none", "worst", 0.0),
    row("vqunet", "none", 0.92),
    row("vqunet", "fgsm", 0.9),
    row("vqunet", "pgd", 0.88),
    row("vqunet", "worst", 0.85),
    row("jpeg", "none", 0.8),
    row("jpeg", "fgsm", 0.5),
    row("jpeg", "worst", 0.4),
]
ADAPTIVE_ROWS = [
    row("none", "none", 0.95, n=500),
    row("none", "worst", 0.01, n=500),
    row("vqunet", "none", 0.89, n=500),
    row("vqunet", "pgd", 0.8, "white_box", n=500),
    row("vqunet", "worst", 0.79, "white_box", n=500),
    row("vqunet", "square", 0.83, "black_box", n=200, steps=1000),
    row("vqunet", "hopskipjump", 0.88, "black_box", n=50, steps=1000),
    row("vqunet", "worst", 0.82, "black_box", n=200),
]


def cells(text):
    """The lines of a table, each as its cells, without the rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


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
        assert bool(target.classifier) != (PRESETS.get(target.preset) == target.dataset), target


@pytest.fixture
def page(tmp_path):
    """A page with a table, and a folder with the report it is made from."""
    (tmp_path / "results" / "fashion_mnist").mkdir(parents=True)
    write(tmp_path, report(GRAY_ROWS))
    table = "<!-- table: fashion_mnist -->\nto be replaced\n<!-- end -->"
    text = f"# Mine\n\nprose  stays\n\n{table}\n\nmore\n<!-- table: claims -->\n<!-- end -->\n"
    (tmp_path / "RESULTS.md").write_text(text)
    return tmp_path


def write(folder, found, preset="fashion_mnist"):
    (folder / "results" / preset).mkdir(exist_ok=True)
    (folder / "results" / preset / "report.json").write_text(json.dumps(found))


def run(folder, *flags):
    """The exit status of the command."""
    places = [f"--file={folder / 'RESULTS.md'}", f"--results_dir={folder / 'results'}"]
    try:
        command.console(["results", *places, *flags])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command_fills_the_tables_and_leaves_the_prose(page, capsys):
    assert run(page) == 0
    assert capsys.readouterr().out.endswith("RESULTS.md: 2 of 2 tables changed (fashion_mnist, claims)\n")
    text = (page / "RESULTS.md").read_text()
    assert text.startswith("# Mine\n\nprose  stays\n\n<!-- table: fashion_mnist -->\n\n| epsilon |")
    assert "\n\n<!-- end -->\n\nmore\n<!-- table: claims -->\n\n| the paper says" in text and "replaced" not in text
    assert run(page, "--check") == 0 and run(page) == 0
    assert capsys.readouterr().out.count("all 2 tables are what the reports give\n") == 2
    assert (page / "RESULTS.md").read_text() == text


def test_the_check_fails_once_a_number_in_a_report_changes(page, capsys):
    run(page)
    before = (page / "RESULTS.md").read_text()
    changed = [{**each, "accuracy": 0.851} if each["accuracy"] == 0.85 else each for each in GRAY_ROWS]
    write(page, report(changed))
    assert run(page, "--check") == 1
    captured = capsys.readouterr()
    assert "is not what the reports give (fashion_mnist): run python -m commands.results" in captured.err
    assert (page / "RESULTS.md").read_text() == before
    assert run(page) == 0 and run(page, "--check") == 0
    assert "| 85.1 (75.0–95.0) |" in (page / "RESULTS.md").read_text()


def test_the_ablations_are_those_that_their_benchmark_wrote(page):
    (page / "RESULTS.md").write_text(
        "<!-- table: ablations -->\n<!-- end -->\n<!-- table: fashion_mnist -->\n<!-- end -->\n"
    )
    assert run(page) == 0 and "Not measured yet" in (page / "RESULTS.md").read_text()
    for name, table in (
        ("ablations_codes", "# More\n\n| b |\n|---|\n"),
        ("ablations", "# First\n\n## Levels\n\n| a |\n|---|\n"),
    ):
        (page / "results" / name).mkdir()
        (page / "results" / name / "ablations.md").write_text(table)
        assert run(page, "--check") == 1 and run(page) == 0
    shown = "-->\n\n### First\n\n#### Levels\n\n| a |\n|---|\n\n### More\n\n| b |\n|---|\n\n<!-- end -->"
    assert shown in (page / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table: mnist -->\n<!-- end -->\n",
            "unknown table 'mnist': expected one of ablations, cifar10, claims, commands",
        ),
        ("<!-- table: fashion_mnist -->\n", "expected pairs of"),
        ("<!-- table: claims -->\n<!-- table: fashion_mnist -->\n<!-- end -->\n", "expected pairs of"),
        ("<!-- end -->\n", "expected pairs of"),
        ("nothing\n", "is in no table: put <!-- table: fashion_mnist --> and <!-- end --> into"),
    ],
)
def test_a_page_that_cannot_be_filled_says_why_and_stays(page, capsys, text, message):
    (page / "RESULTS.md").write_text(text)
    assert run(page) == 2
    assert message in capsys.readouterr().err and (page / "RESULTS.md").read_text() == text


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1, "rows": []}', '{"schema": 2, "rows": [1]}'])
def test_a_report_that_is_none_is_one_line(page, capsys, content):
    (page / "results" / "fashion_mnist" / "report.json").write_text(content)
    assert run(page) == 2
    assert "make it again with trainers.evaluate" in capsys.readouterr().err
    assert run(page / "nowhere") == 2 and "cannot be read" in capsys.readouterr().err


def test_known_presets_come_first_and_plots_are_linked_if_they_are_there(page):
    for preset in ("aaa", "fashion_mnist_adaptive"):
        write(page, report(ADAPTIVE_ROWS), preset)
    (page / "results" / "aaa" / "plots").mkdir()
    (page / "results" / "aaa" / "plots" / "curves.png").touch()
    found = results.load(page / "results")
    assert [each.preset for each in found] == ["fashion_mnist", "fashion_mnist_adaptive", "aaa"]
    assert [sorted(each.files) for each in found] == [[], [], ["plots/curves.png"]]
    assert [each.suffix for each in found] == ["", "adaptive", "aaa"]


def test_the_results_of_the_project_are_up_to_date(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command.console(["results", "--check"])
    assert "tables are what the reports give" in capsys.readouterr().out
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    named = set(re.findall(r"<!-- table: ([^>]+) -->", text))
    known = {
        *PRESETS.values(),
        *(f"{kind} {name}" for kind in ("targets", "published") for name in ("fashion_mnist", "cifar10")),
    }
    assert {*known, "ablations", "claims", "commands"} <= named
    assert re.search(r"^results:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
