"""docs/evaluation.md names all there is, its example runs as written, and the sample report is whole."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

from pages import Tree

from vqunet_tf.attacks import ATTACKS
from vqunet_tf.defenses import DEFENSES, classic
from vqunet_tf.evaluation import checks, probes, suites
from vqunet_tf.evaluation.victims import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_the_page_names_all_there_is():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    built = [*ATTACKS, *suites.SUITES, *DEFENSES, *VARIANTS, *(name for name in checks.__all__ if name.islower())]
    built += [name for name in vars(probes) if name.endswith(("_succeeds", "_little", "_quantizers", "_nothing"))]
    built.remove("from_outcomes")
    assert len(built) > 40
    assert [name for name in built if f"`{name}`" not in text] == []
    for strengths in (classic.GRAY, classic.COLOUR):
        quality, bits, window, weight = dataclasses.astuple(strengths)
        assert f"`jpeg` {quality}, `bit_depth` {bits}, `median` {window}, `total_variation` {weight}" in text


def test_the_example_of_the_page_runs_as_written(untrained, evaluation):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "evaluation.md").read_text(encoding="utf-8"), flags=re.S)
    code = code.replace('suite="adaptive"', 'attacks=["fgsm"]').replace("print(", "shown = (")
    names = {"classifier": untrained[0], "images": evaluation.images, "labels": evaluation.labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained classifier fails checks
        exec(code, names)
    found = {(row["defense"], row["threat_model"]) for row in names["shown"]}
    assert found == {("none", "gray_box"), ("purifier", "gray_box"), ("purifier", "white_box")}


def test_the_sample_report_is_whole_and_says_nothing_of_a_machine():
    text = (DOCS / "sample_report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert len(text) < 3_000_000
    assert {"headline", "curves", "attacks", "pictures", "codes", "classes", "checks", "rows", "again"} <= {
        element.attrs["id"] for element in tree.all("section")
    }
    assert not re.search(r"/(home|tmp|root|work|usr)/|https?:", text)
    assert "digits: accuracy under attack" in text
    assert "sample_report.html" in (DOCS / "evaluation.md").read_text(encoding="utf-8")
