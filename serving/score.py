"""`adversarial_score`: how likely an image was tampered with, told by what purification does to it.

Three signs, each 0 for an image that purification leaves alone:

| sign | of an image x with purified image P(x) |
|---|---|
| `disagreement` | Jensen-Shannon divergence of the classifier's softmax at x and at P(x), to the base 2, in [0, 1] |
| `change` | mean of abs(P(x) - x) |
| `quantisation` | mean over levels of |z - q|² / |z|², z the encoder's vectors, q their codes; 0 without code books |

The score is a logistic regression on their logarithms, fitted on validation images against gray-box adversaries;
without data it is the disagreement itself. It is no defence against an attacker who knows of it: the score is as
differentiable as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf.models.vqunet import VQUNet

SIGNS = ("disagreement", "change", "quantisation")
FALSE_ALARMS = 0.05
RULE = "tampered with if adversarial_score > threshold"

# Added to a sign before its logarithm: smaller ones are rounding.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Score:
    """Maps signs [B, 3] to a score [B] in [0, 1].

    centre, scale: of the logarithms of the signs of clean images; weights, bias: of the regression. All empty without
    data: the score is the disagreement.
    threshold: the score above which at most 5% of clean validation images lie; None without data.
    report: how it was found and what it detects, for score.json.
    """

    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    bias: float = 0.0
    threshold: float | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        return bool(self.weights)

    def __call__(self, signs: Any) -> Any:
        """Returns float32 [B]; 1 where a sign is not a number, as where a model overflows."""
        if self.calibrated:
            z = (tf.math.log(signs + _FLOOR) - tf.constant(self.centre)) / tf.constant(self.scale)
            score = tf.sigmoid(tf.linalg.matvec(z, tf.constant(self.weights)) + self.bias)
        else:
            score = signs[:, 0]
        return tf.where(tf.math.is_finite(score), score, 1.0)

    def to_json(self) -> dict[str, Any]:
        """What score.json holds."""
        return {
            "calibrated": self.calibrated,
            "threshold": self.threshold,
            "rule": RULE,
            "limits": "tells gray-box adversaries; no defence against an attacker who knows of it",
            "signs": list(SIGNS),
            "floor": _FLOOR,
            "centre": list(self.centre),
            "scale": list(self.scale),
            "weights": list(self.weights),
            "bias": self.bias,
            **self.report,
        }


def fit(clean: np.ndarray, tampered: np.ndarray) -> Score:
    """Returns the score that tells signs of clean images [N, 3] from those of tampered ones [M, 3].

    Both kinds weigh the same, however many there are: before an image is seen, the odds are even. The threshold is the
    smallest score of a clean image with at most 5% of them above it.
    """
    from sklearn.linear_model import LogisticRegression

    logs = np.log(np.concatenate([clean, tampered]).astype(np.float64) + _FLOOR)
    centre = logs[: len(clean)].mean(axis=0)
    scale = logs[: len(clean)].std(axis=0)
    scale = np.where(scale > 0.0, scale, 1.0)
    labels = np.repeat([0, 1], [len(clean), len(tampered)])
    found = LogisticRegression(class_weight="balanced").fit((logs - centre) / scale, labels)
    score = Score(_floats(centre), _floats(scale), _floats(found.coef_[0]), float(found.intercept_[0]))
    scores = np.sort(score(tf.constant(clean, tf.float32)).numpy())
    above = int(FALSE_ALARMS * len(scores))  # images that may lie above
    threshold = float(scores[len(scores) - 1 - above])
    return Score(score.centre, score.scale, score.weights, score.bias, threshold)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, values))


def signs(images: Any, purified: Any, quantisation: Any, logits_before: Any, logits_after: Any) -> Any:
    """Returns the signs float32 [B, 3] in the order of SIGNS.

    images, purified: [B, H, W, C]; quantisation: [B]; logits of the images and of the purified images: [B, K].
    """
    change = tf.reduce_mean(tf.abs(purified - images), axis=(1, 2, 3))
    return tf.stack([divergence(logits_before, logits_after), change, quantisation], axis=-1)


def divergence(first: Any, second: Any) -> Any:
    """Jensen-Shannon divergence of softmax(first) and softmax(second), to the base 2: [B, K] twice → float32 [B] in [0, 1].

    In float64: in float32 the difference of two nearly equal distributions would be rounding.
    """
    log_p, log_q = (tf.nn.log_softmax(tf.cast(logits, tf.float64)) for logits in (first, second))
    log_2 = tf.math.log(tf.constant(2.0, tf.float64))
    larger, apart = tf.maximum(log_p, log_q), tf.abs(log_p - log_q)
    log_m = larger + tf.math.log1p(tf.exp(-apart)) - log_2  # finite even where p and q are 0
    total = tf.exp(log_p) * (log_p - log_m) + tf.exp(log_q) * (log_q - log_m)
    return tf.cast(tf.clip_by_value(tf.reduce_sum(total, axis=-1) / (2.0 * log_2), 0.0, 1.0), tf.float32)


def with_quantisation(purifier: keras.Model) -> Callable[[Any], tuple[Any, Any]]:
    """Returns a function images [B, H, W, C] → purified images and their quantisation error, float32 [B].

    One pass gives both. A purifier that is no `VQUNet`, or one without quantizers, has no error: 0.
    """
    if not (isinstance(purifier, VQUNet) and purifier.quantizers):
        return lambda images: (purifier(images, training=False), tf.zeros(tf.shape(images)[:1]))
    graph = purifier.graph
    vectors = [layer.input for layer in purifier.quantizers]
    codes = [next(out for out in layer.output if out.shape == layer.input.shape) for layer in purifier.quantizers]
    inside = keras.Model(graph.input, {"images": graph.output["images"], "vectors": vectors, "codes": codes})

    def run(images: Any) -> tuple[Any, Any]:
        found = inside(images, training=False)
        errors = [_relative(*pair) for pair in zip(found["vectors"], found["codes"], strict=True)]
        return found["images"], tf.add_n(errors) / len(errors)

    return run


def _relative(vectors: Any, codes: Any) -> Any:
    """|vectors - codes|² over |vectors|², each summed over an image: [B, h, w, D] twice → [B]."""
    vectors, codes = tf.cast(vectors, tf.float32), tf.cast(codes, tf.float32)
    error = tf.reduce_sum(tf.square(vectors - codes), axis=(1, 2, 3))
    return error / (tf.reduce_sum(tf.square(vectors), axis=(1, 2, 3)) + 1e-12)
