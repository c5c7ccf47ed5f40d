"""A gate that learns alone, before there is a decoder to please, and how often it may be wrong about images that nobody attacked."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from vqunet_tf import pixels
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.training.batches import Batches, GrayBoxBatches
from vqunet_tf.training.objectives import Objective, binary_cross_entropy
from vqunet_tf.training.patterns import patterns

_BATCH = 250
_KINDS = (16, 5, 5, 3, 3)  # of 32 images: clean, adversarial, nearest adversaries, noisy, patterned
_LEAST = 0.8 / 255.0  # perturbations below it are lost when pixels are rounded to bytes
_LEAST_PATTERN = 2.0 / 255.0  # a fainter one is like what is in images themselves


class GateObjective(Objective):
    """Cross-entropy of a gated purifier's gate; neither encoder, decoder nor classifier is computed.

    Attributes:
        learner: images -> the gate's logits; what learns.
    """

    def __init__(self, purifier: VQUNet):
        super().__init__({"gate": 1.0})
        self.learner = _gate(purifier)

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        return self.learner(inputs["seen"], training=training)

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        return {"gate": binary_cross_entropy(outputs, x["attacked"])}


def freeze(purifier: VQUNet) -> None:
    """Keeps the gate of a purifier as it is."""
    _gate(purifier).trainable = False


def _gate(purifier: VQUNet) -> keras.Model:
    return keras.Model(purifier.graph.inputs, purifier.graph.output["gate"])


class GateBatches(Batches):
    """{"seen": float32 [B, H, W, C] in [0, 1], "attacked": float32 [B]}: half clean images, half tampered with.

    Of those, five in sixteen are training adversaries drawn back towards their images by a random factor (the radius is log-uniform between
    0.8 grey levels and what it was), five the nearest adversaries, three noisy, and three have a pattern on them (`patterns.patterns`, the
    radius log-uniform between 2 grey levels and that of the attack, if that is more). Of the nearest and the patterned half are rounded
    to bytes.

    Args:
        shown: what the purifier is shown.
        nearest: of the first view of every image, float16 [N, H, W, C] (`adversaries.nearest`).
    """

    def __init__(self, shown: GrayBoxBatches, nearest: np.ndarray):
        super().__init__(shown.size, shown.batch_size, shown.seed)
        self.shown, self.nearest = shown, nearest

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        shown = self.shown
        kind = rng.choice(len(_KINDS), size=len(chosen), p=np.array(_KINDS) / sum(_KINDS))
        copies = np.where(kind == 2, 0, rng.integers(len(shown.adversarial), size=len(chosen)))
        clean = shown.views(copies, chosen)
        seen = clean.astype(np.float32) / np.float32(255.0)
        attacked, near, noisy, patterned = (np.flatnonzero(kind == k) for k in (1, 2, 3, 4))
        change = (
            shown.adversarial[copies[attacked], chosen[attacked]].astype(np.float32) / np.float32(255.0)
            - seen[attacked]
        )
        radius = np.maximum(np.abs(change).max(axis=(1, 2, 3), keepdims=True), _LEAST)
        seen[attacked] += change * (_LEAST / radius) ** rng.random(radius.shape, dtype=np.float32)
        seen[near] = _half_rounded(self.nearest[chosen[near]].astype(np.float32), rng)
        seen[noisy] = shown.with_noise(clean[noisy], rng).astype(np.float32) / np.float32(255.0)
        largest = max(shown.radius / 255.0, _LEAST_PATTERN)
        radius = largest * (_LEAST_PATTERN / largest) ** rng.random((len(patterned), 1, 1, 1))
        drawn = seen[patterned] + radius.astype(np.float32) * patterns(seen[patterned].shape, rng)
        seen[patterned] = _half_rounded(np.clip(drawn, 0.0, 1.0), rng)
        return {"seen": seen, "attacked": (kind > 0).astype(np.float32)}


def _half_rounded(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images in [0, 1], each rounded to bytes with a probability of one half."""
    rounded = rng.random((len(images), 1, 1, 1)) < 0.5
    return np.where(rounded, np.rint(images * 255.0) / np.float32(255.0), images)


def calibrate(purifier: VQUNet, images: np.ndarray, false_alarms: float) -> None:
    """Moves the threshold of a purifier's gate to where it closes for this share of clean images, an image more or less.

    Cross-entropy puts it where both mistakes are as frequent in training; but to miss an attack lets it through, and a false
    alarm only costs details.

    Args:
        images: clean ones, uint8 [N, H, W, C].
        false_alarms: a share in [0, 1).
    """
    say = _gate(purifier)
    parts = [say(pixels.to_unit(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    logits = np.sort(np.concatenate([keras.ops.convert_to_numpy(part) for part in parts]))
    threshold = logits[-1 - round(false_alarms * len(logits))]  # closed are those above
    bias = purifier.graph.get_layer("gate_logit").bias
    bias.assign(bias - threshold)
