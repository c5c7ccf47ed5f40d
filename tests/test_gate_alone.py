"""A gate that learns alone: what it is shown, and that nothing else moves."""

import keras
import numpy as np
import pytest
from test_gate import SIZES
from test_interruption import assert_same_weights, stop_after
from test_runs import losses_of, save_linear, silent, tiny

from vqunet_tf import VQUNet, data, pixels
from vqunet_tf.config import AttackConfig, TrainingConfig
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.models import classifiers
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, fit, gate, given
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import GrayBoxBatches


@pytest.fixture
def images(rng):
    return rng.integers(60, 196, size=(40, 8, 8, 1), dtype="uint8")


def linear(rng, classes=3):
    inputs = keras.Input((8, 8, 1))
    outputs = keras.layers.Dense(classes)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs)
    model.set_weights([rng.normal(size=(64, classes)).astype("float32"), np.zeros(classes, "float32")])
    return model


class TestNearest:
    def test_of_a_linear_classifier_they_lie_just_beyond_the_boundary(self, rng, images):
        """Distance |z_1 - z_2| / |w_1 - w_2|, two percent more, and up to 30 % of the way on top."""
        model = linear(rng, classes=2)
        found = adversaries.nearest(classifiers.with_features(model, (8, 8, 1)), images, 16, 0).astype("float64")
        clean = images.astype("float64") / 255
        weights = model.get_weights()[0].astype("float64")
        logits = clean.reshape(40, 64) @ weights
        second, first = np.argsort(logits, axis=1).T[-2:]
        gap = logits[range(40), first] - logits[range(40), second]
        slope = np.linalg.norm(weights[:, first] - weights[:, second], axis=0)
        way = np.linalg.norm((found - clean).reshape(40, 64), axis=1) / (gap / slope)
        way = way[gap / slope > 0.1]  # nearer ones are lost in the rounding of half precision
        assert 1.015 < way.min() < 1.1 and 1.25 < way.max() < 1.34
        np.testing.assert_array_equal((found.reshape(40, 64) @ weights).argmax(axis=1), second)

    def test_among_more_classes_all_are_misclassified(self, rng, images):
        guide = classifiers.with_features(linear(rng, classes=5), (8, 8, 1))
        found = adversaries.nearest(guide, images, 16, 0)
        said = [np.argmax(guide(pixels.to_unit(x))["logits"], axis=1) for x in (images, found)]
        assert (said[0] != said[1]).all()

    def test_the_same_seed_gives_the_same_within_the_unit_range(self, rng, images):
        guide = classifiers.with_features(linear(rng), (8, 8, 1))
        dark = images - images.min()
        first, again = (adversaries.nearest(guide, dark, 16, 3) for _ in range(2))
        assert first.dtype == np.float16 and first.min() >= 0 and first.max() <= 1
        np.testing.assert_array_equal(first, again)
        assert (adversaries.nearest(guide, dark, 16, 4) != first).any()


class TestBatches:
    def batches(self, images, nearest, **changes):
        training = TrainingConfig(batch_size=40, **changes)
        crafted = np.stack([images + 40, images - 40])
        return gate.GateBatches(
            GrayBoxBatches(Views(images, 2, 0, False, 0), crafted, training, AttackConfig()), nearest
        )

    def epochs(self, images, nearest, number=40):
        batches = self.batches(images, nearest)
        for epoch in range(number):
            batches.start(epoch)
            (order,) = batches.order[None]
            found = batches[0]
            assert found["seen"].dtype == found["attacked"].dtype == np.float32
            yield from zip(found["seen"], found["attacked"], images[order].astype("float32") / 255, order, strict=True)

    def test_half_are_clean_and_the_rest_of_four_kinds(self, images, monkeypatch):
        nearest = np.full(images.shape, 0.123, np.float16)
        pattern = np.tile(np.float32([[[1.0], [-0.5]]]), (8, 4, 1))
        monkeypatch.setattr(gate, "patterns", lambda shape, rng: np.repeat(pattern[None], shape[0], axis=0))
        kinds = {"clean": 0, "drawn back": 0, "nearest": 0, "rounded": 0, "noisy": 0}
        kinds |= {"patterned": 0, "patterned, rounded": 0}
        radii, sizes = [], []
        for seen, attacked, clean, _ in self.epochs(images, nearest):
            change = seen - clean
            if (seen == clean).all():
                kinds["clean"] += not attacked
            elif (seen == np.float32(np.float16(0.123))).all():
                kinds["nearest"] += attacked
            elif np.allclose(seen, 31 / 255):
                kinds["rounded"] += attacked
            elif np.ptp(change) < 1e-5:  # a share of +40 or of -40 everywhere
                radii.append(255 * np.abs(change).max())
                kinds["drawn back"] += attacked
            elif np.abs(change - change.max() * pattern).max() < 1e-5:
                sizes.append(255 * change.max())
                kinds["patterned"] += attacked
            elif np.abs(change - change[:, ::2].mean() * pattern).max() < 0.8 / 255:
                kinds["patterned, rounded"] += attacked
            else:
                kinds["noisy"] += attacked
        shares = {name: count / 1600 for name, count in kinds.items()}
        wanted = {"clean": 16 / 32, "drawn back": 5 / 32, "nearest": 2.5 / 32, "rounded": 2.5 / 32, "noisy": 3 / 32}
        assert shares == pytest.approx(wanted | {"patterned": 1.5 / 32, "patterned, rounded": 1.5 / 32}, abs=0.03)
        assert 0.79 < min(radii) < 1.0 and 36 < max(radii) < 40.01
        assert np.mean(np.log(radii)) == pytest.approx((np.log(0.8) + np.log(40)) / 2, abs=0.2)  # log-uniform
        largest = 255 * AttackConfig().epsilon
        assert 1.99 < min(sizes) < 3 and 0.8 * largest < max(sizes) < largest + 0.01
        assert np.mean(np.log(sizes)) == pytest.approx((np.log(2) + np.log(largest)) / 2, abs=0.25)

    @pytest.mark.parametrize(("epsilon", "radius"), [(0.1, 25.5), (1 / 255, 2.0)])
    def test_patterns_stay_in_the_unit_range_and_have_two_grey_levels_at_least(
        self, epsilon, radius, images, monkeypatch
    ):
        monkeypatch.setattr(gate, "patterns", lambda shape, rng: np.ones(shape, "float32"))
        monkeypatch.setattr(gate, "_KINDS", (0, 0, 0, 0, 1))
        shown = GrayBoxBatches(
            Views(images, 1, 0, False, 0), images[None], TrainingConfig(batch_size=40), AttackConfig(epsilon=epsilon)
        )
        batches = gate.GateBatches(shown, np.zeros(images.shape, np.float16))
        clean = images[batches.order].astype("float32") / 255
        change = 255 * (batches[0]["seen"] - clean)
        assert change.min() > 1.99 and change.max() < radius + 0.6  # rounded
        shown.views = Views(np.full_like(images, 255), 1, 0, False, 0)
        np.testing.assert_array_equal(batches[0]["seen"], 1.0)

    def test_an_adversary_that_is_hardly_one_stays_as_it_is(self, images):
        batches = self.batches(images, np.zeros(images.shape, np.float16))
        batches.shown.adversarial = np.stack([images, images])
        found = batches[0]
        kept = (found["seen"] == images[batches.order].astype("float32") / 255).all(axis=(1, 2, 3))
        black = (found["seen"] == 0).all(axis=(1, 2, 3))  # the nearest ones here
        assert (
            np.isfinite(found["seen"]).all() and black.sum() > 0 and kept.sum() + black.sum() >= 30
        )  # the rest are noisy or patterned


def test_its_loss_by_hand(images):
    model = VQUNet(gated=True, **SIZES)
    objective = gate.GateObjective(model)
    inputs = {"seen": images[:4].astype("float32") / 255, "attacked": np.array([0, 1, 1, 0], "float32")}
    logits = np.asarray(objective(inputs), "float64")
    np.testing.assert_allclose(logits, model.graph(inputs["seen"])["gate"], atol=1e-6)
    share = 1.0 / (1.0 + np.exp(-logits))
    expected = -np.log(np.where(inputs["attacked"] == 1, share, 1.0 - share)).mean()
    assert float(objective.compute_loss(inputs, None, logits)) == pytest.approx(expected, rel=1e-5)
    names = {weight.path.split("/")[0] for weight in objective.trainable_variables}
    assert names == {"gate_0", "gate_1", "gate_2", "gate_logit"}


def changes_of(tmp_path):
    save_linear(tmp_path / "mine.keras")
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "purifier.gated": True, "training.selection": "last"}
    return {**changes, "training.gate_epochs": 2, "training.average": 0.0}


def weights_by_layer(model):
    return {layer.name: layer.get_weights() for layer in model.graph.layers if layer.weights}


def test_it_comes_before_the_decoder_and_stays(tmp_path, monkeypatch):
    learned = {}
    train_gate = fit._Stages._train_gate

    def watched(self, name, purifier, whole, make):
        before = weights_by_layer(purifier)
        train_gate(self, name, purifier, whole, make)
        learned.update(before=before, after=weights_by_layer(purifier))
        said = purifier.graph.predict(pixels.to_unit(self.held_out.images), verbose=0)["gate"]
        learned["closed"] = np.mean(said > 1e-6)

    monkeypatch.setattr(fit._Stages, "_train_gate", watched)
    run = RunFolder(tmp_path / "run")
    config = tiny(**{**changes_of(tmp_path), "training.gate_false_alarms": 0.25})
    fit.train(config, run, say=silent)
    moved = {
        name
        for name, weights in learned["after"].items()
        if any(map(np.any, map(np.subtract, weights, learned["before"][name])))
    }
    assert moved == {"gate_0", "gate_1", "gate_2", "gate_logit"}
    held_out = len(data.load(config.data, "validation").labels)
    assert learned["closed"] == pytest.approx(round(0.25 * held_out) / held_out, abs=1.01 / held_out)
    purifier = weights_by_layer(run.load_purifier())
    for name in moved:
        for found, wanted in zip(purifier[name], learned["after"][name], strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert any(map(np.any, map(np.subtract, purifier["head"], learned["after"]["head"])))
    assert {stage for stage, _, _ in losses_of(run)} == {"purifier_gate", "purifier"}
    assert ("purifier", "1", "gate") not in losses_of(run)
    assert not run.checkpoints.exists()


def test_a_gate_alone_goes_on_from_a_purifier(tmp_path):
    """No epoch of anything else: all other weights stay to the last bit, and a share of the pixels may come in."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    changes = changes_of(tmp_path)
    fit.train(tiny(**{**changes, "training.gate_epochs": 0}), first, say=silent)
    again = {"training.start": str(first.purifier), "training.epochs": 0, "purifier.pixel_share": 0.25}
    fit.train(tiny(**{**changes, **again}), second, say=silent)
    before, after = weights_by_layer(first.load_purifier()), weights_by_layer(second.load_purifier())
    same = {name for name, weights in after.items() if all(map(np.array_equal, weights, before[name]))}
    assert set(after) - same == {"gate_0", "gate_1", "gate_2", "gate_logit"}
    assert second.load_purifier().pixel_share == 0.25
    assert {stage for stage, _, _ in losses_of(second)} == {"purifier_gate"}


def test_an_encoder_goes_on_from_a_purifier_whose_gate_stays(tmp_path):
    """The gate to the last bit; the code books, which belonged to the encoder as it was, are placed by what it gives now."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    changes = {**changes_of(tmp_path), "training.gate_epochs": 0, "training.freeze_encoder": True}
    changes |= {"training.encoder_epochs": 1, "training.head_weight": 1.0}
    fit.train(tiny(**changes), first, say=silent)
    again = {"training.start": str(first.purifier), "training.gate_weight": 0.0, "training.weight_decay": 0.5}
    fit.train(tiny(**{**changes, **again}), second, say=silent)
    before, after = weights_by_layer(first.load_purifier()), weights_by_layer(second.load_purifier())
    same = {name for name, weights in after.items() if all(map(np.array_equal, weights, before[name]))}
    assert same == {"gate_0", "gate_1", "gate_2", "gate_logit"}
    losses = losses_of(second)
    assert ("purifier_encoder", "1", "head") in losses and ("purifier", "1", "gate") not in losses
    assert not np.allclose(losses["purifier_encoder", "1", "head"], losses_of(first)["purifier_encoder", "1", "head"])
    start = given.start_of(first.purifier, tiny(**changes).purifier, 1, encoder_epochs=1)
    assert all(float(quantizer.steps) == 0.0 for quantizer in start.quantizers)


# 64 images: crafting 1 batch, its clean answers 1, the nearest 1, the gate 2 + 2 steps, the purifier 2 + 2.
@pytest.mark.parametrize("calls", [3, 4, 6, 8])
def test_a_stopped_run_goes_on_where_it_was(calls, tmp_path):
    """With a head that it begins anew, and a gate that learned before."""
    changes = {**changes_of(tmp_path), "training.head_weight": 1.0}
    config, runs = tiny(**changes), [RunFolder(tmp_path / name) for name in ("whole", "stopped")]
    fit.train(config, runs[0], say=silent)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(Interrupted):
            fit.train(config, runs[1], say=silent)
    fit.train(config, runs[1], say=silent)
    assert_same_weights(runs[0].load_purifier(), runs[1].load_purifier())


@pytest.mark.parametrize(
    "changes",
    [
        {"training.gate_epochs": 0, "training.start": "x.keras"},
        {"training.start": None},
        {"training.start": "x.keras", "purifier.gated": False},
    ],
    ids=str,
)
def test_no_epochs_of_anything_are_refused(changes, tmp_path):
    config = tiny(**{**changes_of(tmp_path), "training.epochs": 0, **changes})
    with pytest.raises(
        UserError,
        match="training.epochs: expected at least 1 where no gate or head alone goes on from a purifier, got 0",
    ):
        fit.train(config, RunFolder(tmp_path / "run"), say=silent)
    assert not (tmp_path / "run").exists()


def test_baselines_need_epochs(tmp_path):
    changes = {**changes_of(tmp_path), "training.epochs": 0, "training.start": "x.keras"}
    with pytest.raises(UserError, match="training.epochs: expected at least 1 to train dae, got 0"):
        fit.train(tiny(**changes), RunFolder(tmp_path / "run"), say=silent, baselines=["dae"])


def test_nearest_adversaries_that_are_asked_for_must_be_there(images):
    with pytest.raises(ValueError, match="Expected the nearest adversaries.*Received: nearest=None"):
        views = Views(images, 1, 0, False, 0)
        GrayBoxBatches(views, images[None], TrainingConfig(nearest=1.0), AttackConfig())
