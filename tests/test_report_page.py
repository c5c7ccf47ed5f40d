"""The page of the report: it needs nothing but itself, and what is on it is the report."""

from __future__ import annotations

import base64
import configparser
import fnmatch
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import Tree
from PIL import Image
from reported import EPSILONS, NAMES, row_of

from vqunet_tf.evaluation import html, markdown, pictures, summary
from vqunet_tf.threat import ThreatModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page(finished, evaluation, untrained):
    """report.html with everything on it."""
    strips = pictures.strips(evaluation, *untrained, NAMES)
    return html.render(finished, NAMES, strips, pictures.code_maps(evaluation, untrained[1]))


def test_no_file_says_where_things_lie(finished, page):
    texts = (json.dumps(finished), markdown.render(finished), page)
    assert all("somebody" not in text and "/home" not in text for text in texts)
    assert finished["dataset"] == finished["config"]["data"]["dataset"] == "pictures"
    assert finished["config"]["classifier"]["path"] == "c.keras"
    assert summary.without_paths({"a": ["C:\\x\\y.keras", 3, None, "plain"]}) == {"a": ["y.keras", 3, None, "plain"]}


def test_the_page_needs_nothing_but_itself(page):
    tree = Tree(page)
    for element in tree.elements:
        for name, value in element.attrs.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value.startswith(("data:", "#")), (element.tag, value[:60])
            assert not name.startswith("on")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[\w+/=]+", "", page))
    (policy,) = [e.attrs["content"] for e in tree.all("meta") if "http-equiv" in e.attrs]
    assert policy.startswith("default-src 'none'")
    targets = {e.attrs["href"][1:] for e in tree.all("a")}
    assert targets <= {e.attrs.get("id") for e in tree.elements}
    assert {e.attrs["id"] for e in tree.all("section")} == targets | {"scope"}
    assert len(page) < 3_000_000


def test_text_from_outside_is_text(finished, evaluation, untrained):
    evil = '<img src=x onerror="alert(2)"></style></script>'
    rows = [{**row, "attack": evil if row["attack"] == "fgsm" else row["attack"]} for row in finished["rows"]]
    rows = [{**row, "defense": evil if row["defense"] == "jpeg" else row["defense"]} for row in rows]
    hostile = {
        **finished,
        "dataset": evil,
        "rows": rows,
        "checks": [{"name": evil, "passed": False, "detail": evil}],
        "command": evil,
        "config": {"name": evil},
        "host": {**finished["host"], "processor": evil},
    }
    page = html.render(hostile, NAMES, pictures.strips(evaluation, *untrained, NAMES))
    tree = Tree(page)
    (script,) = tree.all("script")
    assert "alert" not in script.text
    assert all(e.attrs["src"].startswith("data:image/png;base64,") for e in tree.all("img"))
    assert NAMES[1] not in page and evil not in page
    (title,) = (element for element in tree.all("title") if "head" in element.inside)
    assert title.text == f"{evil}: accuracy under attack"
    assert NAMES[1] in [line[0] for line in tree.table("pin classes")]


def test_the_first_table_is_the_report(page, finished):
    lines = Tree(page).table("headline")
    assert lines[0] == ["Defence", "Clean", "Gray-box", "White-box", "Black-box"]
    shown = {}
    for line in lines[1:]:
        if len(line) == 1:
            epsilon = float(line[0].rpartition("= ")[2])
        else:
            shown[line[0], epsilon] = line[1:]
    assert len(shown) == 3 * len(EPSILONS)
    for epsilon in EPSILONS:
        for defense, name in (("none", "no defence"), ("vqunet", "VQUNet"), ("jpeg", "JPEG")):
            wanted = [row_of(finished["rows"], defense=defense, attack="none")]
            for model in ("gray_box", "white_box"):
                # Without a defence the attackers are one; JPEG was not attacked white-box.
                asked = "gray_box" if defense == "none" else model
                key = {"defense": defense, "attack": "worst", "epsilon": epsilon, "threat_model": asked}
                wanted.append(None if (defense, model) == ("jpeg", "white_box") else row_of(finished["rows"], **key))
            texts = ["–" if row is None else summary.percent(row["accuracy"]) + summary.interval(row) for row in wanted]
            assert shown[name, epsilon] == [*texts, "–"]


def test_every_row_is_on_the_page(page, finished):
    lines = Tree(page).table("pin rows")
    assert len(lines) == 1 + len(finished["rows"])
    for line, row in zip(lines[1:], finished["rows"], strict=True):
        assert (line[0], line[2], line[6]) == (row["defense"], row["attack"], str(row["n"]))
        assert line[7] == f"{100 * row['accuracy']:.1f}"
        assert line[1] == ("–" if row["attack"] == "none" else row["threat_model"])


def test_a_failed_check_is_seen_first(page, finished):
    assert Tree(page).all("div", **{"class": "banner"}) == []
    assert "All 2 checks passed" in page
    checks = [{"name": "a_fine", "passed": True, "detail": ""}, {"name": "b_bad", "passed": False, "detail": "why"}]
    failed = {**finished, "checks": checks}
    tree = Tree(html.render(failed, NAMES))
    (banner,) = tree.all("div", **{"class": "banner"})
    assert "1 of 2 checks failed" in banner.text and "b_bad" in banner.text and "a_fine" not in banner.text
    assert "header" in banner.inside
    assert [item.text.split()[0] for item in tree.all("li") if "checks" not in item.attrs][-2:] == ["b", "a"]
    text = markdown.render(failed)
    assert text.index("1 of 2 checks failed") < text.index("| epsilon")
    assert text.index("| `b_bad`") < text.index("| `a_fine`")


def test_the_scope_comes_before_the_numbers(page, finished):
    assert page.index("Gray-box accuracy is not robustness.") < page.index('class="headline"')
    assert all(model.knowledge.replace("'", "&#39;") in page for model in ThreatModel)
    assert page.count("Here: FGSM, PGD.") == 2 and 'Black-box <span class="faint">not measured' in page
    gray = {**finished, "rows": [row for row in finished["rows"] if row["threat_model"] == "gray_box"]}
    assert "nothing here speaks of robustness" not in page
    assert "nothing here speaks of robustness" in html.render(gray, NAMES)
    assert "White-box attacks were **not measured**" in markdown.render(gray)


def test_each_gradient_is_shown_and_the_strongest_marked(finished):
    rows = [dict(row) for row in finished["rows"]]
    row = row_of(rows, defense="vqunet", attack="pgd", threat_model="white_box", epsilon=0.3)
    row["variants"] = {"straight_through": 0.5, "soft": 0.25, "identity": 0.75}
    row_of(rows, defense="vqunet", attack="fgsm", threat_model="white_box")["variants"] = {"own": 0.5}  # no choice
    tree = Tree(html.render({**finished, "rows": rows}, NAMES))
    assert [line[1:] for line in tree.table("pin gradients")[1:]] == [["50.0", "25.0", "75.0"]]
    (least,) = [e.text for e in tree.all("td") if "least" in e.attrs.get("class", "")]
    assert least == "25.0"
    assert "**25.0**" in markdown.render({**finished, "rows": rows})


def test_a_report_of_an_earlier_version_is_still_read():
    old = json.loads((ROOT / "results" / "fashion_mnist" / "report.json").read_text())
    old = {key: value for key, value in old.items() if key not in ("per_class", "config", "seconds")}
    Tree(html.render(old, [str(k) for k in range(10)]))
    assert markdown.headline(old) in markdown.render(old)


def test_the_file_stays_small_with_large_images(rng):
    noise = (rng.uniform(size=(224, 300, 3)) * 255).astype(np.uint8)
    uri = html.data_uri(noise)
    kept = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert kept.size == (80, 60)
    assert len(uri) * 6 * 5 * 3 < 2_500_000  # six images, five pictures each, three attackers
    exact = html.data_uri(noise[:10, :10])
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(exact.partition(",")[2]))))
    np.testing.assert_array_equal(back, noise[:10, :10])


def test_the_templates_are_installed_with_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["vqunet_tf"].split(",")]
    found = [path.relative_to(ROOT / "vqunet_tf").as_posix() for path in (ROOT / "vqunet_tf").rglob("templates/*")]
    assert len(found) == 4
    assert all(any(fnmatch.fnmatch(path, pattern) for pattern in patterns) for path in found)
