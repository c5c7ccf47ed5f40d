"""Settings of the untrained defences side by side, on validation images: what each is set to is read from here.

    python -m benchmarks.defenses --run_dir=runs/fashion_mnist     (without it: the released fashion_mnist classifier)

Prints JSON lines: accuracy of the classifier behind the defence on clean images and on gray-box PGD images, away from the
true class and towards another, milliseconds an image, and a score as that by which a purifier's epoch is chosen: clean +
the worse of the other two. Of each defence the setting with the best score gets `"best": true`.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vqunet_tf import data, pixels
from vqunet_tf.defenses import Purify, classic
from vqunet_tf.models import classifiers, presets
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries

SETTINGS: dict[str, tuple[Any, dict[str, tuple[float, ...]]]] = {
    "jpeg": (classic.jpeg, {"quality": (90, 75, 50, 25, 10)}),
    "bit_depth": (classic.bit_depth, {"bits": (1, 2, 3, 4, 5)}),
    "median": (classic.median, {"window": (2, 3, 5)}),
    "total_variation": (classic.total_variation, {"weight": (0.05, 0.1, 0.2, 0.3)}),
}
_BATCH = 100


def accuracy(classifier: Any, purify: Purify, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images uint8 [N, H, W, C] that are classified right behind a defence."""
    answer = tf.function(lambda x: classifier(purify(x), training=False))
    units = np.asarray(pixels.to_unit(images))
    logits = np.concatenate([answer(tf.constant(units[i : i + _BATCH])) for i in range(0, len(units), _BATCH)])
    return float(np.mean(logits.argmax(axis=1) == labels))


def measure(
    classifier: Any, shown: dict[str, np.ndarray], labels: np.ndarray, wanted: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per setting; `shown` holds the images uint8 [N, H, W, C] by what was done to them, `clean` first."""

    def row(name: str, setting: dict[str, float], purify: Purify) -> dict[str, Any]:
        found = {kind: accuracy(classifier, purify, images, labels) for kind, images in shown.items()}
        units = tf.constant(pixels.to_unit(shown["clean"][:_BATCH]))
        once = tf.function(purify)
        once(units)
        started = time.perf_counter()
        once(units)
        spent = 1e3 * (time.perf_counter() - started) / len(units)
        score = found["clean"] + min(value for kind, value in found.items() if kind != "clean")
        return {"defense": name, **setting, **found, "score": round(score, 4), "ms_per_image": round(spent, 3)}

    rows = [row("none", {}, lambda images: images)]
    for name in wanted:
        function, settings = SETTINGS[name]
        for key, values in settings.items():
            own = [row(name, {key: value}, functools.partial(function, **{key: value})) for value in values]
            max(own, key=lambda found: found["score"])["best"] = True
            rows += own
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run_dir", default="", help="whose classifier and data; without it the released fashion_mnist"
    )
    parser.add_argument("--defenses", default=",".join(SETTINGS), help="which to compare")
    parser.add_argument("--num_examples", type=int, default=300, help="validation images")
    parser.add_argument("--epsilon", type=float, default=0.1, help="radius (linf)")
    parser.add_argument("--steps", type=int, default=20, help="of PGD")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run_dir or presets.folder("fashion_mnist"))
    config, classifier = folder.load_config(), folder.load_classifier()
    split = data.load(config.data, "validation")
    images, labels = split.images[: options.num_examples], split.labels[: options.num_examples]
    guide = classifiers.with_features(classifier, images.shape[1:], config.classifier.feature_layer)
    shown = {"clean": images}
    for kind in ("untargeted", "targeted"):
        shown[kind] = adversaries.pgd(
            guide, images, labels, options.epsilon, options.steps, kind == "targeted", 0, _BATCH
        )
    for row in measure(classifier, shown, labels, options.defenses.split(",")):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
