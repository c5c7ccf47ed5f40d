"""The signatures of an exported model, each from `images` to named tensors.

Every input and output has the batch as dimension 0, of any size, as server-side batching needs. Nothing in them
compiles with XLA or calls Python, so a stock TF Serving runs them.

| signature | images | outputs |
|---|---|---|
| `serving_default` | float32 `[B,H,W,C]` in [0,1] | `probabilities` `[B,K]`, `class_id` `[B]`, `label` `[B]`, `adversarial_score` `[B]` |
| `serve_uint8` | uint8 `[B,H,W,C]` | the same |
| `serve_encoded` | PNG or JPEG files `[B]` | the same; only where C is 1 or 3 |
| `purify` | float32 `[B,H,W,C]` in [0,1] | `purified` `[B,H,W,C]` |
| `undefended` | float32 `[B,H,W,C]` in [0,1] | the first three of `serving_default`, from the classifier alone |

Floats outside [0,1] count as the nearer end and NaN as 0: what was measured is what images give, and one bad request
cannot spoil those that a server answers in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from serving import decoding
from serving.score import Score, signs, with_quantisation
from vqunet_tf.errors import UserError
from vqunet_tf.pixels import to_unit

# Signature → dtype of `images`.
SIGNATURES = {
    "serving_default": "float32",
    "serve_uint8": "uint8",
    "serve_encoded": "string",
    "purify": "float32",
    "undefended": "float32",
}


def specs(image_shape: Sequence[int]) -> dict[str, tf.TensorSpec]:
    """Signature → what `images` is, for images of `(H, W, C)`."""
    found = {}
    for name, dtype in SIGNATURES.items():
        if dtype == "string" and image_shape[-1] not in decoding.CHANNELS:
            continue
        found[name] = tf.TensorSpec((None,) if dtype == "string" else (None, *image_shape), dtype, name="images")
    return found


def add_endpoints(
    archive: Any,
    purifier: keras.Model,
    classifier: keras.Model,
    class_names: Sequence[str],
    image_shape: Sequence[int],
    score: Score,
) -> None:
    """Adds the signatures to `archive`, a `keras.export.ExportArchive` on the TensorFlow backend.

    purifier: images `[B,H,W,C]` in [0,1] → images, same shape and range.
    classifier: images → logits `[B,K]`.
    class_names: K names, in the order of the logits.
    image_shape: `(H, W, C)`.

    Another number of logits than names raises a `UserError` while the endpoint is traced.
    """
    inside = with_quantisation(purifier)

    def purify(images: Any) -> tuple[Any, Any]:
        purified, quantisation = inside(images)
        return tf.cast(purified, tf.float32), quantisation

    def logits_of(images: Any) -> Any:
        logits = tf.cast(classifier(images, training=False), tf.float32)  # [B, K]
        if logits.shape[-1] != len(class_names):
            raise UserError(f"expected a name for each of the {logits.shape[-1]} logits, got {len(class_names)} names")
        return logits

    def classes(logits: Any) -> dict[str, Any]:
        class_id = tf.argmax(logits, axis=-1, output_type=tf.int64)  # [B]
        return {
            "probabilities": tf.nn.softmax(logits),
            "class_id": class_id,
            "label": tf.gather(tf.constant(list(class_names)), class_id),
        }

    def defended(images: Any) -> dict[str, Any]:
        purified, quantisation = purify(images)
        before, after = logits_of(images), logits_of(purified)
        found = signs(images, purified, quantisation, before, after)
        return {**classes(after), "adversarial_score": score(found)}

    # Traced once, called by three: the graph is a third as large.
    defended_once = tf.function(defended, input_signature=[specs(image_shape)["serving_default"]])
    bodies: dict[str, Callable[[Any], dict[str, Any]]] = {
        "serving_default": lambda images: defended_once(_boxed(images)),
        "serve_uint8": lambda images: defended_once(to_unit(images)),
        "serve_encoded": lambda images: defended_once(decoding.decode(images, image_shape)),
        "purify": lambda images: {"purified": purify(_boxed(images))[0]},
        "undefended": lambda images: classes(logits_of(_boxed(images))),
    }
    archive.track(purifier)
    archive.track(classifier)
    for name, spec in specs(image_shape).items():
        archive.add_endpoint(name, bodies[name], [spec])


def _boxed(images: Any) -> Any:
    """Floats brought into [0, 1], NaN to 0; the gradient is left alone in there, ends included."""
    return tf.clip_by_value(tf.where(tf.math.is_nan(images), 0.0, images), 0.0, 1.0)


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
