"""A head on the bottleneck that closes the skip connections of images of whose class it is certain."""

import dataclasses

import keras
import numpy as np
import pytest
from test_gate import SIZES, log_softmax, pair
from test_gate_alone import weights_by_layer
from test_interruption import assert_same_weights, stop_after
from test_runs import losses_of, save_linear, silent, tiny

from vqunet_tf import VQUNet, backend, data, pixels
from vqunet_tf.config import AttackConfig, PurifierConfig, TrainingConfig
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import blocks
from vqunet_tf.models.operations import multiply_accumulates
from vqunet_tf.recipes import ABLATIONS, ablation
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import certainty, fit, given
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import EncoderBatches, GrayBoxBatches


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(40, 8, 8, 1), dtype="uint8")


def with_head(gated, scale=0.0, threshold=0.0):
    """The same weights, with a head on the bottleneck of random weights of that scale."""
    model = VQUNet(**{**gated.get_config(), "name": None, "classes": 3})
    for layer in model.graph.layers:
        if layer.weights and layer.name not in ("classes", "certainty"):
            layer.set_weights(gated.graph.get_layer(layer.name).get_weights())
    head = model.graph.get_layer("classes")
    shape = head.kernel.shape
    head.set_weights([scale * np.random.default_rng(1).normal(size=shape).astype("float32"), np.zeros(3, "float32")])
    model.graph.get_layer("certainty").threshold.assign(threshold)
    return model


class TestLayer:
    def test_is_the_logarithm_of_the_likeliest_class_s_odds(self, rng):
        logits = rng.normal(size=(50, 4)).astype("float32") * 3
        share = np.exp(log_softmax(logits)).max(axis=1)
        layer = blocks.Certainty()
        np.testing.assert_allclose(layer(logits), np.log(share / (1 - share)), atol=1e-4)
        layer.threshold.assign(1.5)
        np.testing.assert_allclose(layer(logits), np.log(share / (1 - share)) - 1.5, atol=1e-4)
        assert not layer.trainable_weights

    def test_where_the_share_rounds_to_one_it_still_tells_how_sure(self):
        found = blocks.Certainty()(np.array([[200.0, 0.0, 0.0], [0.0, 300.0, 0.0]], "float32"))
        np.testing.assert_allclose(found, [200 - np.log(2), 300 - np.log(2)], rtol=1e-6)

    def test_two_equal_logits_are_even_odds(self):
        np.testing.assert_allclose(blocks.Certainty()(np.array([[5.0, 5.0]], "float32")), [0.0], atol=1e-6)


def test_a_head_that_has_not_learned_changes_nothing(images):
    gated, _ = pair(-60.0)
    fresh = with_head(gated)
    np.testing.assert_array_equal(fresh.purify(images), gated.purify(images))
    np.testing.assert_allclose(fresh.graph(pixels.to_unit(images))["certainty"], -np.log(2), atol=1e-6)


def test_the_head_sees_the_mean_of_the_bottleneck(images):
    model = with_head(pair(-60.0)[0], 2.0)
    found = model.graph(pixels.to_unit(images))
    seen = np.maximum(np.asarray(found["bottleneck"], "float64"), 0).mean(axis=(1, 2))
    expected = seen @ model.graph.get_layer("classes").get_weights()[0]
    np.testing.assert_allclose(found["classes"], expected, atol=1e-5)
    assert np.ptp(np.asarray(found["certainty"])) > 0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_certain_images_are_drawn_from_the_bottleneck_alone_and_others_as_the_gate_says(share, images):
    keras.utils.set_random_seed(5)
    gated = VQUNet(gated=True, pixel_share=share, **SIZES)
    last = gated.graph.get_layer("gate_logit")
    model = with_head(gated, 2.0)
    certainty.calibrate(model, images, 0.5)
    certain = np.asarray(model.graph(pixels.to_unit(images))["certainty"]) > 0
    assert certain.sum() == 20
    found = {}
    for bias in (-60.0, 60.0):
        for purifier in (gated, model):
            last = purifier.graph.get_layer("gate_logit")
            last.set_weights([np.zeros_like(last.get_weights()[0]), np.full(1, bias, "float32")])
        found[bias] = gated.purify(images), model.purify(images)
    (opened, ours), (closed, still_closed) = found[-60.0], found[60.0]
    assert np.abs(opened - closed).max(axis=(1, 2, 3)).min() > 1e-5
    np.testing.assert_allclose(ours[certain], closed[certain], atol=1e-6)
    np.testing.assert_allclose(ours[~certain], opened[~certain], atol=1e-6)
    np.testing.assert_allclose(still_closed, closed, atol=1e-6)


def test_it_is_an_image_s_own(images):
    model = with_head(pair(-60.0)[0], 2.0)
    certainty.calibrate(model, images, 0.5)
    together = model.purify(images)
    np.testing.assert_allclose(np.concatenate([model.purify(image[None]) for image in images]), together, atol=1e-5)


@pytest.mark.parametrize(("share", "in_doubt"), [(0.0, 0), (0.1, 4), (0.5, 20), (1.0, 40)])
def test_a_calibrated_head_is_in_doubt_about_that_share(share, in_doubt, images):
    model = with_head(pair(-60.0)[0], 2.0, threshold=0.3)
    before = np.asarray(model.graph(pixels.to_unit(images))["certainty"])
    model.graph.get_layer("certainty").threshold.assign(1e9)  # silenced, which hides all differences
    certainty.calibrate(model, images, share)
    after = np.asarray(model.graph(pixels.to_unit(images))["certainty"])
    assert np.sum(after <= 0) == in_doubt and np.abs(after).min() > 0
    np.testing.assert_allclose(np.ptp(after - before), 0.0, atol=1e-5)


def test_it_comes_back_from_a_file(tmp_path, images):
    model = with_head(pair(-60.0)[0], 2.0)
    certainty.calibrate(model, images, 0.5)
    model.save(tmp_path / "purifier.keras")
    again = keras.models.load_model(tmp_path / "purifier.keras")
    assert again.classes == 3
    np.testing.assert_allclose(again.purify(images), model.purify(images), atol=1e-6)


def test_it_costs_a_row_of_products_a_class():
    plain, headed = VQUNet(gated=True, **SIZES), VQUNet(gated=True, classes=3, **SIZES)
    cost = [multiply_accumulates(model, (16, 16, 1)) for model in (plain, headed)]
    assert cost[1] - cost[0] == 3 * SIZES["widths"][-1]


class TestAttackers:
    def chains(self, images):
        gated, plain = pair(-60.0)
        model = with_head(gated, 2.0)
        certainty.calibrate(model, images, 0.0)
        inputs = keras.Input((8, 8, 1))
        classifier = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
        return Chain(classifier, model), Chain(classifier, plain)

    def test_may_hold_the_skip_connections_open(self, images):
        chain, plain = self.chains(images)
        x = keras.ops.convert_to_tensor(pixels.to_unit(images))
        wanted = plain.through("straight_through")(x)
        np.testing.assert_allclose(chain.through("open_gate")(x), wanted, atol=1e-5)
        assert np.abs(np.asarray(chain(x)) - np.asarray(wanted)).max(axis=1).min() > 1e-5

    def test_may_follow_a_soft_certainty_back_to_the_image(self, images):
        """Of that sum the skip connections' share alone depends on the bottleneck's certainty here."""
        model = with_head(pair(-60.0)[0], 2.0)
        certainty.calibrate(model, images, 0.0)
        model.set_gradient("straight_through")
        passage = keras.Model(model.graph.inputs, model.graph.get_layer("passage").output)
        x, found = keras.ops.convert_to_tensor(pixels.to_unit(images)), {}
        for how in (None, "soft"):
            with blocks.gates(how) if how else blocks.held_open(np.zeros(40, "float32")):
                slope = backend.input_gradient(lambda x: keras.ops.sum(passage(x), axis=(1, 2, 3)))(x)
            found[how] = 0.0 if slope is None else np.abs(np.asarray(slope)).max()
        assert found[None] == 0 and found["soft"] > 1e-6


def test_its_loss_by_hand_moves_the_head_alone(images):
    model = with_head(pair(-60.0)[0], 2.0)
    before = weights_by_layer(model)
    objective = certainty.CertaintyObjective(model)
    inputs = {"seen": images, "label": np.arange(40, dtype="int32") % 3}
    logits = np.asarray(objective(inputs, training=True), "float64")
    np.testing.assert_allclose(logits, model.graph(pixels.to_unit(images))["classes"], atol=1e-6)
    expected = -log_softmax(logits)[np.arange(40), inputs["label"]].mean()
    assert float(objective.compute_loss(inputs, None, logits)) == pytest.approx(expected, rel=1e-5)
    objective.compile(optimizer=keras.optimizers.SGD(0.5))
    losses = [objective.train_on_batch(inputs, return_dict=True)["loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    after = weights_by_layer(model)
    assert {name for name in after if not all(map(np.array_equal, after[name], before[name]))} == {"classes"}


def changes_of(tmp_path):
    save_linear(tmp_path / "mine.keras")
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "purifier.gated": True, "purifier.classes": 10}
    changes |= {"training.selection": "last", "training.average": 0.0, "training.certainty_epochs": 2}
    return {**changes, "training.head_weight": 0.0, "training.uncertain": 0.25}


def test_it_learns_last_and_is_told_how_often_to_doubt(tmp_path, monkeypatch):
    begun = {}
    train_certainty = fit._Stages._train_certainty

    def watched(self, name, purifier, whole):
        begun.update(weights_by_layer(purifier))
        train_certainty(self, name, purifier, whole)

    monkeypatch.setattr(fit._Stages, "_train_certainty", watched)
    run, config = RunFolder(tmp_path / "run"), tiny(**changes_of(tmp_path))
    fit.train(config, run, say=silent)
    assert not any(map(np.any, begun["classes"])) and not np.any(begun["certainty"])
    purifier = run.load_purifier()
    after = weights_by_layer(purifier)
    moved = {name for name in after if not all(map(np.array_equal, after[name], begun[name]))}
    assert moved == {"classes", "certainty"}
    held_out = data.load(config.data, "validation").images
    doubt = np.mean(np.asarray(purifier.graph(pixels.to_unit(held_out))["certainty"]) <= 0)
    assert doubt == pytest.approx(0.25, abs=0.51 / len(held_out) + 1e-9)
    assert {stage for stage, _, _ in losses_of(run)} == {"purifier", "purifier_certainty"}
    assert losses_of(run)["purifier_certainty", "2", "class"] < np.log(10)
    assert not run.checkpoints.exists()


def test_it_alone_goes_on_from_a_purifier_without_one_and_is_kept_by_a_gate_alone(tmp_path):
    first, second, third = (RunFolder(tmp_path / name) for name in ("first", "second", "third"))
    changes = changes_of(tmp_path)
    fit.train(tiny(**{**changes, "purifier.classes": 0, "training.certainty_epochs": 0}), first, say=silent)
    again = {**changes, "training.start": str(first.purifier), "training.epochs": 0, "training.gate_false_alarms": 0.4}
    fit.train(tiny(**again), second, say=silent)
    before, after = weights_by_layer(first.load_purifier()), weights_by_layer(second.load_purifier())
    assert set(after) - set(before) == {"classes", "certainty"} and np.any(after["certainty"])
    for name, weights in before.items():
        assert all(map(np.array_equal, weights, after[name])), name
    gate_alone = {"training.start": str(second.purifier), "training.certainty_epochs": 0, "training.gate_epochs": 1}
    fit.train(tiny(**{**again, **gate_alone}), third, say=silent)
    last = weights_by_layer(third.load_purifier())
    for name in ("classes", "certainty"):
        assert all(map(np.array_equal, last[name], after[name])), name


# 64 images: crafting 1 batch, its clean answers 1, the purifier 2 + 2 steps, the head 2 + 2; and 2 more to craft and answer anew.
@pytest.mark.parametrize(("calls", "refresh"), [(4, 0), (7, 0), (9, 0), (9, 1), (11, 1)])
def test_a_stopped_run_goes_on_where_it_was(calls, refresh, tmp_path):
    config = tiny(**{**changes_of(tmp_path), "attack.refresh": refresh})
    runs = [RunFolder(tmp_path / name) for name in ("whole", "stopped")]
    fit.train(config, runs[0], say=silent)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(Interrupted):
            fit.train(config, runs[1], say=silent)
    fit.train(config, runs[1], say=silent)
    assert_same_weights(runs[0].load_purifier(), runs[1].load_purifier())


def test_a_learned_head_is_forgotten_while_the_decoder_learns(tmp_path, monkeypatch):
    """It would close the skip connections of most images: they are to learn."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    changes = changes_of(tmp_path)
    fit.train(tiny(**changes), first, say=silent)
    found = {}
    train_whole = fit._Stages._train_whole

    def watched(self, name, purifier, *rest):
        found["before"] = weights_by_layer(purifier)
        train_whole(self, name, purifier, *rest)
        found["trainable"] = purifier.graph.get_layer("classes").trainable

    monkeypatch.setattr(fit._Stages, "_train_whole", watched)
    fit.train(tiny(**{**changes, "training.start": str(first.purifier)}), second, say=silent)
    assert not any(np.any(weight) for name in ("classes", "certainty") for weight in found["before"][name])
    assert not found["trainable"]
    assert np.any(weights_by_layer(second.load_purifier())["certainty"])


def test_a_start_without_a_head_needs_one_to_learn(tmp_path):
    run = RunFolder(tmp_path / "run")
    changes = {**changes_of(tmp_path), "training.epochs": 1}
    fit.train(tiny(**{**changes, "purifier.classes": 0, "training.certainty_epochs": 0}), run, say=silent)
    again = {"training.start": str(run.purifier), "training.epochs": 0, "training.gate_epochs": 1}
    with pytest.raises(UserError, match="expected a head for 10 classes where none is to learn.*certainty_epochs=3"):
        fit.train(
            tiny(**{**changes, **again, "training.certainty_epochs": 0}), RunFolder(tmp_path / "again"), say=silent
        )


def test_a_start_whose_head_is_left_out_is_said(tmp_path):
    settings, told = tiny(**changes_of(tmp_path)).purifier, []
    VQUNet(**dataclasses.asdict(settings), channels=1).save(tmp_path / "start.keras")
    again = given.start_of(tmp_path / "start.keras", settings, 1, say=told.append)
    assert again.classes == 10 and not told
    without = dataclasses.replace(settings, classes=0)
    assert given.start_of(tmp_path / "start.keras", without, 1, say=told.append).classes == 0
    assert len(told) == 1 and "purifier.classes is 0" in told[0]


def test_it_is_shown_squares_covered(images):
    """`training.cutout` is for it too, where no encoder learns alone."""
    training = TrainingConfig(certainty_epochs=1, cutout=4, batch_size=40, clean=1, noisy=0, adversarial=0)
    shown = GrayBoxBatches(
        Views(images, 1, 0, False, 0), images[None], training, AttackConfig(), labels=np.zeros(40, "int32")
    )
    batches = EncoderBatches(shown, training)
    change = batches[0]["seen"] != images[batches.order]
    assert 12 <= change.sum(axis=(1, 2, 3)).max() <= 16


def test_no_ablation_has_one():
    full = PurifierConfig(gated=True, classes=10)
    assert not any(ablation(name, full).classes for name in ABLATIONS)


@pytest.mark.parametrize("arguments", [{"classes": 1, "gated": True}, {"classes": 3}], ids=str)
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=r"Expected classes of 0, or at least 2 with a gate \(gated=True\)"):
        VQUNet(**SIZES, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"purifier.classes": 0}, "training.certainty_epochs: expected 0 for a purifier without a head, got 2"),
        ({"training.certainty_epochs": 0}, r"at least 1 for a purifier with a head \(purifier.classes is 10\), got 0"),
        (
            {"training.certainty_epochs": 0, "training.start": "x.keras"},
            r"at least 1 for a purifier with a head \(purifier.classes is 10\), got 0",
        ),
        ({"purifier.classes": 7}, "purifier.classes: expected the number of classes of these images, 10, got 7"),
        ({"training.uncertain": 1.5}, "training.uncertain: expected a share from 0 to 1, got 1.5"),
        ({"training.epochs": 0}, "training.epochs: expected at least 1 where no gate or head alone goes on"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.train(tiny(**{**changes_of(tmp_path), **changes}), RunFolder(tmp_path / "run"), say=silent)
    assert not (tmp_path / "run").exists()
