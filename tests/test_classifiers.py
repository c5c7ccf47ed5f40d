"""Target classifiers by name: sizes by hand, whitened patches, features beside logits, round trips."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers

ROOT = Path(__file__).resolve().parents[1]


def build(name, shape=(28, 28, 1)):
    return classifiers.build(name, shape, 10, (8, 16), 1)


# Weights and biases, layer by layer, of the tables in the papers.
SIZES = {
    "defense_gan_a": [25 * 64 + 64, 25 * 64 * 64 + 64, 12 * 12 * 64 * 128 + 128, 128 * 10 + 10],
    "defense_gan_b": [64 * 64 + 64, 36 * 64 * 128 + 128, 25 * 128 * 128 + 128, 128 * 10 + 10],
    "defense_gan_c": [9 * 128 + 128, 25 * 128 * 64 + 64, 12 * 12 * 64 * 128 + 128, 128 * 10 + 10],
    "defense_gan_d": [784 * 200 + 200, 200 * 200 + 200, 200 * 10 + 10],
}


@pytest.mark.parametrize("name", SIZES)
def test_the_networks_of_defense_gan_have_the_sizes_of_their_table(name):
    assert build(name).count_params() == sum(SIZES[name])


def test_resnet20_has_the_size_of_its_table_and_projections():
    """Three stages of three blocks, 16, 32 and 64 channels; 1x1 projections where the width changes."""
    convolutions = 9 * 3 * 16 + 6 * 9 * 16 * 16 + 9 * (16 * 32 + 5 * 32 * 32) + 9 * (32 * 64 + 5 * 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    norms = 4 * (16 + 6 * 16 + 6 * 32 + 6 * 64 + 32 + 64)
    assert build("resnet20", (32, 32, 3)).count_params() == convolutions + shortcuts + norms + 64 * 10 + 10


@pytest.mark.parametrize("name", [*SIZES, "residual", "fast", "resnet20"])
def test_each_gives_logits_and_comes_back_from_a_file(name, tmp_path, rng):
    model = build(name)
    images = rng.random((3, 28, 28, 1), dtype="float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    logits = model.predict(images, verbose=0)
    assert logits.shape == (3, 10) and logits.min() < 0.0
    np.testing.assert_allclose(loaded.predict(images, verbose=0), logits, atol=1e-6)
    found = classifiers.with_features(model, (28, 28, 1)).predict(images, verbose=0)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-6)
    last = model.layers[-1]
    weights, bias = (part.numpy() for part in (last.kernel, last.bias))
    np.testing.assert_allclose(found["features"] @ weights + bias, logits, atol=1e-5)


def test_unknown_and_impossible_ones_are_refused():
    with pytest.raises(UserError, match="unknown classifier 'vgg': expected one of defense_gan_a"):
        build("vgg")
    with pytest.raises(UserError, match=r"classifier fast cannot be made for images \(2, 2, 1\)"):
        build("fast", (2, 2, 1))


def test_whitened_patches_are_uncorrelated_and_of_unit_variance(rng):
    """Images whose neighbours go together: the first half of the outputs has the identity for a covariance."""
    coarse = rng.integers(0, 256, size=(200, 5, 5, 3))
    noise = rng.integers(-20, 20, size=(200, 10, 10, 3))
    images = np.clip(np.kron(coarse, np.ones((1, 2, 2, 1))) + noise, 0, 255).astype("uint8")
    model = classifiers.build("fast", (10, 10, 3), 10, (8,), 1)
    classifiers.whiten(model, images)
    layer = model.get_layer("whitening")
    out = layer(images / np.float32(255)).numpy()
    half = out.shape[-1] // 2
    np.testing.assert_allclose(out[..., half:], -out[..., :half], atol=1e-5)
    covariance = np.cov(out[..., :half].reshape(-1, half), rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(half), atol=0.15)  # small directions are held back on purpose
    assert not layer.kernel.trainable and layer.bias.trainable
    before = layer.kernel.numpy()
    model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(images / np.float32(255), np.arange(200) % 10)
    np.testing.assert_array_equal(layer.kernel.numpy(), before)


class TestFeatures:
    def test_a_named_layer_and_a_model_without_layers_to_look_into(self, rng):
        model = build("residual")
        images = rng.random((3, 28, 28, 1), dtype="float32")
        found = classifiers.with_features(model, (28, 28, 1), "stage_1").predict(images, verbose=0)
        assert found["features"].shape == (3, 7 * 7 * 16)
        with pytest.raises(UserError, match="unknown classifier.feature_layer 'nope': expected one of"):
            classifiers.with_features(model, (28, 28, 1), "nope")

        class Opaque(keras.Model):
            def __init__(self):
                super().__init__()
                self.inside = keras.layers.Dense(10)

            def call(self, images):
                return self.inside(keras.ops.reshape(images, (-1, 784)))

        opaque = Opaque()
        opaque(images)
        found = classifiers.with_features(opaque, (28, 28, 1)).predict(images, verbose=0)
        np.testing.assert_allclose(found["features"], found["logits"], atol=1e-6)

    def test_logarithms_of_probabilities_are_logits_up_to_a_constant(self, rng):
        images = keras.Input((4, 4, 1))
        logits = keras.layers.Dense(5)(keras.layers.Flatten()(images))
        plain, soft = keras.Model(images, logits), keras.Model(images, keras.ops.softmax(logits))
        x = rng.random((6, 4, 4, 1), dtype="float32")
        found = classifiers.with_logits(soft, (4, 4, 1))(x).numpy() - plain(x).numpy()
        np.testing.assert_allclose(found, np.broadcast_to(found[:, :1], found.shape), atol=1e-5)


class TestInPrecision:
    @pytest.mark.parametrize("name", ["residual", "fast", "defense_gan_a"])
    def test_a_copy_computes_in_bfloat16_and_answers_about_alike(self, name, rng):
        model, images = build(name), rng.random((4, 28, 28, 1), dtype="float32")
        copy = classifiers.in_precision(model, "mixed_bfloat16")
        policies = {layer.compute_dtype for layer in copy.layers if isinstance(layer, keras.layers.Conv2D)}
        assert policies == {"bfloat16"} and copy.layers[-1].compute_dtype == "float32"
        logits, found = model.predict_on_batch(images), copy.predict_on_batch(images)
        assert 0 < np.abs(found - logits).max() < 0.05 * np.abs(logits).max()
        assert {layer.compute_dtype for layer in model.layers} == {"float32"}
        assert classifiers.with_features(copy, (28, 28, 1))(images)["features"].dtype == "float32"

    def test_a_layer_that_normalises_by_what_it_saw_still_does(self, rng):
        images = rng.normal(7.0, 3.0, (64, 4, 4, 1)).astype("float32")
        normalise = keras.layers.Normalization()
        normalise.adapt(images)
        inputs = keras.Input((4, 4, 1))
        model = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(normalise(inputs))))
        copy = classifiers.in_precision(model, "mixed_bfloat16")
        logits, found = model.predict_on_batch(images), copy.predict_on_batch(images)
        assert copy is not model and np.abs(found - logits).max() < 0.05 * np.abs(logits).max()

    def test_what_cannot_be_copied_is_left_as_it_is(self):
        class Plain(keras.layers.Layer):
            def __init__(self):
                super().__init__()

            def call(self, x):
                return 2 * x

            def get_config(self):
                return {}

        inputs = keras.Input((4, 4, 1))
        own = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(Plain()(inputs))))
        assert classifiers.in_precision(own, "mixed_bfloat16") is own
        model = build("fast")
        images = keras.Input((28, 28, 1))
        nested = keras.Model(images, model(images))
        assert classifiers.in_precision(nested, "mixed_bfloat16") is nested
        assert classifiers.in_precision(model, "float32") is model


def test_importing_the_package_is_enough_to_load_a_classifier(tmp_path):
    """In a process of its own: here the layers are known already."""
    path = tmp_path / "fast.keras"
    build("fast").save(path)
    code = f"import vqunet_tf, keras; keras.models.load_model({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
