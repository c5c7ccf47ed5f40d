"""Which epoch is kept: the one with the best clean and attacked accuracy on validation images, never on test images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from vqunet_tf import pixels
from vqunet_tf.models import DefendedClassifier
from vqunet_tf.models.vector_quantizer import passing
from vqunet_tf.training import adversaries
from vqunet_tf.training.averaging import Averages

_BATCH = 250  # images attacked or classified at a time

Attacked = Callable[[], np.ndarray]  # adversarial images uint8 [N, H, W, C]


class Selection(keras.callbacks.Callback):
    """After each epoch scores the purifier, with its averaged weights, and keeps the best ones, the latest of equals.

    Adds `validation_clean` and `validation_<attack>` to the logs: accuracies in [0, 1] of the classifier behind the
    purifier. The score is clean + the worst of the attacked ones.

    Args:
        averages: of the purifier's weights.
        defended: classifier behind that purifier.
        images, labels: validation images uint8 [N, H, W, C] and labels [N].
        attacks: by name what gives adversarial images, uint8 [N, H, W, C]; asked after each epoch.
    """

    def __init__(
        self,
        averages: Averages,
        defended: DefendedClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        attacks: Mapping[str, Attacked],
    ):
        super().__init__()
        self.averages, self.defended = averages, defended
        self.images, self.labels, self.attacks = images, labels, attacks
        self.score = -1.0
        self.best: list[np.ndarray] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        with self.averages.applied():
            clean = self._accuracy(self.images)
            found = {name: self._accuracy(attacked()) for name, attacked in self.attacks.items()}
            score = clean + min(found.values())
            if score >= self.score:  # of equals the later one: it has learned longer
                weights = [np.array(ops.convert_to_numpy(weight)) for weight in self.defended.purifier.weights]
                self.score, self.best = score, weights
        if logs is not None:
            logs.update({f"validation_{name}": share for name, share in {"clean": clean, **found}.items()})

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
    guide: adversaries.Guide, images: np.ndarray, labels: np.ndarray, epsilon: float, steps: int, seed: int, rule: str
) -> dict[str, Attacked]:
    """Attacks on a classifier that does not change, crafted when they are first asked for.

    rule: `best` has untargeted and targeted PGD, `worst` a single step too.
    """

    def attack(targeted: bool, steps: int) -> Attacked:
        return functools.cache(
            lambda: adversaries.pgd(guide, images, labels, epsilon, steps, targeted, seed, min(_BATCH, len(images)))
        )

    found = {"untargeted": attack(False, steps), "targeted": attack(True, steps)}
    return {**found, "single_step": attack(False, 1)} if rule == "worst" else found


def renewed(
    defended: DefendedClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    steps: int,
    seed: int,
    rule: str,
) -> dict[str, Attacked]:
    """Attacks on the whole chain as it stands when they are asked for; an image is lost at the first step that is misclassified.

    rule: `best` has untargeted and targeted PGD, with the gradient the quantizers are set to pass; `worst` untargeted
        PGD with that of soft codes too, from which a chain trained on another gradient may hide.
    """

    def attack(targeted: bool, gradient: str | None = None) -> Attacked:
        def guide(x: Any) -> dict[str, Any]:
            with passing(defended.purifier.quantizers, gradient):
                logits = defended(x, training=False)
            return {"logits": logits, "features": logits}

        return lambda: adversaries.pgd(
            guide, images, labels, epsilon, steps, targeted, seed, min(_BATCH, len(images)), first=True
        )

    found = {"untargeted": attack(False), "targeted": attack(True)}
    return {**found, "soft": attack(False, "soft")} if rule == "worst" else found
