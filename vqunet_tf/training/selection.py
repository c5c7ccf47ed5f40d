"""Which epoch is kept: the one with the best clean and attacked accuracy on validation images, never on test images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from vqunet_tf import pixels
from vqunet_tf.models import DefendedClassifier
from vqunet_tf.training import adversaries
from vqunet_tf.training.averaging import Averages

_BATCH = 250  # images attacked or classified at a time


class Selection(keras.callbacks.Callback):
    """After each epoch scores the purifier, with its averaged weights, and keeps the best ones, the latest of equals.

    Adds `validation_clean`, `validation_untargeted` and `validation_targeted` to the logs: accuracies in [0, 1] of the
    classifier behind the purifier. The score is clean + the worse of the other two.

    Args:
        averages: of the purifier's weights.
        defended: classifier behind that purifier.
        images, labels: validation images uint8 [N, H, W, C] and labels [N].
        attacked: gives adversarial images for targeted = False and True, uint8 [N, H, W, C]; asked after each epoch.
    """

    def __init__(
        self,
        averages: Averages,
        defended: DefendedClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        attacked: Callable[[bool], np.ndarray],
    ):
        super().__init__()
        self.averages, self.defended = averages, defended
        self.images, self.labels, self.attacked = images, labels, attacked
        self.score = -1.0
        self.best: list[np.ndarray] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        with self.averages.applied():
            found = {
                "validation_clean": self._accuracy(self.images),
                "validation_untargeted": self._accuracy(self.attacked(False)),
                "validation_targeted": self._accuracy(self.attacked(True)),
            }
            score = found["validation_clean"] + min(found["validation_untargeted"], found["validation_targeted"])
            if score >= self.score:  # of equals the later one: it has learned longer
                weights = [np.array(ops.convert_to_numpy(weight)) for weight in self.defended.purifier.weights]
                self.score, self.best = score, weights
        if logs is not None:
            logs.update(found)

    def apply(self) -> None:
        """Gives the purifier the weights of its best epoch for good."""
        for weight, value in zip(self.defended.purifier.weights, self.best or (), strict=True):
            weight.assign(value)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"score": np.array(self.score), **{str(i): value for i, value in enumerate(self.best or ())}}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.score = float(state["score"])
        self.best = [state[str(i)] for i in range(len(state) - 1)] or None

    def _accuracy(self, images: np.ndarray) -> float:
        right = 0
        for i in range(0, len(images), _BATCH):  # eagerly: inside a strategy's scope `predict` answers once a replica
            logits = ops.convert_to_numpy(self.defended(pixels.to_unit(images[i : i + _BATCH]), training=False))
            right += int(np.sum(logits.argmax(axis=1) == self.labels[i : i + _BATCH]))
        return right / len(images)


def fixed(
    guide: adversaries.Guide, images: np.ndarray, labels: np.ndarray, epsilon: float, steps: int, seed: int
) -> Callable[[bool], np.ndarray]:
    """Adversaries of a classifier that does not change, crafted when they are first asked for."""
    known: dict[bool, np.ndarray] = {}

    def attacked(targeted: bool) -> np.ndarray:
        if targeted not in known:
            known[targeted] = adversaries.pgd(guide, images, labels, epsilon, steps, targeted, seed, _BATCH)
        return known[targeted]

    return attacked


def renewed(
    defended: DefendedClassifier, images: np.ndarray, labels: np.ndarray, epsilon: float, steps: int, seed: int
) -> Callable[[bool], np.ndarray]:
    """Adversaries of the whole chain as it stands when they are asked for."""

    def guide(x: Any) -> dict[str, Any]:
        logits = defended(x, training=False)
        return {"logits": logits, "features": logits}

    def attacked(targeted: bool) -> np.ndarray:
        return adversaries.pgd(guide, images, labels, epsilon, steps, targeted, seed, _BATCH)

    return attacked
