"""NumPy arrays to TensorProto and back, for the server and the client; the limits of a message."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from serving.refusal import INVALID, Refused

MAX_MESSAGE_BYTES = 64 * 2**20
MESSAGE_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
_ENUM = {
    np.dtype(kind.as_numpy_dtype): kind.as_datatype_enum
    for kind in (tf.float32, tf.float64, tf.int64, tf.int32, tf.uint8)
}


def to_proto(array: np.ndarray) -> Any:
    """Returns `array` as a TensorProto.

    Numbers travel as `tensor_content`: one copy, where TensorFlow's own `make_tensor_proto` takes several times as long.
    """
    if array.dtype == object:
        proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=array.ravel().tolist())
    elif array.dtype in _ENUM:
        proto = tensor_pb2.TensorProto(dtype=_ENUM[array.dtype], tensor_content=array.tobytes())
    else:  # what is rare
        return tf.make_tensor_proto(array)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    return proto


def to_array(proto: Any) -> np.ndarray:
    """Returns a TensorProto as an array, which may be read-only; strings as objects.

    A proto that contradicts itself raises a `TypeError` or a `ValueError`.
    """
    kind = tf.as_dtype(proto.dtype)
    if not proto.tensor_content or kind == tf.string:
        return tf.make_ndarray(proto)
    shape = [dimension.size for dimension in proto.tensor_shape.dim]
    return np.frombuffer(proto.tensor_content, kind.as_numpy_dtype).reshape(shape)


def checked_array(name: str, proto: Any, spec: tf.TensorSpec) -> np.ndarray:
    """Decodes the input `name` of a request; a `Refused` unless it has the dtype and shape of `spec`.

    The first dimension of `spec` is free. Nothing is laid out before the stated shape is known to be right: a proto of a
    few bytes may state a huge one and a single value to fill it with.
    """
    shape = [dimension.size for dimension in proto.tensor_shape.dim]
    try:
        kind = tf.as_dtype(proto.dtype)
    except TypeError:
        raise Refused(INVALID, f"expected {name!r} as {spec.dtype.name}, got a type without a name") from None
    if proto.tensor_shape.unknown_rank or min(shape, default=0) < 0 or _bytes(shape, kind) > MAX_MESSAGE_BYTES:
        words = f"expected {name!r} of a known shape of at most {MAX_MESSAGE_BYTES} bytes, got {shape}"
        raise Refused(INVALID, words)
    if kind != spec.dtype:
        raise Refused(INVALID, f"expected {name!r} as {spec.dtype.name}, got {kind.name}")
    if not _fits(shape, spec.shape):
        words = f"expected {name!r} of shape {list(spec.shape)}, None the batch, got {shape}"
        raise Refused(INVALID, words)
    if not math.prod(shape):
        raise Refused(INVALID, f"expected at least one image in {name!r}, got shape {shape}")
    try:
        return to_array(proto)
    except (TypeError, ValueError):
        words = f"{name!r} is not a well-formed TensorProto: its values do not fill the shape {shape}"
        raise Refused(INVALID, words) from None


def _bytes(shape: list[int], kind: tf.DType) -> int:
    return math.prod(shape) * max(1, kind.size or 1)


def _fits(shape: list[int], wanted: tf.TensorShape) -> bool:
    """As `wanted.is_compatible_with(shape)`, which takes as long as all the rest."""
    sizes = wanted.as_list()
    return len(shape) == len(sizes) and all(size in (None, have) for size, have in zip(sizes, shape, strict=True))
