"""Loads a purifier under the Keras backend of the environment, purifies, trains one step: `python backends.py FOLDER`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

import vqunet_tf
from vqunet_tf import backend, pixels
from vqunet_tf.config import AttackConfig, TrainingConfig
from vqunet_tf.models import blocks, classifiers
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, certainty, fit, gate, loop
from vqunet_tf.training.certainty import CertaintyObjective
from vqunet_tf.training.encoder import EncoderObjective
from vqunet_tf.training.objectives import AdaptiveObjective, GrayBoxObjective


def train_a_run(folder):
    """A run through `fit` with all its callbacks, from models that every backend shares, on images without attacks."""
    settings = {
        "classifier.path": str(folder / "classifier.keras"),
        "training.start": str(folder / "start.keras"),
        "data.limit": 96,
        "training.batch_size": 32,
        "training.epochs": 3,
        "training.adversarial": 0.0,
        "training.average": 0.5,
        "training.feature_weight": 0.5,
        "attack.max_steps": 1,
    }
    config = preset("smoke", "digits").replace(settings)
    fit.train(config, RunFolder(folder / f"run_{keras.backend.backend()}"), say=print)
    # Averages bring the weights of JAX up to date at every step here: without them nobody else may rely on that.
    short = config.replace({"training.average": 0.0, "training.epochs": 1})
    fit.train(short, RunFolder(folder / f"short_{keras.backend.backend()}"), say=print)


def refuse_eager(objective, *rest, fitted=loop._fit):
    """JAX without its compiler takes a hundred times as long for a step."""
    if objective.jit_compile != (keras.backend.backend() == "jax"):
        raise SystemExit(f"{keras.backend.backend()}: jit_compile={objective.jit_compile}")
    fitted(objective, *rest)


loop._fit = refuse_eager


def steps(objective, inputs):
    """The losses of a few training steps on one batch."""
    objective.compile(optimizer=keras.optimizers.SGD(0.05), jit_compile=False)
    return np.array([objective.train_on_batch(inputs, return_dict=True)["loss"] for _ in range(3)])


def of_a_gate(purifier, guide, images):
    """Half of the images' gates are closed, by half of the distance between the two logits in the middle."""
    logits = np.sort(keras.ops.convert_to_numpy(purifier.graph(pixels.to_unit(images))["gate"]))
    bias = purifier.graph.get_layer("gate_logit").bias
    bias.assign(bias - (logits[7] + logits[8]) / 2)
    certainty.calibrate(purifier, images, 0.75)
    found = purifier.graph(pixels.to_unit(images))
    results = {name: keras.ops.convert_to_numpy(found[name]) for name in ("certainty", "classes")}
    results |= {"purified, gated": purifier.purify(images), "gate": logits}
    with blocks.gates("soft"):
        gradient = backend.input_gradient(lambda x: keras.ops.square(purifier(x, training=False)))
        results["gradient of a soft gate"] = keras.ops.convert_to_numpy(gradient(pixels.to_unit(images)))
    objective = GrayBoxObjective(purifier, guide, TrainingConfig())
    attacked = (np.arange(16) % 2).astype("float32")
    shown = {"seen": images[::-1].copy(), "clean": images, "attacked": attacked}
    shown["share"] = np.linspace(0, 1, len(images), dtype="float32").reshape(-1, 1, 1, 1)
    shown["open"] = 1.0 - attacked
    results["losses gated"] = steps(objective, shown)
    learned = CertaintyObjective(purifier)
    results["losses certainty"] = steps(learned, {"seen": images, "label": np.arange(16, dtype="int32") % 4})
    gate.calibrate(purifier, images, 0.25)
    results["losses gated"] = np.append(results["losses gated"], keras.ops.convert_to_numpy(bias))
    return results


def main(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(16, 16, 16, 3), dtype="uint8")
    defended = keras.models.load_model(folder / "defended.keras")
    if not isinstance(defended, vqunet_tf.DefendedClassifier):
        raise SystemExit(f"expected a DefendedClassifier, got {type(defended)}")
    results = {"purified": defended.purifier.purify(images), "logits": defended.predict(images / 255.0, verbose=0)}
    for name in ("straight_through", "rotation", "soft", "identity"):
        defended.purifier.set_gradient(name)
        gradient = backend.input_gradient(lambda x: keras.ops.square(defended(x, training=False)))
        results[f"gradient {name}"] = keras.ops.convert_to_numpy(gradient(pixels.to_unit(images)))
    defended.purifier.set_gradient("straight_through")
    guide = classifiers.with_features(defended.classifier, images.shape[1:])
    crafted = adversaries.craft(guide, images, AttackConfig(max_steps=3, batch_size=16), seed=1)
    results["adversaries"] = crafted.astype("float32") / 255.0

    settings = TrainingConfig(feature_weight=0.5, attack_steps=2, trades=1.0)
    objective = GrayBoxObjective(defended.purifier, guide, settings)
    results["losses"] = steps(objective, {"seen": images[::-1].copy(), "clean": images})
    objective = AdaptiveObjective(defended.purifier, defended.classifier, settings)
    inputs = {
        "clean": images,
        "label": np.arange(16, dtype="int32") % 4,
        "start": np.zeros(images.shape, "float32"),
        "epsilon": np.full((16, 1, 1, 1), 0.1, "float32"),
    }
    results["losses adaptive"] = steps(objective, inputs)
    shares = TrainingConfig(
        attack_steps=2, attack_gradients=("identity", "straight_through"), head_weight=1.0, attack_on="head"
    )
    objective = AdaptiveObjective(defended.purifier, defended.classifier, shares)
    head = np.random.default_rng(2).normal(size=objective.head.kernel.shape).astype("float32")
    objective.head.set_weights([head, np.zeros(head.shape[1], "float32")])
    results["losses head"] = steps(objective, inputs)
    results["losses encoder"] = steps(EncoderObjective(defended.purifier, objective.head, shares), inputs)
    shown = {"seen": images[::-1].copy(), "clean": images, "label": inputs["label"]}
    results["losses encoder shown"] = steps(EncoderObjective(defended.purifier, objective.head, shares), shown)
    guided = GrayBoxObjective(defended.purifier, guide, shares, objective.head)
    results["losses gray_box head"] = steps(guided, shown)
    looped = GrayBoxObjective(defended.purifier, guide, settings)
    results["losses gray_box loop"] = steps(looped, {**shown, "start": inputs["start"], "epsilon": inputs["epsilon"]})
    results |= of_a_gate(keras.models.load_model(folder / "gated.keras"), guide, images)
    train_a_run(folder)
    for place, weight in enumerate(defended.purifier.weights):
        results[f"trained {place} {weight.name}"] = keras.ops.convert_to_numpy(weight)
    np.savez(folder / f"{keras.backend.backend()}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
