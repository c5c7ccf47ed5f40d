"""The bench an evaluation works on: the victims, the images, and what one attack did to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf.attacks import Attack
from vqunet_tf.attacks.base import batches
from vqunet_tf.defenses import Purify
from vqunet_tf.evaluation.rows import CLEAN, Outcome
from vqunet_tf.threat import Threat, ThreatModel

# Called with what is running, the work done and the work in all; one image and one gradient step are 1.
Progress = Callable[[str, int, int], Any]


class Chain:
    """A victim: the classifier behind one defence, as one function of tensors; equal only to itself."""

    def __init__(self, classifier: keras.Model, purify: Purify):
        self.classifier = classifier
        self.purify = purify
        self._compiled = tf.function(self.__call__)

    def __call__(self, images: Any) -> Any:
        return self.classifier(self.purify(images), training=False)

    def logits(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Logits `[N,K]` float32 of images `[N,H,W,C]`, a batch at a time."""
        parts = [
            np.asarray(self._compiled(tf.constant(images[index])), np.float32)[:count]
            for index, count in batches(len(images), batch_size)
        ]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Crafted:
    """What an attack made: images `[N,H,W,C]` float32, and the seconds it took."""

    attack: Attack
    images: np.ndarray
    seconds: float


class Bench:
    """Images, labels and victims by name of their defence; every number of an evaluation is measured here.

    images: `[N,H,W,C]` float32 in [0,1]. labels: `[N]` int32. keep: how many adversaries an outcome keeps.
    total: the work in all, for the progress bar.
    """

    def __init__(
        self,
        victims: dict[str, Chain],
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        keep: int,
        progress: Progress | None = None,
        total: int = 0,
    ):
        self.victims, self.images, self.labels = victims, images, labels
        self.batch_size, self.seed, self.keep = batch_size, seed, keep
        self.progress, self.total, self.done = progress, total, 0
        self.clean_logits = {name: victim.logits(images, batch_size) for name, victim in victims.items()}

    def clean(self, defense: str, model: ThreatModel, norm: str) -> Outcome:
        """The outcome of no attack."""
        logits, threat = self.clean_logits[defense], Threat(norm, 0.0)
        return Outcome(defense, CLEAN, threat, 0, model, self._correct(logits), 0.0, 0.0, self.images[: self.keep])

    def craft(self, attack: Attack, defense: str, label: str) -> Crafted:
        """Attacks one victim; `label` says on the progress bar what is running."""

        def on_batch(count: int) -> None:
            self.done += count * attack.steps
            if self.progress is not None:
                self.progress(f"{label} {attack.name} {attack.threat.epsilon:.4g}", self.done, self.total)

        started = time.perf_counter()
        adversarial = attack(
            self.victims[defense],
            self.images,
            self.labels,
            batch_size=self.batch_size,
            seed=self.seed,
            on_batch=on_batch,
        )
        return Crafted(attack, adversarial, time.perf_counter() - started)

    def score(self, crafted: Crafted, defense: str, model: ThreatModel) -> Outcome:
        """Shows crafted images to one victim, whomever they were made for."""
        started = time.perf_counter()
        logits = self.victims[defense].logits(crafted.images, self.batch_size)
        attack = crafted.attack
        return Outcome(
            defense=defense,
            attack=attack.name,
            threat=attack.threat,
            steps=attack.steps,
            threat_model=model,
            correct=self._correct(logits),
            distance=float(np.max(attack.threat.distance(crafted.images, self.images))),
            seconds=crafted.seconds + time.perf_counter() - started,
            adversarial=crafted.images[: self.keep].copy(),
        )

    def _correct(self, logits: np.ndarray) -> np.ndarray:
        # Logits that are not numbers are no answer: never a success of the defence.
        return (logits.argmax(axis=1) == self.labels) & np.isfinite(logits).all(axis=1)
