"""A gate that learns alone, before there is a decoder to please, and how often it may be wrong about images that nobody attacked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vqunet_tf import pixels
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.training import crafting
from vqunet_tf.training.batches import Batches, GrayBoxBatches
from vqunet_tf.training.objectives import Objective, binary_cross_entropy
from vqunet_tf.training.patterns import patterns, search

_BATCH = 250
_SEARCHED = 500  # images, for each search
_FAINTEST_SEARCHED = 1 / 8  # of the attack's radius
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
        self.learner = keras.Model(purifier.graph.inputs, purifier.graph.output["gate"])

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        return self.learner(inputs["seen"], training=training)

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        return {"gate": binary_cross_entropy(outputs, x["attacked"])}


class GateBatches(Batches):
    """{"seen": float32 [B, H, W, C] in [0, 1], "attacked": float32 [B]}: half clean images, half tampered with.

    Of those, five in sixteen are training adversaries drawn back towards their images by a random factor (the radius is log-uniform between
    0.8 grey levels and what it was), five the nearest adversaries, three noisy, and three have a pattern on them (`patterns.patterns`, the
    radius log-uniform between 2 grey levels and that of the attack, if that is more). Of the nearest and the patterned half are rounded
    to bytes.

    Args:
        shown: what the purifier is shown.
        nearest: of the first view of every image, float16 [N, H, W, C] (`adversaries.nearest`).

    Attributes:
        found: by a search against the gate as it stood, float16 [M, H, W, C]; half of the patterned images are some of these.
    """

    def __init__(self, shown: GrayBoxBatches, nearest: np.ndarray):
        super().__init__(shown.size, shown.batch_size, shown.seed)
        self.shown, self.nearest = shown, nearest
        self.found: np.ndarray = nearest[:0]

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
        if len(self.found):
            known = rng.random(len(patterned)) < 0.5
            drawn[known] = self.found[rng.integers(len(self.found), size=known.sum())]
        seen[patterned] = _half_rounded(np.clip(drawn, 0.0, 1.0), rng)
        return {"seen": seen, "attacked": (kind > 0).astype(np.float32)}


def _half_rounded(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images in [0, 1], each rounded to bytes with a probability of one half."""
    rounded = rng.random((len(images), 1, 1, 1)) < 0.5
    return np.where(rounded, np.rint(images * 255.0) / np.float32(255.0), images)


class Searches(keras.callbacks.Callback):
    """Before every epoch but the first looks for patterns that the gate overlooks, on some images anew, and adds them to what is shown.

    What is shown at random is seldom what a search would end with. What was found is kept with the checkpoints, so that a run that
    goes on sees the same.

    Args:
        learner: images -> the gate's logits.
        queries: for each image.
    """

    def __init__(self, batches: GateBatches, learner: keras.Model, queries: int, folder: Path):
        super().__init__()
        self.batches, self.learner, self.queries, self.folder = batches, learner, queries, folder

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        shown = self.batches.shown
        shape = (min(_SEARCHED, shown.size), *self.batches.nearest.shape[1:])
        self.batches.found = np.concatenate(
            [
                self.batches.nearest[:0],
                *(
                    crafting.kept(self.folder / f"adversaries.gate.{turn}.npy", shape, partial(self._search, turn))
                    for turn in range(1, epoch + 1)
                ),
            ]
        )

    def _search(self, turn: int) -> np.ndarray:
        shown = self.batches.shown
        rng = np.random.default_rng((self.batches.seed, turn, self.queries))
        chosen = rng.choice(shown.size, min(_SEARCHED, shown.size), replace=False)
        images = shown.views(np.zeros(len(chosen), int), chosen).astype(np.float32) / np.float32(255.0)
        largest = max(shown.radius / 255.0, _LEAST_PATTERN)
        radii = largest * _FAINTEST_SEARCHED ** rng.random((len(chosen), 1, 1, 1), dtype=np.float32)
        return search(partial(_answers, self.learner), images, radii, self.queries, rng).astype(np.float16)


def _answers(learner: keras.Model, images: np.ndarray) -> np.ndarray:
    """Logits [N] of images, bytes or in [0, 1]."""
    parts = [learner(pixels.to_unit(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def calibrate(purifier: VQUNet, images: np.ndarray, false_alarms: float) -> None:
    """Moves the threshold of a purifier's gate to where it closes for this share of clean images, an image more or less.

    Cross-entropy puts it where both mistakes are as frequent in training; but to miss an attack lets it through, and a false
    alarm only costs details.

    Args:
        images: clean ones, uint8 [N, H, W, C].
        false_alarms: a share in [0, 1).
    """
    say = keras.Model(purifier.graph.inputs, purifier.graph.output["gate"])
    logits = np.sort(_answers(say, images))
    threshold = logits[-1 - round(false_alarms * len(logits))]  # closed are those above
    bias = purifier.graph.get_layer("gate_logit").bias
    bias.assign(bias - threshold)
