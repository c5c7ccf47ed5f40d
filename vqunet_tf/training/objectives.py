"""What is minimised, as Keras models whose `fit` trains the model inside them on any backend."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from vqunet_tf import backend, pixels
from vqunet_tf.config import TrainingConfig
from vqunet_tf.models.vqunet import VQUNet


class ClassifierObjective(keras.Model):
    """Cross-entropy with label smoothing on uint8 images; trains `classifier`."""

    def __init__(self, classifier: keras.Model, label_smoothing: float = 0.0):
        super().__init__()
        self.classifier = classifier
        self.smoothing = label_smoothing
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        self.built = True

    def call(self, images: Any, training: bool = False) -> Any:
        return ops.cast(self.classifier(pixels.to_unit(images), training=training), "float32")

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        del x, sample_weight, training
        self.accuracy.update_state(y, y_pred)
        classes = y_pred.shape[-1]
        wanted = ops.one_hot(ops.cast(y, "int32"), classes) * (1.0 - self.smoothing) + self.smoothing / classes
        return backend.share_of_loss(-ops.mean(ops.sum(wanted * ops.log_softmax(y_pred), axis=-1)))


class GrayBoxObjective(keras.Model):
    """Gives the clean image back from a clean, noisy or adversarial one; trains `purifier` only.

    With x the clean image, x' what the purifier P sees, f the frozen classifier:

        pixel_weight    * mean |P(x') - x|                                     reconstruction (L1)
      + guidance_weight * KL(softmax f(x) || softmax f(P(x')))                 logit guidance, after the high-level
                                                                               guided denoiser (Liao et al. 2018,
                                                                               arXiv 1712.02976)
      + codebook_weight * sum over levels of the quantizer losses              (van den Oord et al. 2017, Eq. 3)

    The classifier is frozen (`trainable = False`). The quantizers' losses are outputs added here: `add_loss` is not
    safe under `tf.distribute` once a layer synchronises its replicas.
    """

    def __init__(self, purifier: VQUNet, classifier: keras.Model, config: TrainingConfig):
        super().__init__()
        self.purifier = purifier
        self.classifier = classifier
        self.classifier.trainable = False
        self.weights_of = {
            "pixel": config.pixel_weight,
            "guidance": config.guidance_weight,
            "codebook": config.codebook_weight,
        }
        self.parts = {name: keras.metrics.Mean(name=name) for name in self.weights_of}
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Any]:
        result = self.purifier.graph(pixels.to_unit(inputs["seen"]), training=training)
        logits = self.classifier(result["images"], training=False)
        return {"images": result["images"], "logits": logits, "codebook": result["loss"]}

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        del sample_weight, training
        known = ops.log_softmax(ops.cast(y, "float32"))
        found = ops.log_softmax(ops.cast(y_pred["logits"], "float32"))
        losses = {
            "pixel": ops.mean(ops.abs(y_pred["images"] - pixels.to_unit(x["clean"]))),
            "guidance": ops.mean(ops.sum(ops.exp(known) * (known - found), axis=-1)),
            "codebook": y_pred["codebook"],
        }
        for name, metric in self.parts.items():
            metric.update_state(losses[name])
        return backend.share_of_loss(sum(weight * losses[name] for name, weight in self.weights_of.items()))
