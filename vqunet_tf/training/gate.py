"""How often a gate may be wrong about images that nobody attacked: set after it has learned, on images it has not seen."""

from __future__ import annotations

import keras
import numpy as np

from vqunet_tf import pixels
from vqunet_tf.models.vqunet import VQUNet

_BATCH = 250


def calibrate(purifier: VQUNet, images: np.ndarray, false_alarms: float) -> None:
    """Moves the threshold of a purifier's gate to where it closes for this share of clean images, an image more or less.

    Cross-entropy puts it where both mistakes are as frequent in training; but to miss an attack lets it through, and a false
    alarm only costs details.

    Args:
        images: clean ones, uint8 [N, H, W, C].
        false_alarms: a share in [0, 1).
    """
    say = keras.Model(purifier.graph.inputs, purifier.graph.output["gate"])
    parts = [say(pixels.to_unit(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    logits = np.sort(np.concatenate([keras.ops.convert_to_numpy(part) for part in parts]))
    threshold = logits[-1 - round(false_alarms * len(logits))]  # closed are those above
    bias = purifier.graph.get_layer("gate_logit").bias
    bias.assign(bias - threshold)
