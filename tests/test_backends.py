"""TensorFlow, JAX and PyTorch: one saved model, equal outputs, equal training steps. A process per backend."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from vqunet_tf import DefendedClassifier, VQUNet
from vqunet_tf.models import classifiers
from vqunet_tf.recipes import preset

SCRIPT = str(Path(__file__).with_name("backends.py"))
LOSSES = ("loss", "pixel", "guidance", "feature", "codebook")
INSTALLED = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Backend -> what tests/backends.py found with the model that this process (TensorFlow) saved."""
    folder = tmp_path_factory.mktemp("backends")
    keras.utils.set_random_seed(0)
    purifier = VQUNet(widths=(8, 12), num_embeddings=(16, 32), embedding_dim=(4, 6), channels=3)
    images = np.random.default_rng(1).random((16, 16, 16, 3), dtype="float32")
    purifier.graph(images, training=True)  # codes where a first batch puts them
    classifier = classifiers.build("residual", (16, 16, 3), 4, (4, 8), 1)
    DefendedClassifier(purifier, classifier).save(folder / "defended.keras")
    sizes = {"widths": (8, 12), "num_embeddings": (16, 32), "embedding_dim": (4, 6)}
    gated = VQUNet(**sizes, channels=3, gated=True, pixel_share=0.4, classes=4)
    gated.graph(images, training=True)
    head = gated.graph.get_layer("classes")
    head.set_weights([np.random.default_rng(3).normal(size=(12, 4)).astype("float32"), np.zeros(4, "float32")])
    gated.save(folder / "gated.keras")
    digits, start = (
        np.random.default_rng(2).random((64, 32, 32, 1), dtype="float32"),
        preset("smoke", "digits").purifier,
    )
    start = VQUNet(**dataclasses.asdict(start), channels=1)
    start.graph(digits, training=True)
    start.save(folder / "start.keras")
    classifiers.build("residual", (32, 32, 1), 10, (4, 8), 1).save(folder / "classifier.keras")
    for name in ("tensorflow", *INSTALLED):
        subprocess.run(
            [sys.executable, SCRIPT, str(folder)], check=True, env={**os.environ, "KERAS_BACKEND": name}, timeout=600
        )
    results = {name: dict(np.load(folder / f"{name}.npz")) for name in ("tensorflow", *INSTALLED)}
    for name, found in results.items():
        rows = [line.split(",") for line in (folder / f"run_{name}" / "metrics.csv").read_text().splitlines()[1:]]
        found["losses of a run"] = np.array([float(row[3]) for row in rows if row[2] in LOSSES])
        assert len(found["losses of a run"]) == 3 * len(LOSSES) and (folder / f"run_{name}" / "purifier.keras").exists()
    return results


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_backends_agree(backend, found):
    if backend not in INSTALLED:
        pytest.skip(f"{backend} is not installed")
    ours, theirs = found["tensorflow"], found[backend]
    assert set(ours) == set(theirs)
    for name in ours:
        tolerance = 1e-3 if name.startswith(("trained", "losses")) else 1e-4
        if name == "adversaries":  # a step is a sign: where the gradient is all but zero, rounding decides it
            assert np.mean(np.abs(ours[name] - theirs[name]) > tolerance) < 0.01
        else:
            np.testing.assert_allclose(theirs[name], ours[name], atol=tolerance, err_msg=name)


def test_training_moved_the_weights(found):
    for name in ("losses", "losses adaptive"):
        means = found["tensorflow"][name]  # Keras gives the mean so far
        assert means[2] < means[1] < means[0]
