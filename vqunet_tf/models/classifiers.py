"""The target classifiers, by name: images [B, H, W, C] in [0, 1] -> logits [B, K]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def fast(image_shape: Sequence[int], num_classes: int, widths: Sequence[int], blocks: int = 1) -> keras.Model:
    """A network that learns in few epochs, after airbench94 (Jordan 2024, arXiv 2404.00498).

    A 2x2 convolution with a frozen kernel that whitens patches (`whiten` sets it), then stages of convolution, max
    pooling and `blocks` more convolutions, each with batch normalisation; pooled to a vector, then logits.

    Args:
        image_shape: (H, W, C), sides above 2^stages. num_classes: K. widths: channels per stage.
    """
    images = keras.Input(tuple(image_shape), name="images")
    filters = 2 * 4 * image_shape[-1]  # every direction of a patch, and its negative
    h = ops.relu(Whitening(filters, name="whitening")(images))
    for i, width in enumerate(widths):
        h = parts.convolution(h, width, f"stage_{i}_conv", use_bias=False)
        h = layers.MaxPooling2D(2, name=f"stage_{i}_pool")(h)
        h = ops.relu(layers.BatchNormalization(name=f"stage_{i}_norm")(h))
        for b in range(blocks):
            h = parts.convolution(h, width, f"stage_{i}_conv_{b}", use_bias=False)
            h = ops.relu(layers.BatchNormalization(name=f"stage_{i}_norm_{b}")(h))
    h = layers.GlobalMaxPooling2D(name="features")(h)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(h)
    return keras.Model(images, logits, name="fast")


def resnet20(image_shape: Sequence[int], num_classes: int) -> keras.Model:
    """ResNet-20 for small images, 16, 32 and 64 channels, 3 blocks each (He et al. 2015, arXiv 1512.03385, 4.2)."""

    def normalised(x: Any, width: int, name: str, **kwargs: Any) -> Any:
        return layers.BatchNormalization(name=f"{name}_norm")(
            parts.convolution(x, width, name, use_bias=False, **kwargs)
        )

    images = keras.Input(tuple(image_shape), name="images")
    h = ops.relu(normalised(2.0 * images - 1.0, 16, "stem"))
    for i, width in enumerate((16, 32, 64)):
        for b in range(3):
            name, strides = f"stage_{i}_block_{b}", 2 if i and not b else 1
            short = normalised(h, width, f"{name}_short", kernel=1, strides=2) if strides == 2 else h
            h = ops.relu(normalised(h, width, f"{name}_conv1", strides=strides))
            h = ops.relu(short + normalised(h, width, f"{name}_conv2"))
    h = layers.GlobalAveragePooling2D(name="features")(h)
    return keras.Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(h), name="resnet20")


# Layers of the networks of Defense-GAN (Samangouei et al. 2018, arXiv 1805.06605, appendix; its published code):
# filters, kernel, stride, padding of a convolution; a share dropped out; the width of a dense layer after flattening.
_DEFENSE_GAN: dict[str, tuple[Any, ...]] = {
    "a": ((64, 5, 1, "same"), (64, 5, 2, "valid"), "flatten", 0.25, 128, 0.5),
    "b": (0.2, (64, 8, 2, "same"), (128, 6, 2, "valid"), (128, 5, 1, "valid"), 0.5, "flatten"),
    "c": ((128, 3, 1, "same"), (64, 5, 2, "valid"), "flatten", 0.25, 128, 0.5),
    "d": ("flatten", 200, 0.5, 200),
}


def defense_gan(which: str, image_shape: Sequence[int], num_classes: int) -> keras.Model:
    """The target network `a`, `b`, `c` or `d` of Defense-GAN, for comparison with published rows; made for 28x28x1."""
    images = keras.Input(tuple(image_shape), name="images")
    h: Any = images
    for i, part in enumerate(_DEFENSE_GAN[which]):
        if part == "flatten":
            h = layers.Flatten(name=f"flatten_{i}")(h)
        elif isinstance(part, float):
            h = layers.Dropout(part, name=f"dropout_{i}")(h)
        elif isinstance(part, int):
            h = layers.Dense(part, activation="relu", name=f"dense_{i}")(h)
        else:
            filters, kernel, strides, padding = part
            h = layers.Conv2D(filters, kernel, strides, padding, activation="relu", name=f"conv_{i}")(h)
    return keras.Model(
        images, layers.Dense(num_classes, dtype="float32", name="logits")(h), name=f"defense_gan_{which}"
    )


_CLASSIFIERS: dict[str, Callable[..., keras.Model]] = {
    "residual": residual,
    "fast": fast,
    "resnet20": lambda shape, classes, widths, blocks: resnet20(shape, classes),
    **{
        f"defense_gan_{which}": lambda shape, classes, widths, blocks, which=which: defense_gan(which, shape, classes)
        for which in _DEFENSE_GAN
    },
}


def build(name: str, image_shape: Sequence[int], num_classes: int, widths: Sequence[int], blocks: int) -> keras.Model:
    """Builds a classifier by name; an unknown one raises a `UserError` that lists the known ones.

    Args:
        image_shape: (H, W, C). num_classes: K.
        widths, blocks: sizes of `residual` and `fast`; the other networks are fixed.
    """
    make = _CLASSIFIERS[choice("classifier", name, _CLASSIFIERS)]
    try:
        return make(image_shape, num_classes, widths, blocks)
    except ValueError as error:  # a layer without pixels
        raise UserError(f"classifier {name} cannot be made for images {tuple(image_shape)}: {error}") from None


def whiten(classifier: keras.Model, images: np.ndarray) -> None:
    """Sets the whitening layer of `fast` from training images uint8 [N, H, W, C]; other classifiers are left alone."""
    for layer in classifier.layers:
        if isinstance(layer, Whitening):
            layer.fit(images[:5000])


def with_features(classifier: keras.Model, image_shape: Sequence[int], layer: str | None = None) -> keras.Model:
    """The classifier with two outputs: `logits` [B, K] and `features` [B, F], both of them guidance for a purifier.

    Features are what goes into the last dense layer, or what comes out of the layer named. Where that cannot be reached (a
    subclassed model, or a model inside another one, as `with_logits` makes it) the logits stand for them.

    Args:
        image_shape: (H, W, C). layer: the name of one of its layers.

    Raises:
        UserError: no layer of that name, or one that cannot be reached.
    """
    if layer is not None:
        choice("classifier.feature_layer", layer, [found.name for found in classifier.layers])
    inputs = getattr(classifier, "inputs", None)  # one tensor, not a list: Keras warns at every call otherwise
    images = inputs[0] if inputs else keras.Input(tuple(image_shape), name="images")
    logits = classifier.outputs[0] if getattr(classifier, "outputs", None) else classifier(images)

    def both(features: Any) -> keras.Model:
        flat = layers.Flatten(name="vqunet_features", dtype="float32")(features)
        return keras.Model(images, {"logits": logits, "features": flat}, name="with_features")

    for found in reversed(classifier.layers):
        if found.name == layer or (layer is None and isinstance(found, layers.Dense)):
            try:
                return both(found.input if layer is None else found.output)
            except (AttributeError, ValueError):  # part of a subclassed model, or of another graph
                if layer is not None:
                    raise UserError(f"classifier.feature_layer {layer!r} is not connected in the classifier") from None
                break
    return both(logits)


def with_logits(classifier: keras.Model, image_shape: Sequence[int]) -> keras.Model:
    """A classifier that gives probabilities [B, K] as one that gives their logarithms: logits up to a constant.

    A probability of 0 counts as the smallest number of float32 above it.
    """
    images = keras.Input(tuple(image_shape), name="images")
    logits = ops.log(ops.maximum(ops.cast(classifier(images), "float32"), float(np.finfo("float32").tiny)))
    return keras.Model(images, logits, name="with_logits")


def in_precision(classifier: keras.Model, policy: str) -> keras.Model:
    """A copy of a functional classifier whose layers compute under a dtype policy such as `mixed_bfloat16`.

    Its last dense layer keeps its own. A model that is not functional, of models, or with a layer that takes no dtype,
    is returned as it is.
    """
    inside = getattr(classifier, "layers", [])
    if (
        policy == "float32"
        or not getattr(classifier, "inputs", None)
        or any(isinstance(x, keras.Model) for x in inside)
    ):
        return classifier
    last = next((layer for layer in reversed(inside) if isinstance(layer, layers.Dense)), None)

    def remade(layer: Any) -> Any:
        kept = layer is last or isinstance(layer, layers.InputLayer) or not isinstance(layer, layers.Layer)
        return type(layer).from_config({**layer.get_config(), **({} if kept else {"dtype": policy})})

    try:
        copy = keras.models.clone_model(classifier, clone_function=remade)
    except TypeError:  # a layer of the user's own whose settings have no dtype
        return classifier
    copy.set_weights(classifier.get_weights())
    for layer in copy.layers:
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()  # what it computes with is made of its weights, not its weights
    return copy


def _block(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """x + conv(relu(bn(conv(relu(bn(x))))))."""
    h = x
    for part in ("1", "2"):
        h = ops.relu(layers.BatchNormalization(name=f"{name}_norm{part}")(h))
        h = parts.convolution(h, x.shape[-1], f"{name}_conv{part}", use_bias=False)
    return x + h


@keras.saving.register_keras_serializable("vqunet_tf")
class Whitening(layers.Conv2D):
    """A 2x2 convolution whose kernel is set by data and not trained: [B, H, W, C] -> [B, H-1, W-1, filters].

    After `fit`, half of the outputs are uncorrelated over patches and of unit variance (but for directions that hardly
    vary), the other half their negatives; a bias is learned.
    """

    def __init__(self, filters: int, **kwargs: Any):
        super().__init__(filters, 2, **{"padding": "valid", **kwargs})

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.kernel.trainable = False

    def fit(self, images: np.ndarray) -> None:
        """Sets the kernel from images uint8 [N, H, W, C]."""
        unit = ops.convert_to_numpy(pixels.to_unit(images))
        height, width, channels = unit.shape[1:]
        corners = [unit[:, i : height - 1 + i, j : width - 1 + j] for i in (0, 1) for j in (0, 1)]
        patches = np.stack(corners, axis=-2).reshape(-1, 4 * channels)
        values, directions = np.linalg.eigh(np.cov(patches, rowvar=False, dtype=np.float64))
        scaled = (directions / np.sqrt(values + _LEAST_VARIANCE)).T  # [4C, 4C], a direction in each row
        kernel = np.concatenate([scaled, -scaled]).reshape(-1, 2, 2, channels).transpose(1, 2, 3, 0)
        self.kernel.assign(kernel)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {name: value for name, value in config.items() if name != "kernel_size"}


_LEAST_VARIANCE = 5e-4  # of airbench94: below it a direction is noise, not to be blown up


def check(
    classifier: keras.Model,
    image_shape: Sequence[int],
    num_classes: int,
    images: np.ndarray,
    source: str = "the classifier",
    probabilities: bool = False,
) -> None:
    """Raises a `UserError` unless a classifier fits the data and gives logits (or `probabilities`).

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
    found = logits.min() >= 0.0 and np.allclose(logits.sum(axis=1), 1.0, atol=1e-3)
    if probabilities and not found:
        raise UserError(f"{source} gives no probabilities: leave --from_probabilities out for one that gives logits")
    if found and not probabilities:
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
