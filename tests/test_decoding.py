"""Image files in the graph, and the adversarial score: numbers against Pillow and closed forms."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from serving import calibration, decoding, score
from vqunet_tf import data
from vqunet_tf.config import AttackConfig, Config
from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers
from vqunet_tf.models.vqunet import VQUNet

HEIGHT, WIDTH = 6, 10


@pytest.fixture(scope="module")
def decode():
    """`decode` of files to 6x10 pixels, a function of each number of channels traced once."""
    spec = [tf.TensorSpec((None,), tf.string)]
    functions = {
        channels: tf.function(lambda files, c=channels: decoding.decode(files, (HEIGHT, WIDTH, c)), spec)
        for channels in decoding.CHANNELS
    }
    return lambda channels, *files: functions[channels](tf.constant(files)).numpy()


def image(mode, height=HEIGHT, width=WIDTH):
    """Random pixels as a Pillow image, made from RGBA."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def file(picture, kind="PNG", **options):
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return written.getvalue()


def bytes_of(picture, channels):
    """What Pillow makes of a picture: [H, W, C]."""
    return np.asarray(picture.convert({1: "L", 3: "RGB"}[channels])).reshape(HEIGHT, WIDTH, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_png_of_any_kind(decode, mode, channels):
    picture = image("RGBA").convert("RGB").convert(mode) if mode in ("P", "1") else image(mode)
    found = decode(channels, file(picture))
    assert found.shape == (1, HEIGHT, WIDTH, channels) and found.dtype == np.float32
    allowed = 0.51 if channels == 1 else 0.001  # Pillow rounds its grey to a byte
    np.testing.assert_allclose(found[0] * 255, bytes_of(picture, channels), atol=allowed)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(decode, mode):
    smooth = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    encoded = file(Image.fromarray(smooth).convert("RGB").convert(mode), "JPEG", quality=95)
    for channels in decoding.CHANNELS:
        wanted = bytes_of(Image.open(io.BytesIO(encoded)), channels)
        np.testing.assert_allclose(decode(channels, encoded)[0] * 255, wanted, atol=1)


def test_upper_eight_of_sixteen_bits(decode):
    deep = np.random.default_rng(1).integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
    found = decode(1, file(Image.fromarray(deep)))[0, ..., 0]
    np.testing.assert_allclose(found * 255, deep >> 8, atol=0.001)


def test_another_size_is_resized(decode):
    """Halving averages with a triangle of 4 pixels; a plain picture stays plain; a batch may mix sizes."""
    picture = image("RGB", 2 * HEIGHT, 2 * WIDTH)
    plain = Image.new("RGB", (3, 50), (51, 102, 204))
    found = decode(3, file(picture), file(plain), file(image("RGB")))
    large = np.asarray(picture, np.float64) / 255
    weights = np.array([1, 3, 3, 1]) / 8
    patch = large[3:7, 5:9]  # around the output pixel (2, 3), whose centre lies at (5, 7)
    np.testing.assert_allclose(found[0, 2, 3], np.einsum("i,j,ijc->c", weights, weights, patch), atol=1e-5)
    np.testing.assert_allclose(found[1], np.broadcast_to([0.2, 0.4, 0.8], (HEIGHT, WIDTH, 3)), atol=1e-6)
    np.testing.assert_allclose(found[2] * 255, bytes_of(image("RGB"), 3), atol=0.001)


def test_no_file_no_image(decode):
    files = tf.constant([], tf.string)
    assert decoding.decode(files, (HEIGHT, WIDTH, 3)).shape == (0, HEIGHT, WIDTH, 3)


def bomb():
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def huge_jpeg():
    """A JPEG whose header claims 60,000 x 60,000 pixels."""
    encoded = bytearray(file(image("RGB"), "JPEG"))
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(encoded)


BAD = {
    "text": (b"no image at all, but long enough to be one", "whole PNG or JPEG"),
    "empty": (b"", "whole PNG or JPEG"),
    "gif": (file(image("P"), "GIF"), "whole PNG or JPEG"),
    "bmp": (file(image("RGB"), "BMP"), "whole PNG or JPEG"),
    "cut header": (file(image("RGB"))[:20], "whole PNG or JPEG"),
    "cut PNG": (file(image("RGB"))[:-40], ""),
    "cut JPEG": (file(image("RGB"), "JPEG")[:60], ""),
    "bomb": (bomb(), "expected an image of 1 to 16777216 pixels"),
    "huge JPEG": (huge_jpeg(), "expected an image of 1 to 16777216 pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_an_invalid_argument(decode, case):
    """TF Serving makes INVALID_ARGUMENT of it; the message holds nothing that was sent."""
    content, message = BAD[case]
    with pytest.raises(tf.errors.InvalidArgumentError) as refused:
        decode(3, file(image("RGB")), content)
    assert message in refused.value.message
    assert "no image at all" not in refused.value.message


# === Score ===


def test_divergence_closed_forms():
    """0 for equal distributions, 1 for disjoint ones, and p against (1, 0) by the definition."""
    big = 1e4  # beyond where exp is 0
    first = tf.constant([[0.3, 0.1], [big, 0.0], [0.0, 0.0]])
    second = tf.constant([[1.3, 1.1], [0.0, big], [big, 0.0]])
    half_and_certain = 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25)) + 0.5 * np.log2(1 / 0.75)
    np.testing.assert_allclose(score.divergence(first, second), [0.0, 1.0, half_and_certain], atol=1e-7)


def test_fit_tells_apart_and_keeps_its_word():
    """At most 5% of the clean lie above the threshold, and not one fewer than possible; all tampered ones do."""
    rng = np.random.default_rng(0)
    clean = np.exp(rng.normal([-6, -3, -2], 0.5, (210, 3)))
    tampered = np.exp(rng.normal([-1, -2, -1.5], 0.5, (40, 3)))
    found = score.fit(clean, tampered)
    above = found(tf.constant(clean, tf.float32)).numpy() > found.threshold
    assert above.sum() == 10  # of 210: 5% are 10.5
    scores = found(tf.constant(tampered, tf.float32)).numpy()
    assert (scores > found.threshold).all() and scores.mean() > 0.9
    assert found.calibrated and not score.Score().calibrated


def test_calibrate_measures_what_it_says():
    """Its false alarms come from the images given."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    split = data.Split(images, rng.integers(0, 3, 60).astype(np.int32), ("a", "b", "c"))
    tf.keras.utils.set_random_seed(0)
    purifier = VQUNet(widths=(4, 4), num_embeddings=4, embedding_dim=2, channels=1)
    classifier = classifiers.build("residual", (8, 8, 1), 3, (4,), 1)
    config = Config(attack=AttackConfig(epsilon=0.3, max_steps=2))
    found = calibration.calibrate(purifier, classifier, split, config)
    report = found.report
    assert report["false_alarms"] == {"allowed": 0.05, "measured": pytest.approx(3 / 60), "n": 60}
    assert (report["detected"]["n"], report["detected"]["epsilon"]) == (30, config.evaluation.epsilons[0])
    assert 0 <= report["detected"]["targeted"] <= 1
    few = data.Split(images[:39], split.labels[:39], split.class_names)
    with pytest.raises(UserError, match="39 validation images: expected at least 40"):
        calibration.calibrate(purifier, classifier, few, config)
