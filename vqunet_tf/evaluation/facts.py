"""What the models of an evaluation are: names, sizes, and how they do on the whole clean split."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf import pixels
from vqunet_tf.attacks.base import batches
from vqunet_tf.data import Split
from vqunet_tf.models import VQUNet
from vqunet_tf.models.operations import multiply_accumulates


def describe(
    classifier: keras.Model, purifier: keras.Model, split: Split, batch_size: int = 100
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `classifier` and `purifier` entries of report.json, measured on all of `split`.

    Of a VQUNet also multiply_accumulates, what one image costs; and for each quantizer, finest first: code_counts, how
    often each code is chosen; codebook_usage, the share of codes that some image of the split uses.
    """
    is_vqunet = isinstance(purifier, VQUNet)
    counts = [np.zeros(layer.num_embeddings, np.int64) for layer in purifier.quantizers] if is_vqunet else []

    @tf.function
    def step(images: tf.Tensor) -> tuple[Any, Any, list[Any]]:
        unit = pixels.to_unit(images)
        result = purifier.graph(unit, training=False) if is_vqunet else {"images": purifier(unit, training=False)}
        indices = [result["indices"][level] for level in sorted(result.get("indices", {}))]
        return classifier(unit, training=False), classifier(result["images"], training=False), indices

    bare, purified = [], []
    for index, count in batches(len(split.labels), batch_size):
        logits, defended, indices = step(tf.constant(split.images[index]))
        bare.append(np.argmax(logits, axis=1)[:count])
        purified.append(np.argmax(defended, axis=1)[:count])
        for total, chosen in zip(counts, indices, strict=True):
            total += np.bincount(np.ravel(chosen[:count]), minlength=len(total))
    cost = {"multiply_accumulates": multiply_accumulates(purifier, split.images.shape[1:])} if is_vqunet else {}
    n = len(split.labels)
    accuracy, clean_accuracy = (float(np.mean(np.concatenate(found) == split.labels)) for found in (bare, purified))
    return (
        {"name": classifier.name, "params": classifier.count_params(), "accuracy": accuracy, "n": n},
        {
            "name": "vqunet" if is_vqunet else purifier.name,
            "params": purifier.count_params(),
            **cost,
            "clean_accuracy": clean_accuracy,
            "n": n,
            "codebook_usage": [round(float(np.mean(total > 0)), 4) for total in counts],
            "code_counts": [total.tolist() for total in counts],
        },
    )
