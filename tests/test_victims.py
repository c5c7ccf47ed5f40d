"""The victims: one network, several gradients, and nothing that goes stale."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf import VectorQuantizer, VQUNet, runs
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.evaluation.victims import DRAWS, ESTIMATORS, Chain

SHAPE, CLASSES, N = (8, 8, 1), 3, 4
EXACT = (*ESTIMATORS, "identity")  # forward they are the chain itself
SETTINGS = {"widths": (4, 6), "num_embeddings": 8, "embedding_dim": 2, "groups": 2, "stem": 1, "channels": 1}


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(1)
    inputs = keras.Input(SHAPE)
    hidden = keras.layers.Dense(8, "tanh")(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))


@pytest.fixture
def purifier():
    keras.utils.set_random_seed(2)
    return VQUNet(**SETTINGS)


@pytest.fixture
def chain(classifier, purifier):
    return Chain(classifier, purifier)


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0.1, 0.9, (N, *SHAPE)).astype(np.float32)


LABELS = np.array([0, 1, 2, 0], np.int32)


def test_what_a_victim_offers(classifier, purifier):
    def passes_nothing(images):
        return tf.round(images)

    assert Chain(classifier).variants == ("",)
    assert Chain(classifier, purifier).variants == (*EXACT, "unquantized", "mismatch")
    assert Chain(classifier, VQUNet(**{**SETTINGS, "quantize": False})).variants == ("own", "identity")
    assert Chain(classifier, passes_nothing).variants == ("own", "identity")
    passes_nothing.differentiable = False
    assert Chain(classifier, passes_nothing).variants == ("identity",)
    with pytest.raises(ValueError, match="expected one of identity, got 'soft'"):
        Chain(classifier, passes_nothing).through("soft")


def test_estimators_are_the_real_chain_forward(chain, images):
    wanted = chain.logits(images, N)
    for variant in EXACT:
        found = tf.function(chain.through(variant))(tf.constant(images))
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=variant)
    assert np.abs(chain.through("unquantized")(images) - wanted).max() > 1e-3


def test_unquantized_is_the_network_without_code_books_on_the_same_weights(classifier, purifier, chain, images):
    bare = VQUNet(**{**SETTINGS, "quantize": False})
    layers = {layer.name: layer for layer in purifier.graph.layers}
    for layer in bare.graph.layers:
        layer.set_weights(layers[layer.name].get_weights())
    wanted = classifier(bare(images))
    np.testing.assert_allclose(chain.through("unquantized")(tf.constant(images)), wanted, atol=1e-5)
    one, two = (input_gradient(v, images, LABELS) for v in (chain.through("unquantized"), Chain(classifier, bare)))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-6)


def test_each_variant_passes_the_gradient_it_is_named_after(classifier, purifier, chain, images):
    victims = {name: chain.through(name) for name in (*ESTIMATORS, "unquantized", "identity")}
    found = {name: input_gradient(victim, images, LABELS) for name, victim in victims.items()}

    def gradient(model):
        x = tf.constant(images)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, classifier(model(x)))
        return tape.gradient(loss, x)

    for name in (*ESTIMATORS, "identity"):
        purifier.set_gradient(name)
        wanted = gradient(purifier)
        key = "unquantized" if name == "identity" else name  # of the layer: its inputs pass
        np.testing.assert_allclose(found[key], wanted, rtol=1e-3, atol=1e-6, err_msg=name)
    purifier.set_gradient("straight_through")

    # BPDA: the classifier's own gradient, at the purified image.
    purified = np.asarray(purifier(images))
    np.testing.assert_allclose(found["identity"], input_gradient(Chain(classifier), purified, LABELS), rtol=1e-3)
    distinct = [found[name].ravel() for name in found]
    for i, one in enumerate(distinct):
        for other in distinct[:i]:
            assert np.abs(one - other).max() > 1e-6


def test_a_compiled_victim_keeps_its_gradient_and_the_purifier_its_own(purifier, chain, images):
    purifier.set_gradient("rotation")
    compiled = {name: tf.function(chain.through(name)) for name in ("soft", "unquantized", "straight_through")}
    first = {name: np.asarray(function(tf.constant(images))) for name, function in compiled.items()}
    assert [layer.gradient for layer in purifier.quantizers] == ["rotation", "rotation"]
    for name, function in reversed(compiled.items()):
        np.testing.assert_array_equal(function(tf.constant(images)), first[name])
    with pytest.raises(ValueError):
        chain.through("soft")(images[..., [0, 0]])  # two channels: it fails in the middle
    assert [layer.gradient for layer in purifier.quantizers] == ["rotation", "rotation"]


def test_no_copy_of_the_weights_goes_stale(purifier, chain, images):
    compiled = {name: tf.function(chain.through(name)) for name in (*EXACT, "unquantized")}
    measure = tf.function(chain.mismatch)
    before = {name: np.asarray(function(tf.constant(images))) for name, function in compiled.items()}
    far = measure(tf.constant(images), tf.constant(images[::-1]))
    for layer in purifier.graph.layers:
        layer.set_weights([0.5 * weight for weight in layer.get_weights()])
    wanted = chain.logits(images, N)
    for name, function in compiled.items():
        after = np.asarray(function(tf.constant(images)))
        assert np.abs(after - before[name]).max() > 1e-4
        if name in EXACT:
            np.testing.assert_allclose(after, wanted, atol=1e-5)
    assert np.abs(measure(tf.constant(images), tf.constant(images[::-1])) - far).max() > 1e-4


def test_mismatch_is_the_distance_to_the_codes_of_the_clean_image(purifier, chain, images):
    clean = images[::-1].copy()
    wanted = np.zeros(N)
    for layer in purifier.quantizers:
        encoder = keras.Model(purifier.graph.inputs[0], layer.input)
        moved, still = (np.asarray(encoder(x)).reshape(N, -1, 2) for x in (images, clean))
        codes = np.asarray(layer.codebook)
        nearest = codes[np.square(still[:, :, None] - codes).sum(-1).argmin(-1)]
        wanted += np.square(moved - nearest).mean(axis=(1, 2)) / np.square(codes).mean() / 2
    np.testing.assert_allclose(chain.mismatch(tf.constant(images), tf.constant(clean)), wanted, rtol=1e-4)

    x, reference = tf.constant(images), tf.constant(clean)
    with tf.GradientTape() as tape:
        tape.watch([x, reference])
        total = tf.reduce_sum(chain.mismatch(x, reference))
    to_images, to_reference = tape.gradient(total, [x, reference])
    assert np.abs(to_images).max() > 0 and to_reference is None


def test_quantizers_are_found_in_any_keras_model_and_cosine_counts_by_direction(classifier, images):
    inputs = keras.Input(SHAPE)
    vectors = keras.layers.Conv2D(3, 1, use_bias=False, name="to")(inputs)
    layer = VectorQuantizer(5, 3, distance="cosine")
    model = keras.Model(inputs, keras.layers.Conv2D(1, 1)(layer(vectors)["quantized"]))
    chain = Chain(classifier, model)
    assert chain.quantizers == (layer,)
    before = chain.mismatch(tf.constant(images), tf.constant(images))
    model.get_layer("to").set_weights([7.0 * model.get_layer("to").get_weights()[0]])  # longer, the same way
    np.testing.assert_allclose(chain.mismatch(tf.constant(images), tf.constant(images)), before, rtol=1e-4)
    plain = Chain(classifier, keras.Sequential([keras.Input(SHAPE), keras.layers.Conv2D(1, 1)]))
    assert plain.quantizers == ()
    with pytest.raises(ValueError, match="no quantizers"):
        plain.mismatch(images, images)


def test_the_gradient_of_a_random_victim_is_a_mean_over_draws(classifier, images):
    calls = tf.Variable(0.0)
    chain = Chain(classifier, lambda x: x * (0.5 + 0.01 * calls.assign_add(1.0)))
    chain.is_random = True
    gradient = input_gradient(chain.through(), images, LABELS)
    assert calls.numpy() == DRAWS
    x = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = tf.reduce_mean([classifier(x * (0.5 + 0.01 * k)) for k in range(1, DRAWS + 1)], axis=0)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, logits)
    np.testing.assert_allclose(gradient, tape.gradient(loss, x), rtol=1e-3, atol=1e-7)


def test_a_fingerprint_is_that_of_weights_and_configuration(classifier, purifier, images, tmp_path):
    def fingerprint(*parts):
        return Chain(*parts).fingerprint(images)

    first = fingerprint(classifier, purifier)
    runs.save_model(purifier, tmp_path / "purifier.keras")
    assert fingerprint(classifier, runs.load_model(tmp_path / "purifier.keras")) == first  # whatever the file's date
    found = {first, fingerprint(classifier), fingerprint(classifier, lambda x: x), fingerprint(classifier, tf.sqrt)}
    found.add(fingerprint(classifier, lambda x: 0.9 * x))  # of the same name as another: it does something else
    weights = purifier.get_weights()
    purifier.set_weights([*weights[:-1], weights[-1] + 1e-3])
    found.add(fingerprint(classifier, purifier))
    other = keras.models.clone_model(classifier)
    found.add(fingerprint(other))
    assert len(found) == 7
