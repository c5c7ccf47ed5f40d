"""TF Serving's services for one model: what a client asks, in terms of versions, signatures and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.batching import Batcher
from serving.model import Arrays, Model, Signature
from serving.refusal import INVALID, Refused, listed, quoted
from serving.tensors import to_proto
from serving.versions import Versions

ENCODED = "serve_encoded"


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict, Classify and GetModelMetadata; what makes no sense for a classifier answers UNIMPLEMENTED.

    max_images: of one request.
    """

    def __init__(self, versions: Versions, batcher: Batcher, max_images: int):
        self._versions = versions
        self._batcher = batcher
        self._max_images = max_images

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._versions.use(request.model_spec) as model:
            signature = model.signature(request.model_spec.signature_name)
            wanted = signature.wanted(request.output_filter)
            answer = self._answer(signature, request.inputs, context)
        response = predict_pb2.PredictResponse()
        _describe(response.model_spec, self._versions.name, model, signature)
        for name in wanted:
            response.outputs[name].CopyFrom(to_proto(answer[name]))
        return response

    def Classify(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Takes `tf.Example`s with a PNG or JPEG file each; answers every class with its probability."""
        with self._versions.use(request.model_spec) as model:
            if ENCODED not in model.signatures:
                words = f"Classify needs the signature {ENCODED}, which version {model.version} does not have"
                raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"{words}: call Predict")
            if request.model_spec.signature_name not in ("", ENCODED):
                got = quoted(request.model_spec.signature_name)
                raise Refused(INVALID, f"Classify answers by {ENCODED} alone, got {got}: call Predict")
            signature = model.signature(ENCODED)
            (name,) = signature.inputs
            proto = tf.make_tensor_proto(_files(request.input), tf.string)
            answer = self._answer(signature, {name: proto}, context)
        response = classification_pb2.ClassificationResponse()
        _describe(response.model_spec, self._versions.name, model, signature)
        for row in answer["probabilities"]:
            found = response.result.classifications.add()
            for place, score in enumerate(row):
                label = model.labels[place] if place < len(model.labels) else str(place)
                found.classes.add(label=label, score=float(score))
        return response

    def Regress(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        _unimplemented("Regress")

    def MultiInference(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        _unimplemented("MultiInference")

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._versions.use(request.model_spec) as model:
            if list(request.metadata_field) != ["signature_def"]:
                got = quoted(listed(request.metadata_field)) if request.metadata_field else "none"
                raise Refused(INVALID, f"expected the metadata field signature_def, got {got}")
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            _describe(response.model_spec, self._versions.name, model)
            signatures = get_model_metadata_pb2.SignatureDefMap()
            for name, definition in model.signature_def.items():
                signatures.signature_def[name].CopyFrom(definition)
            response.metadata["signature_def"].Pack(signatures)
            return response

    def _answer(self, signature: Signature, protos: Any, context: grpc.ServicerContext) -> Arrays:
        arrays = signature.decode(protos, self._max_images)
        return self._batcher.run(signature, arrays, context.time_remaining(), _watcher(context))


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus: every version seen, with what is wrong with those that cannot be loaded."""

    def __init__(self, versions: Versions):
        self._versions = versions

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._versions.check(request.model_spec)
        wanted = request.model_spec.version.value if request.model_spec.HasField("version") else None
        response = get_model_status_pb2.GetModelStatusResponse()
        for number, status in self._versions.statuses(wanted).items():
            found = response.model_version_status.add(version=number, state=status.state)
            found.status.error_code = status.error_code
            found.status.error_message = status.error_message
        return response

    def HandleReloadConfigRequest(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        words = "this server watches one folder and takes no configuration: export a version there, or run TF Serving"
        raise Refused(grpc.StatusCode.UNIMPLEMENTED, words)


def _watcher(context: grpc.ServicerContext) -> Callable[[Callable], None]:
    def watch(cancel: Callable) -> None:
        if not context.add_callback(cancel):  # the call is over already
            cancel()

    return watch


def _describe(spec: Any, name: str, model: Model, signature: Signature | None = None) -> None:
    spec.name = name
    spec.version.value = model.version
    if signature is not None:
        spec.signature_name = signature.name


def _unimplemented(method: str) -> NoReturn:
    words = f"{method} is not for a classifier of images: call Predict or Classify"
    raise Refused(grpc.StatusCode.UNIMPLEMENTED, words)


def _files(given: Any) -> np.ndarray:
    """Returns the image file of each `tf.Example`: its `image/encoded`, else its only feature of bytes."""
    if given.WhichOneof("kind") == "example_list_with_context":
        raise Refused(INVALID, "expected an example_list: images share no context")
    files = []
    for place, example in enumerate(given.example_list.examples):
        features = {name: list(value.bytes_list.value) for name, value in example.features.feature.items()}
        named = [name for name in features if features[name]]
        chosen = "image/encoded" if "image/encoded" in named else named[0] if len(named) == 1 else None
        if chosen is None or len(features[chosen]) != 1:
            words = "expected one PNG or JPEG file in the feature image/encoded of every tf.Example"
            raise Refused(INVALID, f"{words}, got {len(named)} features of bytes at {place}")
        files.append(features[chosen][0])
    if not files:
        raise Refused(INVALID, "expected at least one tf.Example, got none")
    return np.array(files, object)
