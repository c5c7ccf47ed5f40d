"""Asks a served model about images.

  python -m serving.client --server=localhost:8500 --model_name=digits --image=FILE.png

Prints a line per image: the file, its class, the probability of that class, the time the answer took. The server may be
serving.server or TF Serving. With --purified_out the image as the purifier leaves it is saved too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

from commands.run import run
from vqunet_tf.errors import UserError, choice
from vqunet_tf.pixels import to_uint8, to_unit

MAX_MESSAGE_BYTES = 64 * 2**20
CLASSIFICATION = {"probabilities", "class_id", "label"}
COLOURS = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


class Client:
    """A connection to one model of a server that speaks TF Serving's protocol.

    server: `host:port`.
    timeout: seconds allowed for each call.

    A call that fails raises a `UserError` in words; its `__cause__` is gRPC's error, with the status code.
    """

    def __init__(self, server: str, model_name: str, timeout: float = 10.0):
        self.server = server
        self.model_name = model_name
        self.timeout = timeout
        limits = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channel = grpc.insecure_channel(server, options=limits)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def predict(self, images: np.ndarray, signature: str = "serving_default") -> dict[str, np.ndarray]:
        """Returns the outputs of `signature` for a batch of images, each with the batch as dimension 0.

        images: `[B,H,W,C]`, float32 in [0,1] or uint8, as the signature wants; float64 is sent as float32.
        Strings come back as `str`.
        """
        if images.dtype == np.float64:
            images = images.astype(np.float32)
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self.model_name
        request.model_spec.signature_name = signature
        request.inputs["images"].CopyFrom(tf.make_tensor_proto(images))
        response = self._call(self._stub.Predict, request)
        return {name: _decoded(tf.make_ndarray(tensor)) for name, tensor in response.outputs.items()}

    def signatures(self) -> dict[str, dict[str, dict[str, tf.TensorSpec]]]:
        """Returns name → {"inputs": {name: TensorSpec}, "outputs": {name: TensorSpec}}; None is a free dimension."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = self.model_name
        response = self._call(self._stub.GetModelMetadata, request)
        found = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(found)
        return {
            name: {"inputs": _specs(definition.inputs), "outputs": _specs(definition.outputs)}
            for name, definition in found.signature_def.items()
            if not name.startswith("__")  # TensorFlow's own, such as __saved_model_init_op
        }

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code == grpc.StatusCode.UNAVAILABLE:
                text = f"no server answers at {self.server}: start one with python -m serving.server, or mend --server"
            elif code == grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"{self.server} did not answer within {self.timeout:g} s: allow more with --timeout"
            else:
                text = f"{self.server} answers {code.name}: {details}"
            raise UserError(text) from error


def _specs(tensors: Any) -> dict[str, tf.TensorSpec]:
    return {
        name: tf.TensorSpec(
            [None if dimension.size < 0 else dimension.size for dimension in info.tensor_shape.dim], info.dtype, name
        )
        for name, info in tensors.items()
    }


def _decoded(array: np.ndarray) -> np.ndarray:
    """Returns bytes as text, anything else as it is."""
    return np.vectorize(bytes.decode, otypes=[str])(array) if array.dtype == object else array


def read_image(path: str, shape: Sequence[int]) -> np.ndarray:
    """Reads an image file as uint8 `[H,W,C]` of exactly `shape`, in that many channels.

    Raises a `UserError` for another size (nothing is resized: that would change what is asked), a file that is no
    image, or one of more than 8 bits per channel.
    """
    height, width, channels = shape
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT:
                raise UserError(f"{path}: expected 8 bits per channel, got Pillow mode {image.mode}: convert it first")
            if image.size != (width, height):
                got = f"{image.width}x{image.height}"
                raise UserError(f"{path}: expected {width}x{height} pixels, got {got}: crop or resize it first")
            return np.asarray(image.convert(COLOURS[channels])).reshape(height, width, channels)
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None


def main(values: flags.FlagValues) -> None:
    if values.purified_out and len(values.image) != 1:
        raise UserError(f"--purified_out saves one image, got {len(values.image)} of --image: ask for one at a time")
    with Client(values.server, values.model_name, values.timeout) as client:
        signatures = client.signatures()
        choice(
            "classifying signature", values.signature, filter(lambda name: _classifies(signatures[name]), signatures)
        )
        spec = signatures[values.signature]["inputs"]["images"]
        shape = tuple(spec.shape[1:])
        if len(shape) != 3 or shape[-1] not in COLOURS:
            raise UserError(f"{values.model_name} takes images of shape {list(shape)}: expected 1, 3 or 4 channels")
        images = [read_image(path, shape) for path in values.image]
        width = max(map(len, values.image))
        for path, image in zip(values.image, images, strict=True):
            batch = image[None] if spec.dtype == tf.uint8 else np.asarray(to_unit(image[None]))
            start = time.perf_counter()
            answer = client.predict(batch, values.signature)
            elapsed = 1000 * (time.perf_counter() - start)
            label, probability = answer["label"][0], answer["probabilities"][0, answer["class_id"][0]]
            print(f"{path:<{width}}  {label}  {probability:.4f}  {elapsed:7.1f} ms")
        if values.purified_out:
            purified = client.predict(np.asarray(to_unit(images[0][None])), "purify")["purified"]
            _save(purified[0], values.purified_out)


def _classifies(signature: dict[str, dict[str, tf.TensorSpec]]) -> bool:
    return signature["inputs"].keys() == {"images"} and signature["outputs"].keys() >= CLASSIFICATION


def _save(image: np.ndarray, path: str) -> None:
    """Writes `image`, float32 `[H,W,C]` in [0,1], to a file of the format that its name says."""
    pixels = to_uint8(image)
    try:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--purified_out {path} cannot be written: {error}") from None


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_string("server", "localhost:8500", "where the server is, host:port", flag_values=values)
    flags.DEFINE_string("model_name", None, "the model to ask", flag_values=values)
    flags.DEFINE_multi_string("image", None, "an image file; may be repeated", flag_values=values)
    flags.DEFINE_string("signature", "serving_default", "which way of classifying to ask for", flag_values=values)
    flags.DEFINE_string("purified_out", None, "a file for the purified image", flag_values=values)
    flags.DEFINE_float("timeout", 10.0, "seconds allowed for each call", lower_bound=0, flag_values=values)
    run(main, values, str(__doc__), required=("model_name", "image"), argv=argv)


if __name__ == "__main__":
    console()
