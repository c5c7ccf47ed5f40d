"""Trains a small quantized autoencoder for ten steps on N logical CPUs: `python replicas.py N FILE.npz`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf import VectorQuantizer, backend
from vqunet_tf.training import devices

STEPS, BATCH = 10, 24


class Autoencoder(keras.Model):
    """Dense -> quantizer -> Dense, trained to reproduce its input."""

    def __init__(self, kind: str):
        super().__init__()
        self.encode = keras.layers.Dense(4)
        self.quantizer = VectorQuantizer(8, 4, codebook=kind, decay=0.9, revive_after=2)
        self.decode = keras.layers.Dense(5)

    def call(self, inputs, training=False):
        result = self.quantizer(self.encode(inputs), training=training)
        return {"outputs": self.decode(result["quantized"]), "loss": result["loss"]}

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return backend.share_of_loss(keras.ops.mean(keras.ops.square(y_pred["outputs"] - x)) + y_pred["loss"])


class Losses(keras.callbacks.Callback):
    """The loss of every single step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(logs["loss"] * (batch + 1) - sum(self.values))  # Keras shows the mean so far


def main(replicas: int, path: str) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    batches = np.random.default_rng(0).normal(size=(STEPS * BATCH, 5)).astype("float32")
    results = {}
    for kind in ("ema", "gradient"):
        with devices.scope("mirrored" if replicas > 1 else "none"):
            keras.utils.set_random_seed(0)
            model = Autoencoder(kind)
            model.compile(optimizer=keras.optimizers.SGD(0.1))
            model(batches[:BATCH])
        losses = Losses()
        model.fit(
            tf.data.Dataset.from_tensor_slices(batches).batch(BATCH), verbose=0, callbacks=[losses], shuffle=False
        )
        results[f"{kind} losses"] = losses.values
        differ = 0.0
        for place, weight in enumerate(model.weights):
            results[f"{kind} {place} {weight.name}"] = keras.ops.convert_to_numpy(weight)
            copies = [copy.numpy() for copy in getattr(weight.value, "values", [weight.value])]
            differ = max(differ, *[float(np.abs(copy - copies[0]).max()) for copy in copies])
        results[f"{kind} copies differ"] = differ
    np.savez(path, **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
