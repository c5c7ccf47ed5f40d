"""A share of the image itself, in a few tones, where a gate is open."""

import keras
import numpy as np
import pytest
from test_gate import SIZES, pair
from test_runs import losses_of, save_linear, silent, tiny

from vqunet_tf import VQUNet, backend, pixels
from vqunet_tf.config import AttackConfig, PurifierConfig, TrainingConfig
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import blocks, classifiers
from vqunet_tf.models.operations import multiply_accumulates
from vqunet_tf.recipes import ABLATIONS, ablation
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import devices, fit, given
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import EncoderBatches, GrayBoxBatches
from vqunet_tf.training.objectives import GrayBoxObjective


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(12, 8, 8, 1), dtype="uint8")


def with_share(drawn, share, tones=64):
    """The same weights, with a share of the pixels."""
    model = VQUNet(gated=True, pixel_share=share, tones=tones, **SIZES)
    for layer in model.graph.layers:
        if layer.weights:
            layer.set_weights(drawn.graph.get_layer(layer.name).get_weights())
    return model


@pytest.mark.parametrize(("share", "tones"), [(0.25, 64), (0.75, 2), (0.5, 5)])
def test_an_open_gate_gives_a_share_of_the_image_in_so_many_tones(share, tones, images):
    drawn, _ = pair(-60.0)
    unit = images.astype("float64") / 255
    toned = np.floor(unit * (tones - 1) + 0.5) / (
        tones - 1
    )  # there are no ties: 2 (tones - 1) v = 255 (2 k + 1) is even = odd
    expected = share * toned + (1 - share) * drawn.purify(images)
    np.testing.assert_allclose(with_share(drawn, share, tones).purify(images), expected, atol=1e-6)


def test_a_closed_gate_gives_none_of_it(images):
    drawn, _ = pair(60.0)
    np.testing.assert_array_equal(with_share(drawn, 0.5).purify(images), drawn.purify(images))


def test_each_image_has_its_own_share(images):
    drawn, _ = pair(0.0)
    last = drawn.graph.get_layer("gate_logit")
    last.set_weights([np.ones_like(last.get_weights()[0]), last.get_weights()[1]])
    logits = np.asarray(drawn.graph(pixels.to_unit(images))["gate"])
    last.set_weights([last.get_weights()[0], -np.median(logits, keepdims=True)])
    model = with_share(drawn, 0.5)
    closed = np.asarray(drawn.graph(pixels.to_unit(images))["gate"]) > 0
    same = np.abs(model.purify(images) - drawn.purify(images)).max(axis=(1, 2, 3)) == 0
    assert 0 < closed.sum() < len(images)
    np.testing.assert_array_equal(same, closed)


def test_tones_are_few_and_stay_what_they_are():
    layer = blocks.Tones(16)
    found = np.asarray(layer(np.linspace(0, 1, 1001, dtype="float32")))
    np.testing.assert_allclose(np.unique(found), np.arange(16) / 15, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(layer(found)), found)
    assert np.abs(found - np.linspace(0, 1, 1001)).max() <= 0.5 / 15 + 1e-6


def test_their_gradient_passes_straight_through():
    layer = blocks.Tones(4)
    x = keras.ops.convert_to_tensor(np.array([0.1, 0.4, 0.9], "float32"))
    slope = backend.input_gradient(lambda x: 3.0 * layer(x))(x)
    np.testing.assert_allclose(slope, [3.0, 3.0, 3.0])


def test_a_purifier_with_a_share_comes_back_from_a_file(tmp_path, images):
    model = with_share(pair(-60.0)[0], 0.3, 8)
    model.save(tmp_path / "purifier.keras")
    again = keras.models.load_model(tmp_path / "purifier.keras")
    assert (again.pixel_share, again.tones) == (0.3, 8)
    np.testing.assert_allclose(again.purify(images), model.purify(images), atol=1e-6)


def test_it_costs_no_multiply_accumulates():
    plain, shared = VQUNet(gated=True, **SIZES), VQUNet(gated=True, pixel_share=0.5, **SIZES)
    assert multiply_accumulates(plain, (16, 16, 1)) == multiply_accumulates(shared, (16, 16, 1))
    assert plain.count_params() == shared.count_params()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pixel_share": 0.5},
            r"Expected a gate \(gated=True\) where pixel_share is above 0. Received: pixel_share=0.5",
        ),
        ({"gated": True, "pixel_share": 1.0}, r"Expected pixel_share in \[0, 1\).*Received: 1.0 and 64"),
        ({"gated": True, "pixel_share": 0.5, "tones": 1}, "tones of at least 2. Received: 0.5 and 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQUNet(**SIZES, **arguments)


def test_no_ablation_has_one():
    full = PurifierConfig(gated=True, pixel_share=0.5)
    assert not any(ablation(name, full).pixel_share for name in ABLATIONS)


def test_a_purifier_without_one_can_begin_one_with(tmp_path, images):
    """Weight by weight, though they come in another order."""
    drawn, _ = pair(-60.0)
    drawn.save(tmp_path / "start.keras")
    settings = PurifierConfig(
        widths=(4, 6), num_embeddings=(8,), embedding_dim=(2,), gated=True, pixel_share=0.5, tones=4
    )
    begun = given.start_of(tmp_path / "start.keras", settings, 1)
    assert (begun.pixel_share, begun.tones) == (0.5, 4)
    np.testing.assert_allclose(begun.purify(images), with_share(drawn, 0.5, 4).purify(images), atol=1e-6)


class TestVictims:
    def chain(self, bias):
        inputs = keras.Input((8, 8, 1))
        classifier = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
        return Chain(classifier, with_share(pair(bias)[0], 0.5))

    def test_a_gate_that_is_held_open_shows_the_pixels_too(self, images):
        chain = self.chain(60.0)
        opened = self.chain(-60.0)
        opened.classifier.set_weights(chain.classifier.get_weights())
        x = keras.ops.convert_to_tensor(pixels.to_unit(images))
        np.testing.assert_allclose(chain.through("open_gate")(x), opened(x), atol=1e-5)
        assert np.abs(np.asarray(chain(x)) - np.asarray(opened(x))).max() > 1e-3


class TestTraining:
    def batches(self, images, **changes):
        training = TrainingConfig(batch_size=12, clean=1, noisy=1, adversarial=1, nearest=1, **changes)
        crafted = np.stack([255 - images, 255 - images])
        nearest = (images / 255 + 0.001).astype("float16")
        views = Views(images, 2, 0, False, 0)
        return GrayBoxBatches(views, crafted, training, AttackConfig(), nearest=nearest, mixed=True)

    def test_a_batch_says_whose_gate_is_open(self, images):
        kinds = {}
        batches = self.batches(images)
        for epoch in range(20):
            batches.start(epoch)
            batch = batches[0]
            clean = batch["clean"].astype("float32") / 255
            assert batch["seen"].dtype == np.float32 and batch["share"].shape == (12, 1, 1, 1)
            for seen, wanted, attacked, opened in zip(
                batch["seen"], clean, batch["attacked"], batch["open"], strict=True
            ):
                if np.allclose(seen, wanted, atol=1e-7):
                    kind = "clean"
                elif np.allclose(seen - wanted, 0.001, atol=4e-4):
                    kind = "nearest"
                else:
                    kind = "adversarial" if np.allclose(seen, 1 - wanted, atol=1e-6) else "noisy"
                kinds.setdefault(kind, set()).add((float(attacked), float(opened)))
        assert kinds.pop("clean") - {(0, 0)} == {(0, 1)}  # noise may be less than half a grey level
        assert kinds == {"nearest": {(1, 1)}, "adversarial": {(1, 0)}, "noisy": {(0, 0)}}

    def test_an_encoder_is_shown_them_as_bytes(self, images):
        shown = EncoderBatches(self.batches(images), TrainingConfig(batch_size=12))
        shown.shown.labels = np.zeros(12, int)
        whole = shown.shown[0]["seen"]
        found = shown[0]["seen"]
        assert found.dtype == np.uint8 and whole.dtype == np.float32
        np.testing.assert_array_equal(found, np.rint(255 * whole).astype("uint8"))

    def test_what_is_learned_from_has_its_own_share_and_open_gates(self, images):
        """P(x') = drawn + share (toned - drawn) where the gate is held open, drawn from the bottleneck alone where it is closed."""
        guide = classifiers.with_features(classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1), (8, 8, 1))
        model = VQUNet(gated=True, pixel_share=0.5, quantize=False, **SIZES)
        bias = model.graph.get_layer("gate_logit").bias
        bias.assign([60.0])
        objective = GrayBoxObjective(model, guide, TrainingConfig(gate_epochs=1))
        unit = images[:3].astype("float32") / 255
        share = np.array([0.0, 0.4, 0.9], "float32").reshape(3, 1, 1, 1)
        inputs = {"seen": unit, "clean": images[:3], "share": share, "open": np.array([1, 1, 0], "float32")}
        found = objective(inputs, training=True)
        plain = objective(inputs, training=False)
        closed = model.purify(images[:3])
        np.testing.assert_allclose(plain["logits"], guide(closed)["logits"], atol=1e-3)
        bias.assign([-60.0])
        opened = np.asarray(model.graph(unit)["drawn"])
        drawn = np.concatenate([opened[:2], closed[2:]])
        toned = np.rint(unit * 63) / 63
        mixed = drawn + share * np.array([1, 1, 0], "float32").reshape(3, 1, 1, 1) * (toned - drawn)
        np.testing.assert_allclose(found["images"], drawn, atol=1e-4)
        np.testing.assert_allclose(found["logits"], guide(mixed)["logits"], atol=1e-3)
        assert "gate" not in objective.weights_of


def test_a_run_learns_with_shares_and_nearest_adversaries(tmp_path):
    save_linear(tmp_path / "mine.keras")
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "purifier.gated": True, "purifier.pixel_share": 0.7}
    changes |= {"training.nearest": 1.0, "training.gate_epochs": 1, "training.selection": "last"}
    run = RunFolder(tmp_path / "run")
    fit.train(tiny(**changes), run, say=silent, baselines=["dae"])
    assert run.load_purifier().pixel_share == 0.7 and not run.load_baseline("dae").pixel_share
    assert {stage for stage, _, _ in losses_of(run)} == {"purifier_gate", "purifier", "dae"}


def test_four_replicas_learn_a_gate_shares_and_a_head_like_one_device(tmp_path):
    """What is held open belongs to its images, whichever replica has them."""
    assert devices.replicas("mirrored") == 4
    save_linear(tmp_path / "mine.keras")
    losses = {}
    for strategy in ("none", "mirrored"):
        run = RunFolder(tmp_path / strategy)
        changes = {"classifier.path": str(tmp_path / "mine.keras"), "training.strategy": strategy}
        changes |= {"purifier.gated": True, "purifier.pixel_share": 0.7, "training.nearest": 1.0}
        # A small rate, and no codes: rounding that tips the choice of a code is a difference that grows.
        changes |= {"purifier.quantize": False, "training.gate_epochs": 3, "training.epochs": 3}
        changes |= {"training.learning_rate": 5e-4, "training.selection": "last"}
        changes |= {"purifier.classes": 10, "training.certainty_epochs": 3}
        fit.train(tiny(**changes), run, say=silent)
        losses[strategy] = losses_of(run)
    assert set(losses["none"]) == set(losses["mirrored"])
    assert {("purifier_gate", "3", "gate"), ("purifier_certainty", "3", "class")} <= set(losses["none"])
    for place, value in losses["none"].items():
        assert losses["mirrored"][place] == pytest.approx(value, abs=1e-4), place


def test_in_half_precision_gate_and_pixels_stay_in_full(images):
    """What a gate looks for is a few grey levels high, and what of the image is let through is the image."""
    models = {}
    for precision in ("float32", "mixed_bfloat16"):
        with devices.precision(precision):
            models[precision] = VQUNet(gated=True, pixel_share=0.7, quantize=False, classes=3, **SIZES)
    full, half = models.values()
    full.graph.get_layer("gate_logit").bias.assign([-1.0])
    half.set_weights(full.get_weights())
    assert half.graph.get_layer("encoder_0_0_conv1").compute_dtype == "bfloat16"
    unit = images[:3].astype("float32") / 255
    found, wanted = (
        {name: np.asarray(model.graph(unit)[name]) for name in ("gate", "drawn", "pixels", "classes", "certainty")}
        for model in (half, full)
    )
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    np.testing.assert_allclose(found["gate"], wanted["gate"], atol=1e-6)
    assert np.abs(found["drawn"] - wanted["drawn"]).max() > 1e-4  # the decoder does feel it
    opened = found["gate"] <= 0
    assert opened.any()
    toned = np.rint(unit * 63) / 63
    np.testing.assert_allclose((found["drawn"] + found["pixels"])[opened], toned[opened], atol=1e-6)
