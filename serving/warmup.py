"""Warm-up requests that travel with an export: TF Serving answers them before it calls a version available.

The first request of a shape is slow; with server-side batching the shapes are the allowed batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from serving.signatures import specs

# What server-side batching pads to: the same as in deploy/batching.config, and as a local server's.
ALLOWED_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def write(version: Path, image_shape: Sequence[int]) -> Path:
    """Writes assets.extra/tf_serving_warmup_requests of a SavedModel, and returns its path.

    One record per allowed batch size for `serving_default` and one of a single image for each other signature. The
    protobufs name one value each, which stands for all: the file stays small for images of any size.
    """
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for request in requests(image_shape):
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())
    return path


def requests(image_shape: Sequence[int]) -> Iterator[Any]:
    """The PredictRequests for images of `(H, W, C)`."""
    for name, spec in specs(image_shape).items():
        for size in ALLOWED_BATCH_SIZES if name == "serving_default" else (1,):
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = name
            proto = tf.make_tensor_proto(_VALUES[spec.dtype](image_shape), spec.dtype)
            proto.tensor_shape.CopyFrom(tf.TensorShape((size, *spec.shape[1:])).as_proto())
            request.inputs["images"].CopyFrom(proto)
            yield request


def _png(image_shape: Sequence[int]) -> bytes:
    height, width, channels = image_shape
    return tf.io.encode_png(tf.fill((height, width, channels), tf.constant(128, tf.uint8))).numpy()


_VALUES = {tf.float32: lambda shape: 0.5, tf.uint8: lambda shape: 128, tf.string: _png}
