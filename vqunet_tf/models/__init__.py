"""Pure Keras 3 models and layers: they load, run and train on every Keras backend."""

from vqunet_tf.models import classifiers as _classifiers  # noqa: F401  registers their layers
from vqunet_tf.models.defended import DefendedClassifier
from vqunet_tf.models.vector_quantizer import VectorQuantizer
from vqunet_tf.models.vqunet import VQUNet

__all__ = ["DefendedClassifier", "VQUNet", "VectorQuantizer"]
