"""Input defences that need no training: JPEG, fewer bits, median, total variation.

Each takes images `[B,H,W,C]` float32 in [0,1], an array or a tensor of a `tf.function`, and gives float32 of the same
shape and range; any number of channels, every image by itself, nothing random.

Each is set to what defends best of the settings that `benchmarks/defenses.py` compares, for images of one channel and for
others: clean accuracy + the worse of targeted and untargeted gray-box PGD-20 (the score by which a purifier's epoch is
chosen) of the released classifier, 500 validation images, seed 0. Gray: Fashion-MNIST, the sum of 0.1 and 8/255, at most 4,
where no defence has 2.11. Colour: CIFAR-10 at 8/255, at most 2, where no defence has 0.92.

                                          gray                               colour
    JPEG quality  90, 75, 50, 25, 10      2.23  2.38  2.66  2.92  2.94       1.49  1.60  1.51  1.37  0.93
    bits           1,  2,  3,  4,  5      2.37  2.97  2.45  2.37  2.12       0.34  0.59  0.80  0.81  0.91
    median window        2,  3,  5        2.89  2.93  2.74                   1.22  1.26  0.95
    TV weight     0.05, 0.1, 0.2, 0.3     3.09  3.00  2.56  2.22             1.26  1.15  0.77  0.57

So rounding colours to few bits defends nothing there: it is set to the least harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from skimage.restoration import denoise_tv_chambolle


@dataclass(frozen=True)
class Strengths:
    """What the defences are set to."""

    quality: int
    bits: int
    window: int
    weight: float


GRAY = Strengths(quality=10, bits=2, window=3, weight=0.05)
COLOUR = Strengths(quality=75, bits=5, window=3, weight=0.05)


def strengths(images: Any) -> Strengths:
    """Those for images `[B,H,W,C]`."""
    return GRAY if images.shape[-1] == 1 else COLOUR


def jpeg(images: Any, quality: int | None = None) -> tf.Tensor:
    """Compresses and decompresses (Dziugaite et al. 2016, arXiv 1608.00853; Guo et al. 2018, arXiv 1711.00117).

    Three channels are taken for RGB, any other number is compressed channel by channel. The pixels are rounded to
    bytes before. Passes no gradient.

    quality: 1 to 100, of libjpeg; None is what `strengths` says.
    """
    images = tf.convert_to_tensor(images, tf.float32)
    quality = strengths(images).quality if quality is None else quality
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


def bit_depth(images: Any, bits: int | None = None) -> tf.Tensor:
    """Rounds to 2^bits levels: feature squeezing (Xu et al. 2018, arXiv 1704.01155). Passes no gradient but zero."""
    images = tf.convert_to_tensor(images, tf.float32)
    bits = strengths(images).bits if bits is None else bits
    highest = 2.0**bits - 1.0
    return tf.round(tf.clip_by_value(images, 0.0, 1.0) * highest) / highest


def median(images: Any, window: int | None = None) -> tf.Tensor:
    """The median of a window around each pixel: local smoothing of feature squeezing (Xu et al. 2018).

    At the border the image is mirrored. For an even window the pixel is right and below of the middle, and of the two
    middle values the larger one is taken, as in `scipy.ndimage.median_filter`. Passes the gradient of the median.
    """
    images = tf.convert_to_tensor(images, tf.float32)
    window = strengths(images).window if window is None else window
    before, after = window // 2, (window - 1) // 2
    padded = tf.pad(images, [[0, 0], [before, after], [before, after], [0, 0]], "SYMMETRIC")
    height, width = tf.unstack(tf.shape(images)[1:3])
    seen = [padded[:, i : i + height, j : j + width] for i in range(window) for j in range(window)]
    middle = len(seen) // 2
    # The largest up to the middle one: all that has to be sorted.
    largest = tf.math.top_k(tf.stack(seen, axis=-1), len(seen) - middle).values
    return tf.ensure_shape(largest[..., -1], images.shape)


def total_variation(images: Any, weight: float | None = None) -> tf.Tensor:
    """The image of least total variation near this one, by Chambolle's method (2004, J. Math. Imaging Vis. 20:89).

    As a defence: Guo et al. 2018 (arXiv 1711.00117), here without their random choice of pixels. scikit-image's
    `denoise_tv_chambolle`, image by image, its other settings as they are. Passes no gradient.

    weight: more is smoother.
    """

    def denoise(batch: np.ndarray) -> np.ndarray:
        found = [denoise_tv_chambolle(image, weight=weight, channel_axis=-1) for image in batch]
        return np.clip(np.reshape(found, batch.shape), 0.0, 1.0).astype(np.float32)

    images = tf.convert_to_tensor(images, tf.float32)
    weight = strengths(images).weight if weight is None else weight
    return tf.ensure_shape(tf.numpy_function(denoise, [images], tf.float32, stateful=False), images.shape)
