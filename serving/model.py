"""One version of an exported model: its signatures, the checks of a request, the answers. Knows no server.

It runs what `serving.export` writes, and any SavedModel whose signatures have the batch as dimension 0 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from serving.encoded import check_encoded
from serving.refusal import EXHAUSTED, INVALID, Refused, listed, quoted
from serving.tensors import checked_array

DEFAULT_SIGNATURE = "serving_default"
WARMUP = Path("assets.extra") / "tf_serving_warmup_requests"  # where TF Serving looks for it

Arrays = dict[str, np.ndarray]


class Signature:
    """A function of a loaded model: named arrays in, named arrays out, the batch first in all of them."""

    def __init__(self, name: str, function: Any):
        self.name = name
        self.function = function
        self.inputs: dict[str, tf.TensorSpec] = function.structured_input_signature[1]
        self.outputs = list(function.structured_outputs)

    def decode(self, protos: Mapping[str, Any], max_images: int) -> Arrays:
        """Returns the arrays of a request, or raises a `Refused` in words.

        Floats must be finite and in [0,1], strings must be PNG or JPEG files; there may be up to `max_images`, and as
        many in each input.
        """
        _check_known(f"input of {self.name!r}", protos, self.inputs)
        arrays = {}
        for name, spec in self.inputs.items():
            if name not in protos:
                raise Refused(INVALID, f"missing input {name!r} of {self.name!r}")
            arrays[name] = array = checked_array(name, protos[name], spec)
            if len(array) > max_images:
                words = f"expected at most {max_images} images in a request, got {len(array)}: send them in parts"
                raise Refused(INVALID, words)
            _check_values(name, array)
        if len({len(array) for array in arrays.values()}) != 1:
            sizes = listed(f"{len(array)} in {name!r}" for name, array in arrays.items())
            raise Refused(INVALID, f"expected as many images in every input, got {sizes}")
        return arrays

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Returns the outputs that a request asks for, all if it names none."""
        _check_known(f"output of {self.name!r}", names, self.outputs)
        return list(names) or self.outputs

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the function. What the images themselves are to blame for raises a `Refused`."""
        try:
            answer = self.function(**{name: tf.constant(array) for name, array in inputs.items()})
            return {name: tensor.numpy() for name, tensor in answer.items()}
        except tf.errors.InvalidArgumentError as error:
            raise Refused(INVALID, f"the model cannot read the images: {_reason(error)}") from None
        except (tf.errors.ResourceExhaustedError, MemoryError):
            raise Refused(EXHAUSTED, "the server has too little memory for this request: send fewer images") from None


class Model:
    """A SavedModel in memory.

    path: `<base>/<version>`, a folder with `saved_model.pb`.
    Raises what TensorFlow raises if it cannot be loaded.
    """

    def __init__(self, path: Path):
        self.path = path
        self.version = int(path.name)
        saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        self.signature_def = dict(saved.meta_graphs[0].signature_def)
        self._loaded = tf.saved_model.load(str(path))  # kept: it owns the variables
        self.signatures = {name: Signature(name, function) for name, function in self._loaded.signatures.items()}
        if not self.signatures:
            raise ValueError("it has no signatures")
        self.labels = _labels(path / "assets" / "labels.txt")

    def signature(self, name: str) -> Signature:
        """Returns a signature by name, the default one for an empty name."""
        found = self.signatures.get(name or DEFAULT_SIGNATURE)
        if found is None:
            asked = quoted(name or DEFAULT_SIGNATURE)[1:-1]
            words = f'Serving signature key "{asked}" not found'
            raise Refused(INVALID, f"{words}: expected one of {listed(self.signatures)}")
        return found

    def warm_up(self, batch_sizes: Iterable[int]) -> int:
        """Runs the warm-up requests that came with the model, else blank images; returns how many.

        TensorFlow plans and allocates at the first call of a function: that is not to happen to a client.
        A request of the model's own that fails raises a `Refused`: as in TF Serving, such a version is not served.
        """
        done = 0
        if (self.path / WARMUP).is_file():
            for request in _warmup_requests(self.path / WARMUP):
                signature = self.signature(request.model_spec.signature_name)
                signature(signature.decode(request.inputs, max_images=2**31))
                done += 1
            return done
        for signature in self.signatures.values():
            shapes = {name: spec.shape[1:] for name, spec in signature.inputs.items()}
            if all(shape.is_fully_defined() for shape in shapes.values()) and not _takes_strings(signature):
                for size in batch_sizes:
                    signature(
                        {
                            name: np.zeros((size, *shapes[name]), spec.dtype.as_numpy_dtype)
                            for name, spec in signature.inputs.items()
                        }
                    )
                    done += 1
        return done


def _warmup_requests(path: Path) -> Iterator[Any]:
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        if log.HasField("predict_log"):
            yield log.predict_log.request


def _takes_strings(signature: Signature) -> bool:
    return any(spec.dtype == tf.string for spec in signature.inputs.values())


def _labels(path: Path) -> list[str]:
    """Class names in the order of `class_id`; empty where the model brings none."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise Refused(INVALID, f"unknown {kind}: expected {listed(known)}, got {quoted(unknown[0])}")


def _check_values(name: str, array: np.ndarray) -> None:
    if array.dtype == object:
        check_encoded(name, array.ravel())
    elif array.dtype.kind == "f":
        low, high = array.min(), array.max()  # a NaN anywhere makes both NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise Refused(INVALID, f"expected finite numbers in {name!r}, got NaN or infinity")
        if low < 0 or high > 1:
            words = f"expected {name!r} in [0,1], got [{low:g}, {high:g}]"
            raise Refused(INVALID, f"{words}: divide bytes by 255, or use serve_uint8")


def _reason(error: tf.errors.OpError) -> str:
    """Returns what TensorFlow says, without the names of nodes around it."""
    lines = [line.strip() for line in str(error.message).splitlines()]
    lines = [line for line in lines if line and "Graph execution error" not in line and "Detected at node" not in line]
    return (lines[0] if lines else "invalid argument").partition(" [[")[0].partition("{{")[0].strip()
