"""Fits the adversarial score of a run on its validation images, against gray-box adversaries made for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from serving import score as scoring
from vqunet_tf import data
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers
from vqunet_tf.pixels import to_unit
from vqunet_tf.training import adversaries

SEED = 0
MOST_CLEAN = 1000  # validation images that set the threshold
MOST_ATTACKED = 64  # of those, how many are attacked for the fit, and as many others for the detection rate
LEAST = 40  # below it a rate of 5% is two images at most: not calibrated
PGD_STEPS = 10
_BATCH = 32


def calibrate(purifier: keras.Model, classifier: keras.Model, split: data.Split, config: Config) -> scoring.Score:
    """Returns the score of a defended model, with its threshold and what it detects.

    purifier: images [B, H, W, C] in [0, 1] → images; classifier: images → logits.
    split: validation images; at least 40, of which up to 1,000 are used, 128 of them attacked.
    config: the run's; `attack` says what is crafted for the fit, `evaluation.epsilons[0]` the radius of PGD.

    The fit sees all clean images and crafted versions of some. Detection is measured with PGD on other images, half of
    them pushed away from their label, half towards another class.
    """
    images, labels = split.images[:MOST_CLEAN], split.labels[:MOST_CLEAN]
    if len(images) < LEAST:
        raise UserError(f"{len(images)} validation images: expected at least {LEAST} to calibrate a score")
    count = min(MOST_ATTACKED, len(images) // 2)
    guide = classifiers.with_features(classifier, images.shape[1:])
    attack = dataclasses.replace(config.attack, batch_size=min(_BATCH, count))
    crafted = adversaries.craft(guide, images[:count], attack, SEED)
    signs = _Signs(purifier, classifier)
    clean = signs(images)
    fitted = scoring.fit(clean, signs(crafted))

    epsilon = config.evaluation.epsilons[0]
    others = slice(count, 2 * count)
    found = {}
    for kind in ("untargeted", "targeted"):
        attacked = adversaries.pgd(
            guide, images[others], labels[others], epsilon, PGD_STEPS, kind == "targeted", SEED, min(_BATCH, count)
        )
        found[kind] = _share_above(fitted, signs(attacked))
    report = {
        "false_alarms": {"allowed": scoring.FALSE_ALARMS, "measured": _share_above(fitted, clean), "n": len(images)},
        "detected": {
            "threat_model": "gray_box",
            "attack": "pgd",
            "norm": "linf",
            "epsilon": epsilon,
            "steps": PGD_STEPS,
            **found,
            "n": count,
        },
        "fitted_on": {"split": "validation", "clean": len(images), "crafted": count, "epsilon": config.attack.epsilon},
        "seed": SEED,
    }
    return dataclasses.replace(fitted, report=report)


def _share_above(score: scoring.Score, signs: np.ndarray) -> float:
    """Share of images whose score lies above the threshold."""
    return float(np.mean(score(tf.constant(signs)).numpy() > score.threshold))


class _Signs:
    """The signs [N, 3] of uint8 images [N, H, W, C], a batch at a time."""

    def __init__(self, purifier: keras.Model, classifier: keras.Model):
        purify = scoring.with_quantisation(purifier)

        def look(images: Any) -> Any:
            purified, quantisation = purify(images)
            before, after = (classifier(kept, training=False) for kept in (images, purified))
            return scoring.signs(images, purified, quantisation, before, after)

        self._look = tf.function(look, reduce_retracing=True)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), _BATCH)
        return np.concatenate([self._look(tf.constant(to_unit(images[i : i + _BATCH]))).numpy() for i in starts])
