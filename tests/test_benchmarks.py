"""The benchmark of training: it prints what it promises, and both of its loops do the same arithmetic."""

import json

import keras
import pytest

from benchmarks import bare, purifier, training
from vqunet_tf.recipes import preset

# Every part of the loss with a weight of its own.
WEIGHTS = {"training.feature_weight": 0.5, "training.guidance_weight": 2.0, "training.codebook_weight": 0.7}
# The bare loop has neither of these.
LEFT_OUT = {"training.head_weight": 1.0, "training.final_pixel_weight": 0.5}
CONFIG = preset("smoke", "smoke").replace({"training.batch_size": 8, "attack.batch_size": 8, **WEIGHTS, **LEFT_OUT})
SHAPE = (8, 8, 1)


def test_it_prints_what_it_promises_and_the_bare_loop_does_the_same_arithmetic(capsys, monkeypatch):
    made, known = bare.make_step, []

    def once(*settings):
        """The first step again, for XLA too: compiling takes longer than all the rest."""
        known.append(known[0] if known else made(*settings))
        return known[-1]

    monkeypatch.setattr(bare, "make_step", once)
    monkeypatch.setattr(training, "preset", lambda name, dataset: CONFIG)
    monkeypatch.setattr(training.purifier, "matmul_peak", lambda: 1e8)  # slow enough for any share of it to be seen
    monkeypatch.setitem(training.SHAPES, "smoke", SHAPE)
    training.main(["--presets=smoke", "--turns=1", "--steps=6"])
    peak, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert peak == {"matmul_peak_gflops": 0.1}
    assert [row.pop("measure") for row in rows] == ["training", "input", "crafting", "crafting", "xla"]
    assert {row.pop("preset") for row in rows} == {"smoke"}
    crafting = {"cleverhans", "ours_images_per_second", "cleverhans_images_per_second", "times_cleverhans"}
    promised = [
        {"ours_images_per_second", "bare_images_per_second", "ours_of_bare", "million_operations", "share_of_peak"},
        {"images_per_second", "times_training"},
        crafting,
        crafting,
        {"graph_images_per_second", "xla_images_per_second", "xla_of_graph"},
    ]
    for row, names in zip(rows, promised, strict=True):
        assert names <= set(row)
        assert all(row[name] > 0 for name in names - {"cleverhans"})
    assert [row["steps"] for row in rows[2:4]] == [1, 2]
    assert rows[0]["bare_loss"] == pytest.approx(rows[0]["ours_loss"], rel=1e-4)


def test_another_arithmetic_would_be_seen(monkeypatch):
    """The tolerance tells a loop apart that learns a twentieth slower."""

    class Slower(keras.optimizers.schedules.LearningRateSchedule):
        def __init__(self, rate):
            self.rate = rate

        def __call__(self, step):
            return 0.95 * self.rate(step)

    made = bare.make_step
    monkeypatch.setattr(
        bare, "make_step", lambda model, guide, config, rate, jit: made(model, guide, config, Slower(rate), jit)
    )
    row = training.measure_training(training.subject(CONFIG, SHAPE), turns=1, steps=6, peak=1e11)
    assert row["bare_loss"] != pytest.approx(row["ours_loss"], rel=1e-4)


@pytest.mark.parametrize(("name", "shape"), [("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_a_preset_with_a_gate_is_measured_without(name, shape):
    what = training.subject(preset("", name), shape)
    model = what.purifier()
    assert not model.gated and not model.pixel_share and not what.config.training.nearest


def test_operations_are_those_of_the_layers():
    what = training.subject(CONFIG, SHAPE)
    model = what.purifier()
    # 8x8x1, widths 8 and 16: a 4x4 convolution with stride 2, a residual block at 4x4, and so on; by hand for the
    # classifier: 4x4x1x8 at 4x4; two 3x3x8x8 at 4x4; 3x3x8x16 at 2x2; two 3x3x16x16 at 2x2; 16x10.
    classifier = 16 * 128 + 2 * 16 * 576 + 4 * 1152 + 2 * 4 * 2304 + 160
    assert purifier.of_layers(what.guide, SHAPE) == classifier
    # The search: 16 and 4 places, 32 codes of width 8.
    assert purifier.of_search(model, SHAPE) == (16 + 4) * 32 * 8
    layers = purifier.of_layers(model.graph, SHAPE)
    assert training.training_operations(model, what.guide, SHAPE) == 2 * (3 * layers + 5120 + 3 * classifier)
