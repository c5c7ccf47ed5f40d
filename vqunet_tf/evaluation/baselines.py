"""Trained ablations that lie in another run folder, for released weights that come without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from vqunet_tf.config import Config
from vqunet_tf.defenses.ablations import training_command
from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder, difference

_SAME_LOGITS = 0.1  # released as float16 the classifier of cifar10 moved them by 0.04


def beside(path: str, own: RunFolder, config: Config, classifier: keras.Model, images: np.ndarray) -> RunFolder:
    """Returns the run folder `path` if its ablations may stand beside the purifier of `own`.

    config, classifier: of `own`. images: a few, uint8 [B, H, W, C].

    Raises a `UserError` if there are none, or if they learned something else: with other settings, or for another classifier.
    """
    other = RunFolder(path)
    names = trained(other)
    advice = f"train them with {training_command(own, names or list(ABLATIONS), path)}"
    if not other.config.exists() or not names:
        wanted = ", ".join(map(str, map(other.baseline, ABLATIONS)))
        raise UserError(f"--baselines_dir={path}: expected one of {wanted}, got none: {advice}")
    differs = difference(other.load_config(), _alike(config, other.load_config()))
    if differs:
        raise UserError(f"--baselines_dir={path}: expected the settings of {own.path}, but {differs}: {advice}")
    gap = np.abs(
        classifiers.logits_of(classifier, images) - classifiers.logits_of(other.load_classifier(), images)
    ).max()
    if not gap <= _SAME_LOGITS:
        raise UserError(
            f"--baselines_dir={path}: expected the classifier of {own.path}, but logits differ by up to {gap:.3g}: {advice}"
        )
    return other


def trained(folder: RunFolder) -> list[str]:
    """The ablations that lie in a run folder."""
    return [name for name in ABLATIONS if folder.baseline(name).exists()]


def note(names: Sequence[str], own: RunFolder, path: str) -> str:
    """What a reader of the report must know of ablations that were trained elsewhere."""
    command = training_command(own, names, path)
    return f"{', '.join(names)}: trained in another run with the same settings, for the same classifier (`{command}`)"


def _alike(config: Config, other: Config) -> Config:
    """The configuration as the other run may have it: nothing that purifiers learn from, or are chosen by, is let go."""
    classifier = dataclasses.replace(other.classifier, feature_layer=config.classifier.feature_layer)
    chosen_at = (config.evaluation.epsilons[0], *other.evaluation.epsilons[1:])
    evaluation = dataclasses.replace(other.evaluation, epsilons=chosen_at)
    return dataclasses.replace(config, classifier=classifier, evaluation=evaluation)
