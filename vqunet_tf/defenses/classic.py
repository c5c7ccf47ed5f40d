"""Input defences that need no training: JPEG, fewer bits, median, total variation.

Each takes images `[B,H,W,C]` float32 in [0,1], an array or a tensor of a `tf.function`, and gives float32 of the same
shape and range; any number of channels, every image by itself, nothing random.

Each is set to what defends best of the settings that `benchmarks/defenses.py` compares: clean accuracy + the worse of
targeted and untargeted gray-box PGD-20 (the score by which a purifier's epoch is chosen), summed over Fashion-MNIST at
0.1 and 8/255 (the released classifier) and CIFAR-10 at 8/255 (a small residual classifier, 69.4 % of clean validation
images), 300 validation images each, seed 0. The highest possible sum is 6, that of no defence 2.79:

    JPEG quality    90: 2.89   75: 3.07   50: 3.28   25: 3.44   10: 3.66
    bits             1: 3.10    2: 3.56    3: 3.09    4: 3.07    5: 2.79
    median window  2x2: 3.22  3x3: 3.13  5x5: 2.98
    TV weight     0.05: 3.24  0.1: 3.35  0.2: 3.05  0.3: 2.58

So strong a setting costs clean accuracy: JPEG 5 to 7 points, 2 bits 4 to 9, the median 1 to 4, total variation 9 to 18.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from skimage.restoration import denoise_tv_chambolle

QUALITY = 10
BITS = 2
WINDOW = 2
WEIGHT = 0.1


def jpeg(images: Any, quality: int = QUALITY) -> tf.Tensor:
    """Compresses and decompresses (Dziugaite et al. 2016, arXiv 1608.00853; Guo et al. 2018, arXiv 1711.00117).

    Three channels are taken for RGB, any other number is compressed channel by channel. The pixels are rounded to
    bytes before. Passes no gradient.

    quality: 1 to 100, of libjpeg.
    """
    images = tf.convert_to_tensor(images, tf.float32)
    levels = tf.cast(tf.round(255.0 * tf.clip_by_value(images, 0.0, 1.0)), tf.uint8)
    if images.shape[-1] != 3:  # [B, H, W, C] -> [B, C, H, W, 1]
        levels = tf.transpose(levels, [0, 3, 1, 2])[..., tf.newaxis]
    shape = tf.shape(levels)
    single = tf.reshape(levels, [-1, *tf.unstack(shape[-3:])])
    channels = 3 if images.shape[-1] == 3 else 1

    def through(image: tf.Tensor) -> tf.Tensor:
        image = tf.ensure_shape(image, [None, None, channels])
        encoded = tf.io.encode_jpeg(image, format="rgb" if channels == 3 else "grayscale", quality=quality)
        return tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE")

    found = tf.reshape(tf.map_fn(through, single), shape)
    if images.shape[-1] != 3:
        found = tf.transpose(found[..., 0], [0, 2, 3, 1])
    return tf.ensure_shape(tf.cast(found, tf.float32) / 255.0, images.shape)


def bit_depth(images: Any, bits: int = BITS) -> tf.Tensor:
    """Rounds to 2^bits levels: feature squeezing (Xu et al. 2018, arXiv 1704.01155). Passes no gradient but zero."""
    images = tf.convert_to_tensor(images, tf.float32)
    highest = 2.0**bits - 1.0
    return tf.round(tf.clip_by_value(images, 0.0, 1.0) * highest) / highest


def median(images: Any, window: int = WINDOW) -> tf.Tensor:
    """The median of a window around each pixel: local smoothing of feature squeezing (Xu et al. 2018).

    At the border the image is mirrored. For an even window the pixel is right and below of the middle, and of the two
    middle values the larger one is taken, as in `scipy.ndimage.median_filter`. Passes the gradient of the median.
    """
    images = tf.convert_to_tensor(images, tf.float32)
    before, after = window // 2, (window - 1) // 2
    padded = tf.pad(images, [[0, 0], [before, after], [before, after], [0, 0]], "SYMMETRIC")
    height, width = tf.unstack(tf.shape(images)[1:3])
    seen = [padded[:, i : i + height, j : j + width] for i in range(window) for j in range(window)]
    middle = len(seen) // 2
    # The largest up to the middle one: all that has to be sorted.
    largest = tf.math.top_k(tf.stack(seen, axis=-1), len(seen) - middle).values
    return tf.ensure_shape(largest[..., -1], images.shape)


def total_variation(images: Any, weight: float = WEIGHT) -> tf.Tensor:
    """The image of least total variation near this one, by Chambolle's method (2004, J. Math. Imaging Vis. 20:89).

    As a defence: Guo et al. 2018 (arXiv 1711.00117), here without their random choice of pixels. scikit-image's
    `denoise_tv_chambolle`, image by image, its other settings as they are. Passes no gradient.

    weight: more is smoother.
    """

    def denoise(batch: np.ndarray) -> np.ndarray:
        found = [denoise_tv_chambolle(image, weight=weight, channel_axis=-1) for image in batch]
        return np.clip(np.reshape(found, batch.shape), 0.0, 1.0).astype(np.float32)

    images = tf.convert_to_tensor(images, tf.float32)
    return tf.ensure_shape(tf.numpy_function(denoise, [images], tf.float32, stateful=False), images.shape)
