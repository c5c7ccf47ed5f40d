"""Export: the SavedModel gives what the Keras models give, and what cannot be served is refused."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from serving import export
from vqunet_tf.errors import UserError

SHAPE = (8, 12, 3)  # neither square nor grey, so that a swapped axis shows
NAMES = ("cat", "dög", "bird", "fish")
CLASSES = {"probabilities", "class_id", "label"}


@pytest.fixture(scope="module")
def models():
    """A purifier that changes images a good deal, and a classifier with decided opinions."""
    keras.utils.set_random_seed(1)
    images = keras.Input(SHAPE)
    hidden = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(images)
    purifier = keras.Model(images, keras.layers.Conv2D(3, 3, padding="same", activation="sigmoid")(hidden))
    purifier.layers[-1].kernel.assign(purifier.layers[-1].kernel * 5.0)
    images = keras.Input(SHAPE)
    hidden = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(keras.layers.Flatten()(images)))
    classifier = keras.Model(images, keras.layers.Dense(len(NAMES), kernel_initializer="random_normal")(hidden))
    classifier.layers[-1].kernel.assign(classifier.layers[-1].kernel * 3.0)
    return purifier, classifier


@pytest.fixture(scope="module")
def base_path(models, tmp_path_factory):
    """A folder of versions, holding version 1."""
    base = tmp_path_factory.mktemp("exported")
    export.export(*models, NAMES, base / "1")
    return base


def random_images(batch, dtype="float32"):
    generator = np.random.default_rng(batch)
    if dtype == "uint8":
        return generator.integers(0, 256, (batch, *SHAPE), dtype=np.uint8)
    return generator.random((batch, *SHAPE), dtype=np.float32)


def expected(models, signature, images):
    """The outputs of `signature` straight from the Keras models, the softmax in NumPy."""
    purifier, classifier = models
    unit = np.float32(images) / np.float32(255) if images.dtype == np.uint8 else images
    kept = unit if signature == "undefended" else np.asarray(purifier(unit, training=False))
    if signature == "purify":
        return {"purified": kept}
    logits = np.asarray(classifier(kept, training=False), np.float64)
    powers = np.exp(logits)
    chosen = logits.argmax(axis=-1)
    return {
        "probabilities": powers / powers.sum(axis=-1, keepdims=True),
        "class_id": chosen,
        "label": np.array(NAMES)[chosen],
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], array)


SIGNATURES = [
    ("serving_default", "float32", CLASSES),
    ("serve_uint8", "uint8", CLASSES),
    ("purify", "float32", {"purified"}),
    ("undefended", "float32", CLASSES),
]


@pytest.mark.parametrize(("name", "dtype", "outputs"), SIGNATURES)
def test_signature_has_stable_names_and_a_free_batch(base_path, name, dtype, outputs):
    signatures = tf.saved_model.load(str(base_path / "1")).signatures
    assert set(signatures) == {name for name, _, _ in SIGNATURES}
    specs = signatures[name].structured_input_signature[1]
    assert specs == {"images": tf.TensorSpec((None, *SHAPE), dtype, name="images")}
    found = signatures[name].structured_outputs
    assert found.keys() == outputs
    assert all(spec.shape[0] is None for spec in found.values())
    if "class_id" in found:
        assert (found["class_id"].dtype, found["label"].dtype) == (tf.int64, tf.string)


@pytest.mark.parametrize("batch", [1, 7, 19])
def test_saved_model_equals_keras(base_path, models, batch):
    signatures = tf.saved_model.load(str(base_path / "1")).signatures
    for name, dtype, _ in SIGNATURES:
        images = random_images(batch, dtype)
        found = {key: value.numpy() for key, value in signatures[name](images=tf.constant(images)).items()}
        if "label" in found:
            found["label"] = np.array([label.decode() for label in found["label"]])
        assert_equal(found, expected(models, name, images))


def test_assets_hold_labels_and_parity(base_path):
    assets = base_path / "1" / "assets"
    assert (assets / "labels.txt").read_text(encoding="utf-8").splitlines() == list(NAMES)
    report = json.loads((assets / "parity.json").read_text())
    assert report["signatures"].keys() == {name for name, _, _ in SIGNATURES}
    for name, _, outputs in SIGNATURES:
        assert report["signatures"][name].keys() == outputs
        assert all(0 <= value <= 1e-5 for value in report["signatures"][name].values())


def test_parity_sees_another_model(base_path, models):
    """The proof of an export can fail: against other weights the differences are not small."""
    purifier, classifier = models
    other = keras.models.clone_model(classifier)  # the same layers, freshly initialised
    parity = export.measure_parity(base_path / "1", purifier, other, NAMES, SHAPE)
    assert parity["purify"]["purified"] <= 1e-5
    assert parity["undefended"]["probabilities"] > 1e-3
    swapped = export.measure_parity(base_path / "1", purifier, classifier, NAMES[::-1], SHAPE)
    assert swapped["serving_default"]["label"] == 1.0


def test_version_is_never_overwritten(base_path, models):
    before = (base_path / "1" / "saved_model.pb").read_bytes()
    with pytest.raises(UserError, match=r"never overwritten: export with --version=2"):
        export.export(*models, NAMES, base_path / "1")
    assert (base_path / "1" / "saved_model.pb").read_bytes() == before
    assert [path.name for path in base_path.iterdir()] == ["1"]


@keras.saving.register_keras_serializable("test_serving")
class Noise(keras.layers.Layer):
    """Wrong on purpose: random at inference."""

    def call(self, images):
        return images + keras.random.uniform(keras.ops.shape(images))


@keras.saving.register_keras_serializable("test_serving")
class Python(keras.layers.Layer):
    """Wrong on purpose: calls Python in the graph."""

    def call(self, images):
        return tf.ensure_shape(tf.py_function(lambda array: array, [images], tf.float32), images.shape)


@keras.saving.register_keras_serializable("test_serving")
class Compiled(keras.layers.Layer):
    """Wrong on purpose: asks for XLA on its own."""

    def call(self, images):
        return tf.function(lambda array: array * 1.0, jit_compile=True)(images)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Noise, "random at inference"), (Python, "calls Python"), (Compiled, "jit_compile=True")],
)
def test_model_that_cannot_be_served_leaves_nothing(models, tmp_path, layer, message):
    purifier = keras.Sequential([keras.Input(SHAPE), layer()])
    with pytest.raises(UserError, match=message):
        export.export(purifier, models[1], NAMES, tmp_path / "1")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_together_is_refused(models, tmp_path):
    purifier, classifier = models
    with pytest.raises(UserError, match="4 logits, got 3 names"):
        export.export(purifier, classifier, NAMES[:3], tmp_path / "1")
    with pytest.raises(UserError, match=r"expected a classifier for images of shape \[8, 8, 3\]"):
        export.export(purifier, classifier, NAMES, tmp_path / "1", (8, 8, 3))
    with pytest.raises(UserError, match="version number"):
        export.export(purifier, classifier, NAMES, tmp_path / "latest")
    assert not list(tmp_path.iterdir())
