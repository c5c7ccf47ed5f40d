"""Perturbations for training, crafted once against the frozen classifier and kept as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from vqunet_tf import backend, pixels
from vqunet_tf.config import AttackConfig

_SINGLE_STEP = 1 / 3  # share of the batches: one large step looks unlike many small ones


def craft(
    classifier: keras.Model,
    images: np.ndarray,
    config: AttackConfig,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Adversarial versions of every image, by a family of iterated linf attacks that never sees a label.

    Each image draws its radius (a fifth of `epsilon` up to all of it) and its aim: towards a random class other than
    the predicted one, away from the predicted class, or far from the clean logits in any direction. Each batch draws
    the number of steps (a third take one, the others 2 to `max_steps`) and the step size, each image whether its start
    is random. No aim is given the
    true label: a perturbation made with it carries it, and a purifier learns to read it ("label leaking", Kurakin et
    al. 2017, arXiv 1611.01236). The second aim still comes close, where the classifier is right; the report's check
    `no_label_leaking` looks for what it does.

    Args:
        classifier: images [B, H, W, C] in [0, 1] -> logits [B, K], frozen.
        images: uint8 [N, H, W, C].
        seed: same seed, same adversaries.
        progress: called with the number of images done.

    Returns:
        uint8 [config.copies, N, H, W, C], each within its radius up to half a grey level.
    """
    step = _compiled_step(classifier)
    rng = np.random.default_rng(seed)
    adversarial = np.empty((config.copies, *images.shape), np.uint8)
    size = config.batch_size
    for copy in range(config.copies):
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            kept = len(batch)
            if kept < size:  # one batch size, one compilation
                batch = np.resize(batch, (size, *batch.shape[1:]))
            result = _attack(classifier, step, batch, config, rng)
            adversarial[copy, start : start + kept] = result[:kept]
            progress(kept)
    return adversarial


def _attack(
    classifier: keras.Model, step: Callable[..., Any], batch: np.ndarray, config: AttackConfig, rng: Any
) -> np.ndarray:
    """Perturbs one batch uint8 [B, H, W, C] with aims and radii drawn from `rng`."""
    clean = pixels.to_unit(batch)
    logits = classifier(clean, training=False)
    size, classes = logits.shape
    predicted = ops.convert_to_numpy(ops.argmax(logits, axis=-1))
    aim = rng.integers(3, size=size)
    target = (predicted + rng.integers(1, max(classes, 2), size=size)) % classes
    attract = np.eye(classes, dtype="float32")[target] * (aim == 0)[:, None]
    repel = np.eye(classes, dtype="float32")[predicted] * (aim == 1)[:, None]
    distance = (aim == 2).astype("float32")

    epsilon = (config.epsilon * rng.uniform(0.2, 1.0, size=(size, 1, 1, 1))).astype("float32")
    steps = 1 if config.max_steps == 1 or rng.random() < _SINGLE_STEP else int(rng.integers(2, config.max_steps + 1))
    alpha = epsilon * np.float32(1.0 if steps == 1 else rng.uniform(1.0, 2.5) / steps)
    noise = rng.uniform(-1.0, 1.0, size=batch.shape).astype("float32")
    # A random start always where the aim is distance: at the clean image its gradient is zero.
    spread = np.where((aim == 2) | (rng.random(size) < 0.5), 0.5, 0.0).astype("float32")[:, None, None, None]
    start = epsilon * spread * noise
    start, epsilon, alpha, pull, distance = map(
        ops.convert_to_tensor, (start, epsilon, alpha, attract - repel, distance)
    )
    x = ops.clip(clean + start, 0.0, 1.0)
    for _ in range(steps):
        x = step(x, clean, epsilon, alpha, pull, distance, logits)
    return pixels.to_uint8(x)


def _compiled_step(classifier: keras.Model) -> Callable[..., Any]:
    """One projected sign-gradient step, compiled for the classifier."""

    def objective(x: Any, pull: Any, distance: Any, reference: Any) -> Any:
        logits = classifier(x, training=False)
        towards = ops.sum(pull * ops.log_softmax(logits), axis=-1)
        away = distance * ops.sum(ops.square(logits - reference), axis=-1)
        return towards + away

    gradient = backend.input_gradient(objective)

    def step(x: Any, clean: Any, epsilon: Any, alpha: Any, pull: Any, distance: Any, reference: Any) -> Any:
        moved = x + alpha * ops.sign(gradient(x, pull, distance, reference))
        return ops.clip(ops.clip(moved, clean - epsilon, clean + epsilon), 0.0, 1.0)

    return backend.compiled(step)
