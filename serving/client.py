"""Asks a served model about images.

  python -m serving.client --server=localhost:8500 --model_name=digits --image=FILE.png

Prints a line per image: its name, its class, the probability of that class, the score for having been tampered with
(where the model gives one), the time the answer took. The server may be serving.server or TF Serving. An --image is a
file, a folder, a .npy array, or - for standard input. With --compare the answer of the classifier without the purifier
stands beside it, with --json every line is a JSON object, with --purified_out the purified image is saved.

In Python: `from serving.client import Client`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from absl import flags
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from commands.run import run
from serving.answers import SCORE, Answer, Asked, rows
from serving.connection import ClientTls, call, open_channel
from serving.images import COLOURS, Source, save_image, sources
from serving.tensors import to_array, to_proto
from vqunet_tf.errors import UserError, choice

CLASSIFICATION = {"probabilities", "class_id", "label"}
UNDEFENDED = "undefended"

Specs = dict[str, dict[str, tf.TensorSpec]]  # "inputs" or "outputs" → name → spec


class Client:
    """A connection to one model of a server that speaks TF Serving's protocol.

        with Client("localhost:8500", "digits") as client:
            answer = client.predict(images)

    server: `host:port`.
    timeout: seconds allowed for each call, all its tries together.
    version: asks this version; None for the server's choice.
    tls: how to encrypt; None for a plain connection.
    retries: how often a call is tried again while the server is unavailable.

    A call that fails raises a `UserError` in words; its `__cause__` is gRPC's error, with the status code.
    """

    def __init__(
        self,
        server: str,
        model_name: str,
        timeout: float = 10.0,
        *,
        version: int | None = None,
        tls: ClientTls | None = None,
        retries: int = 4,
    ):
        self.server = server
        self.model_name = model_name
        self.timeout = timeout
        self.version = version
        self.retries = retries
        self._channel = open_channel(server, tls)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def predict(self, images: np.ndarray | Sequence[bytes], signature: str = "serving_default") -> dict[str, Any]:
        """Returns the outputs of `signature` for a batch of images, each an array with the batch as dimension 0.

        images: `[B,H,W,C]`, float32 in [0,1] or uint8, or the bytes of B files, as the signature wants; float64 is sent
            as float32. A request and its answer may have 64 MiB: send more in parts.
        Strings come back as `str`.
        """
        array = images if isinstance(images, np.ndarray) else np.array(list(images), object)
        request = predict_pb2.PredictRequest(model_spec=self._spec())
        request.model_spec.signature_name = signature
        request.inputs["images"].CopyFrom(to_proto(array.astype(np.float32) if array.dtype == np.float64 else array))
        response = self._call(self._prediction.Predict, request)
        return {name: _decoded(to_array(tensor)) for name, tensor in response.outputs.items()}

    def signatures(self) -> dict[str, Specs]:
        """Returns name → {"inputs": {name: TensorSpec}, "outputs": {name: TensorSpec}}; None is a free dimension."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec(), metadata_field=["signature_def"]
        )
        response = self._call(self._prediction.GetModelMetadata, request)
        found = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(found)
        return {
            name: {"inputs": _specs(definition.inputs), "outputs": _specs(definition.outputs)}
            for name, definition in found.signature_def.items()
            if not name.startswith("__")  # TensorFlow's own, such as __saved_model_init_op
        }

    def status(self) -> dict[int, str]:
        """Returns version → state, such as `AVAILABLE` or `END`."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._spec())
        response = self._call(self._models.GetModelStatus, request)
        name = get_model_status_pb2.ModelVersionStatus.State.Name
        return {status.version: name(status.state) for status in response.model_version_status}

    def _spec(self) -> Any:
        spec = model_pb2.ModelSpec(name=self.model_name)
        if self.version is not None:
            spec.version.value = self.version
        return spec

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return call(method, request, self.timeout, self.retries)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code == grpc.StatusCode.UNAVAILABLE and any(word in str(details) for word in ("queue", "stopping")):
                text = f"{self.server} answers UNAVAILABLE: {details}: try again later"
            elif code == grpc.StatusCode.UNAVAILABLE:
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


# === Command ===


def main(values: flags.FlagValues) -> None:
    found = sources(values.image)
    if values.purified_out and len(found) != 1:
        raise UserError(f"--purified_out saves one image, got {len(found)} of --image: ask for one at a time")
    tls = None
    if values.tls or values.tls_ca or values.tls_certificate or values.tls_key:
        tls = ClientTls(values.tls_ca, values.tls_certificate, values.tls_key)
    options = {"version": values.version, "tls": tls, "retries": values.retries}
    with Client(values.server, values.model_name, values.timeout, **options) as client:
        signatures = client.signatures()
        _check_signatures(values, signatures)
        width = max(len(source.name) for source in found)
        for asked in _ask(client, values, signatures, found):
            print(asked.as_json() if values.json else asked.as_line(width), flush=True)
        if values.purified_out:
            spec = signatures["purify"]["inputs"]["images"]
            image = found[0].as_input(spec, spec.shape[1:])
            save_image(client.predict(image[None], "purify")["purified"][0], values.purified_out)


def _check_signatures(values: flags.FlagValues, signatures: dict[str, Specs]) -> None:
    """Refuses flags that ask for what the model does not have."""
    classifying = [name for name, specs in signatures.items() if _classifies(specs)]
    choice("classifying signature", values.signature, classifying)
    for flag, needed in (("--compare", UNDEFENDED), ("--purified_out", "purify")):
        if getattr(values, flag[2:]) and needed not in signatures:
            raise UserError(f"{flag} needs the signature {needed!r}, which {values.model_name} does not have")
    if values.alarm is not None and SCORE not in signatures[values.signature]["outputs"]:
        raise UserError(f"--alarm needs the output {SCORE!r}, which {values.signature} does not have: export it anew")


def _classifies(signature: Specs) -> bool:
    return signature["inputs"].keys() == {"images"} and signature["outputs"].keys() >= CLASSIFICATION


def _ask(
    client: Client, values: flags.FlagValues, signatures: dict[str, Specs], found: list[Source]
) -> Iterator[Asked]:
    """Asks about the images in batches, and gives what is said about each."""
    for start in range(0, len(found), values.batch_size):
        batch = found[start : start + values.batch_size]
        outputs, elapsed = _timed(client, values.signature, signatures, batch)
        alone: list[Answer | None] = [None] * len(batch)
        if values.compare:
            alone = list(rows(_timed(client, UNDEFENDED, signatures, batch)[0]))
        for source, answer, undefended in zip(batch, rows(outputs), alone, strict=True):
            alarm = None if values.alarm is None or answer.score is None else answer.score > values.alarm
            yield Asked(source.name, answer, elapsed, undefended, alarm)


def _timed(
    client: Client, name: str, signatures: dict[str, Specs], batch: list[Source]
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the outputs of a signature for a batch, and the milliseconds it took."""
    spec = signatures[name]["inputs"]["images"]
    shape = tuple(spec.shape[1:])
    if spec.dtype != tf.string and (len(shape) != 3 or shape[-1] not in COLOURS):
        raise UserError(f"{client.model_name} takes images of shape {list(shape)}: expected 1, 3 or 4 channels")
    elements = [source.as_input(spec, shape) for source in batch]
    start = time.perf_counter()
    outputs = client.predict(elements if spec.dtype == tf.string else np.stack(elements), name)
    return outputs, 1000 * (time.perf_counter() - start)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def text(name: str, default: str | None, words: str) -> None:
        flags.DEFINE_string(name, default, words, flag_values=values)

    def switch(name: str, words: str) -> None:
        flags.DEFINE_boolean(name, False, words, flag_values=values)

    text("server", "localhost:8500", "where the server is, host:port")
    text("model_name", None, "the model to ask")
    flags.DEFINE_multi_string(
        "image", None, "a file, a folder, a .npy array, or - for standard input; may be repeated", flag_values=values
    )
    text("signature", "serving_default", "which way of classifying to ask for; serve_encoded takes files of any size")
    flags.DEFINE_integer("version", None, "the version to ask, else the server's choice", 0, flag_values=values)
    flags.DEFINE_integer("batch_size", 1, "images in a request; all of them share its time", 1, flag_values=values)
    switch("compare", "ask the classifier without the purifier too")
    switch("json", "print a JSON object per line")
    flags.DEFINE_float(
        "alarm",
        None,
        "mark images with a higher adversarial score (the export's score.json has one)",
        flag_values=values,
    )
    text("purified_out", None, "a file for the purified image")
    flags.DEFINE_float("timeout", 10.0, "seconds allowed for each call", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("retries", 4, "tries beyond the first while the server is unavailable", 0, flag_values=values)
    switch("tls", "encrypt, and trust the authorities that gRPC knows")
    text("tls_ca", None, "encrypt, and trust certificates signed by this one, in PEM")
    text("tls_certificate", None, "the client's certificate in PEM, for a server that asks for one")
    text("tls_key", None, "the key of --tls_certificate in PEM")
    return values


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    run(main, _flags(), str(__doc__), required=("model_name", "image"), argv=argv)


if __name__ == "__main__":
    console()
