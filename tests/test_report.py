"""The report says what was measured, all of it and nothing else: as JSON for programs, as text for people."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from pages import Tree
from reported import BLACK, EPSILONS, GRAY, NAMES, WHITE, N, row_of

from vqunet_tf.evaluation import classes, html, markdown, plots, report, rows, summary
from vqunet_tf.threat import ThreatModel


def test_report_json_has_the_schema_that_others_read(finished, tmp_path):
    report.write(tmp_path, finished)
    text = (tmp_path / "report.json").read_text()
    again = json.loads(text)
    assert again == json.loads(json.dumps(finished, allow_nan=False))
    kinds = {
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
        # beyond what is fixed
        "notes": list,
        "per_class": dict,
        "config": dict,
        "seconds": float,
    }
    assert {name: type(value) for name, value in again.items()} == kinds
    assert again["schema"] == 1
    row_kinds = {
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
        assert row_kinds.items() <= {name: type(value) for name, value in row.items()}.items()
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert all({"name", "passed", "detail"} <= set(check) for check in again["checks"])
    assert {"python", "vqunet_tf", "tensorflow", "keras", "cleverhans", "numpy"} <= set(again["versions"])
    assert ' "n": [' in text and re.search(r'"code_counts": \[\n +\[5, 0, 3, 0\],', text)  # numbers stay on one line


def test_seconds_count_images_crafted_once_only_once(finished, evaluation):
    crafted = 2 * 2 * 2 + 1  # two epsilons, two attacks, gray-box and white-box; and looking at the clean images
    assert finished["seconds"] == crafted * 1.5
    assert report._seconds(SimpleNamespace(seconds=7, outcomes=())) == 7


def test_classes_are_counted_as_numpy_counts_them(finished, evaluation):
    found = finished["per_class"]
    assert found["n"] == [int((evaluation.truth == k).sum()) for k in range(4)]
    assert {row["defense"] for row in found["rows"]} == {"none", "vqunet"}
    worst = [o.correct for o in evaluation.outcomes if o.defense == "vqunet" and o.threat.epsilon in (0.0, 0.3)]
    right = np.logical_and.reduce(worst)
    row = row_of(found["rows"], defense="vqunet", attack="worst", epsilon=0.3, threat_model="white_box")
    assert row["accuracy"] == [*(right[evaluation.truth == k].mean() for k in range(3)), None]
    for row in found["rows"]:  # the classes together are the row of the report
        whole = sum(n * share for n, share in zip(found["n"], row["accuracy"], strict=True) if n) / N
        same = {k: row[k] for k in ("defense", "attack", "epsilon", "threat_model")}
        assert whole == pytest.approx(row_of(finished["rows"], **same)["accuracy"])


def test_an_attack_that_met_few_images_says_so(config, evaluation, finished):
    few = next(o for o in evaluation.outcomes if (o.defense, o.attack, o.threat.epsilon) == ("jpeg", "pgd", 0.3))
    few = dataclasses.replace(few, attack="square", threat_model=BLACK, correct=few.correct[:11])
    outcomes = (*evaluation.outcomes, few)
    untrained = tuple(ThreatModel)
    changed = {"outcomes": outcomes, "threat_models": untrained, "rows": rows.rows(outcomes, untrained)}
    changed["notes"] = ("square met the first 11 images only",)
    made = SimpleNamespace(**{**vars(evaluation), **changed})
    found = report.build(config, made, finished["classifier"], finished["purifier"], command="x")
    tree = Tree(html.render(found, NAMES))
    row = row_of(found["rows"], defense="jpeg", attack="worst", epsilon=0.3, threat_model="black_box")
    text = f"{summary.percent(row['accuracy'])}{summary.interval(row)}n = 11"
    assert tree.table("headline")[-1][-1] == text
    assert [item.text for item in tree.all("li")][0] == found["notes"][0]
    assert found["notes"][0] in markdown.render(found)
    assert ", n = 11 |" in markdown.render(found)
    assert tree.table("headline")[0][4] == "Black-boxSquare only"  # a worst case of one is named
    assert "Here: square." in markdown.render(found)
    counted = classes.per_class([o for o in outcomes if o.defense == "jpeg"], evaluation.truth, untrained, 4)
    row = row_of(counted["rows"], threat_model="black_box", attack="worst")
    assert row["n"] == [int((evaluation.truth[:11] == k).sum()) for k in range(4)]
    assert classes.first(row, counted["n"]) == " (first 11)"
    clean = row_of(counted["rows"], attack="none")
    assert classes.first(clean, counted["n"]) == ""
    text = {label.get_text() for label in plots.classes(counted, NAMES).axes[0].get_xticklabels()}
    assert "black-box 0.3 (first 11)" in text


def test_without_all_true_classes_there_is_no_table_of_classes(config, evaluation, finished):
    few = SimpleNamespace(**{**vars(evaluation), "truth": None})
    assert classes.truth(few) is None
    made = report.build(config, few, finished["classifier"], finished["purifier"], command="x")
    assert "per_class" not in made
    assert Tree(html.render(made, NAMES)).all("section", id="classes") == []
    all_kept = SimpleNamespace(labels=evaluation.truth, n=N)
    np.testing.assert_array_equal(classes.truth(all_kept), evaluation.truth)


def test_the_first_table_of_the_text_is_honest(finished):
    text = markdown.render(finished)
    first = next(block for block in text.split("\n\n") if block.startswith("|"))
    assert first == markdown.headline(finished)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    assert lines[0] == ["epsilon", "defence", "clean", "gray-box worst", "white-box worst", "black-box worst"]
    assert [line[:2] for line in lines[2:]] == [
        [str(epsilon), name] for epsilon in EPSILONS for name in ("none", "vqunet", "jpeg")
    ]
    row = row_of(finished["rows"], defense="vqunet", attack="worst", epsilon=0.3, threat_model="white_box")
    assert lines[-2][4].startswith(f"{100 * row['accuracy']:.1f} (")
    assert lines[-3][3] == lines[-3][4]  # without a defence gray-box and white-box are one
    assert lines[-1][4:] == ["–", "–"]
    assert "Gray-box accuracy is not robustness." in text
    assert GRAY.knowledge in text and WHITE.knowledge in text


def test_radii_read_as_people_write_them():
    assert [summary.radius(budget) for budget in (("linf", 8 / 255), ("linf", 0.1), ("l2", 0.5))] == [
        "8/255",
        "0.1",
        "0.5 (l2)",
    ]
