"""vqunet_tf: purify adversarial images with a vector-quantized U-Net before they reach a classifier."""

from typing import Any

from vqunet_tf.models import DefendedClassifier, VectorQuantizer, VQUNet

__version__ = "0.1.0"

__all__ = [
    "DefendedClassifier",
    "VQUNet",
    "VectorQuantizer",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # on demand: it brings TensorFlow, which models on another backend never need
        from vqunet_tf.evaluation.library import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
