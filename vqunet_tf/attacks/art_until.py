"""AutoPGD of ART, with images that leave once they are fooled: ART itself takes every image to the last step."""

from __future__ import annotations

from typing import Any

import numpy as np

from vqunet_tf.attacks.art_model import EndToEnd

# Convolutions are prepared anew for every size of a batch that they meet: fewer sizes, less of that.
_MULTIPLE = 8


class UntilFooled(EndToEnd):
    """That view of a victim for attacks that look at the loss of every point they come to.

    The first point of an image that is misclassified is kept, and the image is asked for no more: its gradient is zero from then on,
    its loss stays as it was. The path of the others is what it would have been.
    """

    asked = True

    def attacked_by(self, attack: Any, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        self.labels, self.asked = labels, False
        self.rows = np.arange(len(images))  # those that ART goes on with
        self.found, self.fooled = images.copy(), np.zeros(len(images), bool)  # the points kept, and where there is one
        self.last = np.zeros(len(images), np.float32)
        made = super().attacked_by(attack, images, labels)
        made[self.fooled] = self.found[self.fooled]
        return made

    def predict(self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        logits = super().predict(x, batch_size, training_mode, **kwargs)
        if not self.asked:  # ART's first question; it goes on with what is right untouched
            self.rows, self.asked = np.flatnonzero(logits.argmax(axis=1) == self.labels), True
        return logits

    def loss_gradient(self, x: np.ndarray, y: np.ndarray, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        left, padded = self._left()
        gradient = np.zeros_like(x, np.float32)
        if len(left):
            gradient[left] = super().loss_gradient(x[padded], y[padded])[: len(left)]
        return gradient

    def compute_loss(
        self, x: np.ndarray, y: np.ndarray, reduction: str = "none", training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        left, padded = self._left()
        if len(left):
            rows = self.rows[left]
            losses, logits = (values[: len(left)] for values in self.losses_and_logits(x[padded], y[padded]))
            self.last[rows] = losses
            gone = logits.argmax(axis=1) != self.labels[rows]
            self.found[rows[gone]] = x[left[gone]]
            self.fooled[rows[gone]] = True
        return self.last[self.rows]

    def _left(self) -> tuple[np.ndarray, np.ndarray]:
        """Which of ART's images are still right; and the same, filled up with the last of them."""
        left = np.flatnonzero(~self.fooled[self.rows])
        return left, np.pad(left, (0, -len(left) % _MULTIPLE), mode="edge") if len(left) else left
