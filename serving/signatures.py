"""The signatures of an exported model, each from `images` to named tensors.

Every input and output has the batch as dimension 0, of any size, as server-side batching needs. Nothing in them
compiles with XLA or calls Python, so a stock TF Serving runs them.

| signature         | images                       | outputs                                                        |
|---|---|---|
| `serving_default` | float32 `[B,H,W,C]` in [0,1] | `probabilities` `[B,K]`, `class_id` `[B]` int64, `label` `[B]` |
| `serve_uint8`     | uint8 `[B,H,W,C]`            | the same                                                       |
| `purify`          | float32 `[B,H,W,C]` in [0,1] | `purified` `[B,H,W,C]`                                         |
| `undefended`      | float32 `[B,H,W,C]` in [0,1] | as `serving_default`, from the classifier alone                |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from vqunet_tf.errors import UserError
from vqunet_tf.pixels import to_unit

SIGNATURES = {"serving_default": "float32", "serve_uint8": "uint8", "purify": "float32", "undefended": "float32"}


def add_endpoints(
    archive: Any, purifier: keras.Model, classifier: keras.Model, class_names: Sequence[str], image_shape: Sequence[int]
) -> None:
    """Adds the four signatures to `archive`, a `keras.export.ExportArchive` on the TensorFlow backend.

    purifier: images `[B,H,W,C]` in [0,1] → images, same shape and range.
    classifier: images → logits `[B,K]`.
    class_names: K names, in the order of the logits.
    image_shape: `(H, W, C)`.

    Another number of logits than names raises a `UserError` while the endpoint is traced.
    """

    def purify(images: Any) -> Any:
        return keras.ops.cast(purifier(images, training=False), "float32")

    def classify(images: Any) -> dict[str, Any]:
        logits = keras.ops.cast(classifier(images, training=False), "float32")  # [B, K]
        if logits.shape[-1] != len(class_names):
            raise UserError(f"expected a name for each of the {logits.shape[-1]} logits, got {len(class_names)} names")
        class_id = tf.argmax(logits, axis=-1, output_type=tf.int64)  # [B]
        return {
            "probabilities": keras.ops.softmax(logits),
            "class_id": class_id,
            "label": tf.gather(tf.constant(list(class_names)), class_id),
        }

    bodies = {
        "serving_default": lambda images: classify(purify(images)),
        "serve_uint8": lambda images: classify(purify(to_unit(images))),
        "purify": lambda images: {"purified": purify(images)},
        "undefended": classify,
    }
    archive.track(purifier)
    archive.track(classifier)
    for name, dtype in SIGNATURES.items():
        archive.add_endpoint(name, bodies[name], [tf.TensorSpec((None, *image_shape), dtype, name="images")])


def refuse_unportable(path: Path) -> None:
    """Raises a `UserError` if the SavedModel at `path` calls Python or must be compiled by XLA.

    A stock TF Serving loads such a model and fails at the first request.
    """
    graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    python = [node.name for node in nodes if node.op in ("PyFunc", "PyFuncStateless", "EagerPyFunc")]
    if python:
        raise UserError(
            f"a model calls Python at {python[0]}, which TF Serving cannot: use TensorFlow or keras.ops there"
        )
    if any(part.attr["_XlaMustCompile"].b for part in [*nodes, *graph.library.function]):
        raise UserError("a layer holds a tf.function(jit_compile=True), which TF Serving cannot run: build it without")
