"""`commands.results`: it fills the tables of RESULTS.md, leaves the prose, and tells when they are out of date."""

import json
import re
from pathlib import Path

import pytest
from figures import ADAPTIVE_ROWS, GRAY_ROWS, report

from commands import results as command
from vqunet_tf.evaluation import results
from vqunet_tf.evaluation.targets import PRESETS

ROOT = Path(__file__).resolve().parents[1]


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


def test_without_a_report_the_tables_stay(page, capsys):
    run(page)
    before = (page / "RESULTS.md").read_text()
    (page / "results" / "fashion_mnist" / "report.json").unlink()
    assert run(page) == 2 and run(page, f"--results_dir={page / 'reslts'}") == 2
    assert capsys.readouterr().err.count("holds no <preset>/report.json") == 2
    assert (page / "RESULTS.md").read_text() == before


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


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 1, "rows": []}',
        '{"schema": 2, "rows": [1]}',
        '{"schema": 1, "split": "validation", "rows": [1]}',
    ],
)
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
