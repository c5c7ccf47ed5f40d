"""What a report draws: curves through its numbers, images as the models see them, colours that can be read."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import matplotlib.image
import numpy as np
import pytest
from PIL import Image
from reported import EPSILONS, GRAY, NAMES, SHAPE, WHITE, row_of

from vqunet_tf.evaluation import charts, palette, pictures, plots, rows
from vqunet_tf.models import VQUNet


def test_curves_go_through_the_numbers(finished):
    gray, white = charts.curves(finished["rows"])
    assert [curve.defense for curve in gray.curves] == ["none", "jpeg", "vqunet"]
    assert [curve.defense for curve in white.curves] == ["none", "vqunet"]
    height = charts.HEIGHT - charts.TOP - charts.BOTTOM
    for point, epsilon in zip(white.curves[1].points, (0.0, *EPSILONS), strict=True):
        name = "worst" if epsilon else "none"
        wanted = row_of(finished["rows"], defense="vqunet", attack=name, epsilon=epsilon)
        if epsilon:
            wanted = row_of(finished["rows"], defense="vqunet", attack=name, epsilon=epsilon, threat_model="white_box")
        assert 1 - (point.y - charts.TOP) / height == pytest.approx(wanted["accuracy"], abs=1e-3)
        width = charts.WIDTH - charts.LEFT - charts.RIGHT
        assert (point.x - charts.LEFT) / width == pytest.approx(epsilon / 0.3, abs=1e-3)
    assert [text for _, text in white.ticks] == ["0", "0.1", "0.3"]
    single = [row for row in finished["rows"] if row["epsilon"] != 0.3]
    assert charts.curves(single) == [] and plots.curves(single) is None

    drawn = plots.curves(finished["rows"]).axes[1].lines
    lines = {line.get_label(): line.get_ydata() for line in drawn}
    wanted = [
        row_of(finished["rows"], defense="vqunet", attack="worst", epsilon=e, threat_model="white_box")
        for e in EPSILONS
    ]
    np.testing.assert_allclose(lines["VQUNet"][1:], [100 * row["accuracy"] for row in wanted])


def test_code_usage_in_closed_form():
    one, even = charts.histograms([[0, 7, 0, 0], [5, 5, 5, 5]])
    assert (one.used, one.codes, one.perplexity, one.most) == (1, 4, 1.0, 1.0)
    assert (even.used, even.perplexity, even.most) == (4, pytest.approx(4.0), 0.25)
    assert charts.perplexity([1, 1, 2]) == pytest.approx(2**1.5)


def test_pictures_are_what_the_models_say(evaluation, untrained):
    classifier, purifier = untrained
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


def test_code_maps_are_the_codes(evaluation, untrained):
    _, purifier = untrained
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


def test_the_plots_are_written_and_old_ones_go(evaluation, untrained, finished, tmp_path):
    plots.write(tmp_path, evaluation, *untrained, NAMES, finished)
    names = {"pictures", "curves", "heat_map", "code_maps", "code_usage", "classes"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert matplotlib.image.imread(tmp_path / "pictures.png").shape[1] == 1000
    example = np.asarray(Image.open(tmp_path / "examples" / "1_gray_box.png"))
    bare = pictures.shown(evaluation.outcomes, "none", GRAY).adversarial
    np.testing.assert_array_equal(example, np.rint(255 * bare[1, ..., 0]))
    outcomes = tuple(o for o in evaluation.outcomes if o.threat.epsilon != 0.3)
    less = SimpleNamespace(**{**vars(evaluation), "outcomes": outcomes, "rows": rows.rows(outcomes, (GRAY, WHITE))})
    plots.write(tmp_path, less, *untrained, NAMES)
    assert {path.stem for path in tmp_path.glob("*.png")} == names - {"curves", "code_usage"}
