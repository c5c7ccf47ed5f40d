"""The defended model: classifier after purifier, as one Keras model."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable("vqunet_tf")
class DefendedClassifier(keras.Model):
    """images [B, H, W, C] in [0, 1] -> logits [B, K]: `classifier(purifier(images))`.

    Saves and loads with both parts. The classifier always runs in inference mode; what may be trained is decided by
    `purifier.trainable` and `classifier.trainable`, which stay as they are given.

    Args:
        purifier: a Keras model or layer, images -> images.
        classifier: a Keras model, images -> logits.
    """

    def __init__(self, purifier: keras.layers.Layer, classifier: keras.Model, **kwargs: Any):
        super().__init__(**{"autocast": False, **kwargs})  # the purifier takes float32 whatever the policy
        for name, part in {"purifier": purifier, "classifier": classifier}.items():
            if not isinstance(part, keras.layers.Layer):
                raise ValueError(f"Expected {name} to be a Keras model. Received: {type(part).__name__}")
        self.purifier = purifier
        self.classifier = classifier
        if getattr(classifier, "inputs", None):
            self(keras.Input(classifier.input_shape[1:]))  # so that it can be saved and exported before its first use

    def call(self, images: Any, training: bool = False) -> Any:
        return self.classifier(self.purifier(images, training=training), training=False)

    def compute_output_spec(self, images: Any, training: bool = False) -> Any:
        return self.classifier(self.purifier(images))  # symbolic: each part says its own

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "purifier": serialize(self.purifier),
            "classifier": serialize(self.classifier),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DefendedClassifier:
        parts = {name: keras.saving.deserialize_keras_object(config.pop(name)) for name in ("purifier", "classifier")}
        return cls(**parts, **config)
