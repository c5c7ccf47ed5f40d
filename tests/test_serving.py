"""Export, server and client: the answers are those of the Keras models, and what is wrong is refused in words."""

import re
import shutil
import socket

import grpc
import numpy as np
import pytest
import tensorflow as tf
from exported import SIGNATURES, expected, refusal
from PIL import Image
from served import SHAPE, assert_equal, random_images
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving import client, server
from vqunet_tf.errors import UserError

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def port(base_path):
    running = server.start(server.Options("tiny", base_path, port=0), log=lambda *_, **__: None)
    yield running.port
    running.stop(0)


@pytest.fixture(scope="module")
def channel(port):
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        yield channel


@pytest.mark.parametrize(("name", "dtype", "outputs"), SIGNATURES)
def test_answers_over_grpc_equal_keras(port, models, name, dtype, outputs):
    images = random_images(5, dtype)
    with client.Client(f"localhost:{port}", "tiny") as asking:
        answer = asking.predict(images, name)
    answer.pop("adversarial_score", None)
    assert answer.keys() == outputs
    assert_equal(answer, expected(models, name, images))


def test_purifier_matters(port):
    """Else the comparison above could not tell `undefended` from `serving_default`."""
    with client.Client(f"localhost:{port}", "tiny") as asking:
        defended, alone = (asking.predict(random_images(5), name) for name in ("serving_default", "undefended"))
    assert np.abs(defended["probabilities"] - alone["probabilities"]).max() > 0.1


def test_message_may_be_larger_than_grpc_allows_by_default(port):
    images = random_images(5000, "uint8")
    assert images.size * 4 > 4 * 2**20
    with client.Client(f"localhost:{port}", "tiny") as asking:
        asking.timeout = 60.0
        purified = asking.predict(images.astype(np.float64) / 255, "purify")["purified"]
    assert purified.shape == images.shape


def predict_request(images=None, **changes):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = changes.get("model", "tiny")
    request.model_spec.signature_name = changes.get("signature", "")
    if "version" in changes:
        request.model_spec.version.value = changes["version"]
    if "label" in changes:
        request.model_spec.version_label = changes["label"]
    request.output_filter.extend(changes.get("outputs", ()))
    for name in changes.get("inputs", ("images",)):
        request.inputs[name].CopyFrom(tf.make_tensor_proto(random_images(1) if images is None else images))
    return request


def filled_proto(shape, dtype):
    """A proto of a few bytes that stands for a tensor of any size."""
    proto = tf.make_tensor_proto(np.float32(0.5) if dtype == tf.float32 else "x")
    proto.tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return proto


REFUSED = {
    "model": (predict_request(model="other"), NOT_FOUND, r"Latest\(other\).*'tiny' version 1"),
    "version": (predict_request(version=7), NOT_FOUND, r"Specific\(tiny, 7\).*'tiny' version 1"),
    "version label": (predict_request(label="stable"), INVALID, "Unrecognized servable version label: stable"),
    "signature": (predict_request(signature="serve"), INVALID, '"serve" not found.*serve_uint8, serving_default'),
    "missing input": (predict_request(inputs=()), INVALID, "missing input 'images'"),
    "extra input": (predict_request(inputs=("images", "x")), INVALID, "unknown input.*expected images, got 'x'"),
    "output": (predict_request(outputs=["logits"]), INVALID, "class_id, label, probabilities, got 'logits'"),
    "dtype": (predict_request(random_images(1, "uint8")), INVALID, "as float32, got uint8"),
    "uint8": (predict_request(signature="serve_uint8"), INVALID, "as uint8, got float32"),
    "string": (predict_request(np.full((1, *SHAPE), b"a")), INVALID, "as float32, got string"),
    "rank": (predict_request(random_images(1)[0]), INVALID, r"\[None, 8, 12, 3\].*got \[8, 12, 3\]"),
    "size": (predict_request(random_images(1)[:, :, :8]), INVALID, r"got \[1, 8, 8, 3\]"),
    "empty batch": (predict_request(random_images(1)[:0]), INVALID, "at least one image"),
    "NaN": (predict_request(np.full((1, *SHAPE), np.nan, np.float32)), INVALID, "got NaN"),
    "infinity": (predict_request(np.full((1, *SHAPE), np.inf, np.float32)), INVALID, "infinity"),
    "bytes as floats": (predict_request(random_images(1) * 255), INVALID, r"in \[0,1\].*divide bytes by 255"),
    "below zero": (predict_request(random_images(1) - 0.5), INVALID, r"in \[0,1\], got \[-0\.4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_right_status(channel, case):
    request, code, message = REFUSED[case]
    with pytest.raises(grpc.RpcError) as refused:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
    assert refused.value.code() == code
    assert refused.value.details() and "\n" not in refused.value.details()
    assert re.search(message, refused.value.details()), refused.value.details()


@pytest.mark.parametrize("dtype", [tf.float32, tf.string])
def test_small_message_cannot_ask_for_huge_memory(channel, dtype):
    request = predict_request()
    request.inputs["images"].CopyFrom(filled_proto((10**12, *SHAPE), dtype))
    with pytest.raises(grpc.RpcError) as refused:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
    assert refused.value.code() == INVALID
    assert "at most" in refused.value.details()


def test_malformed_tensor_is_refused(channel):
    request = predict_request()
    request.inputs["images"].tensor_content = b"123"
    with pytest.raises(grpc.RpcError) as refused:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
    assert refused.value.code() == INVALID
    assert "well-formed" in refused.value.details()


def test_output_filter_and_model_spec(channel):
    request = predict_request(outputs=["label"], version=1)
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
    assert set(response.outputs) == {"label"}
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("tiny", 1, "serving_default")


def test_metadata_and_status(channel, port):
    with client.Client(f"localhost:{port}", "tiny") as asking:
        signatures = asking.signatures()
    assert signatures.keys() >= {name for name, _, _ in SIGNATURES}
    for name, dtype, outputs in SIGNATURES:
        assert signatures[name]["inputs"] == {"images": tf.TensorSpec((None, *SHAPE), dtype, name="images")}
        assert signatures[name]["outputs"].keys() >= outputs
    metadata = get_model_metadata_pb2.GetModelMetadataRequest()
    metadata.model_spec.name = "tiny"
    with pytest.raises(grpc.RpcError) as refused:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).GetModelMetadata(metadata, timeout=10)
    assert refused.value.code() == INVALID

    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "tiny"
    (status,) = stub.GetModelStatus(request, timeout=10).model_version_status
    assert (status.version, status.state, status.status.error_code) == (1, 30, 0)  # 30 is AVAILABLE
    request.model_spec.version.value = 2
    with pytest.raises(grpc.RpcError) as refused:
        stub.GetModelStatus(request, timeout=10)
    assert refused.value.code() == NOT_FOUND


def serves(base):
    """The versions that a server at `base` has."""
    running = server.start(server.Options("tiny", base, port=0))
    running.stop(0)
    return running.versions.numbers


def test_highest_whole_version_is_served(base_path, tmp_path):
    for version in ("2", "0010", ".11.part", "v12"):
        shutil.copytree(base_path / "1", tmp_path / version)
    shutil.copytree(base_path / "1" / "variables", tmp_path / "13" / "variables")  # somebody is still copying
    assert serves(tmp_path) == [10]


def test_nothing_to_serve_is_refused(base_path, tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        serves(base_path / "1")
    with pytest.raises(UserError, match="no version to serve"):
        serves(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        serves(tmp_path / "nowhere")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot be loaded"):
        serves(tmp_path)


def test_taken_port_is_refused(base_path, port):
    with pytest.raises(UserError, match=rf"localhost:{port} .*choose another --port"):
        server.start(server.Options("tiny", base_path, port=port))
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match="choose another --port"):
        # taken on one address of localhost only
        server.start(server.Options("tiny", base_path, port=other.getsockname()[1]))


def test_client_refusals(capsys, port, tmp_path, image_file):
    path, pixels = image_file
    ask = [client.console, f"--server=localhost:{port}", "--model_name=tiny"]
    Image.fromarray(pixels[:, :8]).save(tmp_path / "small.png")
    small = refusal(capsys, *ask, f"--image={tmp_path / 'small.png'}")
    assert "expected 12x8 pixels, got 8x8" in small
    Image.fromarray(np.zeros(SHAPE[:2], np.uint16)).save(tmp_path / "deep.png")
    assert "8 bits" in refusal(capsys, *ask, f"--image={tmp_path / 'deep.png'}")
    (tmp_path / "text.png").write_text("no image")
    assert "cannot be read" in refusal(capsys, *ask, f"--image={tmp_path / 'text.png'}")
    assert "cannot be read" in refusal(capsys, *ask, f"--image={tmp_path / 'nowhere.png'}")
    assert "'purify'" in refusal(capsys, *ask, f"--image={path}", "--signature=purify")
    assert "one at a time" in refusal(capsys, *ask, f"--image={path}", f"--image={path}", "--purified_out=p.png")
    other = refusal(capsys, *ask[:2], "--model_name=other", f"--image={path}")
    assert "NOT_FOUND" in other and "'tiny'" in other
