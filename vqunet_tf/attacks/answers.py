"""What a victim answers, and which of several adversaries of an image is the strongest."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vqunet_tf.attacks.base import Victim


def answers(victim: Victim, images: np.ndarray) -> np.ndarray:
    """Returns the logits `[B, classes]` float32 of one batch `[B,H,W,C]`."""
    return _compiled(victim, images.shape[1:])(tf.constant(images)).numpy()


def losses(logits: np.ndarray, labels: np.ndarray, loss: str) -> np.ndarray:
    """Returns the loss `[B]` of logits `[B, classes]`: `margin`, or cross-entropy for any other name.

    margin: the largest other logit minus the true one; above zero where the victim is wrong.
    """
    rows = np.arange(len(labels))
    own = logits[rows, labels]
    if loss == "margin":
        others = logits.copy()
        others[rows, labels] = -np.inf
        return others.max(axis=1) - own
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - own


class Best:
    """The strongest adversary of each image so far: one that fools the victim, else the one of the largest loss.

    images: `[B,H,W,C]`, fooled: `[B]` booleans.
    """

    def __init__(self, victim: Victim, labels: np.ndarray, loss: str):
        self.victim, self.labels, self.loss = victim, labels, loss
        self.images = np.empty(0, np.float32)
        self.fooled = np.zeros(len(labels), bool)
        self._losses = np.full(len(labels), -np.inf)

    def offer(self, images: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Takes over what is stronger. The first offer must be of all images; rows: which ones these are."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        if self.images.size == 0:
            self.images = images.copy()
        logits, labels = answers(self.victim, images), self.labels[rows]
        fooled, loss = logits.argmax(axis=1) != labels, losses(logits, labels, self.loss)
        better = np.where(fooled == self.fooled[rows], loss > self._losses[rows], fooled)
        taken = rows[better]
        self.images[taken], self.fooled[taken], self._losses[taken] = images[better], fooled[better], loss[better]


@functools.lru_cache(maxsize=16)
def _compiled(victim: Victim, shape: tuple[int, ...]) -> Callable[[tf.Tensor], tf.Tensor]:
    """One program for batches of any size."""
    return tf.function(
        lambda images: tf.cast(victim(images), tf.float32), input_signature=[tf.TensorSpec((None, *shape))]
    )
