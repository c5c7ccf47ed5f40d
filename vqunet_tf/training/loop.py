"""One stage of training: `fit` from the last checkpoint to the last epoch, with all that a person wants to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from vqunet_tf import backend
from vqunet_tf.config import TrainingConfig
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import callbacks, devices, optimizers, workers
from vqunet_tf.training.averaging import Averages
from vqunet_tf.training.batches import Batches
from vqunet_tf.training.checkpoints import Checkpoints, Keeper
from vqunet_tf.training.objectives import Objective
from vqunet_tf.training.selection import Selection


@dataclass(frozen=True)
class Stage:
    """What is trained how long.

    name: `classifier`, `purifier` or that of a baseline.
    trained: the model inside the objective that learns.
    muon: as in `optimizers.build`.
    """

    name: str
    objective: Objective
    trained: keras.Model
    batches: Batches
    epochs: int
    learning_rate: float
    weight_decay: float
    warmup: float
    muon: float = 0.0


def run(
    stage: Stage,
    settings: TrainingConfig,
    folder: RunFolder,
    averages: Averages,
    selection: Selection | None = None,
    *,
    before: Sequence[keras.callbacks.Callback] = (),
    after: Sequence[keras.callbacks.Callback] = (),
    stop: Callable[[], Any] = lambda: None,
    say: Callable[[str], Any],
) -> None:
    """Trains a stage to its end and leaves the weights that are to be kept in `stage.trained`.

    Args:
        averages: of the weights of `stage.trained`.
        selection: which epoch is kept; None keeps the averages at the end.
        before, after: callbacks that prepare an epoch, and that see all its logs.
        stop: asked after every step; a truth saves a checkpoint and raises `errors.Interrupted`.
    """
    objective, batches, epochs = stage.objective, stage.batches, stage.epochs
    steps = epochs * batches.per_epoch
    replicas, size = devices.replicas(settings.strategy), batches.batch_size
    shares = f"{replicas} replicas ({size // replicas} each)" if replicas > 1 else "1 replica"
    say(f"{stage.name}: {size} images a step on {shares}, learning rate up to {stage.learning_rate:g}")
    with devices.scope(settings.strategy):
        schedule = OneCycle(stage.learning_rate * (stage.muon or 1.0), steps, stage.warmup, settings.accumulate)
        optimizer = optimizers.build(schedule, stage.weight_decay, stage.muon, settings.accumulate)
        objective.compile(
            optimizer=optimizer,
            jit_compile=settings.jit_compile or backend.needs_jit(),
            steps_per_execution=min(settings.steps_per_execution, batches.per_epoch),
        )
        objective.optimizer.build(objective.trainable_variables)
    keepers: dict[str, Keeper] = {"averages": averages}
    if selection is not None:
        keepers["selection"] = selection
    chief = devices.is_chief()
    checkpoints = Checkpoints(
        folder.checkpoints, stage.name, batches, keepers, settings.checkpoint_seconds, stop, writes=chief
    )
    with devices.scope(settings.strategy):
        done = checkpoints.restore(objective, say)
    workers.same(f"the step of the {stage.name}'s last checkpoint", done)
    epoch, first = divmod(done, batches.per_epoch)
    purifier = stage.trained if isinstance(stage.trained, VQUNet) else None
    progress = callbacks.Progress(stage.name, batches, epochs, done, purifier)
    watching = [
        callbacks.Epochs(batches),
        callbacks.StopOnNaN(batches),
        *before,
        averages,
        *([callbacks.Usage(purifier, batches)] if purifier else []),
        *([selection] if selection else []),
        *([callbacks.MetricsFile(folder.metrics, stage.name, epoch), *after] if chief else []),
        checkpoints,
        progress,
    ]
    try:
        if first:  # Keras counts the batches of an epoch once in a fit
            batches.start(epoch, first)
            _fit(objective, batches, epoch, epoch + 1, watching)
            epoch += 1
        if epoch < epochs:
            batches.start(epoch)
            _fit(objective, batches, epoch, epochs, watching)
    finally:
        progress.close()
    if selection is None:
        averages.apply()
    else:
        selection.apply()


class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from a hundredth of the peak over a share of the steps, then a cosine to zero.

    Args:
        steps: batches in all.
        accumulate: batches to one step of the optimizer; Keras counts batches, the rate changes once for each step.
    """

    def __init__(self, peak: float, steps: int, warmup: float, accumulate: int = 1):
        self.peak, self.steps, self.warmup, self.accumulate = peak, steps, warmup, accumulate
        updates = max(1, steps // accumulate)
        rising = max(1, int(warmup * updates))
        self.curve = keras.optimizers.schedules.CosineDecay(
            peak / 100, max(1, updates - rising), alpha=0.0, warmup_target=peak, warmup_steps=rising
        )

    def __call__(self, step: Any) -> Any:
        return self.curve(step // self.accumulate)

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "steps": self.steps, "warmup": self.warmup, "accumulate": self.accumulate}


def _fit(objective: Objective, batches: Batches, epoch: int, epochs: int, watching: list[Any]) -> None:
    objective.fit(
        backend.feed(batches),
        initial_epoch=epoch,
        epochs=epochs,
        verbose=0,
        shuffle=False,  # the batches are in random order themselves, by seed and epoch
        callbacks=watching,
    )
