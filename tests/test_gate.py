"""Skip connections that close where an image looks tampered with, and the encoder that is left to draw from."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_interruption import assert_same_weights, stop_after
from test_runs import losses_of, save_linear, silent, tiny

from vqunet_tf import VQUNet, data, pixels
from vqunet_tf.config import AttackConfig, Config, PurifierConfig, TrainingConfig
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import blocks, classifiers
from vqunet_tf.recipes import ABLATIONS, ablation, preset
from vqunet_tf.runs import RunFolder, save_model
from vqunet_tf.training import encoder, fit, gate, loop
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import EncoderBatches, GrayBoxBatches
from vqunet_tf.training.encoder import EncoderObjective, adopt, freeze
from vqunet_tf.training.objectives import GrayBoxObjective, new_head

SIZES = {"widths": (4, 6), "num_embeddings": 8, "embedding_dim": 2, "channels": 1}


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(40, 8, 8, 1), dtype="uint8")


def log_softmax(logits):
    logits = np.asarray(logits, "float64")
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def pair(bias):
    """A gated purifier whose gate says `bias` of every image, and one without a gate and else the same weights."""
    keras.utils.set_random_seed(5)
    gated, plain = VQUNet(gated=True, **SIZES), VQUNet(**SIZES)
    for layer in plain.graph.layers:
        layer.set_weights(gated.graph.get_layer(layer.name).get_weights())
    last = gated.graph.get_layer("gate_logit")
    last.set_weights([np.zeros_like(last.get_weights()[0]), np.full(1, bias, "float32")])
    return gated, plain


def test_an_open_gate_changes_nothing(images):
    gated, plain = pair(-60.0)
    np.testing.assert_array_equal(gated.purify(images), plain.purify(images))
    np.testing.assert_array_equal(gated.graph(pixels.to_unit(images))["gate"], np.full(40, -60.0, "float32"))


def test_a_closed_gate_leaves_the_bottleneck_alone(images):
    """As if nothing came of the skip connection: its last convolution gives zeros."""
    gated, plain = pair(60.0)
    different = np.abs(gated.purify(images) - plain.purify(images)).max(axis=(1, 2, 3))
    assert different.min() > 1e-4
    last = plain.graph.get_layer("from_codes_0")
    last.set_weights([0.0 * weight for weight in last.get_weights()])
    np.testing.assert_allclose(gated.purify(images), plain.purify(images), atol=1e-6)


def test_the_gate_is_an_image_s_own(images):
    """Closed where the logit of that image is above 0, whatever its neighbours are."""
    keras.utils.set_random_seed(5)
    model = VQUNet(gated=True, **SIZES)
    gate.calibrate(model, images, 0.5)
    together = model.graph(pixels.to_unit(images))
    assert together["gate"].shape == (40,) and np.ptp(np.asarray(together["gate"])) > 0
    assert 0 < np.sum(np.asarray(together["gate"]) > 0) < 40
    alone = model.graph(pixels.to_unit(images[7:8]))
    np.testing.assert_allclose(alone["gate"][0], together["gate"][7], atol=1e-5)
    np.testing.assert_allclose(alone["images"][0], together["images"][7], atol=1e-5)


def test_a_gate_passes_all_or_nothing(images):
    """On either side of its threshold, however close: no share that the decoder could learn to make up for."""
    open_, plain = pair(-1e-3)
    np.testing.assert_array_equal(open_.purify(images), plain.purify(images))
    nearly, surely = pair(1e-3)[0], pair(60.0)[0]
    np.testing.assert_array_equal(nearly.purify(images), surely.purify(images))


@pytest.mark.parametrize(("share", "closed"), [(0.1, 4), (0.97, 39), (0.012, 0)])
def test_a_calibrated_gate_closes_for_that_share_of_clean_images(share, closed, images):
    keras.utils.set_random_seed(5)
    model = VQUNet(gated=True, **SIZES)
    before = np.asarray(model.graph(pixels.to_unit(images))["gate"])
    gate.calibrate(model, images, share)
    after = np.asarray(model.graph(pixels.to_unit(images))["gate"])
    assert np.sum(after > 1e-6) == closed  # that of the threshold itself may be an ulp above
    np.testing.assert_allclose(np.ptp(after - before), 0.0, atol=1e-6)


def test_a_gated_purifier_comes_back_from_a_file(tmp_path, images):
    model = VQUNet(gated=True, **SIZES)
    model.save(tmp_path / "purifier.keras")
    again = keras.models.load_model(tmp_path / "purifier.keras")
    assert again.gated
    np.testing.assert_allclose(again.purify(images), model.purify(images), atol=1e-6)


@pytest.mark.parametrize("arguments", [{"skips": False}, {"finest_skip": 1}], ids=str)
def test_a_gate_without_skip_connections_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected skip connections where gated is True.*with 2 levels"):
        VQUNet(gated=True, **SIZES, **arguments)


def test_no_ablation_has_a_gate():
    assert not any(ablation(name, PurifierConfig(gated=True)).gated for name in ABLATIONS)


class TestVictims:
    def chains(self, bias):
        gated, plain = pair(bias)
        inputs = keras.Input((8, 8, 1))
        classifier = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
        return Chain(classifier, gated), Chain(classifier, plain)

    def test_a_gate_that_is_held_open_leaves_the_chain_without_one(self, images):
        chain, plain = self.chains(60.0)
        assert chain.variants[-3:-1] == ("open_gate", "soft_gate") and "open_gate" not in plain.variants
        x = keras.ops.convert_to_tensor(pixels.to_unit(images))
        wanted = plain.through("straight_through")(x)
        np.testing.assert_allclose(chain.through("open_gate")(x), wanted, atol=1e-5)
        assert np.abs(np.asarray(chain(x)) - np.asarray(wanted)).max() > 1e-3  # outside it is closed again
        np.testing.assert_allclose(chain(x), chain.through("straight_through")(x), atol=1e-6)

    def test_a_soft_gate_has_a_gradient_where_the_closed_one_has_none(self, images):
        chain, _ = self.chains(60.0)
        bias = chain.model.graph.get_layer("gate_logit").bias
        x = keras.ops.convert_to_tensor(pixels.to_unit(images))
        found = {}
        for variant in ("straight_through", "soft_gate"):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(chain.through(variant)(x)))
            found[variant] = tape.gradient(loss, bias.value)
            np.testing.assert_allclose(chain.through(variant)(x), chain(x), atol=1e-5)
        assert found["straight_through"] is None
        assert abs(float(found["soft_gate"][0])) > 1e-6

    def test_only_two_ways_are_known(self):
        with pytest.raises(ValueError, match="Expected one of open, soft. Received: 'shut'"), blocks.gates("shut"):
            pass


class TestTraining:
    settings = TrainingConfig(head_weight=1.0, encoder_epochs=1, batch_size=40)

    def batches(self, images, training, answers=None):
        views = Views(images, 2, 0, False, 0)
        crafted = np.stack([255 - images, 255 - images])
        return GrayBoxBatches(views, crafted, training, AttackConfig(), answers=answers, labels=np.arange(40) % 4)

    def test_a_batch_says_which_images_are_adversarial(self, images):
        settings = dataclasses.replace(self.settings, clean=1, noisy=1, adversarial=2)
        inputs = self.batches(images, settings)[0]
        crafted = (inputs["seen"] == 255 - inputs["clean"]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(inputs["attacked"], crafted.astype("float32"))
        assert 0 < crafted.sum() < 40 and inputs["attacked"].dtype == np.float32

    def test_the_gate_s_loss_by_hand(self, images):
        guide = classifiers.with_features(classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1), (8, 8, 1))
        model = VQUNet(gated=True, **SIZES)
        objective = GrayBoxObjective(model, guide, TrainingConfig(gate_weight=3.0))
        inputs = {"seen": images[:4], "clean": images[4:8], "attacked": np.array([0, 1, 1, 0], "float32")}
        outputs = objective(inputs)
        share = 1.0 / (1.0 + np.exp(-np.asarray(outputs["gate"], "float64")))
        expected = -np.log(np.where(inputs["attacked"] == 1, share, 1.0 - share)).mean()
        parts = objective.losses_of(inputs, None, outputs)
        assert float(parts["gate"]) == pytest.approx(expected, rel=1e-5)
        rest = sum(float(objective.weights_of[name] * value) for name, value in parts.items() if name != "gate")
        assert float(objective.compute_loss(inputs, None, outputs)) == pytest.approx(rest + 3 * expected, rel=1e-5)

    def test_a_gate_learns_to_tell_what_is_tampered_with(self, images):
        """Inverted images of a half that is dark are bright: told apart after a few steps."""
        guide = classifiers.with_features(classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1), (8, 8, 1))
        keras.utils.set_random_seed(0)
        objective = GrayBoxObjective(VQUNet(gated=True, **SIZES), guide, TrainingConfig())
        objective.compile(optimizer=keras.optimizers.Adam(1e-2))
        dark = images // 4
        inputs = {"seen": np.concatenate([dark, 255 - dark]), "clean": np.concatenate([dark, dark])}
        inputs["attacked"] = np.repeat([0.0, 1.0], 40).astype("float32")
        for _ in range(25):
            objective.train_on_batch(inputs)
        logits = np.asarray(objective.purifier.graph(pixels.to_unit(inputs["seen"]))["gate"])
        np.testing.assert_array_equal(logits > 0, inputs["attacked"] == 1)

    def test_an_encoder_is_shown_covered_squares(self, images):
        bright = np.maximum(images, 1)
        settings = dataclasses.replace(self.settings, cutout=3, clean=1, noisy=0, adversarial=0)
        whole = self.batches(bright, settings)
        found, shown = EncoderBatches(whole, settings)[0]["seen"], whole[0]["seen"]
        mean = np.rint(bright.mean())
        for image, source in zip(found, shown, strict=True):
            rows, columns = np.nonzero((image != source)[..., 0])
            assert np.ptp(rows) <= 2 and np.ptp(columns) <= 2 and len(rows) > 4
            assert (image[image != source] == mean).all()

    def test_an_encoder_s_guidance_by_hand(self, images):
        """A quarter of the label, three of what the classifier said of that view."""
        settings = dataclasses.replace(self.settings, encoder_guidance=0.75)
        answers = {"logits": np.random.default_rng(1).normal(size=(2, 40, 4)).astype("float32")}
        whole = self.batches(images, settings, answers)
        inputs, shown = EncoderBatches(whole, settings)[0], whole[0]
        assert set(inputs) == {"seen", "label", "logits"}
        np.testing.assert_array_equal(inputs["logits"], shown["logits"])
        purifier = VQUNet(**SIZES)
        objective = EncoderObjective(purifier, new_head(purifier, 4), settings)
        outputs = objective(inputs)
        p, q = log_softmax(inputs["logits"]), log_softmax(outputs)
        expected = -0.25 * q[np.arange(40), inputs["label"]].mean() + 0.75 * np.mean(
            np.sum(np.exp(p) * (p - q), axis=1)
        )
        assert float(objective.compute_loss(inputs, None, outputs)) == pytest.approx(expected, rel=1e-4)

    def test_a_frozen_encoder_stays_and_another_purifier_takes_it_over(self, images):
        guide = classifiers.with_features(classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1), (8, 8, 1))
        model, other = VQUNet(gated=True, **SIZES), VQUNet(quantize=False, skips=False, **SIZES)
        layers = {"stem", "down_1", "to_codes_1", *(f"encoder_{i}_0_conv{j}" for i in (0, 1) for j in (1, 2))}
        adopt(other, model)
        same = {
            layer.name
            for layer in other.graph.layers
            if layer.weights
            and all(map(np.array_equal, layer.get_weights(), model.graph.get_layer(layer.name).get_weights()))
        }
        assert layers <= same and "from_codes_1" not in same
        freeze(model)
        objective = GrayBoxObjective(model, guide, TrainingConfig())
        objective.compile(optimizer=keras.optimizers.Adam(1e-2))
        before = {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
        inputs = {"seen": images, "clean": images, "attacked": np.zeros(40, "float32")}
        objective.train_on_batch(inputs)
        objective.train_on_batch(inputs)
        moved = {w.path.split("/")[0] for w in model.weights if np.any(keras.ops.convert_to_numpy(w) != before[w.path])}
        assert not moved & layers
        assert {"to_codes_0", "from_codes_0", "from_codes_1", "head", "gate_0", "gate_logit"} <= moved


ALONE = {"training.encoder_epochs": 1, "training.head_weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.cutout": 4}, "training.cutout: expected 0 where no encoder learns alone.*got 4"),
        ({"training.encoder_guidance": 0.5}, "training.encoder_guidance: expected 0 where no encoder.*got 0.5"),
        ({"training.freeze_encoder": True}, "freeze_encoder: expected training.encoder_epochs or training.start"),
        ({"training.objective": "adaptive", **ALONE, "training.cutout": 4}, "cutout.*with the objective gray_box"),
        (
            {"training.objective": "adaptive", "purifier.gated": True},
            "purifier.gated: expected false.*purifier.gated=false.*gate_epochs=0",
        ),
        (
            {"training.loop_epsilon": 0.1, "purifier.gated": True},
            "loop_epsilon: expected 0 for a gated purifier.*got 0.1",
        ),
        ({"training.gate_epochs": 3}, "gate_epochs: expected 0 for a purifier without a gate, got 3: set it to 0, or"),
        (
            {"training.objective": "adaptive", "training.gate_epochs": 3},
            "gate_epochs: expected 0.*got 3: set it to 0 .no gate",
        ),
        (
            {"training.gate_weight": 0.0, "purifier.gated": True},
            "gate_weight: expected more than 0 for a gated purifier",
        ),
        ({"training.adversarial": 0.0, "purifier.gated": True}, "adversaries and others.*got shares of 0, 1 and 0.5"),
        (
            {"training.clean": 0, "training.noisy": 0, "purifier.gated": True},
            "adversaries and others.*got shares of 2.5, 0",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.train(tiny(**changes), RunFolder(tmp_path / "run"), say=silent)
    assert not (tmp_path / "run").exists()


def test_a_share_is_a_share():
    with pytest.raises(UserError, match="gate_false_alarms: expected a share below 1, got 1"):
        Config().replace({"training.gate_false_alarms": 1.0})
    with pytest.raises(UserError, match="encoder_guidance: expected a share from 0 to 1, got 1.5"):
        Config().replace({"training.encoder_guidance": 1.5})


def test_a_baseline_takes_over_the_purifier_s_encoder_and_none_of_other_sizes(tmp_path):
    save_linear(tmp_path / "mine.keras")
    config = tiny(**{**ALONE, "classifier.path": str(tmp_path / "mine.keras"), "training.freeze_encoder": True})
    run = RunFolder(tmp_path / "run")
    fit.train(config, run, say=silent)
    begun = RunFolder(tmp_path / "begun")
    changes = {"training.start": str(run.purifier), "training.encoder_epochs": 0}
    fit.train(config.replace(changes), begun, say=silent, baselines=["dae"])
    for model in (begun.load_purifier(), begun.load_baseline("dae")):  # that of `start`, though no baseline lies there
        for found, wanted in zip(
            encoder._encoder(model).get_weights(), encoder._encoder(run.load_purifier()).get_weights(), strict=True
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    save_model(VQUNet(**SIZES), run.purifier)
    with pytest.raises(UserError, match="purifier.keras: expected a purifier of this run's sizes, whose encoder"):
        fit.train(config, run, say=silent, baselines=["dae"])


def test_an_encoder_s_own_decay(tmp_path, monkeypatch):
    save_linear(tmp_path / "mine.keras")
    changes = {**ALONE, "classifier.path": str(tmp_path / "mine.keras"), "training.encoder_weight_decay": 0.5}
    decays, build = {}, loop.optimizers.build
    monkeypatch.setattr(loop.optimizers, "build", lambda *args: decays.update({len(decays): args[1]}) or build(*args))
    fit.train(tiny(**{**changes, "training.weight_decay": 0.25}), RunFolder(tmp_path / "run"), say=silent)
    assert decays == {0: 0.5, 1: 0.25}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_run_calibrates_its_gate_where_it_is_asked_to(share, tmp_path, monkeypatch):
    save_linear(tmp_path / "mine.keras")
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "purifier.gated": True}
    asked = []
    monkeypatch.setattr(gate, "calibrate", lambda purifier, images, share: asked.append((len(images), share)))
    config = tiny(**{**changes, "training.gate_false_alarms": share, "training.selection": "last"})
    fit.train(config, RunFolder(tmp_path / "run"), say=silent)
    held_out = len(data.load(config.data, "validation").labels)
    assert asked == ([(held_out, share)] if share else [])


def test_adaptive_presets_have_no_gate():
    for name in ("digits", "fashion_mnist", "cifar10", "another"):
        config = preset("", name, "adaptive")
        assert not config.purifier.gated and not config.training.freeze_encoder and not config.training.cutout


def test_a_run_keeps_its_encoder_and_its_baseline_has_the_same(tmp_path):
    """The encoder learns once; what came of it is in the purifier and in the baseline, and survives a stop."""
    save_linear(tmp_path / "mine.keras")
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "purifier.gated": True, "training.selection": "last"}
    changes |= {"training.head_weight": 0.5, "training.encoder_epochs": 1, "training.freeze_encoder": True}
    changes |= {"training.encoder_guidance": 0.5, "training.cutout": 4, "training.average": 0.0}
    config, runs = tiny(**changes), [RunFolder(tmp_path / name) for name in ("whole", "stopped")]
    learned = {}
    train_encoder = fit._Stages._train_encoder

    def watched(self, name, purifier, whole):
        head = train_encoder(self, name, purifier, whole)
        learned[self.run.path.name] = [encoder._encoder(purifier).get_weights()]
        return head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit._Stages, "_train_encoder", watched)
        fit.train(config, runs[0], say=silent, baselines=["dae"])
        stop_after(patch, 6)  # crafted, answered, two steps of the encoder, then one of the purifier
        with pytest.raises(Interrupted):
            fit.train(config, runs[1], say=silent, baselines=["dae"])
    fit.train(config, runs[1], say=silent, baselines=["dae"])
    stages = {stage for stage, _, _ in losses_of(runs[0])}
    assert stages == {"purifier_encoder", "purifier", "dae"} == {stage for stage, _, _ in losses_of(runs[1])}
    assert ("purifier", "1", "gate") in losses_of(runs[0])
    for model in (runs[0].load_purifier(), runs[0].load_baseline("dae"), runs[1].load_purifier()):
        for found, wanted in zip(encoder._encoder(model).get_weights(), learned["whole"][0], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert_same_weights(runs[0].load_purifier(), runs[1].load_purifier())
