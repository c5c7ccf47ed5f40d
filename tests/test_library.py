"""`vqunet_tf.evaluate`: somebody else's classifier and somebody else's defence, in one call."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import vqunet_tf
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import library

SHAPE, CLASSES, N = (8, 8, 1), 3, 24


@pytest.fixture(autouse=True)
def no_probes(monkeypatch):
    monkeypatch.setattr("vqunet_tf.evaluation.probes.run", lambda *arguments: [])


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(inputs)))


@pytest.fixture(scope="module")
def data(classifier):
    images = np.random.default_rng(0).uniform(0.2, 0.8, (N, *SHAPE)).astype(np.float32)
    return images, classifier.predict(images, verbose=0).argmax(axis=1)


def _rows(defended, data, **options):
    """The rows and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vqunet_tf.evaluate(defended, *data, **{"attacks": ["pgd"], "steps": 3, "epsilons": [0.1], **options})
    return found, " ".join(str(w.message) for w in caught if "do not trust" in str(w.message))


def _variants(rows):
    return {name for row in rows for name in row.get("variants", {})}


def test_a_preprocessing_layer_of_somebody_else(classifier, data):
    layer = keras.layers.AveragePooling2D(3, strides=1, padding="same")
    rows, _ = _rows((layer, classifier), data)
    assert {row["defense"] for row in rows} == {"none", "purifier"}
    assert {row["threat_model"] for row in rows} == {"gray_box", "white_box"}
    assert _variants(rows) == {"own"}
    (clean,) = [r for r in rows if (r["defense"], r["attack"]) == ("purifier", "none")]
    answers = classifier.predict(layer(data[0]), verbose=0).argmax(axis=1)
    assert clean["accuracy"] == np.mean(answers == data[1]) and clean["n"] == N


def test_a_classifier_alone_and_a_defended_one(classifier, data):
    bare, _ = _rows(classifier, data)
    assert [row["attack"] for row in bare] == ["none", "pgd", "worst"]
    keras.utils.set_random_seed(0)
    purifier = vqunet_tf.VQUNet(widths=(4,), num_embeddings=8, embedding_dim=2, stem=1, channels=1)
    options = {"attacks": [], "suite": "quick", "threat_models": ["white_box"]}
    rows, _ = _rows(vqunet_tf.DefendedClassifier(purifier, classifier), data, **options)
    assert {row["defense"] for row in rows} == {"none", "vqunet"} and _variants(rows) == {"straight_through"}


def test_a_function_of_arrays_is_attacked_as_if_it_were_the_identity(classifier, data):
    def rounded(images):
        assert isinstance(images, np.ndarray)
        return np.round(images * 8) / 8

    rows, _ = _rows((rounded, classifier), data)
    assert _variants(rows) == {"identity"}
    worst = {row["threat_model"]: row["accuracy"] for row in rows if row["defense"] == "purifier"}
    assert worst["white_box"] <= worst["gray_box"] < 1.0


def test_a_smooth_stand_in_is_attacked_through_whatever_carries_it(classifier, data):
    class Rounding(keras.layers.Layer):
        differentiable, smooth = False, staticmethod(tf.identity)

        def call(self, images):
            return keras.ops.round(images * 8) / 8

    def rounded(images):
        return np.round(np.asarray(images) * 8) / 8

    rounded.smooth = tf.identity
    for purifier in (Rounding(), rounded):
        assert _variants(_rows((purifier, classifier), data, suite="standard")[0]) == {"smooth", "identity"}
    rounded.smooth = 3  # something else that is called so
    assert _variants(_rows((rounded, classifier), data, suite="standard")[0]) == {"identity"}


def test_a_defence_that_hides_its_gradient_is_warned_of(classifier, data):
    _, warned = _rows((lambda images: tf.round(images * 8) / 8, classifier), data)
    assert "gradients_not_masked" in warned
    assert "gradients_not_masked" not in _rows((lambda images: 0.9 * images, classifier), data)[1]


def test_randomness_is_seen_wherever_it_is_drawn(classifier, data):
    few, rng = data[0][:2], np.random.default_rng(0)

    def outside(images):  # traced, this is drawn once and for all
        return images + rng.normal(size=(1, *SHAPE)).astype(np.float32)

    def inside(images):
        return images + tf.random.normal(tf.shape(images))

    adapted = library.function_of(outside, few)
    traced = tf.function(adapted)
    assert np.abs(traced(few) - np.asarray(traced(few))).max() > 0.01
    assert library.function_of(inside, few) is inside
    assert library.function_of(tf.sqrt, few) is tf.sqrt
    _, warned = _rows((outside, classifier), data)
    assert "purifier answers differently" in warned and "means over 10 draws" in warned


def test_surrogates_carry_images_over(classifier, data):
    keras.utils.set_random_seed(3)
    other = keras.models.clone_model(classifier)
    purify = keras.layers.Rescaling(0.9)
    rows, _ = _rows(
        (lambda images: 0.9 * images, classifier), data, attacks=["transfer"], surrogates={"mine": (purify, other)}
    )
    assert {row["threat_model"] for row in rows} == {"black_box"}
    assert _variants(rows) == {"mine_classifier", "mine_purified"}
    transfer = [row for row in rows if row["attack"] == "transfer"]
    assert [row["defense"] for row in transfer] == ["none", "purifier"]
    assert all(row["accuracy"] <= min(row["variants"].values()) for row in transfer)
    with pytest.raises(UserError, match="transfer needs models"):
        _rows(classifier, data, attacks=["transfer"])


def test_what_is_no_model_and_no_logits_is_refused(classifier, data):
    for wrong in ("model.keras", (classifier, lambda x: x), (1, classifier), (classifier,) * 3):
        with pytest.raises(UserError, match="expected a DefendedClassifier, a Keras classifier, or a pair"):
            vqunet_tf.evaluate(wrong, *data)
    softmax = keras.Sequential([classifier, keras.layers.Softmax()])
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        vqunet_tf.evaluate(softmax, *data)
    with pytest.raises(UserError, match="unknown suite 'huge'"):
        vqunet_tf.evaluate(classifier, *data, suite="huge")
    with pytest.raises(UserError, match="deepfool knows the norm l2, not 'linf'"):
        vqunet_tf.evaluate(classifier, *data, attacks=["deepfool"], l2_epsilons=[])
    with pytest.raises(UserError, match=r"behind the defense 'purifier' cannot be called on images \[24, 8, 8, 1\]"):
        vqunet_tf.evaluate((keras.layers.Flatten(), classifier), *data)
    with pytest.raises(UserError, match=r"images \[N,H,W,C\], at least one, got shape \[8, 8, 1\]"):
        vqunet_tf.evaluate(classifier, data[0][0], data[1])


def test_the_package_stays_light(tmp_path):
    code = (
        "import sys, vqunet_tf\n"
        "print(sorted({'cleverhans', 'art', 'vqunet_tf.evaluation'} & set(sys.modules)))\n"
        "print('evaluate' in vqunet_tf.__all__, callable(vqunet_tf.evaluate), hasattr(vqunet_tf, 'nothing'))\n"
    )
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.stdout.split("\n")[:2] == ["[]", "True True False"], ran.stderr
