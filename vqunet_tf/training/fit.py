"""From a configuration to a run folder: classifier, training adversaries, purifier; each stage resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from tqdm import tqdm

from vqunet_tf import data, runs
from vqunet_tf.config import Config, PurifierConfig
from vqunet_tf.errors import UserError, choice
from vqunet_tf.models import DefendedClassifier, VQUNet, classifiers
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, callbacks, devices
from vqunet_tf.training.batches import Batches, ClassifierBatches, PurifierBatches
from vqunet_tf.training.objectives import ClassifierObjective, GrayBoxObjective

OBJECTIVES = ("gray_box",)
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def train(config: Config, run: RunFolder, say: Callable[[str], None]) -> None:
    """Trains whatever the run folder lacks; the same call again goes on where the last one stopped.

    Args:
        config: what to train, on which data.
        run: where everything is written.
        say: called with one line per finished stage.
    """
    choice("objective", config.training.objective, OBJECTIVES)
    choice("precision", config.training.precision, PRECISIONS)
    choice("strategy", config.training.strategy, devices.STRATEGIES)
    _refuse_impossible(config.purifier)
    if run.config.exists():
        run.create(config)  # refuses another configuration before any data are read
        if run.classifier.exists() and run.purifier.exists():
            say(f"nothing to do: {run.path} holds a finished run")
            return

    train_split = data.load(config.data, "train")
    validation = data.load(config.data, "validation")
    config = config.replace(
        {"data.image_shape": train_split.images.shape[1:], "data.class_names": train_split.class_names}
    )
    given = None
    if config.classifier.path and not run.classifier.exists():
        given = _given_classifier(config, validation.images[:64])
    run.create(config)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.training.precision)
    try:
        _train_stages(config, run, given, train_split, validation, say)
    finally:
        keras.config.set_dtype_policy(policy)
    callbacks.remove_checkpoints(run.checkpoints)


def _refuse_impossible(settings: PurifierConfig) -> None:
    """Raises a `UserError` for settings of which no purifier can be made, before hours are spent on the rest."""
    try:
        VQUNet(**dataclasses.asdict(settings), channels=1)
    except ValueError as error:
        raise UserError(f"configuration purifier: {error}") from None


def _given_classifier(config: Config, images: np.ndarray) -> keras.Model:
    """The user's own classifier, checked against the data before anything is written."""
    path = str(config.classifier.path)
    classifier = runs.load_model(path)
    classifiers.check(classifier, config.data.image_shape, len(config.data.class_names), images, source=path)
    return classifier


def _train_stages(
    config: Config,
    run: RunFolder,
    given: keras.Model | None,
    train_split: data.Split,
    validation: data.Split,
    say: Callable[[str], None],
) -> None:
    if given is not None:
        runs.save_model(given, run.classifier)
    if not run.classifier.exists():
        _train_classifier(config, run, train_split)
    classifier = run.load_classifier()
    say(f"classifier: {_accuracy(classifier, validation):.2%} of {len(validation.labels)} validation images")
    if not run.purifier.exists():
        adversarial = _adversaries(config, run, classifier, train_split.images)
        # Outside the scope of a strategy: in there Keras gives the answers of every replica.
        logits = classifiers.logits_of(classifier, train_split.images)
        _train_purifier(config, run, train_split.images, logits, adversarial)
    defended = DefendedClassifier(run.load_purifier(), classifier)
    say(f"purified:   {_accuracy(defended, validation):.2%} of the same images, none of them attacked")


def _train_classifier(config: Config, run: RunFolder, split: data.Split) -> None:
    settings, training = config.classifier, config.training
    replicas = devices.replicas(training.strategy)
    batches = ClassifierBatches(split.images, split.labels, settings, training.seed, replicas)
    shape, classes = config.data.image_shape, len(config.data.class_names)
    keras.utils.set_random_seed(training.seed)
    with devices.scope(training.strategy):
        model = classifiers.build(settings.name, shape, classes, settings.widths, settings.blocks)
        objective = ClassifierObjective(model, settings.label_smoothing)
        schedule = _one_cycle(settings.learning_rate, settings.epochs * len(batches), warmup=0.2)
        _fit("classifier", objective, batches, settings.epochs, schedule, settings.weight_decay, config, run)
    runs.save_model(model, run.classifier)


def _adversaries(config: Config, run: RunFolder, classifier: keras.Model, images: np.ndarray) -> np.ndarray:
    """The training adversaries, crafted once and kept with the checkpoints."""
    path = run.checkpoints / "adversaries.npy"
    if path.exists():
        return np.load(path)
    total = config.attack.copies * len(images)
    with tqdm(desc="adversaries", total=total, unit="img", unit_scale=True, dynamic_ncols=True) as bar:
        crafted = adversaries.craft(classifier, images, config.attack, config.training.seed, bar.update)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("part.adversaries.npy")
    np.save(beside, crafted)
    beside.replace(path)
    return crafted


def _train_purifier(
    config: Config, run: RunFolder, images: np.ndarray, logits: np.ndarray, adversarial: np.ndarray
) -> None:
    settings = config.training
    replicas = devices.replicas(settings.strategy)
    batches = PurifierBatches(images, logits, adversarial, settings, config.attack, replicas)
    keras.utils.set_random_seed(settings.seed)
    with devices.scope(settings.strategy):
        purifier = VQUNet(**dataclasses.asdict(config.purifier), channels=config.data.image_shape[-1])
        objective = GrayBoxObjective(purifier, run.load_classifier(), settings)
        schedule = _one_cycle(settings.learning_rate, settings.epochs * len(batches), settings.warmup)
        usage = callbacks.Usage(purifier)
        _fit("purifier", objective, batches, settings.epochs, schedule, settings.weight_decay, config, run, usage)
    runs.save_model(purifier, run.purifier)


def _fit(
    stage: str,
    objective: keras.Model,
    batches: Batches,
    epochs: int,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    weight_decay: float,
    config: Config,
    run: RunFolder,
    *more: keras.callbacks.Callback,
) -> None:
    """Runs `fit` from the last checkpoint to the last epoch, with everything a person wants to see."""
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    objective.compile(optimizer=optimizer, jit_compile=config.training.jit_compile)
    checkpoint = callbacks.Checkpoint(run.checkpoints, stage)
    done = checkpoint.restore(objective)
    objective.fit(
        batches,
        initial_epoch=done,
        epochs=epochs,
        verbose=0,
        shuffle=False,  # the batches are in random order themselves, by seed and epoch
        callbacks=[
            callbacks.Epochs(batches),
            *more,
            callbacks.MetricsFile(run.metrics, stage, done),
            callbacks.StopOnNaN(),
            checkpoint,
            callbacks.Progress(stage, batches.batch_size, len(batches), epochs, done),
        ],
    )


def _one_cycle(peak: float, steps: int, warmup: float) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up from a hundredth of the peak over a share of the steps, then a cosine to zero."""
    rising = max(1, int(warmup * steps))
    return keras.optimizers.schedules.CosineDecay(
        peak / 100, max(1, steps - rising), alpha=0.0, warmup_target=peak, warmup_steps=rising
    )


def _accuracy(model: keras.Model, split: data.Split) -> float:
    return float(np.mean(classifiers.logits_of(model, split.images).argmax(axis=1) == split.labels))
