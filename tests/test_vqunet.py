"""The purifier and the defended model: shapes, ranges, what reaches the decoder, round trips."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf import DefendedClassifier, VQUNet, data
from vqunet_tf.config import DataConfig
from vqunet_tf.models import blocks


@pytest.fixture
def purifier():
    return VQUNet(widths=(8, 12), num_embeddings=(16, 32), embedding_dim=(4, 6), channels=1)


def classifier_for(shape, classes=5):
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.Flatten()(inputs)))


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (9, 31, 3), (32, 32, 2)], ids=str)
@pytest.mark.parametrize("stem", [1, 2, 4])
def test_any_size_and_channel_count_comes_back_in_its_shape_and_range(shape, stem, rng):
    model = VQUNet(widths=(8, 8, 8), num_embeddings=8, embedding_dim=4, stem=stem, channels=shape[-1])
    images = rng.random((2, *shape), dtype="float32")
    purified = model.purify(images)
    assert purified.shape == images.shape and purified.dtype == np.float32
    assert purified.min() >= 0.0 and purified.max() <= 1.0


def test_only_code_book_content_reaches_the_decoder(purifier, rng):
    """Two images with the same codes at every level give the same output, to the last bit."""
    image = rng.random((1, 16, 16, 1), dtype="float32")
    found = purifier.graph(image)["indices"]
    nudged = image + np.float32(1e-6) * (image < 0.5)
    again = purifier.graph(nudged)["indices"]
    assert all(np.array_equal(found[level], again[level]) for level in found)
    assert not np.array_equal(image, nudged)
    np.testing.assert_array_equal(purifier(image), purifier(nudged))


def test_without_quantizers_the_same_nudge_is_seen(rng):
    model = VQUNet(widths=(8, 12), channels=1, quantize=False)
    image = rng.random((1, 16, 16, 1), dtype="float32")
    assert model.quantizers == []
    assert not np.array_equal(model(image), model(image + np.float32(1e-6) * (image < 0.5)))


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [({}, 2), ({"skips": False}, 1), ({"quantize": False}, 0), ({"skips": False, "quantize": False}, 0)],
    ids=str,
)
def test_ablations_are_arguments(arguments, levels):
    model = VQUNet(widths=(8, 12), num_embeddings=8, embedding_dim=4, channels=1, **arguments)
    assert len(model.quantizers) == levels
    assert VQUNet.from_config(model.get_config()).get_config() == model.get_config()


def test_the_decoder_has_sizes_of_its_own(tmp_path, rng):
    same = VQUNet((8, 12), blocks=2, decoder_widths=(8, 12), decoder_blocks=2, channels=1, name="v")
    assert same.get_config() == VQUNet((8, 12), blocks=2, channels=1, name="v").get_config()
    model = VQUNet((8, 12), blocks=2, num_embeddings=16, decoder_widths=(4, 6), decoder_blocks=1, channels=1)
    assert model.graph.output["bottleneck"].shape[-1] == 6
    kernels = {layer.name: layer.kernel.shape for layer in model.graph.layers if "conv1" in layer.name}
    assert kernels == {
        **{f"encoder_{i}_{b}_conv1": (3, 3, width, width) for i, width in enumerate((8, 12)) for b in range(2)},
        **{f"decoder_{i}_0_conv1": (3, 3, width, width) for i, width in enumerate((4, 6))},
    }
    images = rng.random((4, 16, 16, 1), dtype="float32")
    model.save(tmp_path / "purifier.keras")
    loaded = keras.models.load_model(tmp_path / "purifier.keras")
    assert loaded.get_config() == model.get_config() and loaded.decoder_widths == (4, 6)
    np.testing.assert_allclose(loaded.purify(images), model.purify(images), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decoder_widths", (4,)), ("decoder_widths", ()), ("decoder_widths", (4, 0)), ("decoder_blocks", 0)],
)
def test_a_decoder_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"Expected {name}"):
        VQUNet((8, 12), channels=1, **{name: value})


def test_groups_and_normalised_blocks_keep_what_is_promised(tmp_path, rng):
    """Several codes at a place, alike alone and in a batch, the same after a file."""
    model = VQUNet((8, 12), num_embeddings=16, embedding_dim=4, groups=(2, 3), normalize=True, channels=1)
    images = rng.random((4, 16, 16, 1), dtype="float32")
    model.graph(images, training=True)
    codes = model.codes(images)
    assert codes["level_0"].shape == (4, 8, 8, 2) and codes["level_1"].shape == (4, 4, 4, 3)
    np.testing.assert_allclose(model.purify(images[1]), model.purify(images)[1], atol=1e-6)
    model.save(tmp_path / "purifier.keras")
    loaded = keras.models.load_model(tmp_path / "purifier.keras")
    assert loaded.groups == (2, 3) and loaded.normalize
    np.testing.assert_allclose(loaded.purify(images), model.purify(images), atol=1e-6)


def test_padding_mirrors_the_lower_and_right_border_and_is_cropped_again(purifier, rng):
    """An odd image is purified as the upper left corner of the image that is mirrored by hand."""
    image = rng.random((1, 13, 10, 1), dtype="float32")
    padded = np.pad(image, [(0, 0), (0, 3), (0, 2), (0, 0)], mode="symmetric")  # to multiples of 4
    np.testing.assert_array_equal(purifier(image), purifier(padded)[:, :13, :10])


def test_an_image_is_purified_alike_alone_and_in_a_batch(purifier, rng):
    images = rng.random((3, 12, 12, 1), dtype="float32")
    for image, expected in zip(images, purifier.purify(images), strict=True):
        np.testing.assert_allclose(purifier.purify(image), expected, atol=1e-6)


def test_the_gradient_of_all_quantizers_is_set_at_once_and_identity_changes_the_answer(purifier, rng):
    image = rng.random((16, 16, 1), dtype="float32")
    hard = purifier.purify(image)
    purifier.set_gradient("rotation")
    np.testing.assert_array_equal(purifier.purify(image), hard)
    purifier.set_gradient("identity")
    assert np.abs(purifier.purify(image) - hard).max() > 1e-4
    with pytest.raises(ValueError, match="straight_through"):
        purifier.set_gradient("none")


def test_bytes_and_floats_mean_the_same_image(purifier, rng):
    image = rng.integers(0, 256, size=(16, 16, 1), dtype="uint8")
    np.testing.assert_array_equal(purifier.purify(image), purifier.purify((image / 255.0).astype("float32")))
    assert purifier.purify(np.zeros((0, 16, 16, 1), "uint8")).shape == (0, 16, 16, 1)
    np.testing.assert_array_equal(purifier.purify(image[None], batch_size=1)[0], purifier.purify(image))


@pytest.mark.parametrize("block", [2, 3])
def test_depth_to_space_equals_the_one_of_keras(block, rng):
    x = rng.normal(size=(2, 3, 4, 2 * block**2)).astype("float32")
    expected = np.zeros((2, 3 * block, 4 * block, 2), "float32")
    for i, j in np.ndindex(block, block):
        first = 2 * (i * block + j)
        expected[:, i::block, j::block] = x[..., first : first + 2]
    np.testing.assert_array_equal(blocks.depth_to_space(x, block), expected)
    np.testing.assert_array_equal(blocks.DepthToSpace(block)(x), expected)


def test_codes_are_the_maps_the_decoder_sees(purifier, rng):
    images = rng.random((5, 16, 20, 1), dtype="float32")
    codes = purifier.codes(images, batch_size=2)
    assert {name: maps.shape for name, maps in codes.items()} == {"level_0": (5, 8, 10), "level_1": (5, 4, 5)}
    np.testing.assert_array_equal(purifier.codes(images[3])["level_1"], codes["level_1"][3])
    assert codes["level_0"].max() < 16 and codes["level_1"].max() < 32


def test_weights_and_saved_model_round_trips(purifier, tmp_path, rng):
    images = rng.random((8, 16, 16, 1), dtype="float32")
    purifier.graph(images, training=True)
    purifier.save_weights(tmp_path / "purifier.weights.h5")
    other = VQUNet.from_config(purifier.get_config())
    assert not np.array_equal(other(images), purifier(images))
    other.load_weights(tmp_path / "purifier.weights.h5")
    np.testing.assert_array_equal(other(images), purifier(images))
    purifier.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    for batch in (1, 5):
        np.testing.assert_allclose(served.serve(images[:batch]), purifier(images[:batch]), atol=1e-6)


def test_trainable_flags_are_those_given(purifier):
    classifier = classifier_for((16, 16, 1))
    classifier.trainable = False
    defended = DefendedClassifier(purifier, classifier)
    assert defended.trainable_weights and not classifier.trainable_weights
    assert {id(w) for w in defended.trainable_weights} == {id(w) for w in purifier.trainable_weights}


def test_file_round_trip_at_another_batch_size(purifier, tmp_path, rng):
    purifier.graph(rng.random((8, 16, 16, 1), dtype="float32"), training=True)
    purifier.save(tmp_path / "purifier.keras")
    again = keras.models.load_model(tmp_path / "purifier.keras")
    for batch in (1, 5):
        images = rng.random((batch, 20, 12, 1), dtype="float32")
        np.testing.assert_array_equal(again(images), purifier(images))


def test_the_defended_model_is_the_classifier_after_the_purifier(purifier, tmp_path, rng):
    classifier = classifier_for((16, 16, 1))
    defended = DefendedClassifier(purifier, classifier)
    images = rng.random((3, 16, 16, 1), dtype="float32")
    np.testing.assert_array_equal(defended(images), classifier(purifier(images)))
    np.testing.assert_allclose(defended.predict(images, verbose=0), defended(images), atol=1e-5)
    defended.save(tmp_path / "defended.keras")
    again = keras.models.load_model(tmp_path / "defended.keras")
    np.testing.assert_array_equal(again(images), defended(images))
    again.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(images[:2]), defended(images[:2]), atol=1e-6)
    assert isinstance(again.purifier, VQUNet) and again.classifier.output_shape == (None, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((16, 16, 3), "uint8"), r"\[H, W, 1\].*shape=\(16, 16, 3\)"),
        (np.zeros((16, 16), "uint8"), r"shape=\(16, 16\)"),
        (np.zeros((4, 16, 1), "uint8"), "at least 8x8"),
        (np.full((16, 16, 1), 1.5, "float32"), r"\[0, 1\].*1.5"),
        (np.full((16, 16, 1), np.nan, "float32"), "nan"),
        (np.zeros((16, 16, 1), "int64"), "dtype=int64"),
    ],
    ids=["channels", "rank", "small", "range", "nan", "dtype"],
)
def test_wrong_images_say_expected_and_received(purifier, images, message):
    with pytest.raises(ValueError, match=message):
        purifier.purify(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_embeddings": (8, 8, 8)}, "each of the 2 levels"),
        ({"stem": 0}, "stem.*Received: 0"),
        ({"channels": 0}, "channels.*Received: 0"),
        ({"widths": ()}, "widths"),
    ],
    ids=str,
)
def test_wrong_arguments_say_expected_and_received(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQUNet(**{"widths": (8, 12), "channels": 1, **arguments})


def test_too_small_for_the_depth_says_so():
    model = VQUNet(widths=(4,) * 6, num_embeddings=4, embedding_dim=2, channels=1)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        model(np.zeros((1, 16, 16, 1), "float32"))


def test_nearly_all_codes_are_used_on_real_images(tfds_dir):
    """A quarter of an epoch of Fashion-MNIST; the whole of it with five seeds is in docs/vqunet.md."""
    images = data.load(DataConfig(dataset="fashion_mnist", data_dir=str(tfds_dir), limit=15360), "train").images
    model = VQUNet(widths=(8, 16, 24), num_embeddings=512, embedding_dim=16, channels=1)
    optimizer = keras.optimizers.AdamW(2e-3)

    @tf.function
    def step(batch):
        x = tf.cast(batch, tf.float32) / 255.0
        with tf.GradientTape() as tape:
            result = model.graph(x, training=True)
            loss = tf.reduce_mean(tf.abs(result["images"] - x)) + result["loss"]
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    optimizer.build(model.trainable_variables)
    for start in range(0, len(images) - 127, 128):
        step(tf.constant(images[start : start + 128]))
    assert min(quantizer.usage() for quantizer in model.quantizers) >= 0.9
