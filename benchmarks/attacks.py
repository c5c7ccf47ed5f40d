"""PGD against the same attack of CleverHans, ART and Foolbox: images per second and the accuracy that is left.

    python -m benchmarks.attacks [--victims=fashion_mnist,digits,small] [--num_examples=512] [--steps=40]
                                 [--batch_size=128] [--epsilon=0] [--turns=3]

Victims, undefended, on their test images:

`fashion_mnist`  the released classifier (22 million multiply-accumulates an image).
`digits`         the classifier of the digits recipe, trained here for some epochs.
`small`          two narrow convolutions on the digits, trained here in seconds: what the library costs around them.

Contenders, each with as many steps of the same length from a random start, one after the other in each turn:

`ours`               `attacks.PGD`, one program.
`ours_until_fooled`  the same with `until_fooled`: an image leaves the loop at the first point that fools. The accuracy
                     of this victim is what it measures; for images shown to other models `ours` is the one to compare.
`cleverhans`         `projected_gradient_descent` called eagerly, batch by batch, as in its README.
`art`                `ProjectedGradientDescentTensorFlowV2` on a `TensorFlowV2Classifier` of the Keras model.
`foolbox`            `LinfPGD` on a `TensorFlowModel` of the Keras model; left out, with a word, if it is not installed.

Prints a JSON line for each. Each takes one batch to warm up (compilation does not count). Rates are medians of turns,
`times` are medians over turns of the contender's seconds by those of `ours` and of `ours_until_fooled`; `cpu_times` the
same of processor seconds, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from vqunet_tf import data
from vqunet_tf.attacks import PGD
from vqunet_tf.evaluation import sample
from vqunet_tf.models import classifiers, presets
from vqunet_tf.recipes import preset
from vqunet_tf.threat import Threat

Contender = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images, labels → adversaries

EPSILONS = {"fashion_mnist": 0.1, "digits": 0.2, "small": 0.2}
OURS = ("ours", "ours_until_fooled")


@dataclass(frozen=True)
class Victim:
    """An undefended classifier and images `[N,H,W,C]` float32 in [0,1] with their labels."""

    classifier: keras.Model
    images: np.ndarray
    labels: np.ndarray

    def __call__(self, images: Any) -> Any:
        return self.classifier(images, training=False)

    def __hash__(self) -> int:
        return id(self)

    def accuracy(self, images: np.ndarray) -> float:
        logits = classifiers.logits_of(self.classifier, images)
        return float(np.mean(logits.argmax(axis=1) == self.labels))


def victim(name: str, number: int) -> Victim:
    """The victim of that name and so many of its test images; where there are fewer, they come again."""
    config = preset("digits" if name == "small" else name, "digits" if name == "small" else name)
    if name == "fashion_mnist":
        classifier = presets.load(name, "classifier")
    else:
        train = data.load(config.data, "train")
        classifier = trained(name, config.classifier, train.images / np.float32(255), train.labels)
    test = data.load(config.data, "test")
    part = sample(test, min(number, len(test.labels)))
    rows = np.arange(number) % len(part.labels)
    return Victim(classifier, part.images[rows] / np.float32(255), part.labels[rows])


def trained(name: str, settings: Any, images: np.ndarray, labels: np.ndarray) -> keras.Model:
    keras.utils.set_random_seed(0)
    if name == "small":
        layers = [keras.layers.Conv2D(width, 3, strides=2, activation="relu") for width in (8, 16)]
        classifier = keras.Sequential(
            [keras.Input(images.shape[1:]), *layers, keras.layers.Flatten(), keras.layers.Dense(10)]
        )
    else:
        classifier = classifiers.build(settings.name, images.shape[1:], 10, settings.widths, settings.blocks)
    classifier.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    classifier.fit(images, labels, epochs=8, batch_size=64, verbose=0)
    return classifier


def contenders(what: Victim, threat: Threat, steps: int, batch_size: int) -> dict[str, Contender]:
    """All that are installed, by name."""
    ours = PGD(threat=threat, steps=steps)
    numbers = {"eps": threat.epsilon, "eps_iter": ours.length, "nb_iter": steps, "norm": np.inf}

    def in_batches(attack: Callable[[Any, Any], Any]) -> Contender:
        def run(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
            parts = [slice(at, at + batch_size) for at in range(0, len(images), batch_size)]
            return np.concatenate([np.asarray(attack(images[part], labels[part])) for part in parts])

        return run

    def cleverhans(images: np.ndarray, labels: np.ndarray) -> Any:
        return projected_gradient_descent(
            what.classifier, tf.constant(images), **numbers, clip_min=0.0, clip_max=1.0, y=labels, rand_init=True
        )

    found: dict[str, Contender] = {
        name: lambda images, labels, attack=attack: attack(what, images, labels, batch_size=batch_size)
        for name, attack in zip(OURS, (ours, PGD(threat=threat, steps=steps, until_fooled=True)), strict=True)
    }
    found["cleverhans"] = in_batches(cleverhans)
    found["art"] = _art(what, threat, steps, ours.length, batch_size)
    try:
        found["foolbox"] = in_batches(_foolbox(what, threat, steps, ours.length))
    except ImportError:
        print(json.dumps({"contender": "foolbox", "missing": "pip install foolbox"}), flush=True)
    return found


def _art(what: Victim, threat: Threat, steps: int, length: float, batch_size: int) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch is not there
        from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2
        from art.estimators.classification import TensorFlowV2Classifier

    classifier = TensorFlowV2Classifier(
        what.classifier,
        nb_classes=10,
        input_shape=what.images.shape[1:],
        loss_object=keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )
    attack = ProjectedGradientDescentTensorFlowV2(
        classifier,
        eps=threat.epsilon,
        eps_step=length,
        max_iter=steps,
        num_random_init=1,
        batch_size=batch_size,
        verbose=False,
    )
    return lambda images, labels: attack.generate(images, labels)


def _foolbox(what: Victim, threat: Threat, steps: int, length: float) -> Callable[[Any, Any], Any]:
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=length, steps=steps)
    model = foolbox.TensorFlowModel(what.classifier, bounds=(0, 1))
    # 64-bit labels: with others it calls a function that NumPy 2 no longer has.
    return lambda images, labels: attack(
        model, tf.constant(images), tf.constant(labels, tf.int64), epsilons=threat.epsilon
    )[1]


def measure(what: Victim, threat: Threat, steps: int, batch_size: int, turns: int) -> list[dict[str, Any]]:
    """One row for each contender."""
    runners = contenders(what, threat, steps, batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    left = {}
    for run in runners.values():
        run(what.images[:batch_size], what.labels[:batch_size])
    for _ in range(turns):
        for name, run in runners.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            adversaries = run(what.images, what.labels)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
            left[name] = what.accuracy(adversaries)
    rows = []
    for name, times in seconds.items():
        by_ours = {
            f"{kind}_{mine}": round(statistics.median(a / b for a, b in zip(of[name], of[mine], strict=True)), 2)
            for mine in OURS
            for kind, of in (("times", seconds), ("cpu_times", cpu))
        }
        rate = len(what.images) / statistics.median(times)
        rows.append({"contender": name, "images_per_second": round(rate, 1), "accuracy": left[name], **by_ours})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", default=",".join(EPSILONS))
    parser.add_argument("--num_examples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--epsilon", type=float, default=0.0, help="0: one at which few images are left")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    for name in options.victims.split(","):
        what = victim(name, options.num_examples)
        epsilon = options.epsilon or EPSILONS[name]
        settings = {"n": len(what.images), "steps": options.steps, "batch_size": options.batch_size}
        clean = {"epsilon": epsilon, "clean_accuracy": what.accuracy(what.images)}
        print(json.dumps({"victim": name, **settings, **clean}), flush=True)
        for row in measure(what, Threat("linf", epsilon), options.steps, options.batch_size, options.turns):
            print(json.dumps({"victim": name, **row}), flush=True)


if __name__ == "__main__":
    main()
