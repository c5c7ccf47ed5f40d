"""What the tests of serving export, what it answers in Keras, and commands as they are typed."""

import keras
import numpy as np
import pytest
from served import NAMES, SHAPE

CLASSES = {"probabilities", "class_id", "label"}
SIGNATURES = [
    ("serving_default", "float32", CLASSES),
    ("serve_uint8", "uint8", CLASSES),
    ("purify", "float32", {"purified"}),
    ("undefended", "float32", CLASSES),
]


def models() -> tuple[keras.Model, keras.Model]:
    """A purifier that changes images a good deal, and a classifier with decided opinions."""
    keras.utils.set_random_seed(1)
    images = keras.Input(SHAPE)
    hidden = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(images)
    purifier = keras.Model(images, keras.layers.Conv2D(3, 3, padding="same", activation="sigmoid")(hidden))
    purifier.layers[-1].kernel.assign(purifier.layers[-1].kernel * 5.0)
    images = keras.Input(SHAPE)
    hidden = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(keras.layers.Flatten()(images)))
    classifier = keras.Model(images, keras.layers.Dense(len(NAMES), kernel_initializer="random_normal")(hidden))
    classifier.layers[-1].kernel.assign(classifier.layers[-1].kernel * 3.0)
    return purifier, classifier


def expected(models, signature, images):
    """The outputs of `signature` straight from the Keras models, the softmax in NumPy."""
    purifier, classifier = models
    unit = np.float32(images) / np.float32(255) if images.dtype == np.uint8 else images
    kept = unit if signature == "undefended" else np.asarray(purifier(unit, training=False))
    if signature == "purify":
        return {"purified": kept}
    logits = np.asarray(classifier(kept, training=False), np.float64)
    powers = np.exp(logits)
    chosen = logits.argmax(axis=-1)
    return {
        "probabilities": powers / powers.sum(axis=-1, keepdims=True),
        "class_id": chosen,
        "label": np.array(NAMES)[chosen],
    }


def run(console, *arguments):
    """Runs a command as if these flags had been typed."""
    console(["command", *map(str, arguments)])


def refusal(capsys, console, *arguments):
    """Runs a command that is to fail; returns its one line."""
    with pytest.raises(SystemExit) as stopped:
        run(console, *arguments)
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err
