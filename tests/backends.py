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
from vqunet_tf.models import classifiers
from vqunet_tf.training import adversaries
from vqunet_tf.training.objectives import GrayBoxObjective


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
    crafted = adversaries.craft(defended.classifier, images, AttackConfig(copies=1, max_steps=3, batch_size=16), seed=1)
    results["adversaries"] = crafted.astype("float32") / 255.0

    objective = GrayBoxObjective(defended.purifier, defended.classifier, TrainingConfig())
    objective.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=False)
    inputs = {"seen": crafted[0], "clean": images}
    logits = classifiers.logits_of(defended.classifier, images)
    results["losses"] = np.array([objective.train_on_batch(inputs, logits, return_dict=True)["loss"] for _ in range(2)])
    for place, weight in enumerate(defended.purifier.weights):
        results[f"trained {place} {weight.name}"] = keras.ops.convert_to_numpy(weight)
    np.savez(folder / f"{keras.backend.backend()}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
