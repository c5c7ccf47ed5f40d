"""A victim as the one model that ART attacks, end to end.

ART (Adversarial Robustness Toolbox 1.20, Nicolae et al., https://arxiv.org/abs/1807.01069) asks its model for logits,
losses and gradients as NumPy arrays. Its own TensorFlow classifier answers class by class, each with a forward pass of
its own, and in front of preprocessors it leaves out part of the gradient. This one has no preprocessors: the victim is
the whole chain; and every question is one compiled program for batches of any size.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from vqunet_tf.attacks.base import Victim
from vqunet_tf.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that PyTorch is not there
    from art.estimators.classification import TensorFlowV2Classifier
    from art.utils import is_probability_array

# Images answered at once; ART's hard-label attack asks for thousands.
_CHUNK = 256

# ART adds 1e-7 to the length of a gradient: the steps of a confident classifier would shrink to nothing. A power of
# two changes no direction and no comparison of losses.
_SCALE = 2.0**40


class TooManyQueries(Exception):
    """An attack did not come to an end."""


class EndToEnd(TensorFlowV2Classifier):
    """ART's view of a victim.

    loss: `ce` or `dlr`, what `loss_gradient` and `compute_loss` speak of.
    remember: keep the answers of the last few batches, for an attack that asks for the same images again.
    queries: images answered so far. limit: where `TooManyQueries` is raised.
    """

    def __init__(self, victim: Victim, example: np.ndarray, *, loss: str = "ce", remember: bool = False):
        """example: a batch `[B,H,W,C]`. Raises a `UserError` if the victim answers it with probabilities."""
        self.programs = _programs(victim, example.shape[1:])
        logits = self.programs.logits(example).numpy()
        if logits.ndim != 2 or is_probability_array(logits):
            raise UserError(
                f"expected logits [B, classes], the victim gives {'probabilities' if logits.ndim == 2 else logits.shape}: "
                "take away its last activation, attacks would see flattened gradients"
            )
        super().__init__(
            model=self.programs.logits,
            nb_classes=logits.shape[1],
            input_shape=example.shape[1:],
            clip_values=(0.0, 1.0),
            preprocessing=None,
        )
        self.loss, self.remember = loss, remember
        self.queries = 0
        self.limit: int | None = None
        self._known: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._most = 0

    def predict(self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """Logits `[B, classes]` float32."""
        x = np.asarray(x, np.float32)
        if not self.remember:
            return self._ask(x)
        keys = [image.tobytes() for image in x]
        unknown = [row for row, key in enumerate(keys) if key not in self._known]
        for key in keys:
            if key in self._known:
                self._known.move_to_end(key)
        if unknown:
            self._known.update(zip((keys[row] for row in unknown), self._ask(x[unknown]), strict=True))
        answers = np.stack([self._known[key] for key in keys])
        self._most = max(self._most, len(x))
        while len(self._known) > 4 * self._most:  # bounded by the batch
            self._known.popitem(last=False)
        return answers

    def _ask(self, x: np.ndarray) -> np.ndarray:
        self.queries += len(x)
        if self.limit is not None and self.queries > self.limit:
            raise TooManyQueries
        parts = [self.programs.logits(x[at : at + _CHUNK]).numpy() for at in range(0, len(x), _CHUNK)]
        return np.concatenate(parts)

    def loss_gradient(self, x: np.ndarray, y: np.ndarray, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """Gradient `[B,H,W,C]` of each image's loss; y one-hot."""
        return self.programs.loss_gradients[self.loss](np.asarray(x, np.float32), y.argmax(axis=1)).numpy()

    def compute_loss(
        self, x: np.ndarray, y: np.ndarray, reduction: str = "none", training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Loss `[B]` of each image; y one-hot."""
        if reduction != "none":
            raise ValueError(f"expected the loss of each image (reduction 'none'), got {reduction!r}")
        return self.losses_and_logits(x, y)[0]

    def losses_and_logits(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss `[B]` of each image and logits `[B, classes]`, of one forward pass; y one-hot."""
        losses, logits = self.programs.losses[self.loss](np.asarray(x, np.float32), y.argmax(axis=1))
        return losses.numpy(), logits.numpy()

    def attacked_by(self, attack: Any, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What an attack of ART on this model makes of images `[B,H,W,C]` of the classes `[B]`."""
        return attack.generate(images, labels)

    def class_gradient(
        self, x: np.ndarray, label: Any = None, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Gradient of logits: of all `[B,classes,H,W,C]`, or of one for each image `[B,1,H,W,C]`."""
        x = np.asarray(x, np.float32)
        if label is None:
            return self.programs.jacobian(x).numpy()
        labels = np.broadcast_to(np.asarray(label), len(x))
        return self.programs.class_gradient(x, labels).numpy()[:, None]


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """ART draws from the global generators of NumPy and Python: sets them, and puts them back afterwards."""
    kept, kept_python = np.random.get_state(), random.getstate()
    np.random.seed(rng.integers(2**32, dtype=np.uint32))
    random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(kept)
        random.setstate(kept_python)


def difference_of_logits_ratio(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The loss `[B]` of APGD that no scaling of the logits changes, with z sorted in falling order:

        (max_{i≠y} z_i - z_y) / (z_1 - z_3)

    "Reliable evaluation of adversarial robustness ...", Croce & Hein, https://arxiv.org/abs/2003.01690, equation 6.
    ART's own walks over the images in Python, with the same numbers.
    """
    top = tf.math.top_k(logits, 3).values
    own = tf.one_hot(labels, tf.shape(logits)[-1], dtype=logits.dtype)
    other = tf.reduce_max(tf.where(own > 0, logits.dtype.min, logits), axis=-1)
    return (other - tf.reduce_sum(own * logits, axis=-1)) / (top[:, 0] - top[:, 2] + 1e-12)


_LOSSES = {
    "ce": lambda labels, logits: tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
    "dlr": difference_of_logits_ratio,
}


@dataclass(frozen=True)
class _Programs:
    logits: Callable[..., tf.Tensor]
    jacobian: Callable[..., tf.Tensor]
    class_gradient: Callable[..., tf.Tensor]
    losses: dict[str, Callable[..., tuple[tf.Tensor, tf.Tensor]]]
    loss_gradients: dict[str, Callable[..., tf.Tensor]]


@functools.lru_cache(maxsize=16)
def _programs(victim: Victim, shape: tuple[int, ...]) -> _Programs:
    """Everything ART may ask, traced when it is first asked. The last few are kept, and with them their victims."""
    images, labels = tf.TensorSpec((None, *shape)), tf.TensorSpec((None,), tf.int32)

    def logits(x: tf.Tensor) -> tf.Tensor:
        return tf.cast(victim(x), tf.float32)

    def gradient(of: tf.Tensor, x: tf.Tensor, tape: tf.GradientTape) -> tf.Tensor:
        return tape.gradient(of, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def jacobian(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            found = tf.unstack(logits(x), axis=1)
        return tf.stack([gradient(one, x, tape) for one in found], axis=1)

    def class_gradient(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            picked = tf.gather(logits(x), y, axis=1, batch_dims=1)
        return gradient(picked, x, tape)

    def loss(kind: str) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
        def compute(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            found = logits(x)
            return _SCALE * _LOSSES[kind](y, found), found

        return compute

    def loss_gradient(kind: str) -> Callable[..., tf.Tensor]:
        def compute(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(x)
                value, _ = loss(kind)(x, y)
            return gradient(value, x, tape)

        return compute

    one, two = [images], [images, labels]
    return _Programs(
        logits=tf.function(logits, input_signature=one),
        jacobian=tf.function(jacobian, input_signature=one),
        class_gradient=tf.function(class_gradient, input_signature=two),
        losses={kind: tf.function(loss(kind), input_signature=two) for kind in _LOSSES},
        loss_gradients={kind: tf.function(loss_gradient(kind), input_signature=two) for kind in _LOSSES},
    )
