"""What a run is asked for and given, checked before anything is written and hours are spent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vqunet_tf import runs
from vqunet_tf.config import Config, PurifierConfig, TrainingConfig
from vqunet_tf.errors import UserError, choice
from vqunet_tf.models import VQUNet, classifiers
from vqunet_tf.models.vector_quantizer import GRADIENTS, VectorQuantizer
from vqunet_tf.recipes import UNGATED
from vqunet_tf.training import devices

OBJECTIVES = ("gray_box", "adaptive")
PRECISIONS = ("float32", "mixed_bfloat16")  # in float16 gradients of images vanish

_CODES = ("num_embeddings", "embedding_dim", "groups")
_HEAD = ("classes", "certainty")  # layers
_WITHOUT = " ".join(f"--set={key}={json.dumps(value)}" for key, value in UNGATED.items())


def refuse_impossible(config: Config) -> None:
    """Raises a `UserError` for settings with which nothing can be trained, before hours are spent on the rest."""
    training = config.training
    choice("objective", training.objective, OBJECTIVES)
    choice("precision", training.precision, PRECISIONS)
    quantized = [name for name in GRADIENTS if name != "identity"]
    choice("configuration training.gradient", training.gradient, quantized)
    for name in training.attack_gradients:
        choice("configuration training.attack_gradients", name, GRADIENTS)
    if training.objective == "adaptive" and config.purifier.quantize and set(training.attack_gradients) == {"identity"}:
        raise UserError(
            "configuration training.attack_gradients: expected another beside identity, which switches the quantizers off: "
            f"nothing would learn to live with the codes; add one of {', '.join(quantized)}"
        )
    replicas = devices.replicas(training.strategy)
    if training.objective == "adaptive" and training.batch_size // replicas < len(training.attack_gradients):
        raise UserError(
            f"configuration training.batch_size: expected an image for each of {len(training.attack_gradients)} attack_gradients on "
            f"each of {replicas} replicas, got {training.batch_size}"
        )
    for name in ("accumulate", "steps_per_execution"):
        if replicas > 1 and getattr(training, name) > 1:
            raise UserError(
                f"configuration training.{name}: expected 1 on {replicas} replicas, which Keras cannot combine with it, "
                f"got {getattr(training, name)}: train with --strategy=none, or leave it out"
            )
    _refuse_encoder(config)
    _refuse_certainty(config)
    alone = (training.gate_epochs and config.purifier.gated) or training.certainty_epochs
    if not training.epochs and not (alone and training.start):
        raise UserError(
            "configuration training.epochs: expected at least 1 where no gate or head alone goes on from a purifier, got 0: set it, or "
            "training.start with training.gate_epochs and purifier.gated or with training.certainty_epochs and purifier.classes"
        )
    if config.purifier.gated:
        _refuse_gate(training)
    elif training.gate_epochs:
        raise UserError(
            f"configuration training.gate_epochs: expected 0 for a purifier without a gate, got {training.gate_epochs}: set it to 0"
            + (", or purifier.gated" if training.objective == "gray_box" else "")
            + f" (no gate at all: {_WITHOUT})"
        )
    try:
        VQUNet(**dataclasses.asdict(config.purifier), channels=1)
    except ValueError as error:
        raise UserError(f"configuration purifier: {error}") from None


def _refuse_encoder(config: Config) -> None:
    training = config.training
    for name in ("cutout", "encoder_guidance"):
        value = getattr(training, name)
        alone = training.encoder_epochs or (name == "cutout" and training.certainty_epochs)
        if value and not (alone and training.objective == "gray_box"):
            raise UserError(
                f"configuration training.{name}: expected 0 where no encoder learns alone from training adversaries, got {value:g}: "
                f"set training.encoder_epochs{' or certainty_epochs' if name == 'cutout' else ''}, with the objective gray_box"
            )
    if training.freeze_encoder and not (training.encoder_epochs or training.start):
        raise UserError(
            "configuration training.freeze_encoder: expected training.encoder_epochs or training.start, which give an encoder that is "
            "worth keeping, got neither"
        )


def _refuse_certainty(config: Config) -> None:
    """Until it has learned a head is certain of nothing, and after the bottleneck has learned more, of what it no longer knows."""
    classes, epochs = config.purifier.classes, config.training.certainty_epochs
    if epochs and not classes:
        raise UserError(
            f"configuration training.certainty_epochs: expected 0 for a purifier without a head, got {epochs}: "
            "set it to 0, or purifier.classes"
        )
    if classes and not epochs and (config.training.epochs or not config.training.start):
        raise UserError(
            f"configuration training.certainty_epochs: expected at least 1 for a purifier with a head (purifier.classes "
            f"is {classes}), got 0"
        )


def _refuse_gate(training: TrainingConfig) -> None:
    """A gate learns to tell adversaries from what is none: it needs both, and to know which is which."""
    if training.objective != "gray_box":
        raise UserError(
            f"configuration purifier.gated: expected false for the objective {training.objective}, which shows no clean images, got true: "
            f"give {_WITHOUT}"
        )
    if training.loop_epsilon:
        raise UserError(
            f"configuration training.loop_epsilon: expected 0 for a gated purifier, since it would move the clean images too, got "
            f"{training.loop_epsilon:g}"
        )
    if not (training.gate_weight or training.gate_epochs or training.start):
        raise UserError(
            "configuration training.gate_weight: expected more than 0 for a gated purifier, whose gate learns from nothing else, got 0 "
            "without training.start, whose gate could stay"
        )
    if not (training.adversarial and training.clean + training.noisy):
        raise UserError(
            "configuration training.adversarial, clean, noisy: expected adversaries and others for a gate to tell apart, got shares of "
            f"{training.adversarial:g}, {training.clean:g} and {training.noisy:g}"
        )


def refuse_images(config: Config) -> None:
    """Raises a `UserError` for images that are too small for the purifier, or have more or fewer classes than its head."""
    known, classes = len(config.data.class_names), config.purifier.classes
    if classes not in (0, known):
        raise UserError(
            f"configuration purifier.classes: expected the number of classes of these images, {known}, got {classes}: "
            f"give --set=purifier.classes={known}"
        )
    settings, shape = config.purifier, config.data.image_shape
    multiple = settings.stem * 2 ** (len(settings.widths) - 1)
    least = max(8, (multiple + 1) // 2)
    if min(shape[:2]) < least:
        raise UserError(
            f"expected images of at least {least}x{least} pixels for a purifier of {len(settings.widths)} levels and stem "
            f"{settings.stem}, got {shape[0]}x{shape[1]}: give larger images, or fewer purifier.widths"
        )


def refuse_classifier(config: Config) -> None:
    """Raises a `UserError` for a classifier that cannot be made for these images, or has no such feature layer."""
    settings, shape = config.classifier, config.data.image_shape
    model = classifiers.build(settings.name, shape, len(config.data.class_names), settings.widths, settings.blocks)
    classifiers.with_features(model, shape, settings.feature_layer)


def classifier_of(config: Config, images: np.ndarray, say: Callable[[str], Any]) -> keras.Model:
    """The user's own classifier, checked against the data before anything is written."""
    settings = config.classifier
    classifier = runs.load_model(str(settings.path))
    shape, classes = config.data.image_shape, len(config.data.class_names)
    classifiers.check(classifier, shape, classes, images, str(settings.path), settings.from_probabilities)
    if settings.from_probabilities:
        classifier = classifiers.with_logits(classifier, shape)
        say(
            "warning: the logarithms of the classifier's probabilities stand for its logits; where a probability rounds "
            "to 1 its gradient is gone: give a classifier without the last softmax to be attacked honestly"
        )
    classifiers.with_features(classifier, shape, settings.feature_layer)
    return classifier


def start_of(
    path: Path,
    settings: PurifierConfig,
    channels: int,
    certainty_epochs: int = 0,
    encoder_epochs: int = 0,
    say: Callable[[str], None] = print,
) -> VQUNet:
    """The purifier to begin with, of the sizes that are asked for.

    With `certainty_epochs` it may lack the head that is asked for; one that is not asked for is left out, which `say` hears of.
    Code books may be of another size, if as many numbers pass them: then, and where the encoder goes on learning first, for
    `encoder_epochs`, they are placed anew by the first batch.
    """
    purifier = runs.load_model(path)
    expected = {**dataclasses.asdict(settings), "channels": channels}
    if not isinstance(purifier, VQUNet):
        raise UserError(f"training.start {path}: expected a VQUNet, got a {type(purifier).__name__}")
    wanted = VQUNet(**expected)
    asked, there = wanted.get_config(), purifier.get_config()
    for name in expected:
        if (
            name not in ("commitment_cost", "decay", "pixel_share", "tones", "classes", *_CODES)
            and asked[name] != there[name]
        ):
            raise UserError(
                f"training.start {path}: its {name} is {there[name]!r}, the configuration has {asked[name]!r}: "
                f"give --set=purifier.{name}={json.dumps(there[name], separators=(',', ':'))}"
            )
    if asked["classes"] not in (0, there["classes"]) and not certainty_epochs:
        raise UserError(
            f"training.start {path}: expected a head for {asked['classes']} classes where none is to learn "
            f"(training.certainty_epochs is 0), its purifier.classes is {there['classes']}: give --set=training.certainty_epochs=3"
        )
    if there["classes"] and not asked["classes"]:
        say(f"warning: {path} has a head on its bottleneck, which is left out: purifier.classes is 0")
    same = not encoder_epochs and all(asked[name] == there[name] for name in _CODES)
    numbers, known = (
        tuple(dim * groups for dim, groups in zip(config["embedding_dim"], config["groups"], strict=True))
        for config in (asked, there)
    )
    if numbers != known:
        raise UserError(
            f"training.start {path}: {known} numbers pass its code books at a place of each level (embedding_dim times groups), "
            f"the configuration has {numbers}: give --set=purifier.embedding_dim=... and purifier.groups=... with the same products"
        )
    layers = {layer.name: layer for layer in purifier.graph.layers}
    for layer in wanted.graph.layers:  # one by one: how many of the pixels are shared moves the order of the weights
        if layer.name in _HEAD and asked["classes"] != there["classes"]:
            continue  # a head of its own, which has yet to learn
        if layer.weights and (same or not isinstance(layer, VectorQuantizer)):
            layer.set_weights(layers[layer.name].get_weights())
    return wanted
