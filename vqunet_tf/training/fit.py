"""From a configuration to a run folder: classifier, training adversaries, purifier, baselines; each stage resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vqunet_tf import backend, data, runs
from vqunet_tf.config import Config, PurifierConfig
from vqunet_tf.errors import UserError, choice
from vqunet_tf.models import DefendedClassifier, VQUNet, classifiers
from vqunet_tf.recipes import ABLATIONS, ablation
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import (
    certainty,
    checkpoints,
    crafting,
    devices,
    folder,
    gate,
    given,
    loop,
    selection,
    tensorboard,
    workers,
)
from vqunet_tf.training.averaging import Averages
from vqunet_tf.training.batches import AdaptiveBatches, ClassifierBatches, EncoderBatches, GrayBoxBatches
from vqunet_tf.training.encoder import EncoderObjective, adopt, freeze
from vqunet_tf.training.interruption import Interruption
from vqunet_tf.training.objectives import (
    AdaptiveObjective,
    ClassifierObjective,
    GrayBoxObjective,
    new_head,
)

_GRID = 8  # validation images that TensorBoard shows before and after

Say = Callable[[str], Any]


def train(config: Config, run: RunFolder, say: Say, baselines: Sequence[str] = ()) -> None:
    """Trains whatever the run folder lacks; the same call again goes on where the last one stopped.

    SIGTERM and Ctrl-C save a checkpoint first and raise `errors.Interrupted`.
    With the strategy `multi_worker` every worker makes the same call, before TensorFlow has computed anything in its
    process and with a run folder that all share; the first worker writes, and one that is lost ends all others.

    Args:
        config: what to train, on which data.
        run: where everything is written.
        say: called with one line per finished stage, and per warning.
        baselines: ablations to train beside the purifier, by name: on the same data and training adversaries, for the
            same objective and as many epochs.
    """
    for name in baselines:
        choice("baseline", name, ABLATIONS)
    devices.start(config.training.strategy, say)
    with workers.loss_is_an_error(run.checkpoints):
        _train(config, run, say, tuple(dict.fromkeys(baselines)))


def _train(config: Config, run: RunFolder, say: Say, baselines: tuple[str, ...]) -> None:
    given.refuse_impossible(config)
    if baselines and not config.training.epochs:
        raise UserError(
            f"configuration training.epochs: expected at least 1 to train {', '.join(baselines)}, got 0: set it, or leave --baselines out"
        )
    if run.config.exists():
        run.create(config)  # refuses another configuration before any data are read
        if all(path.exists() for path in (run.classifier, run.purifier, *map(run.baseline, baselines))):
            say(f"nothing to do: {run.path} holds a finished run")
            _clean_up(run)
            return

    split, held_out = data.load(config.data, "train"), data.load(config.data, "validation")
    config = config.replace({"data.image_shape": split.images.shape[1:], "data.class_names": split.class_names})
    given.refuse_images(config)
    classifier = None
    if config.classifier.path and not run.classifier.exists():
        classifier = given.classifier_of(config, held_out.images[:64], say)
    elif not config.classifier.path and not run.classifier.exists():
        given.refuse_classifier(config)
    missing = _missing(config, run, baselines, say)
    with workers.chief_first():
        workers.appears(run.config)
        run.create(config)
    if config.training.deterministic:
        backend.make_deterministic()
    with folder.alone(run), Interruption() as interruption:
        folder.same_images(run, split)
        _Stages(config, run, split, held_out, say, interruption).train(classifier, missing, baselines)
    workers.wait()
    _clean_up(run)


def _clean_up(run: RunFolder) -> None:
    """Removes what finished stages do not need; a baseline that was interrupted can still go on."""
    if devices.is_chief():
        checkpoints.remove(run.checkpoints, unfinished=[name for name in ABLATIONS if not run.baseline(name).exists()])


@dataclasses.dataclass(frozen=True)
class _Purifier:
    """The purifier of the run, or an ablation of it: where it goes, its sizes, the weights it begins with if not random ones."""

    name: str
    path: Path
    settings: PurifierConfig
    start: VQUNet | None


def _missing(config: Config, run: RunFolder, baselines: Sequence[str], say: Say) -> list[_Purifier]:
    """What the folder lacks of the purifier and these baselines; all that they are to begin with is loaded."""
    found, begin = [], config.training.start
    for name in ("purifier", *baselines):
        path = run.baseline(name) if name in ABLATIONS else run.purifier
        if path.exists():
            continue
        settings = ablation(name, config.purifier) if name in ABLATIONS else config.purifier
        source = Path(begin) if begin else None
        if source and name in ABLATIONS:
            source = RunFolder(source.parent).baseline(name)
            if not source.exists():
                say(f"warning: {name} begins with random weights, the purifier with {begin}: {source} is not there")
                source = None
        start = (
            given.start_of(
                source,
                settings,
                config.data.image_shape[-1],
                config.training.certainty_epochs,
                config.training.encoder_epochs,
                say,
            )
            if source
            else None
        )
        found.append(_Purifier(name, path, settings, start))
    return found


class _Stages:
    """The stages of one run, with what all of them need."""

    def __init__(
        self, config: Config, run: RunFolder, split: data.Split, held_out: data.Split, say: Say, stop: Interruption
    ):
        self.config, self.run, self.split, self.held_out = config, run, split, held_out
        self.say, self.stop = say, stop
        self.replicas = devices.replicas(config.training.strategy)
        self.boards = tensorboard.available() and devices.is_chief()

    def train(self, own: keras.Model | None, missing: Sequence[_Purifier], baselines: Sequence[str]) -> None:
        """Writes classifier.keras, unless it is there, and what is missing; `own` is the classifier that the user gave."""
        run, count = self.run, len(self.held_out.labels)
        if own is not None:
            _save(own, run.classifier)
        if not run.classifier.exists():
            self._train_classifier()
        classifier = run.load_classifier()
        self.say(f"classifier: {self._accuracy(classifier):.2%} of {count} validation images")
        todo = {purifier.name: purifier for purifier in missing}
        for name in ("purifier", *baselines):
            if name in todo:
                self._train_purifier(todo[name])
            trained, label = (run.load_baseline(name), name) if name in ABLATIONS else (run.load_purifier(), "purified")
            accuracy = self._accuracy(DefendedClassifier(trained, classifier))
            self.say(f"{label + ':':<11} {accuracy:.2%} of the same images, none of them attacked")

    def _train_classifier(self) -> None:
        settings, training, shape = self.config.classifier, self.config.training, self.config.data.image_shape
        batches = ClassifierBatches(self.split.images, self.split.labels, settings, training.seed, self.replicas)
        keras.utils.set_random_seed(training.seed)

        def build() -> keras.Model:
            return classifiers.build(
                settings.name, shape, len(self.split.class_names), settings.widths, settings.blocks
            )

        with devices.scope(training.strategy):
            with devices.precision(training.precision):
                model = build()
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
                muon=settings.muon,
            )
            averages = self._averages(model, batches, settings.epochs)
            boards = [tensorboard.TensorBoard(self.run.tensorboard / stage.name, batches)] if self.boards else []
        with devices.normalised_together(model, training.strategy):
            stop = workers.agreed(self.stop)
            loop.run(stage, training, self.run, averages, after=boards, stop=stop, say=self.say)
        _save(_in_float32(build, model), self.run.classifier)

    def _train_purifier(self, wanted: _Purifier) -> None:
        config, training = self.config, self.config.training
        prepare: list[keras.callbacks.Callback] = []
        nearest = first = None
        if training.objective == "adaptive":
            warmed = dataclasses.replace(training, epsilon_warmup=0.0) if training.encoder_epochs else training
            batches: Any = AdaptiveBatches(self.split.images, self.split.labels, warmed, config.attack, self.replicas)
        else:
            # Outside the scope of a strategy: in there every replica would craft and answer.
            make = crafting.Crafting(
                config, self.run, self.split.images, self._known_guide, self.stop, self._exact_guide
            )
            views, adversarial = make(0)
            learns_certainty = wanted.settings.classes > 0 and training.certainty_epochs > 0
            labels = self.split.labels if training.head_weight or learns_certainty else None
            answers = make.answers(views)
            if training.encoder_guidance and answers is None:
                raise UserError(
                    f"configuration training.encoder_guidance: expected 0 where the classifier's answers to "
                    f"{config.attack.copies} copies of {len(views.images)} images take more than a gibibyte, got "
                    f"{training.encoder_guidance:g}: set it to 0, or attack.copies lower, for a new run"
                )
            learns_gate = wanted.settings.gated and training.gate_epochs > 0
            # Before the seed is set: a resumed run finds them, and loads no classifier here.
            if training.nearest or learns_gate:
                nearest = make.nearest(views)
            mixed = wanted.settings.pixel_share > 0
            shown = nearest if training.nearest else None
            given_ = (views, adversarial, training, config.attack, self.replicas, answers, labels, shown, mixed)
            batches = GrayBoxBatches(*given_)
            if config.attack.refresh:
                first = GrayBoxBatches(*given_) if learns_certainty else None  # a resumed run has no later ones
                prepare.append(crafting.Refresh(batches, config.attack.refresh, make))
        keras.utils.set_random_seed(training.seed)

        def build() -> VQUNet:
            return VQUNet(**dataclasses.asdict(wanted.settings), channels=config.data.image_shape[-1])

        with devices.scope(training.strategy):
            with devices.precision(training.precision):
                purifier = build()
            if wanted.start is not None:
                purifier.set_weights(wanted.start.get_weights())
            purifier.set_gradient(training.gradient)
            if purifier.classes:
                purifier.graph.get_layer("classes").trainable = False  # until its own epochs
                if training.epochs:
                    certainty.forget(purifier)  # one of the start's would close what the decoder is to learn
        head = None
        if training.freeze_encoder and wanted.name in ABLATIONS:
            self._adopt(purifier)  # the same network, which stays as it is: no need to train it again
        elif training.encoder_epochs:
            head = self._train_encoder(wanted.name, purifier, batches)
        if training.freeze_encoder:
            freeze(purifier)
        if nearest is not None and purifier.gated and training.gate_epochs:
            self._train_gate(wanted.name, purifier, batches, nearest)
        with_the_whole = purifier.gated and training.gate_beside_the_rest > 0
        if purifier.gated and not with_the_whole:
            gate.freeze(purifier)
        if training.epochs:
            self._train_whole(wanted.name, purifier, batches, head, prepare)
        if with_the_whole and training.gate_false_alarms and training.epochs:
            gate.calibrate(purifier, self.held_out.images, training.gate_false_alarms)
        if purifier.classes and training.certainty_epochs:
            self._train_certainty(wanted.name, purifier, batches if first is None else first)
        _save(_in_float32(build, purifier), wanted.path)

    def _train_whole(
        self,
        name: str,
        purifier: VQUNet,
        batches: Any,
        head: keras.layers.Dense | None,
        prepare: list[keras.callbacks.Callback],
    ) -> None:
        """Trains all of a purifier that is not frozen, through the classifier."""
        training = self.config.training
        with devices.scope(training.strategy):
            classifier = self.run.load_classifier()
            classifier.trainable = False
            frozen = classifiers.in_precision(classifier, training.precision)
            objective = (
                AdaptiveObjective(purifier, frozen, training, head)
                if training.objective == "adaptive"
                else GrayBoxObjective(purifier, self._guide(frozen), training, head)
            )
            stage = loop.Stage(
                name=name,
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
            chosen = self._selection(averages, purifier, classifier) if training.selection != "last" else None
            boards = []
            if self.boards:
                grid = self.held_out.images[:_GRID]
                boards = [tensorboard.PurifierBoard(self.run.tensorboard / stage.name, batches, purifier, grid)]
        stop = workers.agreed(self.stop)
        loop.run(stage, training, self.run, averages, chosen, before=prepare, after=boards, stop=stop, say=self.say)

    def _train_gate(self, name: str, purifier: VQUNet, whole: GrayBoxBatches, nearest: np.ndarray) -> None:
        """Trains the gate of a purifier alone and sets how often it may be wrong; it stays as it is then."""
        training = self.config.training
        batches = gate.GateBatches(whole, nearest)
        with devices.scope(training.strategy):
            objective = gate.GateObjective(purifier)
        self._learn_alone(name + checkpoints.GATE, objective, batches, training.gate_epochs)
        if training.gate_false_alarms:
            gate.calibrate(purifier, self.held_out.images, training.gate_false_alarms)

    def _train_certainty(self, name: str, purifier: VQUNet, whole: GrayBoxBatches) -> None:
        """Trains the head of a purifier that is otherwise finished, and sets how often it is in doubt."""
        training = self.config.training
        batches = EncoderBatches(whole, training)
        with devices.scope(training.strategy):
            objective = certainty.CertaintyObjective(purifier)
        self._learn_alone(name + checkpoints.CERTAINTY, objective, batches, training.certainty_epochs)
        certainty.calibrate(purifier, self.held_out.images, training.uncertain)

    def _adopt(self, baseline: VQUNet) -> None:
        try:
            adopt(baseline, self.run.load_purifier())
        except (ValueError, AttributeError):
            raise UserError(
                f"{self.run.purifier}: expected a purifier of this run's sizes, whose encoder its baselines take over; delete it and give "
                "the same command again"
            ) from None

    def _train_encoder(self, name: str, purifier: VQUNet, whole: Any) -> keras.layers.Dense:
        """Trains the encoder of a purifier with a head alone and returns the head; `whole` is what the purifier will learn from."""
        config, training = self.config, self.config.training
        rate, decay = training.encoder_learning_rate, training.encoder_weight_decay
        if isinstance(whole, GrayBoxBatches):
            batches: Any = EncoderBatches(whole, training)
        else:
            alone = dataclasses.replace(training, epochs=training.encoder_epochs)
            batches = AdaptiveBatches(self.split.images, self.split.labels, alone, config.attack, self.replicas)
        with devices.scope(training.strategy):
            head = new_head(purifier, len(self.split.class_names))
            objective = EncoderObjective(purifier, head, training)
        settings = {
            "learning_rate": training.learning_rate if rate is None else rate,
            "weight_decay": training.weight_decay if decay is None else decay,
            "muon": training.muon,
        }
        self._learn_alone(name + checkpoints.ENCODER, objective, batches, training.encoder_epochs, **settings)
        return head

    def _learn_alone(self, name: str, objective: Any, batches: Any, epochs: int, **settings: float) -> None:
        """Runs a stage in which a part of a purifier, `objective.learner`, learns by itself; settings: other than those of the run."""
        training = self.config.training
        usual = {"learning_rate": training.learning_rate, "weight_decay": training.weight_decay}
        stage = loop.Stage(
            name=name,
            objective=objective,
            trained=objective.learner,
            batches=batches,
            epochs=epochs,
            warmup=training.warmup,
            **{**usual, **settings},
        )
        averages = self._averages(objective.learner, batches, epochs)
        boards = [tensorboard.TensorBoard(self.run.tensorboard / name, batches)] if self.boards else []
        loop.run(stage, training, self.run, averages, after=boards, stop=workers.agreed(self.stop), say=self.say)

    def _averages(self, model: keras.Model, batches: Any, epochs: int) -> Averages:
        training = self.config.training
        seen_at_once = min(training.steps_per_execution, batches.per_epoch)  # callbacks come after that many steps
        return Averages(model, training.average * batches.per_epoch * epochs / seen_at_once)

    def _guide(self, classifier: keras.Model) -> keras.Model:
        return classifiers.with_features(classifier, self.config.data.image_shape, self.config.classifier.feature_layer)

    def _known_guide(self) -> keras.Model:
        return self._guide(classifiers.in_precision(self.run.load_classifier(), self.config.training.precision))

    def _exact_guide(self) -> keras.Model:
        return self._guide(self.run.load_classifier())

    def _selection(self, averages: Averages, purifier: VQUNet, classifier: keras.Model) -> selection.Selection:
        """Scores with PGD at the first radius of the evaluation: of the classifier, or of the whole chain."""
        settings = self.config.training
        images = self.held_out.images[: settings.selection_examples]
        labels = self.held_out.labels[: settings.selection_examples]
        defended = DefendedClassifier(purifier, classifier)
        epsilon, steps = self.config.evaluation.epsilons[0], settings.selection_steps
        if settings.objective == "adaptive":
            attacks = selection.renewed(defended, images, labels, epsilon, steps, settings.seed, settings.selection)
        else:
            guide = self._guide(classifier)
            attacks = selection.fixed(guide, images, labels, epsilon, steps, settings.seed, settings.selection)
        return selection.Selection(averages, defended, images, labels, attacks)

    def _accuracy(self, model: keras.Model) -> float:
        logits = classifiers.logits_of(model, self.held_out.images)
        return float(np.mean(logits.argmax(axis=1) == self.held_out.labels))


def _in_float32(build: Callable[[], keras.Model], trained: keras.Model) -> keras.Model:
    """The weights in a model as `build` makes it without a policy: whoever loads it computes in full precision."""
    model = build()
    model.set_weights(trained.get_weights())
    return model


def _save(model: keras.Model, path: Path) -> None:
    """Writes a model; of several workers the chief does, and the others wait until it has."""
    with workers.chief_first():
        if devices.is_chief():
            runs.save_model(model, path)
        workers.appears(path)
