"""Gray-box training of the purifier: what the library costs around the arithmetic, and where the time goes.

    python -m benchmarks.training [--presets=fashion_mnist,cifar10] [--turns=5] [--steps=8] [--batch_size=0]

On random images of a data set's shape; no data are needed. A head, a gate, an encoder that stays as it is and a weight of the
pixels that fades are left out of the presets: the bare loop has none of them. Prints JSON lines, for each preset:

`training`  images per second of `vqunet_tf.training.loop.run` (Keras `fit` with every callback) and of a bare loop by
            hand (`benchmarks/bare.py`) with the same arithmetic on batches that lie ready as tensors. One epoch of
            ours and one turn of the bare loop after the other; the first of each and the first step of every turn do
            not count (compilation), nor do the checkpoints that ours writes between two epochs. `ours_loss` and
            `bare_loss` are means over the first turn: they agree because the arithmetic does. Operations per image
            and the share of the machine's matrix-product peak that ours reaches.
`input`     images per second of `GrayBoxBatches` alone, in one thread, and as a multiple of what training consumes.
`crafting`  images per second of `adversaries.craft` and of CleverHans called as in its README, batch by batch in
            turns, with as many gradient steps on the same images and the same classifier.
`xla`       images per second of the bare step, as a TensorFlow graph and with `jit_compile=True`.

Ratios are medians of the ratios of single turns, rates are medians of turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks import bare, purifier
from vqunet_tf import VQUNet
from vqunet_tf.config import Config
from vqunet_tf.models import classifiers
from vqunet_tf.recipes import UNGATED, preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, loop
from vqunet_tf.training.augment import Views
from vqunet_tf.training.averaging import Averages
from vqunet_tf.training.batches import GrayBoxBatches
from vqunet_tf.training.objectives import GrayBoxObjective

SHAPES = {**purifier.SHAPES, "smoke": (16, 16, 1)}
CLASSES = 10
_LEFT_OUT = {
    **UNGATED,
    "training.nearest": 0.0,
    "training.head_weight": 0.0,
    "training.encoder_epochs": 0,
    "training.final_pixel_weight": None,
}
DATA_SET = 50_000  # images in a real epoch: how often weights are averaged follows from it


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: a preset's configuration and models on random images."""

    config: Config
    shape: tuple[int, int, int]
    classifier: keras.Model
    guide: keras.Model

    def purifier(self) -> VQUNet:
        """A new one; the same weights every time."""
        keras.utils.set_random_seed(0)
        return VQUNet(**dataclasses.asdict(self.config.purifier), channels=self.shape[-1])

    def batches(self, count: int) -> GrayBoxBatches:
        """So many batches in an epoch."""
        config, number = self.config, count * self.config.training.batch_size
        views = Views(self.images(number), config.attack.copies, config.training.max_shift, config.training.flip, 0)
        adversarial = np.stack([self.images(number) for _ in range(config.attack.copies)])
        return GrayBoxBatches(views, adversarial, config.training, config.attack)

    def images(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, size=(number, *self.shape), dtype=np.uint8)


def subject(config: Config, shape: tuple[int, int, int]) -> Subject:
    config = config.replace(_LEFT_OUT)
    keras.utils.set_random_seed(1)
    settings = config.classifier
    classifier = classifiers.build(settings.name, shape, CLASSES, settings.widths, settings.blocks)
    classifiers.whiten(classifier, np.random.default_rng(0).integers(0, 256, size=(64, *shape), dtype=np.uint8))
    classifier.trainable = False
    return Subject(config, shape, classifier, classifiers.with_features(classifier, shape, settings.feature_layer))


class _Turns(keras.callbacks.Callback):
    """Before each epoch lets another contender take its turn, then times the epoch without its first step."""

    def __init__(self, other: Callable[[], float]):
        super().__init__()
        self.other = other
        self.others: list[float] = []
        self.mine: list[float] = []
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.others.append(self.other())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.start = time.perf_counter()
        self.stop, self.loss = time.perf_counter(), logs["loss"]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.mine.append(self.stop - self.start)
        self.losses.append(float(logs["loss"]))  # the mean over the epoch


def measure_training(what: Subject, turns: int, steps: int, peak: float) -> dict[str, Any]:
    """Ours against the bare loop."""
    training = dataclasses.replace(
        what.config.training, epochs=turns + 1, checkpoint_seconds=1e9, accumulate=1, steps_per_execution=1
    )
    batches, mine, theirs = what.batches(steps), what.purifier(), what.purifier()
    rate = loop.OneCycle(training.learning_rate, training.epochs * steps, training.warmup)
    step = bare.make_step(theirs, what.guide, training, rate, training.jit_compile)
    ready = _tensors(batches)
    bare_losses: list[float] = []

    def bare_turn() -> float:
        seconds, losses = bare.timed(step, ready)
        bare_losses.append(statistics.mean(losses))
        return seconds

    watch = _Turns(bare_turn)
    stage = loop.Stage(
        name="purifier",
        objective=GrayBoxObjective(mine, what.guide, training),
        trained=mine,
        batches=batches,
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup=training.warmup,
    )
    real_steps = what.config.training.epochs * (DATA_SET // training.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        averages = Averages(mine, training.average * real_steps)
        loop.run(stage, training, RunFolder(Path(folder)), averages, before=[watch], say=lambda line: None)
    images = (steps - 1) * training.batch_size
    ours, other = (_rates(seconds[1:], images) for seconds in (watch.mine, watch.others))
    operations = training_operations(mine, what.guide, what.shape)
    return {
        "batch_size": training.batch_size,
        "jit_compile": training.jit_compile,
        "ours_images_per_second": round(statistics.median(ours), 1),
        "bare_images_per_second": round(statistics.median(other), 1),
        "ours_of_bare": _ratio(ours, other),
        "ours_loss": watch.losses[0],
        "bare_loss": bare_losses[0],
        "million_operations": round(operations / 1e6, 1),
        "share_of_peak": round(operations * statistics.median(ours) / peak, 3),
    }


def training_operations(model: VQUNet, guide: keras.Model, shape: tuple[int, ...]) -> int:
    """Of one image in one step, a multiply-accumulate counting as two.

    The purifier's convolutions forward, backward to inputs and to kernels; its search for codes once, nothing flows
    back through it; the classifier on the clean image, on the purified one, and back to that.
    """
    layers, search = purifier.of_layers(model.graph, shape), purifier.of_search(model, shape)
    return 2 * (3 * layers + search + 3 * purifier.of_layers(guide, shape))


def measure_input(what: Subject, turns: int, steps: int, consumed: float) -> dict[str, Any]:
    """The input pipeline alone; `consumed` are the images per second of training."""
    batches = what.batches(max(steps, 64))  # more than a cache holds
    seconds = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        for i in range(len(batches)):
            batches[i]
        seconds.append(time.perf_counter() - start)
    rate = statistics.median(_rates(seconds[1:], len(batches) * batches.batch_size))
    return {"images_per_second": round(rate), "times_training": round(rate / consumed, 1)}


def measure_crafting(what: Subject, turns: int, steps: int, peak: float) -> dict[str, Any]:
    """Ours and CleverHans, each batch by one and then by the other, with this number of gradient steps."""
    config, size = what.config.attack, what.config.attack.batch_size
    images = what.images(size)
    ready = tf.constant(images / np.float32(255.0))
    model, epsilon = what.classifier, config.epsilon

    def cleverhans() -> np.ndarray:
        if steps == 1:
            return fast_gradient_method(model, ready, epsilon, np.inf).numpy()
        return projected_gradient_descent(model, ready, epsilon, epsilon / steps, steps, np.inf).numpy()

    ours: list[float] = []
    theirs: list[float] = []
    last = time.perf_counter()

    def progress(_: int) -> None:
        nonlocal last
        between = time.perf_counter()
        ours.append(between - last)
        cleverhans()
        last = time.perf_counter()
        theirs.append(last - between)

    with mock.patch.object(adversaries, "_steps", lambda config, rng: (steps, 0.0)):  # it draws them for each batch
        adversaries.craft(what.guide, np.concatenate([images] * (turns + 2)), config, 0, progress)
    mine, other = (_rates(seconds[2:], size) for seconds in (ours, theirs))
    operations = 2 * (1 + 2 * steps) * purifier.of_layers(what.guide, what.shape)
    return {
        "cleverhans": "fast_gradient_method" if steps == 1 else "projected_gradient_descent",
        "steps": steps,
        "batch_size": size,
        "ours_images_per_second": round(statistics.median(mine), 1),
        "cleverhans_images_per_second": round(statistics.median(other), 1),
        "times_cleverhans": _ratio(mine, other),
        "share_of_peak": round(operations * statistics.median(mine) / peak, 3),
    }


def measure_xla(what: Subject, turns: int, steps: int) -> dict[str, Any]:
    """The bare step with XLA against the same without."""
    training = what.config.training
    ready = _tensors(what.batches(steps))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    contenders = {
        jit: bare.make_step(what.purifier(), what.guide, training, training.learning_rate, jit) for jit in seconds
    }
    for _ in range(turns + 1):
        for jit, step in contenders.items():
            seconds[jit].append(bare.timed(step, ready)[0])
    images = (steps - 1) * training.batch_size
    graph, xla = (_rates(seconds[jit][1:], images) for jit in (False, True))
    return {
        "graph_images_per_second": round(statistics.median(graph), 1),
        "xla_images_per_second": round(statistics.median(xla), 1),
        "xla_of_graph": _ratio(xla, graph),
    }


def measure(what: Subject, turns: int, steps: int, peak: float) -> Iterator[dict[str, Any]]:
    """All rows of one preset."""
    row = measure_training(what, turns, steps, peak)
    yield {"measure": "training", **row}
    yield {"measure": "input", **measure_input(what, turns, steps, row["ours_images_per_second"])}
    for attack_steps in (1, what.config.attack.max_steps):
        yield {"measure": "crafting", **measure_crafting(what, turns, attack_steps, peak)}
    yield {"measure": "xla", **measure_xla(what, turns, steps)}


def _tensors(batches: GrayBoxBatches) -> list[dict[str, tf.Tensor]]:
    """An epoch of batches, ready on the device."""
    return [{name: tf.constant(part) for name, part in batches[i].items()} for i in range(len(batches))]


def _rates(seconds: list[float], images: int) -> list[float]:
    return [images / duration for duration in seconds]


def _ratio(ours: list[float], other: list[float]) -> float:
    return round(statistics.median(mine / theirs for mine, theirs in zip(ours, other, strict=True)), 3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="fashion_mnist,cifar10", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender that count")
    parser.add_argument("--steps", type=int, default=8, help="training steps in a turn, at least 2")
    parser.add_argument("--batch_size", type=int, default=0, help="0: as in the preset")
    options = parser.parse_args(arguments)
    peak = purifier.matmul_peak()
    print(json.dumps({"matmul_peak_gflops": round(peak / 1e9, 1)}), flush=True)
    for name in options.presets.split(","):
        config = preset(name, name)
        if options.batch_size:
            sizes = dict.fromkeys(("training.batch_size", "attack.batch_size"), options.batch_size)
            config = config.replace(sizes)
        for row in measure(subject(config, SHAPES[name]), options.turns, options.steps, peak):
            print(json.dumps({"preset": name, **row}), flush=True)


if __name__ == "__main__":
    main()
