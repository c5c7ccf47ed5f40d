"""The proof of an export: a SavedModel gives what the Keras models give."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from serving import c_api
from serving.score import Score, signs, with_quantisation
from serving.signatures import specs
from vqunet_tf.errors import UserError
from vqunet_tf.pixels import to_unit

TOLERANCE = 1e-5
IMAGES = 64
BATCH_SIZES = (1, 7, 64)
SEED = 0

Parity = dict[str, dict[str, float]]  # signature → output → largest difference


def measure(
    path: Path,
    purifier: keras.Model,
    classifier: keras.Model,
    class_names: Sequence[str],
    image_shape: Sequence[int],
    score: Score,
) -> Parity:
    """Returns max |SavedModel - Keras| per signature and output, over 64 random images in batches of 1, 7 and 64.

    Keras answers in the same batches: where a vector lies between two codes, rounding decides, and that differs with the
    size of a batch. The first batch of a size is asked twice: a SavedModel carries the Keras random state along, so that
    a layer that is random at inference agrees the first time.

    For `class_id` it is the Keras probability lost by that class against the best one, 0 where they agree, so that
    a tie is no difference. A `label` that is not the name of its `class_id` counts as 1.
    """
    signatures = tf.saved_model.load(str(path)).signatures
    keras_answers = _reference(purifier, classifier, image_shape, score)
    pixels, floats = _random_images(image_shape)
    parity: Parity = {name: {} for name in specs(image_shape)}
    for size in BATCH_SIZES:
        for start in range(0, IMAGES, size):
            part = slice(start, start + size)
            wanted = {
                dtype: {key: value.numpy() for key, value in keras_answers(to_unit(images[part])).items()}
                for dtype, images in (("uint8", pixels), ("float32", floats))
            }
            for name in parity:
                images, reference = _question(name, pixels[part], floats[part], wanted)
                for _ in range(1 if start else 2):
                    answer = {key: value.numpy() for key, value in signatures[name](images=tf.constant(images)).items()}
                    logits = reference["before" if name == "undefended" else "after"]
                    for key, value in _differences(answer, reference, logits, class_names).items():
                        parity[name][key] = float(np.maximum(parity[name].get(key, 0.0), value))  # keeps a NaN
    return parity


def _reference(purifier: keras.Model, classifier: keras.Model, image_shape: Sequence[int], score: Score) -> Any:
    """A function images float32 `[B,H,W,C]` → `purified` images, logits `before` and `after` that, and `score`."""
    inside = with_quantisation(purifier)

    def answers(images: Any) -> dict[str, Any]:
        purified = tf.cast(purifier(images, training=False), tf.float32)
        before, after = (tf.cast(classifier(part, training=False), tf.float32) for part in (images, purified))
        found = score(signs(images, purified, inside(images)[1], before, after))
        return {"purified": purified, "before": before, "after": after, "score": found}

    return tf.function(answers, input_signature=[tf.TensorSpec((None, *image_shape), tf.float32)])


def _random_images(image_shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and floats in [0, 1], `[64,H,W,C]` each."""
    generator = np.random.default_rng(SEED)
    shape = (IMAGES, *image_shape)
    return generator.integers(0, 256, shape, dtype=np.uint8), generator.random(shape, dtype=np.float32)


def _question(
    name: str, pixels: np.ndarray, floats: np.ndarray, wanted: dict[str, dict[str, np.ndarray]]
) -> tuple[Any, dict[str, np.ndarray]]:
    """What a signature is asked, and what Keras says to that."""
    if name == "serve_encoded":
        return [tf.io.encode_png(image).numpy() for image in pixels], wanted["uint8"]
    return (pixels, wanted["uint8"]) if name == "serve_uint8" else (floats, wanted["float32"])


def _differences(
    answer: dict[str, np.ndarray], reference: dict[str, np.ndarray], logits: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """Compares an answer with what Keras gives: purified images and scores, and logits `[B,K]`."""
    if "purified" in answer:
        return {"purified": _largest(answer["purified"] - reference["purified"])}
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    expected = powers / powers.sum(axis=-1, keepdims=True)  # [B, K]
    chosen = np.take_along_axis(expected, answer["class_id"][:, None], axis=-1)[:, 0]  # [B]
    names = [class_names[index].encode() for index in answer["class_id"]]
    found = {
        "probabilities": _largest(answer["probabilities"] - expected),
        "class_id": _largest(expected.max(axis=-1) - chosen),
        "label": float(answer["label"].tolist() != names),
    }
    if "adversarial_score" in answer:
        found["adversarial_score"] = _largest(answer["adversarial_score"] - reference["score"])
    return found


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def c_libraries() -> list[Path]:
    """TensorFlow's C library, where the installation has one."""
    return sorted(Path(tf.sysconfig.get_lib()).glob("libtensorflow_cc.*"))


def measure_through_c(path: Path, image_shape: Sequence[int]) -> float | None:
    """Returns max |answer through TensorFlow's C API - answer in Python| over all signatures and a batch of 3.

    A process of its own loads the SavedModel with the C library of the installed TensorFlow and no Python code of a
    model, as TF Serving would: an operation that TensorFlow itself does not bring fails there, as a `UserError`. None
    where the installation has no such library.
    """
    libraries = c_libraries()
    if not libraries:
        return None
    definition = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0]
    signatures = tf.saved_model.load(str(path)).signatures
    pixels, floats = (images[:3] for images in _random_images(image_shape))
    requests, wanted = [], []
    for name in specs(image_shape):
        images, _ = _question(name, pixels, floats, {"uint8": {}, "float32": {}})
        tensors = definition.signature_def[name]
        fed = np.array(images, dtype=object) if name == "serve_encoded" else images
        names = sorted(tensors.outputs)
        requests.append(({tensors.inputs["images"].name: fed}, [tensors.outputs[key].name for key in names]))
        answer = signatures[name](images=tf.constant(images))
        wanted.append([answer[key].numpy() for key in names])
    command = [sys.executable, c_api.__file__, str(libraries[0])]
    done = subprocess.run(command, input=pickle.dumps((str(path), requests)), capture_output=True, check=False)
    if done.returncode:
        line = (done.stderr.decode(errors="replace").splitlines() or ["no message"])[-1]
        raise UserError(f"the SavedModel does not run without Python, as in TF Serving: {line[:300]}")
    worst = 0.0
    for found, reference in zip(pickle.loads(done.stdout), wanted, strict=True):
        for left, right in zip(found, reference, strict=True):
            same = float(left.tolist() != right.tolist()) if left.dtype == object else _largest(left - right)
            worst = float(np.maximum(worst, same))
    if not worst <= TOLERANCE:
        raise UserError(f"answers through TensorFlow's C API differ by {worst:.1e}, allowed {TOLERANCE:.0e}")
    return worst


def refuse_difference(parity: Parity) -> None:
    """Raises a `UserError` for the first output that differs by more than 1e-5, or is not a number."""
    for name, outputs in parity.items():
        for key, value in outputs.items():
            if not value <= TOLERANCE:  # a NaN fails too
                raise UserError(
                    f"{key} of {name} differs by {value:.1e} between the SavedModel and the Keras models, "
                    f"allowed {TOLERANCE:.0e}: is a layer random at inference, or does it keep a state?"
                )


def to_json(parity: Parity, through_c: float | None) -> dict[str, Any]:
    """What parity.json holds: what was compared, and how; `c_api` is null where it was not asked."""
    return {
        "tolerance": TOLERANCE,
        "images": IMAGES,
        "batch_sizes": list(BATCH_SIZES),
        "seed": SEED,
        "signatures": parity,
        "c_api": through_c,
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
    }
