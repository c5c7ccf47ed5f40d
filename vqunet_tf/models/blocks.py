"""Pieces of the networks as functions of symbolic tensors: they make layers and connect them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
from keras import layers, ops

from vqunet_tf.models.quantize import straight_through


def convolution(x: Any, width: int, name: str, kernel: int = 3, strides: int = 1, **kwargs: Any) -> Any:
    """A convolution that keeps height and width, divided by `strides`: [B, H, W, *] -> [B, H/s, W/s, width]."""
    kwargs.setdefault("kernel_initializer", "he_normal")
    return layers.Conv2D(width, kernel, strides=strides, padding="same", name=name, **kwargs)(x)


def residual(x: Any, name: str, normalize: bool = False) -> Any:
    """x + conv(relu(conv(relu(x)))) at constant width, the identity at first (Fixup, Zhang et al. 2019, arXiv 1901.09321).

    No batch normalisation: an image is purified alike whatever batch or replica it comes in. With `normalize` each image
    is normalised over all its places and channels before both convolutions (group normalisation with one group, Wu & He
    2018, arXiv 1803.08494).
    """
    width, h = x.shape[-1], x
    for part, initializer in (("1", "he_normal"), ("2", "zeros")):
        if normalize:
            h = layers.GroupNormalization(1, name=f"{name}_norm{part}")(h)
        h = convolution(ops.relu(h), width, f"{name}_conv{part}", kernel_initializer=initializer)
    return x + h


def down(x: Any, width: int, name: str) -> Any:
    """Halves the resolution: [B, H, W, *] -> [B, H/2, W/2, width]."""
    return convolution(ops.relu(x), width, name, strides=2)


def up(x: Any, width: int, name: str) -> Any:
    """Doubles the resolution, by sub-pixel convolution (Shi et al. 2016, arXiv 1609.05158): [B, H, W, *] -> [B, 2H, 2W, width]."""
    return DepthToSpace(2, name=f"{name}_shuffle")(convolution(ops.relu(x), 4 * width, name, kernel=1))


GATES = ("open", "soft")

# What gates do for now, if not what they learned. Not an attribute of the layer: replicas are traced in threads that take turns.
_GATES: contextvars.ContextVar[Any] = contextvars.ContextVar("gates", default=None)
_SOFTNESS = 10.0


def gate(images: Any, name: str) -> Any:
    """How sure a small network is that an image was tampered with: [B, H, W, C] -> logits [B, 1, 1, 1].

    In float32 whatever the policy: what it looks for is a few grey levels high.
    """
    h = images
    for i, (width, strides) in enumerate(((16, 1), (32, 2), (48, 2))):
        h = ops.relu(convolution(h, width, f"{name}_{i}", strides=strides, dtype="float32"))
    h = layers.GlobalAveragePooling2D(keepdims=True, dtype="float32", name=f"{name}_mean")(h)
    return convolution(h, 1, f"{name}_logit", kernel=1, dtype="float32", kernel_initializer="glorot_uniform")


def head(bottleneck: Any, classes: int, name: str) -> Any:
    """A linear classifier of the mean over all places: [B, h, w, C] -> logits [B, classes], all 0 until it has learned."""
    seen = ops.mean(ops.relu(ops.cast(bottleneck, "float32")), axis=(1, 2))
    return layers.Dense(classes, dtype="float32", kernel_initializer="zeros", name=name)(seen)


@contextlib.contextmanager
def gates(how: str) -> Iterator[None]:
    """Has all gates stay `open` or be `soft` within the block, in this thread only, for attackers whom a gate leaves no gradient.

    A soft one does what it always does and has the gradient of sigmoid(-logit / 10): a stand-in, as for a quantizer.

    A layer reads this while it is traced: what is compiled inside gets it for good.
    """
    if how not in GATES:
        raise ValueError(f"Expected one of {', '.join(GATES)}. Received: {how!r}")
    token = _GATES.set(how)
    try:
        yield
    finally:
        _GATES.reset(token)


@contextlib.contextmanager
def held_open(which: Any) -> Iterator[None]:
    """Has gates stay open within the block for those images of a batch for which `which` [B] is 1, in this thread only."""
    token = _GATES.set(which)
    try:
        yield
    finally:
        _GATES.reset(token)


@keras.saving.register_keras_serializable("vqunet_tf")
class Certainty(layers.Layer):
    """How sure logits [B, K] are of the likeliest class: the logarithm of its odds, less a threshold; [B].

    After Hendrycks & Gimpel 2017, arXiv 1610.02136. The threshold, 0 at first (odds of one to one), is a weight that no gradient moves.
    """

    def build(self, shape: Any) -> None:
        self.threshold = self.add_weight(name="threshold", shape=(), initializer="zeros", trainable=False)

    def call(self, logits: Any) -> Any:
        likeliest = ops.one_hot(ops.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
        return ops.max(logits, axis=-1) - ops.logsumexp(logits - 1e9 * likeliest, axis=-1) - self.threshold

    def compute_output_spec(self, logits: Any) -> Any:
        return keras.KerasTensor(logits.shape[:-1], dtype=self.compute_dtype)


@keras.saving.register_keras_serializable("vqunet_tf")
class Passage(layers.Layer):
    """Whether an image keeps its skip connections: 1 where its logit is at most 0, else 0.

    Not a share: of what a share lets through the decoder learns to make up for the factor, and the gate closes nothing. No gradient
    passes; the gate learns from being told which images were attacked alone.
    """

    def call(self, logits: Any) -> Any:
        how = _GATES.get()
        passed = ops.cast(logits <= 0, logits.dtype)
        if how is None:
            return passed
        if not isinstance(how, str):
            return ops.maximum(passed, ops.reshape(ops.cast(how, logits.dtype), (-1, 1, 1, 1)))
        return ops.ones_like(logits) if how == "open" else straight_through(ops.sigmoid(-logits / _SOFTNESS), passed)

    def compute_output_spec(self, logits: Any) -> Any:
        return keras.KerasTensor(logits.shape, dtype=logits.dtype)


@keras.saving.register_keras_serializable("vqunet_tf")
class Tones(layers.Layer):
    """Rounds numbers in [0, 1] to the nearest of `number` tones, equally far apart; the gradient passes straight through."""

    def __init__(self, number: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.number = number

    def call(self, inputs: Any) -> Any:
        return straight_through(inputs, ops.round(inputs * (self.number - 1)) / (self.number - 1))

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "number": self.number}


@keras.saving.register_keras_serializable("vqunet_tf")
class DepthToSpace(layers.Layer):
    """Lays channels out as patches: [B, H, W, C r^2] -> [B, H r, W r, C], r = `block`."""

    def __init__(self, block: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.block = block

    def call(self, inputs: Any) -> Any:
        if hasattr(ops, "depth_to_space"):
            return ops.depth_to_space(inputs, self.block)
        return depth_to_space(inputs, self.block)  # the newest Keras for Python 3.10 has none

    def compute_output_spec(self, inputs: Any) -> Any:
        batch, height, width, channels = inputs.shape
        sides = [None if side is None else side * self.block for side in (height, width)]
        return keras.KerasTensor((batch, *sides, channels // self.block**2), dtype=inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "block": self.block}


def depth_to_space(x: Any, block: int) -> Any:
    """[B, H, W, C r^2] -> [B, H r, W r, C]: channel (i r + j) C + c goes to row i and column j of its patch."""
    _, height, width, channels = ops.shape(x)
    patches = ops.reshape(x, (-1, height, width, block, block, channels // block**2))
    rows = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
    return ops.reshape(rows, (-1, height * block, width * block, channels // block**2))


@keras.saving.register_keras_serializable("vqunet_tf")
class PadToMultiple(layers.Layer):
    """Mirrors the lower and right border until height and width are multiples of `multiple`.

    [B, H, W, C] -> [B, ceil(H/m) m, ceil(W/m) m, C]. Raises a `ValueError` for sides shorter than half a multiple.
    """

    def __init__(self, multiple: int, **kwargs: Any):
        super().__init__(**{"dtype": "float32", **kwargs})  # images keep their precision whatever the policy
        self.multiple = multiple

    def call(self, images: Any) -> Any:
        short = [-side % self.multiple for side in ops.shape(images)[1:3]]
        for side, missing in zip(images.shape[1:3], short, strict=True):
            if side is not None and missing > side:
                raise ValueError(
                    f"Expected images of at least {(self.multiple + 1) // 2} pixels a side for this depth and stem. "
                    f"Received: shape={tuple(images.shape)}"
                )
        if all(isinstance(missing, int) and missing == 0 for missing in short):
            return images
        # Not ops.pad(mode="symmetric"): Keras 3.15 repeats the border instead on PyTorch.
        down = ops.concatenate([images, ops.flip(images[:, ops.shape(images)[1] - short[0] :], axis=1)], axis=1)
        return ops.concatenate([down, ops.flip(down[:, :, ops.shape(images)[2] - short[1] :], axis=2)], axis=2)

    def compute_output_spec(self, images: Any) -> Any:
        batch, height, width, channels = images.shape
        sides = [None if side is None else side + -side % self.multiple for side in (height, width)]
        return keras.KerasTensor((batch, *sides, channels), dtype=images.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multiple": self.multiple}


@keras.saving.register_keras_serializable("vqunet_tf")
class CropLike(layers.Layer):
    """Cuts the first image batch to the height and width of the second: undoes `PadToMultiple`."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"dtype": "float32", **kwargs})

    def call(self, images: Any, like: Any) -> Any:
        _, height, width, _ = ops.shape(like)
        return images[:, :height, :width, :]

    def compute_output_spec(self, images: Any, like: Any) -> Any:
        return keras.KerasTensor((*like.shape[:3], images.shape[3]), dtype=images.dtype)
