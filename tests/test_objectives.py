"""Objectives: each loss by hand, what learns and what stays frozen, the attack in the loop, precision, JAX."""

import dataclasses

import keras
import numpy as np
import pytest

from vqunet_tf import VQUNet, backend, pixels
from vqunet_tf.config import TrainingConfig
from vqunet_tf.models import classifiers
from vqunet_tf.training.encoder import EncoderObjective
from vqunet_tf.training.loop import OneCycle
from vqunet_tf.training.objectives import (
    AdaptiveObjective,
    ClassifierObjective,
    GrayBoxObjective,
    glance,
    new_head,
)


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(40, 8, 8, 1), dtype="uint8")


@pytest.fixture
def classifier():
    return classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1)


@pytest.fixture
def guide(classifier):
    return classifiers.with_features(classifier, (8, 8, 1))


def tiny_purifier():
    return VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1)


def log_softmax(logits):
    logits = np.asarray(logits, "float64")
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_classifier_loss_by_hand(classifier):
    objective = ClassifierObjective(classifier, label_smoothing=0.2)
    logits = np.array([[2.0, 0.0, 0.0, 0.0]], "float32")
    expected = -(np.array([0.85, 0.05, 0.05, 0.05]) * log_softmax(logits)).sum()
    assert float(objective.compute_loss(None, np.array([0]), logits)) == pytest.approx(expected, rel=1e-6)


class TestGrayBox:
    def test_the_loss_by_hand(self, guide, images):
        purifier = tiny_purifier()
        settings = TrainingConfig(pixel_weight=2.0, guidance_weight=3.0, feature_weight=7.0, codebook_weight=5.0)
        objective = GrayBoxObjective(purifier, guide, settings)
        inputs = {"seen": images[:4], "clean": images[4:8]}
        outputs = objective(inputs)
        wanted = guide.predict_on_batch(pixels.to_unit(images[4:8]))
        found = guide.predict_on_batch(purifier(pixels.to_unit(images[:4])))
        p, q = log_softmax(wanted["logits"]), log_softmax(found["logits"])
        guidance = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
        missed = np.mean((found["features"] - wanted["features"]) ** 2, axis=1)
        feature = np.mean(missed / np.mean(wanted["features"] ** 2, axis=1))
        pixel = np.mean(np.abs(purifier.purify(images[:4]) - images[4:8] / 255.0))
        expected = 2 * pixel + 3 * guidance + 7 * feature + 5 * float(outputs["codebook"])
        assert float(objective.compute_loss(inputs, None, outputs)) == pytest.approx(expected, rel=1e-4)

    def test_the_weight_of_the_pixels_may_come_with_the_inputs(self, guide, images):
        objective = GrayBoxObjective(tiny_purifier(), guide, TrainingConfig(pixel_weight=2.0))
        inputs = {"seen": images[:4], "clean": images[4:8]}
        outputs = objective(inputs)
        pixel = float(objective.losses_of(inputs, None, outputs)["pixel"])
        loss = float(objective.compute_loss(inputs, None, outputs))
        faded = float(objective.compute_loss({**inputs, "pixel_weight": np.full(4, 0.5, "float32")}, None, outputs))
        assert loss - faded == pytest.approx(1.5 * pixel, rel=1e-4)

    def test_a_head_on_the_bottleneck_learns_the_class(self, guide, images):
        """Its cross-entropy by hand; a head that is given goes on, with its own weights."""
        purifier, weight = tiny_purifier(), 3.0
        head = new_head(purifier, 4)
        plain, headed = (
            GrayBoxObjective(purifier, guide, TrainingConfig(head_weight=each), head) for each in (0.0, weight)
        )
        inputs = {"seen": images[:4], "clean": images[4:8], "label": np.array([3, 0, 2, 2], "int32")}
        kernel, bias = (np.asarray(part, "float64") for part in head.get_weights())
        bottleneck = np.asarray(purifier.graph(pixels.to_unit(images[:4]))["bottleneck"], "float64")
        logits = np.maximum(bottleneck, 0).mean(axis=(1, 2)) @ kernel + bias
        expected = -weight * log_softmax(logits)[np.arange(4), inputs["label"]].mean()
        losses = [float(each.compute_loss(inputs, None, each(inputs))) for each in (plain, headed)]
        assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)
        assert headed.head is head and plain.head is None
        own = GrayBoxObjective(purifier, guide, TrainingConfig(head_weight=weight)).head
        assert own is not head and own.kernel.shape == (4, 4)
        headed.compile(optimizer=keras.optimizers.SGD(0.1))
        headed.train_on_batch(inputs)
        assert np.abs(head.get_weights()[0] - kernel).max() > 1e-4

    def test_answers_known_beforehand_change_nothing(self, guide, images):
        objective = GrayBoxObjective(tiny_purifier(), guide, TrainingConfig(feature_weight=1.0))
        inputs = {"seen": images[:4], "clean": images[4:8]}
        outputs = objective(inputs)
        known = {**inputs, **guide.predict_on_batch(pixels.to_unit(images[4:8]))}
        asked, told = (float(objective.compute_loss(x, None, outputs)) for x in (inputs, known))
        assert told == pytest.approx(asked, rel=1e-6)
        known["logits"] = known["logits"][::-1]
        assert float(objective.compute_loss(known, None, outputs)) != pytest.approx(asked, rel=1e-3)

    def test_an_attack_in_the_loop_goes_on_from_what_is_seen(self, guide, images):
        """Within its radius of the seen image it takes the chain away from what the classifier says about the clean one."""
        purifier, clean = tiny_purifier(), images // 2
        purifier.set_gradient("identity")  # without quantizers, whose codes would move in training
        settings = TrainingConfig(loop_epsilon=0.1, attack_steps=3, attack_step_size=0.5)
        objective = GrayBoxObjective(purifier, guide, settings)
        still = {"seen": images, "clean": clean}
        start, radius = np.zeros(images.shape, "float32"), np.linspace(0, 0.1, 40, dtype="float32")
        inputs = {**still, "start": start, "epsilon": radius.reshape(40, 1, 1, 1)}
        seen = np.asarray(pixels.to_unit(images))
        attacked = np.asarray(objective.attack(seen, inputs))
        moved = np.abs(attacked - seen).max(axis=(1, 2, 3))
        assert (moved <= radius + 1e-6).all() and moved[-1] > 0.09 and attacked.min() >= 0 and attacked.max() <= 1
        said = np.asarray(guide(pixels.to_unit(clean))["logits"]).argmax(axis=1)

        def loss(x):
            return -log_softmax(guide(purifier(x))["logits"])[np.arange(40), said].mean()

        noise = np.clip(seen + 0.1 * np.sign(np.random.default_rng(0).normal(size=seen.shape)), 0, 1)
        assert loss(attacked) > max(loss(seen), loss(noise.astype("float32")))
        known = guide.predict_on_batch(pixels.to_unit(clean))
        np.testing.assert_allclose(objective.attack(seen, {**inputs, **known}), attacked, atol=1e-6)
        # In training the purifier is shown those, otherwise what comes; without a radius there is no attack.
        for given, training, shown in ((inputs, True, attacked), (inputs, False, seen), (still, True, seen)):
            np.testing.assert_allclose(objective(given, training=training)["images"], purifier(shown), atol=1e-5)
        objective.compile(optimizer="sgd")
        assert np.isfinite(objective.train_on_batch(inputs, return_dict=True)["loss"])

    def test_a_step_in_mixed_precision_is_about_the_one_in_float32(self, images):
        losses = []
        for name in ("float32", "mixed_bfloat16"):
            keras.utils.set_random_seed(0)
            keras.config.set_dtype_policy(name)
            try:
                model = classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1)
                purifier = tiny_purifier()
                objective = GrayBoxObjective(
                    purifier, classifiers.with_features(model, (8, 8, 1)), TrainingConfig(feature_weight=0.1)
                )
            finally:
                keras.config.set_dtype_policy("float32")
            objective.compile(optimizer="sgd")
            losses.append(objective.train_on_batch({"seen": images, "clean": images}))
            assert purifier.purify(images).dtype == np.float32
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)

    def test_the_classifier_stays_frozen(self, guide, images):
        objective = GrayBoxObjective(tiny_purifier(), guide, TrainingConfig(feature_weight=1.0))
        before = [keras.ops.convert_to_numpy(weight) for weight in guide.weights]
        objective.compile(optimizer="sgd")
        objective.train_on_batch({"seen": images, "clean": images})
        for weight, old in zip(guide.weights, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), old)


class TestAdaptive:
    settings = TrainingConfig(attack_steps=3, attack_step_size=0.5, pixel_weight=2.0, guidance_weight=3.0)

    def inputs(self, images, epsilon=0.1):
        return {
            "clean": images,
            "label": np.arange(len(images), dtype="int32") % 4,
            "start": np.zeros(images.shape, "float32"),
            "epsilon": np.full((len(images), 1, 1, 1), epsilon, "float32"),
        }

    @pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
    def test_the_attack_in_the_loop_stays_within_its_radius_and_raises_the_loss(self, gradient, classifier, images):
        purifier = tiny_purifier()
        purifier.graph(pixels.to_unit(images), training=True)
        purifier.set_gradient(gradient)
        objective = AdaptiveObjective(purifier, classifier, self.settings)
        inputs, clean = self.inputs(images), pixels.to_unit(images)
        attacked = np.asarray(objective.attack(clean, inputs))
        assert np.abs(attacked - clean).max() <= 0.1 + 1e-6 and attacked.min() >= 0.0 and attacked.max() <= 1.0

        def loss(x):
            return -log_softmax(classifier(purifier(x)))[np.arange(40), inputs["label"]].mean()

        noise = np.clip(clean + 0.1 * np.sign(np.random.default_rng(0).normal(size=clean.shape)), 0, 1)
        assert loss(attacked) > max(loss(clean), loss(noise.astype("float32")))

    def test_each_gradient_attacks_its_share_of_a_batch(self, classifier, images):
        purifier = tiny_purifier()
        purifier.graph(pixels.to_unit(images), training=True)
        names = ("straight_through", "soft", "rotation")
        mixed = AdaptiveObjective(purifier, classifier, dataclasses.replace(self.settings, attack_gradients=names))
        inputs, clean = self.inputs(images), pixels.to_unit(images)
        found = np.asarray(mixed.attack(clean, inputs))
        for i, name in enumerate(names):
            purifier.set_gradient(name)
            alone = np.asarray(AdaptiveObjective(purifier, classifier, self.settings).attack(clean, inputs))
            share = slice(i * 40 // 3, (i + 1) * 40 // 3)
            np.testing.assert_allclose(found[share], alone[share], atol=1e-6)
            assert any(np.abs(found[j] - alone[j]).max() > 1e-3 for j in range(40))
        assert purifier.quantizers[0].gradient == "rotation"  # as it was set, not as the attack had it

    def test_what_meets_no_quantizers_is_learned_without_them(self, classifier, images):
        """The share of `identity` is attacked and shown with the quantizers off, the rest with them on."""
        purifier = tiny_purifier()
        purifier.graph(pixels.to_unit(images), training=True)
        names = ("identity", "straight_through")
        mixed = AdaptiveObjective(purifier, classifier, dataclasses.replace(self.settings, attack_gradients=names))
        inputs, clean = self.inputs(images), pixels.to_unit(images)
        seen = mixed.attack(clean, inputs)
        quantized = np.asarray(purifier(seen))
        outputs = mixed(inputs, training=True)
        purifier.set_gradient("identity")
        alone = AdaptiveObjective(purifier, classifier, self.settings)
        np.testing.assert_allclose(np.asarray(seen)[:20], np.asarray(alone.attack(clean, inputs))[:20], atol=1e-6)
        smooth = np.asarray(purifier(seen))
        assert np.abs(smooth - quantized).max() > 1e-3
        np.testing.assert_allclose(outputs["images"][:20], smooth[:20], atol=1e-6)
        np.testing.assert_allclose(mixed(inputs)["images"][:20], np.asarray(purifier(clean))[:20], atol=1e-6)
        purifier.set_gradient("straight_through")
        expected = np.asarray(purifier(clean))[20:]
        np.testing.assert_allclose(mixed(inputs)["images"][20:], expected, atol=1e-6)
        np.testing.assert_allclose(outputs["attacked"][:20], np.asarray(classifier(smooth))[:20], atol=1e-5)

    def test_a_head_on_the_bottleneck(self, classifier, images):
        """Its loss by hand; attacked itself it is fooled by more than by what was made to fool the chain."""
        purifier = tiny_purifier()
        purifier.graph(pixels.to_unit(images), training=True)
        settings = dataclasses.replace(self.settings, head_weight=7.0)
        objective = AdaptiveObjective(purifier, classifier, settings)
        inputs, clean = self.inputs(images), pixels.to_unit(images)
        outputs = objective(inputs)
        kernel, bias = objective.head.get_weights()
        seen = np.maximum(np.asarray(purifier.graph(clean)["bottleneck"]), 0.0).mean(axis=(1, 2))
        expected = 7 * -log_softmax(seen @ kernel + bias)[np.arange(40), inputs["label"]].mean()
        plain = AdaptiveObjective(purifier, classifier, self.settings)
        without = float(plain.compute_loss(inputs, None, plain(inputs)))
        assert float(objective.compute_loss(inputs, None, outputs)) == pytest.approx(without + expected, rel=1e-4)
        assert any(variable is objective.head.kernel for variable in objective.trainable_variables)

        def loss(x):
            logits = glance(objective.head, purifier.graph(x)["bottleneck"])
            return -log_softmax(logits)[np.arange(40), inputs["label"]].mean()

        attacked = objective.attack(clean, inputs)
        own = AdaptiveObjective(purifier, classifier, dataclasses.replace(settings, attack_on="head"))
        own.head.set_weights(objective.head.get_weights())
        aimed = own.attack(clean, inputs)
        assert np.abs(np.asarray(aimed) - np.asarray(clean)).max() <= 0.1 + 1e-6
        assert loss(aimed) > max(loss(clean), loss(attacked))

    def test_no_radius_no_change(self, classifier, images):
        objective = AdaptiveObjective(tiny_purifier(), classifier, self.settings)
        clean = pixels.to_unit(images)
        np.testing.assert_array_equal(objective.attack(clean, self.inputs(images, 0.0)), clean)

    @pytest.mark.parametrize("trades", [0.0, 4.0])
    def test_the_loss_by_hand(self, trades, classifier, images):
        settings = dataclasses.replace(self.settings, trades=trades, codebook_weight=5.0)
        purifier = tiny_purifier()
        objective = AdaptiveObjective(purifier, classifier, settings)
        inputs = self.inputs(images)
        before, after = (np.random.default_rng(i).normal(size=(40, 4)).astype("float32") for i in (0, 1))
        outputs = {"logits": before, "attacked": after, "images": images / 510.0, "codebook": np.float32(0.25)}
        if not trades:
            outputs["logits"] = after
        p, q = log_softmax(outputs["logits"]), log_softmax(after)
        expected = 3 * -p[np.arange(40), inputs["label"]].mean()
        expected += 3 * trades * np.mean(np.sum(np.exp(p) * (p - q), axis=1))
        expected += 2 * np.mean(images / 510.0) + 5 * 0.25
        assert float(objective.compute_loss(inputs, None, outputs)) == pytest.approx(expected, rel=1e-5)

    def test_training_on_attacked_images_shows_the_purifier_those(self, classifier, images):
        """Outside training it is shown the images; in training the attack's; the gradient does not enter the attack."""
        objective = AdaptiveObjective(tiny_purifier(), classifier, self.settings)
        objective.purifier.graph(pixels.to_unit(images), training=True)  # places the codes
        inputs = self.inputs(images, 0.3)
        expected = np.asarray(objective.purifier(pixels.to_unit(images)))
        plain, attacked = objective(inputs, training=False), objective(inputs, training=True)
        np.testing.assert_allclose(plain["images"], expected, atol=1e-6)
        assert np.abs(np.asarray(attacked["images"]) - np.asarray(plain["images"])).max() > 1e-4

    def test_only_the_purifier_learns_and_the_loss_falls(self, classifier, images):
        purifier = tiny_purifier()
        objective = AdaptiveObjective(purifier, classifier, self.settings)
        objective.compile(optimizer=keras.optimizers.Adam(1e-2))
        before = [keras.ops.convert_to_numpy(weight) for weight in classifier.weights]
        inputs = self.inputs(images)
        losses = [objective.train_on_batch(inputs, return_dict=True)["classification"] for _ in range(15)]
        means = np.diff([0.0, *(np.array(losses) * np.arange(1, 16))])  # Keras gives the mean so far
        assert means[-1] < means[0]
        for weight, old in zip(classifier.weights, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), old)


def test_an_encoder_that_learns_alone(classifier, images):
    """Its attack and loss are those of the whole objective on the head with the quantizers off; the rest stays as it was."""
    purifier, settings = tiny_purifier(), TestAdaptive.settings
    settings = dataclasses.replace(settings, head_weight=1.0, attack_on="head", attack_gradients=("identity",))
    head, inputs, clean = new_head(purifier, 4), TestAdaptive().inputs(images), pixels.to_unit(images)
    objective = EncoderObjective(purifier, head, settings)
    both = AdaptiveObjective(purifier, classifier, settings, head)
    seen = both.attack(clean, inputs)
    purifier.set_gradient("identity")
    logits = np.asarray(glance(head, purifier.graph(seen)["bottleneck"]))
    purifier.set_gradient("straight_through")
    np.testing.assert_allclose(objective(inputs, training=True), logits, atol=1e-5)
    expected = -log_softmax(logits)[np.arange(40), inputs["label"]].mean()
    assert float(objective.compute_loss(inputs, None, logits)) == pytest.approx(expected, rel=1e-5)
    assert np.abs(np.asarray(objective(inputs)) - logits).max() > 1e-4  # outside training nothing is attacked
    given = {"seen": images, "label": inputs["label"]}  # nor is what comes attacked, or not, from elsewhere
    np.testing.assert_array_equal(objective(given, training=True), objective({"clean": images}))

    objective.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = {weight.path: keras.ops.convert_to_numpy(weight) for weight in purifier.weights}
    losses = [objective.train_on_batch(inputs, return_dict=True)["loss"] for _ in range(15)]
    assert losses[-1] < losses[0]
    moved = {weight.path for weight in purifier.weights if np.any(weight.numpy() != before[weight.path])}
    assert {path.split("/")[0] for path in moved} == {
        "stem",
        "encoder_0_0_conv1",
        "encoder_0_0_conv2",
        "down_1",
        "encoder_1_0_conv1",
        "encoder_1_0_conv2",
        "to_codes_1",
        "from_codes_1",
    }


def test_the_gradient_of_the_attack_is_that_of_finite_differences(classifier, images):
    """Through the chain with the quantizers switched off, which makes it smooth: no masked gradient in the loop."""
    purifier = tiny_purifier()
    purifier.set_gradient("identity")

    def loss(x):
        return keras.ops.logsumexp(classifier(purifier(x)), axis=-1)

    x = keras.ops.convert_to_tensor(0.2 + 0.6 * np.random.default_rng(0).random((2, 8, 8, 1)).astype("float32"))
    direction = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    gradient = np.asarray(backend.input_gradient(loss)(x))
    step = 1e-3 / np.abs(direction).max()
    found = (np.asarray(loss(x + step * direction)) - np.asarray(loss(x - step * direction))) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(axis=(1, 2, 3)), found, rtol=0.1, atol=1e-3)


def test_the_learning_rate_rises_and_falls_by_steps_of_the_optimizer():
    """A hundredth of the peak, the peak after the warm-up, half of it half way down, nothing at the end."""
    rate = OneCycle(1.0, steps=100, warmup=0.2)
    at = [float(rate(keras.ops.convert_to_tensor(step))) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(at, [0.01, 0.505, 1.0, 0.5, 0.0], atol=1e-6)
    slow = OneCycle(1.0, steps=400, warmup=0.2, accumulate=4)
    for step in (0, 10, 20, 60):
        for batch in range(4):
            found = float(slow(keras.ops.convert_to_tensor(4 * step + batch)))
            assert found == pytest.approx(float(rate(keras.ops.convert_to_tensor(step))), abs=1e-6)
