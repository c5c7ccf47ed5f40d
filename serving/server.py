"""A local gRPC server for an exported model, speaking TF Serving's protocol.

  python -m serving.server --model_base_path=exported/digits --model_name=digits

It serves the highest version found at start, on loopback, until SIGTERM or Ctrl-C, and finishes what it has begun.
Messages may have 64 MiB. It is for trying a model out on one machine: in production run TF Serving on the same folder;
clients need no change.
"""

from __future__ import annotations

import errno
import math
import queue
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import tensorflow as tf
from absl import flags
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    status_pb2,
)

from commands.run import run
from vqunet_tf.errors import UserError

MAX_MESSAGE_BYTES = 64 * 2**20
GRACE_SECONDS = 10


# === Model ===


class RequestError(Exception):
    """A request that the model cannot answer: says what was expected and what was got."""


class ServedModel:
    """One version of an exported model: its signatures, the checks of a request, the answers. Knows no gRPC.

    base_path: a folder of versions, `<base_path>/<number>/saved_model.pb`; the highest number is served.
    A `UserError` is raised if there is none, or if it cannot be loaded.
    """

    def __init__(self, name: str, base_path: Path | str):
        self.name = name
        path = _highest_version(Path(base_path))
        self.version = int(path.name)
        try:
            self._loaded = tf.saved_model.load(str(path))  # kept: it owns the variables
            saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        except Exception as error:  # TensorFlow raises many kinds for a damaged file
            raise UserError(f"{path} cannot be loaded with TensorFlow {tf.__version__}: {error}") from None
        self.signatures = dict(self._loaded.signatures)
        self.signature_def = dict(saved.meta_graphs[0].signature_def)

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], outputs: Iterable[str] = ()
    ) -> dict[str, np.ndarray]:
        """Returns the named outputs of `signature` (default: all), or raises a `RequestError`.

        inputs: name → array, a batch of at least one; floats in [0,1].
        """
        if signature not in self.signatures:
            known = _listed(self.signatures)
            raise RequestError(f'Serving signature key "{signature}" not found: expected one of {known}')
        function = self.signatures[signature]
        specs = function.structured_input_signature[1]
        wanted = list(outputs) or list(function.structured_outputs)
        _check_known(f"output of {signature!r}", wanted, function.structured_outputs)
        _check_known(f"input of {signature!r}", inputs, specs)
        for name, spec in specs.items():
            if name not in inputs:
                raise RequestError(f"missing input {name!r} of {signature!r}")
            _check_tensor(name, inputs[name], spec)
        answer = function(**{name: tf.constant(array) for name, array in inputs.items()})
        return {name: answer[name].numpy() for name in wanted}


def _highest_version(base_path: Path) -> Path:
    if not base_path.is_dir():
        raise UserError(f"--model_base_path {base_path} is not a folder: give the --export_dir of serving.export")
    versions = [path.parent for path in base_path.glob("*/saved_model.pb") if path.parent.name.isdecimal()]
    if not versions:
        inside = (base_path / "saved_model.pb").exists()
        hint = f"did you mean {base_path.parent}?" if inside else "export a run there first"
        raise UserError(f"no version to serve: expected {base_path}/<number>/saved_model.pb, found none; {hint}")
    return max(versions, key=lambda path: int(path.name))


def _check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise RequestError(f"unknown {kind}: expected {_listed(known)}, got {unknown[0]!r}")


def _check_tensor(name: str, array: np.ndarray, spec: tf.TensorSpec) -> None:
    """Raises a `RequestError` unless dtype, shape and range are those of `spec`, whose batch is free."""
    if array.dtype != spec.dtype.as_numpy_dtype:
        got = "string" if array.dtype == object else array.dtype.name
        raise RequestError(f"expected {name!r} as {spec.dtype.name}, got {got}")
    if not spec.shape.is_compatible_with(array.shape):
        raise RequestError(f"expected {name!r} of shape {list(spec.shape)}, None the batch, got {list(array.shape)}")
    if not array.size:
        raise RequestError(f"expected at least one image in {name!r}, got shape {list(array.shape)}")
    if spec.dtype.is_floating:
        if not np.isfinite(array).all():
            raise RequestError(f"expected finite numbers in {name!r}, got NaN or infinity")
        if array.min() < 0 or array.max() > 1:
            got = f"[{array.min():g}, {array.max():g}]"
            raise RequestError(f"expected {name!r} in [0,1], got {got}: divide bytes by 255, or use serve_uint8")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# === gRPC ===


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict and GetModelMetadata of TF Serving, for one model; the other calls answer UNIMPLEMENTED."""

    def __init__(self, model: ServedModel):
        self.model = model

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        _require(self.model, request.model_spec, context)
        signature = request.model_spec.signature_name or "serving_default"
        try:
            inputs = {name: _array(name, tensor) for name, tensor in request.inputs.items()}
            answer = self.model.predict(signature, inputs, request.output_filter)
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = predict_pb2.PredictResponse()
        _describe(self.model, response.model_spec)
        response.model_spec.signature_name = signature
        for name, array in answer.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
        return response

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        _require(self.model, request.model_spec, context)
        if list(request.metadata_field) != ["signature_def"]:
            got = _listed(request.metadata_field) or "none"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected the metadata field signature_def, got {got}")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        _describe(self.model, response.model_spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, definition in self.model.signature_def.items():
            signatures.signature_def[name].CopyFrom(definition)
        response.metadata["signature_def"].Pack(signatures)
        return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus of TF Serving: the one version, AVAILABLE."""

    def __init__(self, model: ServedModel):
        self.model = model

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        _require(self.model, request.model_spec, context)
        response = get_model_status_pb2.GetModelStatusResponse()
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        response.model_version_status.add(version=self.model.version, state=available, status=status_pb2.StatusProto())
        return response


def _require(model: ServedModel, spec: Any, context: grpc.ServicerContext) -> None:
    """Aborts the call, with TF Serving's status and opening words, unless `spec` asks for `model`."""
    code = grpc.StatusCode
    here = f"this server has {model.name!r} version {model.version} and no labels"
    if spec.name != model.name:
        context.abort(code.NOT_FOUND, f"Servable not found for request: Latest({spec.name}): {here}")
    if spec.version_label:
        context.abort(code.INVALID_ARGUMENT, f"Unrecognized servable version label: {spec.version_label}: {here}")
    if spec.HasField("version") and spec.version.value != model.version:
        wanted = f"Specific({spec.name}, {spec.version.value})"
        context.abort(code.NOT_FOUND, f"Servable not found for request: {wanted}: {here}")


def _describe(model: ServedModel, spec: Any) -> None:
    spec.name = model.name
    spec.version.value = model.version


def _array(name: str, tensor: Any) -> np.ndarray:
    """Decodes a TensorProto; a `RequestError` says why it cannot be."""
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    try:
        # A proto may state a huge shape and one value to fill it with: bound it before it is laid out.
        size = math.prod(shape) * max(1, tf.as_dtype(tensor.dtype).size)
        if tensor.tensor_shape.unknown_rank or min(shape, default=0) < 0 or size > MAX_MESSAGE_BYTES:
            raise RequestError(f"expected {name!r} of a known shape of at most {MAX_MESSAGE_BYTES} bytes, got {shape}")
        return tf.make_ndarray(tensor)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name!r} is not a well-formed TensorProto: {error}") from None


def start(model: ServedModel, host: str = "localhost", port: int = 8500) -> tuple[grpc.Server, int]:
    """Starts serving `model` in threads; returns the server and its port, which port 0 leaves to the system.

    A port or a host that cannot be had raises a `UserError`.
    """
    _refuse_taken(host, port)
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),  # else two servers share a port and each gets half the calls
    ]
    server = grpc.server(futures.ThreadPoolExecutor(), options=options)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(model), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(model), server)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:  # in the moment since it was free
        _refuse(host, port, "gRPC could not bind it")
    server.start()
    return server, bound


def _refuse_taken(host: str, port: int) -> None:
    """Tries every address of `host`: gRPC itself is content if one of them is free."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        _refuse(host, port, error.strerror or str(error))
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last server's closed calls linger
                probe.bind(address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as ::1 where there is no IPv6
                _refuse(host, port, error.strerror or str(error))


def _refuse(host: str, port: int, reason: str) -> NoReturn:
    raise UserError(f"cannot listen at {host}:{port} ({reason}): choose another --port (0 for a free one) or --host")


# === Command ===


def main(values: flags.FlagValues) -> None:
    # An Event may not be set from a handler: where the signal comes as the main thread begins to wait, both hang.
    stop: queue.SimpleQueue[None] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.put(None))
    model = ServedModel(values.model_name, values.model_base_path)
    server, port = start(model, values.host, values.port)
    print(f"serving {model.name} version {model.version} at {values.host}:{port}", flush=True)
    stop.get()
    server.stop(GRACE_SECONDS).wait()


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_string("model_base_path", None, "the --export_dir of serving.export", flag_values=values)
    flags.DEFINE_string("model_name", None, "the name clients ask for", flag_values=values)
    flags.DEFINE_integer("port", 8500, "the port, 0 for a free one", 0, 65535, flag_values=values)
    flags.DEFINE_string("host", "localhost", "the address to listen at", flag_values=values)
    run(main, values, str(__doc__), required=("model_base_path", "model_name"), argv=argv)


if __name__ == "__main__":
    console()
