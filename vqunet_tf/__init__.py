"""vqunet_tf: purify adversarial images with a vector-quantized U-Net before they reach a classifier."""

from vqunet_tf.models import DefendedClassifier, VectorQuantizer, VQUNet

__version__ = "0.1.0"

__all__ = [
    "DefendedClassifier",
    "VQUNet",
    "VectorQuantizer",
]
