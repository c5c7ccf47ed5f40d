"""The smooth stand-ins of defences that pass no gradient: close to them, with the gradient of what they compute."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle

from vqunet_tf.defenses import DEFENSES, classic, smooth
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import classifiers


def images_of(shape, seed=0):
    """Soft blobs with a little noise, using all of [0, 1]."""
    generator = np.random.default_rng(seed)
    images = ndimage.gaussian_filter(generator.random(shape), (0, 2, 2, 0))
    images = (images - images.min()) / np.ptp(images) + generator.normal(0, 0.02, shape)
    return np.clip(images, 0, 1).astype("float32")


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("quality", [75, 10])
@pytest.mark.parametrize("size", [(16, 32), (15, 12)], ids=["whole blocks", "odd sides"])
def test_jpeg_rounded_to_whole_numbers_is_that_of_the_library(channels, quality, size):
    """To the bytes that the library rounds to on its way, and how it spreads colours at odd borders."""
    images = images_of((4, *size, channels))
    expected = 255 * classic.jpeg(images, quality).numpy()
    found = 255 * np.clip(smooth.jpeg(images, quality, tf.round).numpy(), 0, 1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < (1.0 if channels < 3 else 1.5)
    assert np.abs(found - expected).mean() < 0.25 * np.abs(255 * images - expected).mean()


def test_smooth_rounding_by_hand():
    found = smooth.rounded(tf.constant([0.0, 0.4, 0.5, 0.6, 1.3, -1.3]))
    np.testing.assert_allclose(found, [0.0, 0.256, 0.5, 0.744, 1.108, -1.108], atol=1e-6)
    with tf.GradientTape() as tape:
        x = tf.constant([1.0, 1.4, -0.2])
        tape.watch(x)
        y = smooth.rounded(x)
    np.testing.assert_allclose(tape.gradient(y, x), [0.0, 1.92, 0.48], atol=1e-5)  # 12 (x - r)^2


@pytest.mark.parametrize("weight", [0.05, 0.1])
def test_total_variation_ends_where_the_library_ends(weight):
    """After as many steps; and as the defence goes on until little moves, after ten close to it."""
    images = images_of((3, 20, 17, 2))
    for steps in (1, 2, 10):
        found = smooth.total_variation(images, weight, steps).numpy()
        for image, mine in zip(images, found, strict=True):
            expected = denoise_tv_chambolle(image, weight, eps=0, max_num_iter=steps, channel_axis=-1)
            np.testing.assert_allclose(mine, expected, atol=1e-5)
    defended = classic.total_variation(images, weight).numpy()
    assert np.abs(found - defended).mean() < 0.3 * np.abs(images - defended).mean()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stand_in", [smooth.jpeg, smooth.total_variation])
def test_the_gradient_is_that_of_finite_differences(stand_in, channels):
    """And neither that of the identity nor, for JPEG, that of rounding which is taken for the identity."""
    images = 0.1 + 0.8 * images_of((1, 16, 16, channels))  # nothing is clipped
    direction = np.random.default_rng(1).normal(size=images.shape).astype("float32")
    weights = tf.constant(np.random.default_rng(2).normal(size=images.shape), tf.float32)

    def value(x):
        return tf.reduce_sum(weights * stand_in(x))

    with tf.GradientTape() as tape:
        x = tf.constant(images)
        tape.watch(x)
        y = value(x)
    along = float(tf.reduce_sum(tape.gradient(y, x) * direction))
    step = 1e-3
    found = float(value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert along == pytest.approx(found, rel=0.02, abs=0.02)
    assert abs(along - float(np.sum(weights * direction))) > 0.1


@pytest.mark.parametrize("name", ["jpeg", "total_variation"])
def test_a_chain_answers_with_the_defence_and_goes_back_through_its_stand_in(name):
    defense = DEFENSES[name](None, None)
    classifier = classifiers.build("residual", (16, 16, 1), 10, (4,), 1)
    chain = Chain(classifier, defense)
    assert chain.variants == ("smooth", "identity") and chain.through() is chain.through("smooth")
    images = tf.constant(images_of((2, 16, 16, 1)))

    def gradient(function):
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = function(images)
            loss = tf.reduce_sum(logits[:, 0])
        return logits, tape.gradient(loss, images)

    logits, found = gradient(chain.through("smooth"))
    np.testing.assert_allclose(logits, chain(images), atol=1e-5)
    # By the chain rule: the classifier's gradient at what the defence gives, carried back by the stand-in's.
    purified = tf.constant(defense(images))
    with tf.GradientTape() as tape:
        tape.watch(purified)
        loss = tf.reduce_sum(classifier(purified, training=False)[:, 0])
    upstream = tape.gradient(loss, purified)
    with tf.GradientTape() as tape:
        tape.watch(images)
        near = defense.smooth(images)
    np.testing.assert_allclose(found, tape.gradient(near, images, upstream), atol=1e-5)
    _, other = gradient(chain.through("identity"))
    np.testing.assert_allclose(other, upstream, atol=1e-6)
    assert np.abs(found - other).max() > 1e-3
