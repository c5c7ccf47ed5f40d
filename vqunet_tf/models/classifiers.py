"""The target classifiers, by name: images [B, H, W, C] in [0, 1] -> logits [B, K]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import layers, ops

from vqunet_tf import pixels
from vqunet_tf.errors import UserError, choice
from vqunet_tf.models import blocks as parts


def residual(image_shape: Sequence[int], num_classes: int, widths: Sequence[int], blocks: int = 1) -> keras.Model:
    """A small pre-activation residual network with batch normalisation (He et al. 2016, arXiv 1603.05027).

    Every stage halves the resolution, the first one in its stem; global average pooling, then logits.

    Args:
        image_shape: (H, W, C). num_classes: K. widths: channels per stage. blocks: residual blocks per stage.
    """
    images = keras.Input(tuple(image_shape), name="images")
    h = 2.0 * images - 1.0
    for i, width in enumerate(widths):
        kernel = 4 if i == 0 else 3
        h = parts.convolution(h, width, f"stage_{i}", kernel=kernel, strides=2, use_bias=False)
        for b in range(blocks):
            h = _block(h, f"stage_{i}_block_{b}")
    h = ops.relu(layers.BatchNormalization(name="norm")(h))
    h = layers.GlobalAveragePooling2D(name="features")(h)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(h)
    return keras.Model(images, logits, name="residual")


_CLASSIFIERS: dict[str, Callable[..., keras.Model]] = {"residual": residual}


def build(name: str, image_shape: Sequence[int], num_classes: int, widths: Sequence[int], blocks: int) -> keras.Model:
    """Builds a classifier by name; an unknown one raises a `UserError` that lists the known ones."""
    return _CLASSIFIERS[choice("classifier", name, _CLASSIFIERS)](image_shape, num_classes, widths, blocks)


def _block(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """x + conv(relu(bn(conv(relu(bn(x))))))."""
    h = x
    for part in ("1", "2"):
        h = ops.relu(layers.BatchNormalization(name=f"{name}_norm{part}")(h))
        h = parts.convolution(h, x.shape[-1], f"{name}_conv{part}", use_bias=False)
    return x + h


def check(
    classifier: keras.Model,
    image_shape: Sequence[int],
    num_classes: int,
    images: np.ndarray,
    source: str = "the classifier",
) -> None:
    """Raises a `UserError` unless a classifier fits the data and gives logits.

    Args:
        image_shape: (H, W, C) of the data. num_classes: K of the data.
        images: a few, uint8 or float in [0, 1], [B, H, W, C]; a classifier whose every row lies in [0, 1] and sums to
            1 on them gives probabilities.
        source: how the message names the classifier, such as its path.
    """
    expected = getattr(classifier, "input_shape", None)  # a subclassed model may not know
    if expected is not None:
        sides = tuple(expected[1:])
        if len(sides) != 3 or any(a is not None and a != b for a, b in zip(sides, image_shape, strict=True)):
            raise UserError(
                f"{source} expects images of shape {sides}, the data has {tuple(image_shape)}: "
                "give the classifier of this data set"
            )
    try:
        logits = ops.convert_to_numpy(classifier(pixels.to_unit(images), training=False))
    except Exception as error:  # whatever the user's model raises
        raise UserError(f"{source} cannot be called on images {images.shape}: {error}") from None
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise UserError(
            f"{source} gives outputs of shape {logits.shape[1:]}, the data has {num_classes} classes: expected logits [B, {num_classes}]"
        )
    if logits.min() >= 0.0 and np.allclose(logits.sum(axis=1), 1.0, atol=1e-3):
        raise UserError(f"{source} gives probabilities: expected logits, remove its last softmax and save it again")


def logits_of(classifier: keras.Model, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Logits float32 [N, K] of uint8 images [N, H, W, C], a batch of floats in memory at a time."""
    starts = range(0, len(images), batch_size)
    parts_of = [classifier.predict_on_batch(pixels.to_unit(images[i : i + batch_size])) for i in starts]
    logits = np.concatenate(parts_of).astype("float32")
    if len(logits) != len(images):  # as under a tf.distribute strategy, where every replica answers
        raise RuntimeError(
            f"expected logits of {len(images)} images, got {len(logits)}: call this outside a strategy's scope"
        )
    return logits
