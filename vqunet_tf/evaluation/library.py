"""`vqunet_tf.evaluate`: the evaluation as one call, for anybody's Keras classifier and anybody's defence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import inputs, suites
from vqunet_tf.evaluation.bench import Progress
from vqunet_tf.evaluation.measure import evaluate as measure
from vqunet_tf.evaluation.victims import surrogates as chains_of
from vqunet_tf.models import DefendedClassifier, VQUNet
from vqunet_tf.threat import Threat


def evaluate(
    defended: Any,
    images: Any,
    labels: Any,
    suite: str = "quick",
    *,
    epsilons: Sequence[float] = (8 / 255,),
    l2_epsilons: Sequence[float] = (0.5,),
    attacks: Sequence[str] = (),
    threat_models: Sequence[str] = (),
    steps: int = 20,
    surrogates: Mapping[str, Any] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Attacks a classifier, with and without what stands in front of it, and returns what is left of its accuracy.

        rows = vqunet_tf.evaluate((layer, classifier), images, labels, suite="adaptive", epsilons=[0.1])

    Rows of defence `none` are the bare classifier's; those of `vqunet`, or `purifier` for another than a `VQUNet`, are the
    defended model's. Only white-box rows bear on an attacker who knows the defence.

    defended: a `DefendedClassifier`, a pair (purifier, classifier), or a classifier alone. The classifier is a Keras model
        `[B,H,W,C]` in [0,1] → logits; the purifier any function images → images, on tensors or on NumPy arrays. One that
        passes no gradient is attacked as if it were the identity on the way back; an attribute `differentiable` set to
        False says that its gradient leads nowhere, an attribute `smooth`, a function of
        tensors close to it, is attacked through as well.
    images: `[N,H,W,C]` uint8, or floats in [0,1]. labels: `[N]` whole numbers.
    suite: `quick`, `standard`, `adaptive` or `full`. attacks, threat_models: by name, instead of those of the suite.
    epsilons: linf radii. l2_epsilons: radii of attacks that know l2 only.
    steps: of the iterated attacks.
    surrogates: independently trained models for the attack `transfer`, by name: each as `defended` is given.
    progress: called with what is running, the work done and the work in all.

    Returns the rows of report.json. A check that fails (masked gradients, an attack that does not work, ...) is a warning:
    the rows are then not to be trusted. Raises a `vqunet_tf.errors.UserError` for unknown names, images on another scale,
    labels that are none, and a classifier that gives probabilities.
    """
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"attacks need the Keras backend tensorflow, got {keras.backend.backend()}: set KERAS_BACKEND")
    purifier, classifier = _parts(defended)
    threats = [Threat("linf", epsilon) for epsilon in epsilons] + [Threat("l2", epsilon) for epsilon in l2_epsilons]
    few = inputs.unit_images(images[:2] if np.ndim(images) == 4 else images)
    others: dict[str, Any] = {}
    for name, other in (surrogates or {}).items():
        purify, bare = _parts(other)
        others |= chains_of(name, bare, None if purify is None else function_of(purify, few))
    defenses = {}
    if purifier is not None:
        name = "vqunet" if isinstance(purifier, VQUNet) else "purifier"
        defenses[name] = function_of(purifier, few)
    found = measure(
        classifier,
        None,
        images,
        labels,
        attacks=suites.build(suite, attacks, threats, steps),
        threat_models=threat_models,
        defenses=defenses,
        surrogates=others,
        batch_size=batch_size,
        seed=seed,
        keep=0,
        progress=progress,
    )
    failed = [f"{check.name} ({check.detail})" for check in found.checks if not check.passed]
    if failed:
        warnings.warn(f"do not trust these rows, checks failed: {'; '.join(failed)}", UserWarning, stacklevel=2)
    return found.rows


class Adapted:
    """A function of NumPy arrays as one of tensors, that passes no gradient."""

    differentiable = False

    def __init__(self, function: Any):
        self.function = function
        self.smooth = getattr(function, "smooth", None)
        self.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)

    def __call__(self, images: Any) -> Any:
        images = tf.convert_to_tensor(images, tf.float32)
        found = tf.numpy_function(lambda array: np.asarray(self.function(array), np.float32), [images], tf.float32)
        return tf.ensure_shape(found, images.shape)


def function_of(purifier: Any, few: np.ndarray) -> Any:
    """Returns a purifier as a function of tensors that can be traced: itself, or adapted if it cannot.

    few: images to try it on. A function that draws random numbers outside TensorFlow would draw them once, while it is
    traced; that shows in two calls, and such a one is called anew each time.
    """
    if isinstance(purifier, keras.layers.Layer):
        return _Quiet(purifier)
    if isinstance(getattr(purifier, "__self__", None), VQUNet):
        return _Quiet(purifier.__self__)  # its method `purify` is for users; the model passes gradients
    shape = (None, *few.shape[1:])
    try:
        traced = tf.function(purifier, input_signature=[tf.TensorSpec(shape, tf.float32)])
        once, again = np.asarray(traced(few)), np.asarray(traced(few))
    except Exception:  # whatever a function of arrays raises that is given a tensor without values
        return Adapted(purifier)
    is_drawn = not np.array_equal(np.asarray(purifier(tf.constant(few))), np.asarray(purifier(tf.constant(few))))
    return Adapted(purifier) if is_drawn and np.array_equal(once, again) else purifier


class _Quiet:
    """A Keras layer in inference mode."""

    def __init__(self, layer: keras.layers.Layer):
        self.purify = layer
        self.differentiable = getattr(layer, "differentiable", True)
        self.smooth = getattr(layer, "smooth", None)

    def __call__(self, images: Any) -> Any:
        return self.purify(images, training=False)


def _parts(defended: Any) -> tuple[Any, keras.Model]:
    """(purifier or None, classifier)."""
    if isinstance(defended, DefendedClassifier):
        return defended.purifier, defended.classifier
    purifier, classifier = defended if isinstance(defended, tuple | list) and len(defended) == 2 else (None, defended)
    if not isinstance(classifier, keras.Model) or not (purifier is None or callable(purifier)):
        raise UserError(
            "expected a DefendedClassifier, a Keras classifier, or a pair (purifier, classifier), got "
            f"{type(defended).__name__}"
        )
    return purifier, classifier
