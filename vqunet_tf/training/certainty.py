"""The head of a purifier with `classes`: it learns last, and is then told how often to be in doubt."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from vqunet_tf import pixels
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.training.objectives import Objective, cross_entropy

_BATCH = 250


class CertaintyObjective(Objective):
    """Cross-entropy of that head; encoder, code books and all else stay as they are, and neither decoder nor classifier is computed.

    Attributes:
        learner: images -> the head's logits; of its weights the head's alone learn.
    """

    def __init__(self, purifier: VQUNet):
        super().__init__({"class": 1.0})
        self.learner = keras.Model(purifier.graph.inputs, purifier.graph.output["classes"])
        for layer in self.learner.layers:
            layer.trainable = layer.name == "classes"
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="class_accuracy")

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        return self.learner(pixels.to_unit(inputs["seen"]), training=False)  # no code moves

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        self.accuracy.update_state(x["label"], outputs)
        return {"class": cross_entropy(outputs, x["label"])}


def forget(purifier: VQUNet) -> None:
    """Makes a purifier's head certain of nothing, as it is before it has learned."""
    for name in ("classes", "certainty"):
        for weight in purifier.graph.get_layer(name).weights:
            weight.assign(keras.ops.zeros_like(weight))


def calibrate(purifier: VQUNet, images: np.ndarray, uncertain: float) -> None:
    """Moves the threshold of a purifier's certainty to where it is in doubt about this share of clean images: halfway between two of them.

    Args:
        images: clean ones, uint8 [N, H, W, C].
        uncertain: a share in [0, 1].
    """
    threshold = purifier.graph.get_layer("certainty").threshold
    threshold.assign(0.0)  # beside a large one the odds would be lost
    say = keras.Model(purifier.graph.inputs, purifier.graph.output["certainty"])
    parts = [say(pixels.to_unit(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    found = np.sort(np.concatenate([keras.ops.convert_to_numpy(part) for part in parts]))
    in_doubt = round(uncertain * len(found))
    between = np.pad(found, 1, constant_values=(found[0] - 1.0, found[-1] + 1.0))[in_doubt : in_doubt + 2].mean()
    threshold.assign(between)
