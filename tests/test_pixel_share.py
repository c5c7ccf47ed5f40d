"""A share of the image itself, in a few tones, where a gate is open."""

import keras
import numpy as np
import pytest
from test_gate import SIZES, pair

from vqunet_tf import VQUNet, pixels
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import blocks
from vqunet_tf.models.operations import multiply_accumulates
from vqunet_tf.recipes import ABLATIONS, PurifierConfig, ablation
from vqunet_tf.training import given


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
    toned = np.floor(unit * (tones - 1) + 0.5) / (tones - 1)  # no tie: 255 (tones - 1) is never odd times 1/2
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
    from vqunet_tf import backend

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
