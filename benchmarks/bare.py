"""The gray-box training written by hand in TensorFlow: the yardstick for what `vqunet_tf.training` adds around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from vqunet_tf import VQUNet
from vqunet_tf.config import TrainingConfig

Step = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def make_step(
    purifier: VQUNet, guide: keras.Model, config: TrainingConfig, learning_rate: Any, jit_compile: bool
) -> Step:
    """Returns `step(seen, clean) -> loss`: one AdamW step on images uint8 [B, H, W, C].

    Its losses are written out here, not taken from `training/objectives.py`, so that equal losses mean something.

    Args:
        guide: the frozen classifier with its features (`classifiers.with_features`).
        learning_rate: a number or a schedule.
    """
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=config.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    variables = purifier.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile)
    def step(seen: tf.Tensor, clean: tf.Tensor) -> tf.Tensor:
        target = tf.cast(clean, tf.float32) / 255.0
        wanted = guide(target, training=False)
        with tf.GradientTape() as tape:
            purified = purifier.graph(tf.cast(seen, tf.float32) / 255.0, training=True)
            found = guide(purified["images"], training=False)
            known, guessed = tf.nn.log_softmax(wanted["logits"]), tf.nn.log_softmax(found["logits"])
            pixel = tf.reduce_mean(tf.abs(purified["images"] - target))
            guidance = tf.reduce_mean(tf.reduce_sum(tf.exp(known) * (known - guessed), axis=-1))
            missed = tf.reduce_mean(tf.square(found["features"] - wanted["features"]), axis=-1)
            feature = tf.reduce_mean(missed / (tf.reduce_mean(tf.square(wanted["features"]), axis=-1) + 1e-6))
            loss = (
                config.pixel_weight * pixel
                + config.guidance_weight * guidance
                + config.feature_weight * feature
                + config.codebook_weight * purified["loss"]
            )
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return step


def timed(step: Step, batches: Sequence[dict[str, tf.Tensor]]) -> tuple[float, list[float]]:
    """Takes a step on every batch; returns the seconds of all but the first, and the losses."""
    losses = [step(batches[0]["seen"], batches[0]["clean"])]
    losses[0].numpy()
    start = time.perf_counter()
    for batch in batches[1:]:
        losses.append(step(batch["seen"], batch["clean"]))
    losses[-1].numpy()
    return time.perf_counter() - start, [float(loss) for loss in losses]
