"""PNG and JPEG files to images, as graph operations that every TF Serving has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from vqunet_tf.pixels import to_unit

CHANNELS = (1, 3)  # what `decode` can make
# A small file may claim any size, and all of it would be held in memory.
MAX_PIXELS = 2**24

_PNG = b"\x89PNG\r\n\x1a\n"
_HEADER = 33  # bytes of a PNG up to the end of its IHDR, whose width and height stand at 16
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"
_AT_A_TIME = 4


def decode(encoded: Any, image_shape: Sequence[int]) -> Any:
    """Returns images float32 [B, H, W, C] in [0, 1] of PNG or JPEG files, strings [B].

    image_shape: (H, W, C), C 1 or 3.

    Eight bits per channel are kept (of 16 the upper eight). Colour becomes grey as BT.601 luma; grey becomes colour by
    repetition; alpha is dropped; an animated PNG gives its first picture; a palette is resolved; the orientation in EXIF is
    not followed. Another size is resized, without keeping the aspect ratio: bilinear, with a filter as wide as the
    reduction (antialiased); the right size is left alone.

    When it runs, an `InvalidArgumentError` is raised if one of the batch is neither PNG nor JPEG (GIF and BMP are not),
    is damaged, or claims more than 2^24 pixels; the last is known from its header, before anything is unpacked.
    """
    height, width, channels = image_shape
    return tf.map_fn(
        lambda one: _decode_one(one, height, width, channels),
        encoded,
        fn_output_signature=tf.TensorSpec((height, width, channels), tf.float32),
        parallel_iterations=_AT_A_TIME,
    )


def _decode_one(data: Any, height: int, width: int, channels: int) -> Any:
    """One file, a string [], to float32 [H, W, C]."""
    is_jpeg = tf.io.is_jpeg(data)
    is_png = tf.equal(tf.strings.substr(data, 0, len(_PNG)), _PNG) & (tf.strings.length(data) >= _HEADER)
    with tf.control_dependencies([tf.debugging.Assert(is_jpeg | is_png, ["expected a whole PNG or JPEG file"])]):
        data = tf.identity(data)
    sides = tf.cond(is_jpeg, lambda: tf.image.extract_jpeg_shape(data)[:2], lambda: _png_sides(data))
    area = tf.reduce_prod(tf.cast(sides, tf.int64))
    fits = tf.reduce_all(sides > 0) & (area <= MAX_PIXELS)
    with tf.control_dependencies([tf.debugging.Assert(fits, [f"expected an image of 1 to {MAX_PIXELS} pixels"])]):
        data = tf.identity(data)
    pixels = tf.cond(
        is_jpeg,
        # The faster method, the default, is off by up to 8 grey levels in the dark.
        lambda: tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_png(data, channels=3),
    )
    image = to_unit(pixels)
    if channels == 1:
        image = tf.reduce_sum(image * tf.constant(_LUMA), axis=-1, keepdims=True)
    image = tf.cond(
        tf.reduce_all(tf.equal(sides, (height, width))),
        lambda: image,
        lambda: tf.image.resize(image, (height, width), "bilinear", antialias=True),
    )
    return tf.clip_by_value(tf.ensure_shape(image, (height, width, channels)), 0.0, 1.0)


def _png_sides(data: Any) -> Any:
    """Height and width, int32 [2]: two big-endian numbers of the header."""
    return tf.reverse(tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.int32, little_endian=False), [0])
