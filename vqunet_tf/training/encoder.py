"""The encoder's own first stage: features that tell the class, attacked or not, before there is a decoder to please."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from vqunet_tf import pixels
from vqunet_tf.config import TrainingConfig
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.training.objectives import Objective, climb, cross_entropy, divergence, glance


class EncoderObjective(Objective):
    """Trains the encoder with a linear head on the bottleneck, without quantizers.

    CE(h(x'), y) of what the batches say is seen (`GrayBoxObjective`); where they do not, x' is attacked on h, as in
    `AdaptiveObjective`. With a share `encoder_guidance` s it is (1 - s) CE(h(x'), y) + s KL(softmax f(x) || softmax h(x')), f(x)
    what the classifier said about the clean image. Neither decoder nor classifier is computed.

    Attributes:
        learner: images -> the head's logits, a model of the encoder and the head; what learns.
    """

    def __init__(self, purifier: VQUNet, head: keras.layers.Dense, config: TrainingConfig):
        super().__init__({"head": 1.0})
        out_of = purifier.graph.get_layer(f"from_codes_{len(purifier.widths) - 1}")
        self.learner = keras.Model(purifier.graph.inputs, glance(head, out_of(_encoder(purifier).output)))
        self.guidance = config.encoder_guidance
        self.attack_steps, self.step_size = config.attack_steps, config.attack_step_size
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="head_accuracy")

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        seen = clean = pixels.to_unit(inputs["seen" if "seen" in inputs else "clean"])
        if training and "seen" not in inputs:
            given = (inputs["start"], inputs["epsilon"], inputs["label"], self.attack_steps, self.step_size)
            seen = ops.stop_gradient(climb(self.learner, clean, *given))
        return self.learner(seen)

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        self.accuracy.update_state(x["label"], outputs)
        loss = cross_entropy(outputs, x["label"])
        if self.guidance:
            loss = (1.0 - self.guidance) * loss + self.guidance * divergence(x["logits"], outputs)
        return {"head": loss}


def freeze(purifier: VQUNet) -> None:
    """Keeps all that leads to the bottleneck's quantizer as it is; skip connections go on to learn what they take from it."""
    _encoder(purifier).trainable = False


def adopt(purifier: VQUNet, other: VQUNet) -> None:
    """Takes over from another purifier of the same sizes what leads to the bottleneck's quantizer."""
    _encoder(purifier).set_weights(_encoder(other).get_weights())


def _encoder(purifier: VQUNet) -> keras.Model:
    return keras.Model(purifier.graph.inputs, purifier.graph.get_layer(f"to_codes_{len(purifier.widths) - 1}").output)
