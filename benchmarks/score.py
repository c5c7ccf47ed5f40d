"""What the adversarial score of an export is worth: false alarms, gray-box adversaries seen, and one who knows of it.

    python -m benchmarks.score --export=exported/digits/1 --run_dir=runs/digits [--num_examples=400] [--adaptive=100] [--steps=120]

Prints JSON lines, of images from the test split in a fixed order (seed 0). Gray-box: PGD-10 against the bare classifier at
the run's first epsilon and a quarter of it. White-box: PGD through the reloaded SavedModel itself, on class and score at once;
the share left wrong and not flagged is a lower bound on what an attacker who knows of the score can do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from vqunet_tf import data
from vqunet_tf.models import classifiers
from vqunet_tf.pixels import to_unit
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries

BATCH = 50
GRAY_STEPS = 10


def ask(signature: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """The answers of `serve_uint8` to uint8 images [N, H, W, C], a batch at a time."""
    parts = [signature(images=tf.constant(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}


def adaptive(
    signature: Any, images: np.ndarray, labels: np.ndarray, threshold: float, epsilon: float, steps: int
) -> float:
    """Share of images that PGD through `serving_default` leaves wrong and below the threshold at some step.

    images: uint8 [N, H, W, C]. Random start; lowers the margin of the true class while it is right and the score while it is
    above the threshold; steps of epsilon / 5, in the second half of epsilon / 20.
    """
    clean = tf.constant(to_unit(images))
    limit = float(np.log(threshold) - np.log1p(-threshold)) - 0.3  # somewhat below the threshold, as a logit

    @tf.function
    def look(x: Any) -> tuple[Any, Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            answer = signature(images=x)
            true = tf.one_hot(labels, answer["probabilities"].shape[-1])
            right = tf.reduce_sum(true * answer["probabilities"], axis=-1)
            margin = right - tf.reduce_max(answer["probabilities"] - true, axis=-1)
            score = answer["adversarial_score"]
            logit = tf.math.log(score + 1e-9) - tf.math.log(1.0 - score + 1e-7)
            loss = tf.reduce_sum(4.0 * tf.nn.relu(margin + 0.1) + 0.3 * tf.nn.relu(logit - limit))
        return tape.gradient(loss, x), answer["class_id"], score

    noise = np.random.default_rng(1).uniform(-epsilon, epsilon, images.shape)
    x = tf.clip_by_value(clean + tf.constant(noise, tf.float32), 0.0, 1.0)
    beaten = np.zeros(len(images), bool)
    for step in range(steps):
        slope, found, score = look(x)
        beaten |= (found.numpy() != labels) & (score.numpy() <= threshold)
        x = x - epsilon * (0.2 if step < steps // 2 else 0.05) * tf.sign(slope)
        x = tf.clip_by_value(tf.clip_by_value(x, clean - epsilon, clean + epsilon), 0.0, 1.0)
    return float(beaten.mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--num_examples", type=int, default=400)
    parser.add_argument("--adaptive", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(argv)
    threshold = json.loads((Path(options.export) / "assets" / "score.json").read_text(encoding="utf-8"))["threshold"]
    if threshold is None:
        parser.error("the score of this export is not calibrated: it has no threshold")
    loaded = tf.saved_model.load(options.export)
    run = RunFolder(options.run_dir)
    config, classifier = run.load_config(), run.load_classifier()
    split = data.load(config.data, "test")
    chosen = np.random.RandomState(0).permutation(len(split.images))[: options.num_examples]
    images, labels = split.images[chosen], split.labels[chosen]

    def row(attack: str, attacked: np.ndarray, **facts: Any) -> None:
        answer = ask(loaded.signatures["serve_uint8"], attacked)
        flagged = float(np.mean(answer["adversarial_score"] > threshold))
        right = float(np.mean(answer["class_id"] == labels[: len(attacked)]))
        facts |= {"n": len(attacked), "flagged": round(flagged, 4), "accuracy": round(right, 4)}
        print(json.dumps({"attack": attack, **facts}), flush=True)

    row("none", images)
    guide = classifiers.with_features(classifier, images.shape[1:])
    first = config.evaluation.epsilons[0]
    half = slice(0, max(1, len(images) // 2))
    for epsilon in (first, first / 4):
        for targeted in (False, True):
            attacked = adversaries.pgd(guide, images[half], labels[half], epsilon, GRAY_STEPS, targeted, 1, BATCH)
            row("gray_box pgd", attacked, epsilon=round(epsilon, 5), targeted=targeted)
    some = slice(0, options.adaptive)
    share = adaptive(loaded.signatures["serving_default"], images[some], labels[some], threshold, first, options.steps)
    facts = {"epsilon": round(first, 5), "steps": options.steps, "n": len(images[some])}
    print(json.dumps({"attack": "white_box pgd, class and score", **facts, "wrong_and_not_flagged": round(share, 4)}))


if __name__ == "__main__":
    main()
