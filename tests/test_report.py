"""The report says what was measured, all of it and nothing else; and the page needs nothing but itself."""

from __future__ import annotations

import base64
import configparser
import dataclasses
import fnmatch
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import keras
import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from vqunet_tf.attacks import ATTACKS
from vqunet_tf.config import Config, DataConfig
from vqunet_tf.defenses import DEFENSES, classic
from vqunet_tf.evaluation import (
    charts,
    checks,
    classes,
    html,
    markdown,
    palette,
    pictures,
    plots,
    probes,
    report,
    rows,
    suites,
    summary,
)
from vqunet_tf.evaluation.checks import Check
from vqunet_tf.evaluation.rows import Outcome
from vqunet_tf.evaluation.victims import VARIANTS
from vqunet_tf.models import VQUNet
from vqunet_tf.threat import Threat, ThreatModel

ROOT = Path(__file__).resolve().parents[1]
GRAY, WHITE, BLACK = ThreatModel
EPSILONS, N, KEPT, SHAPE = (0.1, 0.3), 40, 7, (16, 16, 1)
NAMES = ("cat", "<script>alert(1)</script>", 'a "dog" & co', "never seen")
VOID = {"meta", "link", "img"}  # of those the page uses


@pytest.fixture(scope="module")
def models():
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    classifier = keras.Model(inputs, keras.layers.Dense(len(NAMES))(keras.layers.Flatten()(inputs)), name="linear")
    return classifier, VQUNet(widths=(4, 4), num_embeddings=(8, 16), embedding_dim=2, channels=1)


@pytest.fixture(scope="module")
def evaluation():
    """Three defences; JPEG was not attacked white-box, and nothing was attacked black-box."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (KEPT, *SHAPE)).astype(np.float32)
    truth = rng.integers(0, 3, N)

    def outcome(defense, attack, epsilon, model, share):
        threat = Threat("linf", epsilon)
        moved = threat.project(images + rng.uniform(-epsilon, epsilon, images.shape).astype(np.float32), images)
        correct = rng.uniform(size=N) < share
        return Outcome(
            defense=defense,
            attack=attack,
            threat=threat,
            steps=10,
            threat_model=model,
            correct=correct,
            distance=epsilon,
            seconds=1.5,
            adversarial=moved,
        )

    outcomes = [outcome(name, "none", 0.0, GRAY, 0.9) for name in ("none", "vqunet", "jpeg")]
    for epsilon in EPSILONS:
        for attack in ("fgsm", "pgd"):
            outcomes.append(outcome("none", attack, epsilon, GRAY, 0.2))
            outcomes += [outcome(name, attack, epsilon, GRAY, 0.8 - epsilon) for name in ("vqunet", "jpeg")]
            outcomes.append(outcome("vqunet", attack, epsilon, WHITE, 0.5 - epsilon))
    return SimpleNamespace(
        outcomes=tuple(outcomes),
        threat_models=(GRAY, WHITE),
        checks=(Check("fine", np.bool_(True), "as it should be"), Check("deterministic", True, "two calls agree")),
        images=images,
        labels=truth[:KEPT],
        truth=truth,
        seed=3,
        n=N,
        rows=rows.rows(outcomes, (GRAY, WHITE)),
    )


@pytest.fixture(scope="module")
def config():
    config = Config(
        data=DataConfig(dataset="/home/somebody/pictures", data_dir="/home/somebody/tfds", class_names=NAMES)
    )
    return dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, path="/home/somebody/c.keras"))


@pytest.fixture(scope="module")
def finished(config, evaluation):
    """report.json as a dict."""
    classifier = {"name": "linear", "params": 1234, "accuracy": 0.9, "n": 500}
    purifier = {"name": "vqunet", "params": 5678, "clean_accuracy": 0.85, "n": 500, "codebook_usage": [0.5, 0.75]}
    purifier["code_counts"] = [[5, 0, 3, 0], [1, 1, 0, 6]]
    return report.build(config, evaluation, classifier, purifier, command="python -m trainers.evaluate --run_dir=x")


@pytest.fixture(scope="module")
def page(finished, evaluation, models):
    """report.html with everything on it."""
    strips = pictures.strips(evaluation, *models, NAMES)
    return html.render(finished, NAMES, strips, pictures.code_maps(evaluation, models[1]))


class Tree(HTMLParser):
    """Elements of a page in order: tag, attributes, text inside; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[SimpleNamespace] = []
        self.elements: list[SimpleNamespace] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", inside=[e.tag for e in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {[e.tag for e in self.open]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e.tag == tag and all(e.attrs.get(k) == v for k, v in attrs.items())]

    def table(self, name: str) -> list[list[str]]:
        """Texts of the cells of the first table of that class, line by line."""
        start = next(i for i, e in enumerate(self.elements) if e.tag == "table" and e.attrs.get("class") == name)
        lines: list[list[str]] = []
        for element in self.elements[start + 1 :]:
            if "table" not in element.inside:
                break
            if element.tag == "tr":
                lines.append([])
            elif element.tag in ("th", "td"):
                lines[-1].append(element.text)
        return lines


def _row(found, **wanted):
    return next(row for row in found if wanted.items() <= row.items())


# === report.json ===


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


def test_no_file_says_where_things_lie(finished, page):
    texts = (json.dumps(finished), markdown.render(finished), page)
    assert all("somebody" not in text and "/home" not in text for text in texts)
    assert finished["dataset"] == finished["config"]["data"]["dataset"] == "pictures"
    assert finished["config"]["classifier"]["path"] == "c.keras"
    assert summary.without_paths({"a": ["C:\\x\\y.keras", 3, None, "plain"]}) == {"a": ["y.keras", 3, None, "plain"]}


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
    row = _row(found["rows"], defense="vqunet", attack="worst", epsilon=0.3, threat_model="white_box")
    assert row["accuracy"] == [*(right[evaluation.truth == k].mean() for k in range(3)), None]
    for row in found["rows"]:  # the classes together are the row of the report
        whole = sum(n * share for n, share in zip(found["n"], row["accuracy"], strict=True) if n) / N
        same = {k: row[k] for k in ("defense", "attack", "epsilon", "threat_model")}
        assert whole == pytest.approx(_row(finished["rows"], **same)["accuracy"])


def test_an_attack_that_met_few_images_says_so(config, evaluation, finished):
    few = next(o for o in evaluation.outcomes if (o.defense, o.attack, o.threat.epsilon) == ("jpeg", "pgd", 0.3))
    few = dataclasses.replace(few, attack="square", threat_model=BLACK, correct=few.correct[:11])
    outcomes = (*evaluation.outcomes, few)
    models = tuple(ThreatModel)
    changed = {"outcomes": outcomes, "threat_models": models, "rows": rows.rows(outcomes, models)}
    changed["notes"] = ("square met the first 11 images only",)
    made = SimpleNamespace(**{**vars(evaluation), **changed})
    found = report.build(config, made, finished["classifier"], finished["purifier"], command="x")
    tree = Tree(html.render(found, NAMES))
    row = _row(found["rows"], defense="jpeg", attack="worst", epsilon=0.3, threat_model="black_box")
    text = f"{summary.percent(row['accuracy'])}{summary.interval(row)}n = 11"
    assert tree.table("headline")[-1][-1] == text
    assert [item.text for item in tree.all("li")][0] == found["notes"][0]
    assert found["notes"][0] in markdown.render(found)
    assert ", n = 11 |" in markdown.render(found)
    assert tree.table("headline")[0][4] == "Black-boxSquare only"  # a worst case of one is named
    assert "Here: square." in markdown.render(found)
    counted = classes.per_class([o for o in outcomes if o.defense == "jpeg"], evaluation.truth, models, 4)
    row = _row(counted["rows"], threat_model="black_box", attack="worst")
    assert row["n"] == [int((evaluation.truth[:11] == k).sum()) for k in range(4)]
    assert classes.first(row, counted["n"]) == " (first 11)"
    clean = _row(counted["rows"], attack="none")
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


# === report.html ===


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


def test_text_from_outside_is_text(finished, evaluation, models):
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
    page = html.render(hostile, NAMES, pictures.strips(evaluation, *models, NAMES))
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
            wanted = [_row(finished["rows"], defense=defense, attack="none")]
            for model in ("gray_box", "white_box"):
                # Without a defence the attackers are one; JPEG was not attacked white-box.
                asked = "gray_box" if defense == "none" else model
                key = {"defense": defense, "attack": "worst", "epsilon": epsilon, "threat_model": asked}
                wanted.append(None if (defense, model) == ("jpeg", "white_box") else _row(finished["rows"], **key))
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
    row = _row(rows, defense="vqunet", attack="pgd", threat_model="white_box", epsilon=0.3)
    row["variants"] = {"straight_through": 0.5, "soft": 0.25, "identity": 0.75}
    _row(rows, defense="vqunet", attack="fgsm", threat_model="white_box")["variants"] = {"own": 0.5}  # no choice
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


def test_colours_can_be_read_in_both_schemes():
    for scheme in (palette.LIGHT, palette.DARK):
        ink = palette.INK[scheme]
        assert palette.contrast(ink, palette.PAPER[scheme]) > 7
        assert len(palette.ramp(scheme)) == palette.STEPS
        for color in palette.ramp(scheme):
            parts = [(int(ink[i : i + 2], 16), int(color[i : i + 2], 16)) for i in (1, 3, 5)]
            small = "#" + "".join(f"{round(0.85 * one + 0.15 * other):02x}" for one, other in parts)
            assert palette.contrast(small, color) > 4.5, color  # the intervals are set at 85 %
        for color in palette.lines(["none", "vqunet", *"abcdefgh"], "vqunet").values():
            assert palette.contrast(color, palette.PAPER[scheme]) >= 3, (scheme, color)
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert [palette.step(share) for share in (0.0, 0.04, 0.06, 0.5, 1.0)] == [0, 0, 1, 5, 10]


def test_the_file_stays_small_with_large_images(rng):
    noise = (rng.uniform(size=(224, 300, 3)) * 255).astype(np.uint8)
    uri = html.data_uri(noise)
    kept = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert kept.size == (80, 60)
    assert len(uri) * 6 * 5 * 3 < 2_500_000  # six images, five pictures each, three attackers
    exact = html.data_uri(noise[:10, :10])
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(exact.partition(",")[2]))))
    np.testing.assert_array_equal(back, noise[:10, :10])


# === What is drawn ===


def test_curves_go_through_the_numbers(finished):
    gray, white = charts.curves(finished["rows"])
    assert [curve.defense for curve in gray.curves] == ["none", "jpeg", "vqunet"]
    assert [curve.defense for curve in white.curves] == ["none", "vqunet"]
    height = charts.HEIGHT - charts.TOP - charts.BOTTOM
    for point, epsilon in zip(white.curves[1].points, (0.0, *EPSILONS), strict=True):
        name = "worst" if epsilon else "none"
        wanted = _row(finished["rows"], defense="vqunet", attack=name, epsilon=epsilon)
        if epsilon:
            wanted = _row(finished["rows"], defense="vqunet", attack=name, epsilon=epsilon, threat_model="white_box")
        assert 1 - (point.y - charts.TOP) / height == pytest.approx(wanted["accuracy"], abs=1e-3)
        width = charts.WIDTH - charts.LEFT - charts.RIGHT
        assert (point.x - charts.LEFT) / width == pytest.approx(epsilon / 0.3, abs=1e-3)
    assert [text for _, text in white.ticks] == ["0", "0.1", "0.3"]
    single = [row for row in finished["rows"] if row["epsilon"] != 0.3]
    assert charts.curves(single) == [] and plots.curves(single) is None

    drawn = plots.curves(finished["rows"]).axes[1].lines
    lines = {line.get_label(): line.get_ydata() for line in drawn}
    wanted = [
        _row(finished["rows"], defense="vqunet", attack="worst", epsilon=e, threat_model="white_box") for e in EPSILONS
    ]
    np.testing.assert_allclose(lines["VQUNet"][1:], [100 * row["accuracy"] for row in wanted])


def test_code_usage_in_closed_form():
    one, even = charts.histograms([[0, 7, 0, 0], [5, 5, 5, 5]])
    assert (one.used, one.codes, one.perplexity, one.most) == (1, 4, 1.0, 1.0)
    assert (even.used, even.perplexity, even.most) == (4, pytest.approx(4.0), 0.25)
    assert charts.perplexity([1, 1, 2]) == pytest.approx(2**1.5)


def test_pictures_are_what_the_models_say(evaluation, models):
    classifier, purifier = models
    gray, white = pictures.strips(evaluation, classifier, purifier, NAMES, count=6)
    assert (gray.outcome.attack, gray.outcome.threat.epsilon, white.outcome.threat_model) == ("pgd", 0.3, WHITE)
    assert [panel.title for panel in white.panels] == ["clean", "attacked", "purified", "added ×5", "left ×5"]
    clean, attacked, purified, added, left = (panel.images for panel in white.panels)
    np.testing.assert_array_equal(clean, evaluation.images[:6])
    np.testing.assert_array_equal(attacked, white.outcome.adversarial[:6])
    np.testing.assert_allclose(purified, purifier.purify(attacked), atol=1e-6)
    np.testing.assert_allclose(added, np.clip(0.5 + 5 * (attacked - clean), 0, 1), atol=1e-6)
    np.testing.assert_allclose(left, np.clip(0.5 + 5 * (purified - clean), 0, 1), atol=1e-6)
    logits = classifier.predict(purified, verbose=0).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for answer, share, label in zip(white.panels[2].answers, shares, evaluation.labels, strict=False):
        assert answer.name == NAMES[share.argmax()]
        assert answer.confidence == pytest.approx(share.max(), abs=1e-5)
        assert answer.right == (share.argmax() == label)


def test_code_maps_are_the_codes(evaluation, models):
    _, purifier = models
    found = pictures.code_maps(evaluation, purifier, count=2)
    attacked = pictures.shown(evaluation.outcomes, "vqunet", GRAY).adversarial
    for level in found:
        codes = {
            name: purifier.codes(x)[f"level_{level.level}"]
            for name, x in (("clean", evaluation.images), ("gray_box", attacked))
        }
        assert level.changed["gray_box"] == pytest.approx(np.mean(codes["clean"] != codes["gray_box"]))
        colors = np.concatenate([level.maps[name].reshape(-1, 3) for name in codes])
        chosen = np.concatenate([codes[name][:2].ravel() for name in codes])
        pairs = {(int(code), tuple(color)) for code, color in zip(chosen, colors, strict=True)}
        assert len(pairs) == len(set(chosen))  # one colour for each code
    assert set(found[0].maps) == {"clean", "gray_box", "white_box"}
    assert found[0].maps["clean"].shape == (2, 8, 8, 3)
    plain = keras.Sequential([keras.Input(SHAPE), keras.layers.Activation("linear")])
    assert pictures.code_maps(evaluation, plain) == []


def test_several_groups_of_codes_are_one_picture(evaluation):
    keras.utils.set_random_seed(1)
    purifier = VQUNet(widths=(4, 4), num_embeddings=4, embedding_dim=2, groups=2, channels=1)
    level = pictures.code_maps(evaluation, purifier)[0]
    assert level.maps["clean"].shape == (3, 8, 8, 3)
    codes = purifier.codes(evaluation.images)["level_0"]
    attacked = purifier.codes(pictures.shown(evaluation.outcomes, "vqunet", WHITE).adversarial)["level_0"]
    assert level.changed["white_box"] == pytest.approx(np.mean((codes != attacked).any(axis=-1)))


def test_close_codes_have_close_colours():
    line = np.linspace(0, 1, 32)[:, None] * np.array([[3.0, 1.0, -2.0]])
    colors = palette.codes(line).astype(int)
    steps = np.abs(np.diff(colors, axis=0)).sum(axis=1)
    assert np.abs(colors[-1] - colors[0]).sum() > 8 * steps.max() > 0
    assert palette.codes(np.zeros((1, 2))).shape == (1, 3)


def test_the_plots_are_written_and_old_ones_go(evaluation, models, finished, tmp_path):
    plots.write(tmp_path, evaluation, *models, NAMES, finished)
    names = {"pictures", "curves", "heat_map", "code_maps", "code_usage", "classes"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert matplotlib.image.imread(tmp_path / "pictures.png").shape[1] == 1000
    example = np.asarray(Image.open(tmp_path / "examples" / "1_gray_box.png"))
    bare = pictures.shown(evaluation.outcomes, "none", GRAY).adversarial
    np.testing.assert_array_equal(example, np.rint(255 * bare[1, ..., 0]))
    outcomes = tuple(o for o in evaluation.outcomes if o.threat.epsilon != 0.3)
    less = SimpleNamespace(**{**vars(evaluation), "outcomes": outcomes, "rows": rows.rows(outcomes, (GRAY, WHITE))})
    plots.write(tmp_path, less, *models, NAMES)
    assert {path.stem for path in tmp_path.glob("*.png")} == names - {"curves", "code_usage"}


# === report.md ===


def test_the_first_table_of_the_text_is_honest(finished):
    text = markdown.render(finished)
    first = next(block for block in text.split("\n\n") if block.startswith("|"))
    assert first == markdown.headline(finished)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    assert lines[0] == ["epsilon", "defence", "clean", "gray-box worst", "white-box worst", "black-box worst"]
    assert [line[:2] for line in lines[2:]] == [
        [str(epsilon), name] for epsilon in EPSILONS for name in ("none", "vqunet", "jpeg")
    ]
    row = _row(finished["rows"], defense="vqunet", attack="worst", epsilon=0.3, threat_model="white_box")
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


def test_the_templates_are_installed_with_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["vqunet_tf"].split(",")]
    found = [path.relative_to(ROOT / "vqunet_tf").as_posix() for path in (ROOT / "vqunet_tf").rglob("templates/*")]
    assert len(found) == 4
    assert all(any(fnmatch.fnmatch(path, pattern) for pattern in patterns) for path in found)


# === docs/evaluation.md ===

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


def test_the_example_of_the_page_runs_as_written(models, evaluation):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "evaluation.md").read_text(encoding="utf-8"), flags=re.S)
    code = code.replace('suite="adaptive"', 'attacks=["fgsm"]').replace("print(", "shown = (")
    names = {"classifier": models[0], "images": evaluation.images, "labels": evaluation.labels}
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
