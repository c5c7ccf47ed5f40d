"""Pixels as bytes and as numbers: the only place that divides by 255."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def to_unit(images: Any) -> Any:
    """Returns images on the [0,1] scale: uint8 `[...]` → float32 `[...]`, a tensor of the running backend.

    Floats are taken to be on that scale already and only become float32. Works on tensors inside a
    compiled function too. Any other type raises a `ValueError`: its scale cannot be known.
    """
    if not hasattr(images, "dtype"):
        images = np.asarray(images)
    dtype = keras.backend.standardize_dtype(images.dtype)
    if dtype == "uint8":
        return keras.ops.cast(images, "float32") / 255.0
    if "float" in dtype:
        return keras.ops.cast(images, "float32")
    raise ValueError(f"expected images as uint8 in 0..255 or floats in [0,1], got {dtype}: convert them first")


def to_uint8(images: Any) -> np.ndarray:
    """Returns float images on the [0,1] scale as uint8 `[...]`, rounded to the nearest byte and clipped."""
    unit = np.asarray(keras.ops.convert_to_numpy(images), dtype=np.float32)
    return np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)


def checked(images: Any, channels: int) -> np.ndarray:
    """Returns one image [H, W, C] or a batch [B, H, W, C] as a NumPy array, uint8 or float32 in [0,1].

    Raises a `ValueError` for another rank, type, channel count or scale, for NaN, and for sides below 8.
    """
    array = np.asarray(keras.ops.convert_to_numpy(images))
    if array.ndim not in (3, 4) or array.shape[-1] != channels or min(array.shape[-3:-1]) < 8:
        raise ValueError(
            f"Expected images [H, W, {channels}] or [B, H, W, {channels}] of at least 8x8 pixels. "
            f"Received: shape={array.shape}"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Expected uint8 in 0..255 or floats in [0, 1]. Received: dtype={array.dtype}")
    if array.size and not (array.min() >= 0.0 and array.max() <= 1.0):  # NaN fails both
        raise ValueError(f"Expected floats in [0, 1]. Received: values from {array.min()} to {array.max()}")
    return array.astype(np.float32)
