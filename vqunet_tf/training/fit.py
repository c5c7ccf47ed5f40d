"""From a configuration to a run folder: classifier, training adversaries, purifier; each stage resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vqunet_tf import backend, data, runs
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError, choice
from vqunet_tf.models import DefendedClassifier, VQUNet, classifiers
from vqunet_tf.models.vector_quantizer import GRADIENTS
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import checkpoints, crafting, devices, loop, selection, tensorboard, workers
from vqunet_tf.training.averaging import Averages
from vqunet_tf.training.batches import AdaptiveBatches, ClassifierBatches, GrayBoxBatches
from vqunet_tf.training.interruption import Interruption
from vqunet_tf.training.objectives import AdaptiveObjective, ClassifierObjective, GrayBoxObjective

OBJECTIVES = ("gray_box", "adaptive")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

_GRID = 8  # validation images that TensorBoard shows before and after

Say = Callable[[str], Any]


def train(config: Config, run: RunFolder, say: Say) -> None:
    """Trains whatever the run folder lacks; the same call again goes on where the last one stopped.

    SIGTERM and Ctrl-C save a checkpoint first and raise `errors.Interrupted`.
    With the strategy `multi_worker` every worker makes the same call, before TensorFlow has computed anything in its
    process and with a run folder that all share; the first worker writes, and one that is lost ends all others.

    Args:
        config: what to train, on which data.
        run: where everything is written.
        say: called with one line per finished stage, and per warning.
    """
    devices.start(config.training.strategy, say)
    with workers.loss_is_an_error(run.checkpoints):
        _train(config, run, say)


def _train(config: Config, run: RunFolder, say: Say) -> None:
    _refuse_impossible(config)
    if run.config.exists():
        run.create(config)  # refuses another configuration before any data are read
        if run.classifier.exists() and run.purifier.exists():
            say(f"nothing to do: {run.path} holds a finished run")
            _clean_up(run)
            return

    split, held_out = data.load(config.data, "train"), data.load(config.data, "validation")
    config = config.replace({"data.image_shape": split.images.shape[1:], "data.class_names": split.class_names})
    given = None
    if config.classifier.path and not run.classifier.exists():
        given = _given_classifier(config, held_out.images[:64], say)
    elif not config.classifier.path and not run.classifier.exists():
        _refuse_classifier(config)
    start = _given_start(config) if config.training.start and not run.purifier.exists() else None
    with workers.chief_first():
        workers.appears(run.config)
        run.create(config)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.training.precision)
    if config.training.deterministic:
        backend.make_deterministic()
    try:
        with Interruption() as interruption:
            _Stages(config, run, split, held_out, say, interruption).train(given, start)
    finally:
        keras.config.set_dtype_policy(policy)
    workers.wait()
    _clean_up(run)


def _clean_up(run: RunFolder) -> None:
    """Removes what a finished run does not need."""
    if devices.is_chief():
        checkpoints.remove(run.checkpoints)


def _refuse_impossible(config: Config) -> None:
    """Raises a `UserError` for settings with which nothing can be trained, before hours are spent on the rest."""
    training = config.training
    choice("objective", training.objective, OBJECTIVES)
    choice("precision", training.precision, PRECISIONS)
    # Not the identity: it lets vectors through unquantized, and nothing would learn to live with the codes.
    choice("configuration training.gradient", training.gradient, [name for name in GRADIENTS if name != "identity"])
    replicas = devices.replicas(training.strategy)
    for name in ("accumulate", "steps_per_execution"):
        if replicas > 1 and getattr(training, name) > 1:
            raise UserError(
                f"configuration training.{name}: expected 1 on {replicas} replicas, which Keras cannot combine with it, "
                f"got {getattr(training, name)}: train with --strategy=none, or leave it out"
            )
    try:
        VQUNet(**dataclasses.asdict(config.purifier), channels=1)
    except ValueError as error:
        raise UserError(f"configuration purifier: {error}") from None


def _refuse_classifier(config: Config) -> None:
    """Raises a `UserError` for a classifier that cannot be made for these images, or has no such feature layer."""
    settings, shape = config.classifier, config.data.image_shape
    model = classifiers.build(settings.name, shape, len(config.data.class_names), settings.widths, settings.blocks)
    classifiers.with_features(model, shape, settings.feature_layer)


def _given_classifier(config: Config, images: np.ndarray, say: Say) -> keras.Model:
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


def _given_start(config: Config) -> VQUNet:
    """The purifier to begin with, of the sizes that the configuration asks for."""
    purifier = runs.load_model(str(config.training.start))
    expected = {**dataclasses.asdict(config.purifier), "channels": config.data.image_shape[-1]}
    if not isinstance(purifier, VQUNet):
        raise UserError(f"training.start {config.training.start}: expected a VQUNet, got a {type(purifier).__name__}")
    wanted = VQUNet(**expected).get_config()
    found_there = purifier.get_config()
    for name in expected:
        found = found_there[name]
        if name not in ("commitment_cost", "decay") and wanted[name] != found:
            raise UserError(
                f"training.start {config.training.start}: its {name} is {found!r}, the configuration has {wanted[name]!r}: "
                f"give --set=purifier.{name}=... as it is there"
            )
    return purifier


class _Stages:
    """The stages of one run, with what all of them need."""

    def __init__(
        self, config: Config, run: RunFolder, split: data.Split, held_out: data.Split, say: Say, stop: Interruption
    ):
        self.config, self.run, self.split, self.held_out = config, run, split, held_out
        self.say, self.stop = say, stop
        self.replicas = devices.replicas(config.training.strategy)
        self.boards = tensorboard.available() and devices.is_chief()

    def train(self, given: keras.Model | None, start: VQUNet | None) -> None:
        """Writes classifier.keras and purifier.keras, unless they are there."""
        run, count = self.run, len(self.held_out.labels)
        if given is not None:
            _save(given, run.classifier)
        if not run.classifier.exists():
            self._train_classifier()
        classifier = run.load_classifier()
        self.say(f"classifier: {self._accuracy(classifier):.2%} of {count} validation images")
        if not run.purifier.exists():
            self._train_purifier(start)
        defended = DefendedClassifier(run.load_purifier(), classifier)
        self.say(f"purified:   {self._accuracy(defended):.2%} of the same images, none of them attacked")

    def _train_classifier(self) -> None:
        settings, training, shape = self.config.classifier, self.config.training, self.config.data.image_shape
        batches = ClassifierBatches(self.split.images, self.split.labels, settings, training.seed, self.replicas)
        keras.utils.set_random_seed(training.seed)
        with devices.scope(training.strategy):
            model = classifiers.build(
                settings.name, shape, len(self.split.class_names), settings.widths, settings.blocks
            )
            classifiers.whiten(model, self.split.images)
            stage = loop.Stage(
                name="classifier",
                objective=ClassifierObjective(model, settings.label_smoothing),
                trained=model,
                batches=batches,
                epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                warmup=0.2,
            )
            averages = self._averages(model, batches, settings.epochs)
            boards = [tensorboard.TensorBoard(self.run.tensorboard / stage.name, batches)] if self.boards else []
        with devices.normalised_together(model, training.strategy):
            stop = workers.agreed(self.stop)
            loop.run(stage, training, self.run, averages, after=boards, stop=stop, say=self.say)
        _save(model, self.run.classifier)

    def _train_purifier(self, start: VQUNet | None) -> None:
        config, training = self.config, self.config.training
        prepare: list[keras.callbacks.Callback] = []
        if training.objective == "adaptive":
            batches: Any = AdaptiveBatches(self.split.images, self.split.labels, training, config.attack, self.replicas)
        else:
            # Outside the scope of a strategy: in there every replica would craft and answer.
            make = crafting.Crafting(config, self.run, self.split.images, self._known_guide, self.stop)
            batches = GrayBoxBatches(*make(0), training, config.attack, self.replicas)
            if config.attack.refresh:
                prepare.append(crafting.Refresh(batches, config.attack.refresh, make))
        keras.utils.set_random_seed(training.seed)
        with devices.scope(training.strategy):
            purifier = VQUNet(**dataclasses.asdict(config.purifier), channels=config.data.image_shape[-1])
            if start is not None:
                purifier.set_weights(start.get_weights())
            purifier.set_gradient(training.gradient)
            classifier = self.run.load_classifier()
            classifier.trainable = False
            guide = self._guide(classifier)
            objective = (
                AdaptiveObjective(purifier, classifier, training)
                if training.objective == "adaptive"
                else GrayBoxObjective(purifier, guide, training)
            )
            stage = loop.Stage(
                name="purifier",
                objective=objective,
                trained=purifier,
                batches=batches,
                epochs=training.epochs,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                warmup=training.warmup,
                muon=training.muon,
            )
            averages = self._averages(purifier, batches, training.epochs)
            chosen = self._selection(averages, purifier, classifier, guide) if training.selection == "best" else None
            boards = []
            if self.boards:
                grid = self.held_out.images[:_GRID]
                boards = [tensorboard.PurifierBoard(self.run.tensorboard / stage.name, batches, purifier, grid)]
        stop = workers.agreed(self.stop)
        loop.run(stage, training, self.run, averages, chosen, before=prepare, after=boards, stop=stop, say=self.say)
        purifier.set_gradient("straight_through")
        _save(purifier, self.run.purifier)

    def _averages(self, model: keras.Model, batches: Any, epochs: int) -> Averages:
        training = self.config.training
        seen_at_once = min(training.steps_per_execution, batches.per_epoch)  # callbacks come after that many steps
        return Averages(model, training.average * batches.per_epoch * epochs / seen_at_once)

    def _guide(self, classifier: keras.Model) -> keras.Model:
        return classifiers.with_features(classifier, self.config.data.image_shape, self.config.classifier.feature_layer)

    def _known_guide(self) -> keras.Model:
        return self._guide(self.run.load_classifier())

    def _selection(
        self, averages: Averages, purifier: VQUNet, classifier: keras.Model, guide: keras.Model
    ) -> selection.Selection:
        """Scores with PGD at the first radius of the evaluation: of the classifier, or of the whole chain."""
        settings = self.config.training
        images = self.held_out.images[: settings.selection_examples]
        labels = self.held_out.labels[: settings.selection_examples]
        defended = DefendedClassifier(purifier, classifier)
        epsilon, steps = self.config.evaluation.epsilons[0], settings.selection_steps
        if settings.objective == "adaptive":
            attacked = selection.renewed(defended, images, labels, epsilon, steps, settings.seed)
        else:
            attacked = selection.fixed(guide, images, labels, epsilon, steps, settings.seed)
        return selection.Selection(averages, defended, images, labels, attacked)

    def _accuracy(self, model: keras.Model) -> float:
        logits = classifiers.logits_of(model, self.held_out.images)
        return float(np.mean(logits.argmax(axis=1) == self.held_out.labels))


def _save(model: keras.Model, path: Path) -> None:
    """Writes a model; of several workers the chief does, and the others wait until it has."""
    with workers.chief_first():
        if devices.is_chief():
            runs.save_model(model, path)
        workers.appears(path)
