"""Defences: the classic ones give what their libraries give, image by image, and say what gradient they pass."""

import dataclasses
import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle

from benchmarks import defenses as bench
from vqunet_tf import defenses
from vqunet_tf.defenses import classic
from vqunet_tf.errors import UserError
from vqunet_tf.models import VQUNet, classifiers

CLASSIC = {
    "jpeg": classic.jpeg,
    "bit_depth": classic.bit_depth,
    "median": classic.median,
    "total_variation": classic.total_variation,
}


def smooth(shape, seed=0):
    """Images with edges and flat parts, using all of [0, 1]."""
    images = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), (0, 2, 2, 0))
    return ((images - images.min()) / np.ptp(images)).astype("float32")


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["grey", "two_channels", "colour"])
def images(request):
    return smooth((4, 15, 12, request.param))


def build(name):
    return defenses.build(name, VQUNet(widths=(4, 8), num_embeddings=8, embedding_dim=2, channels=1))


@pytest.mark.parametrize("name", CLASSIC)
def test_every_image_is_answered_alone_and_always_alike(name, images):
    defense = build(name)
    found = np.asarray(defense(images))
    assert found.shape == images.shape and found.dtype == np.float32
    assert found.min() >= 0.0 and found.max() <= 1.0
    assert np.abs(found - images).max() > 1e-3  # it does something
    compiled = tf.function(defense, input_signature=[tf.TensorSpec((None, 15, 12, images.shape[-1]))])
    np.testing.assert_allclose(compiled(images), found, atol=1e-6)
    for i in range(len(images)):
        np.testing.assert_allclose(compiled(images[i : i + 1])[0], found[i], atol=1e-6)


@pytest.mark.parametrize("name", CLASSIC)
def test_a_flat_image_stays_as_it_is(name):
    """At levels that each of them can hold: JPEG has 128 at any quality, other flat levels to half its coarsest step."""
    level = {"jpeg": 128 / 255, "bit_depth": 1 / (2**classic.GRAY.bits - 1)}.get(name, 0.3)
    flat = np.full((2, 16, 16, 1), level, "float32")
    np.testing.assert_allclose(CLASSIC[name](flat), flat, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [90, 75, classic.GRAY.quality])
def test_jpeg_is_that_of_pillow(channels, quality):
    images = smooth((3, 15, 12, channels))
    found = 255.0 * classic.jpeg(images, quality).numpy()
    for image, mine in zip(np.rint(255 * images).astype("uint8"), found, strict=True):
        file = io.BytesIO()
        Image.fromarray(image if channels == 3 else image[..., 0]).save(file, "jpeg", quality=quality)
        np.testing.assert_allclose(mine, np.array(Image.open(file)).reshape(image.shape), atol=1e-4)


def test_jpeg_takes_other_channels_one_by_one():
    images = smooth((2, 16, 16, 2))
    single = [classic.jpeg(images[..., i : i + 1], 50).numpy() for i in range(2)]
    np.testing.assert_array_equal(classic.jpeg(images, 50), np.concatenate(single, axis=-1))


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_fewer_bits_are_the_nearest_of_so_many_levels(bits, images):
    found = classic.bit_depth(images, bits).numpy()
    levels = np.arange(2**bits) / (2**bits - 1)
    assert set(np.unique(np.rint(found * (2**bits - 1)))) <= set(range(2**bits))
    nearest = levels[np.abs(images[..., None] - levels).argmin(axis=-1)]
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    np.testing.assert_array_equal(classic.bit_depth(found, bits), found)


@pytest.mark.parametrize("window", [2, 3, 5])
def test_the_median_is_that_of_scipy(window, images):
    expected = ndimage.median_filter(images, size=(1, window, window, 1), mode="reflect")
    np.testing.assert_array_equal(classic.median(images, window), expected)


def test_the_median_passes_its_gradient():
    """Each result is one of the pixels: all of its gradient goes there. By hand for one row of distinct levels."""
    row = np.array([0.1, 0.5, 0.2, 0.9, 0.3], "float32")
    images = tf.constant(np.tile(row, (5, 1))[None, :, :, None] + 1e-3 * np.arange(5)[None, :, None, None])
    with tf.GradientTape() as tape:
        tape.watch(images)
        middle = classic.median(tf.cast(images, tf.float32), 3)[0, 2, 2, 0]  # of 0.5, 0.2, 0.9 in three lines each
    gradient = tape.gradient(middle, images).numpy()[0, :, :, 0]
    assert gradient[2, 1] == 1.0 and np.abs(gradient).sum() == 1.0


@pytest.mark.parametrize("weight", [0.05, 0.2])
def test_total_variation_is_that_of_scikit_image(weight, images):
    found = classic.total_variation(images, weight).numpy()
    for image, mine in zip(images, found, strict=True):
        expected = denoise_tv_chambolle(image, weight=weight, channel_axis=-1)
        np.testing.assert_allclose(mine, np.clip(expected, 0.0, 1.0), atol=1e-6)
    assert variation(found) < 0.8 * variation(images)
    assert variation(classic.total_variation(images, 2 * weight)) < variation(found)


def variation(images):
    images = np.asarray(images)
    return np.abs(np.diff(images, axis=1)).sum() + np.abs(np.diff(images, axis=2)).sum()


@pytest.mark.parametrize("name", ["none", "vqunet", *CLASSIC])
def test_each_says_whether_it_passes_a_gradient(name):
    defense = build(name)
    images = tf.constant(smooth((2, 16, 16, 1)))

    @tf.function
    def gradient(x):
        return tf.gradients(tf.reduce_sum(defense(x) ** 2), x)

    found = gradient(images)[0]
    assert defense.differentiable == (found is not None and bool(tf.reduce_any(found != 0.0)))


class TestRegistry:
    def test_unknown_names_list_the_known_ones(self):
        known = "bit_depth, dae, jpeg, median, none, total_variation, unet, vqunet, vqvae"
        with pytest.raises(UserError, match=f"unknown defense 'jpg': expected one of {known}"):
            build("jpg")

    def test_an_ablation_needs_a_folder(self):
        with pytest.raises(UserError, match="'unet' is trained beside a purifier: expected a run folder, got none"):
            build("unet")
        assert defenses.available() == ["none", "vqunet", *CLASSIC]

    def test_no_defence_gives_the_images_back_and_vqunet_is_the_purifier(self):
        images = smooth((2, 16, 16, 1))
        np.testing.assert_array_equal(build("none")(images), images)
        purifier = VQUNet(widths=(4, 8), num_embeddings=8, embedding_dim=2, channels=1)
        np.testing.assert_array_equal(defenses.build("vqunet", purifier)(images), purifier(images))

    def test_every_defence_says_how_it_is_set(self):
        gray, colour = (
            [found.quality, found.bits, found.window, found.weight] for found in (classic.GRAY, classic.COLOUR)
        )
        for name, one, other in zip(CLASSIC, gray, colour, strict=True):
            assert str(one) in build(name).setting and str(other) in build(name).setting

    def test_gray_and_colour_images_have_strengths_of_their_own(self):
        for channels, expected in ((1, classic.GRAY), (2, classic.COLOUR), (3, classic.COLOUR)):
            images = smooth((2, 16, 16, channels))
            for name, strength in zip(CLASSIC, dataclasses.astuple(expected), strict=True):
                np.testing.assert_array_equal(build(name)(images), CLASSIC[name](images, strength))


def test_the_comparison_of_settings_names_the_best_of_each(capsys, monkeypatch):
    """A classifier that calls bright images 1: an image is right as long as its defence leaves it on its side."""
    levels = np.array([10, 120, 135, 250], "uint8")
    shown = {"clean": levels, "untargeted": np.array([10, 130, 135, 250], "uint8"), "targeted": levels}
    shown = {kind: np.tile(values[:, None, None, None], (1, 16, 16, 1)) for kind, values in shown.items()}

    def classifier(x, training):
        return tf.stack([0.5 - x[:, 8, 8, 0], x[:, 8, 8, 0] - 0.5], axis=-1)

    monkeypatch.setitem(bench.SETTINGS, "bit_depth", (classic.bit_depth, {"bits": (1, 4)}))
    none, *rows = bench.measure(classifier, shown, np.array([0, 0, 1, 1]), ["bit_depth"])
    assert (none["clean"], none["untargeted"], none["targeted"], none["score"]) == (1.0, 0.75, 1.0, 1.75)
    assert [row["bits"] for row in rows] == [1, 4] and [row["score"] for row in rows] == [1.75, 1.75]
    assert [row.get("best", False) for row in rows] == [True, False]

    model = classifiers.build("residual", (28, 28, 1), 10, (4, 8), 1)
    monkeypatch.setattr(bench.RunFolder, "load_classifier", lambda folder: model)
    monkeypatch.setattr(bench.data, "load", lambda config, split: fake_split())
    bench.main(["--defenses=bit_depth", "--num_examples=8", "--steps=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["defense"] for line in lines] == ["none", "bit_depth", "bit_depth"]


def fake_split():
    levels = (255 * smooth((8, 28, 28, 1))).astype("uint8")
    return bench.data.Split(levels, np.arange(8), tuple("0123456789"))
