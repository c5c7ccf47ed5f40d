"""Export, server and client: the answers are those of the Keras models, and what is wrong is refused in words."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving import client, export, server
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.runs import RunFolder, save_model

ROOT = Path(__file__).parents[1]
SHAPE = (8, 12, 3)  # neither square nor grey, so that a swapped axis shows
NAMES = ("cat", "dög", "bird", "fish")
CLASSES = {"probabilities", "class_id", "label"}
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def models():
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


@pytest.fixture(scope="module")
def base_path(models, tmp_path_factory):
    """A folder of versions, holding version 1."""
    base = tmp_path_factory.mktemp("exported")
    export.export(*models, NAMES, base / "1")
    return base


@pytest.fixture(scope="module")
def port(base_path):
    running = server.start(server.Options("tiny", base_path, port=0), log=lambda *_, **__: None)
    yield running.port
    running.stop(0)


@pytest.fixture(scope="module")
def channel(port):
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        yield channel


@pytest.fixture
def image_file(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, SHAPE, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png", pixels


def random_images(batch, dtype="float32"):
    generator = np.random.default_rng(batch)
    if dtype == "uint8":
        return generator.integers(0, 256, (batch, *SHAPE), dtype=np.uint8)
    return generator.random((batch, *SHAPE), dtype=np.float32)


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


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], array)


SIGNATURES = [
    ("serving_default", "float32", CLASSES),
    ("serve_uint8", "uint8", CLASSES),
    ("purify", "float32", {"purified"}),
    ("undefended", "float32", CLASSES),
]


# === Server ===


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


# === Commands ===


def run(console, *arguments):
    console(["command", *map(str, arguments)])


def test_export_serve_ask(models, tmp_path, image_file, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config().replace({"data.image_shape": SHAPE, "data.class_names": NAMES}))
    for model, path in zip(models, (folder.purifier, folder.classifier), strict=True):
        save_model(model, path)
    run(export.console, f"--run_dir={folder.path}", f"--export_dir={tmp_path / 'out'}", "--version=3")
    summary = capsys.readouterr().out
    assert str(tmp_path / "out" / "3") in summary
    assert all(name in summary for name, _, _ in SIGNATURES)
    assert "allowed 1e-05" in summary

    path, pixels = image_file
    grey = tmp_path / "longer_name.png"  # converted to the channels the model wants
    Image.fromarray(pixels).convert("L").save(grey)
    running = server.start(server.Options("tiny", tmp_path / "out", port=0))
    try:
        ask = [client.console, f"--server=localhost:{running.port}", "--model_name=tiny"]
        run(*ask, f"--image={path}", f"--image={grey}")
        lines = capsys.readouterr().out.splitlines()
        purified = tmp_path / "purified.png"
        run(*ask, f"--image={path}", "--signature=serve_uint8", f"--purified_out={purified}")
        (again,) = capsys.readouterr().out.splitlines()
    finally:
        running.stop(0)
    wanted = expected(models, "serving_default", pixels[None])
    label, probability = wanted["label"][0], wanted["probabilities"].max()
    for line in (lines[0], again):
        file, found, number, *_, unit = line.split()
        assert (file, found, unit) == (str(path), label, "ms")
        assert abs(float(number) - probability) < 1e-4
    assert len(lines) == 2 and lines[1].startswith(str(grey))
    assert lines[0].index(label) == len(str(grey)) + 2  # aligned
    kept = np.asarray(Image.open(purified), np.float32) / 255
    np.testing.assert_allclose(kept, expected(models, "purify", pixels[None])["purified"][0], atol=0.51 / 255)


def refusal(capsys, console, *arguments):
    """Runs a command that is to fail; returns its one line."""
    with pytest.raises(SystemExit) as stopped:
        run(console, *arguments)
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("command", [export, server, client])
def test_wrong_flags(capsys, command):
    assert "Unknown command line flag 'colour'" in refusal(capsys, command.console, "--colour=red")
    assert "missing --" in refusal(capsys, command.console)
    assert "unexpected argument 'digits'" in refusal(capsys, command.console, "digits")
    with pytest.raises(SystemExit) as stopped:
        run(command.console, "--help")
    assert stopped.value.code == 0
    assert f"python -m {command.__name__} --" in capsys.readouterr().out


def test_wrong_values(capsys, base_path, tmp_path):
    export_to = f"--export_dir={base_path}"
    assert "not a run folder" in refusal(capsys, export.console, f"--run_dir={tmp_path}", f"--export_dir={tmp_path}")
    assert "--version=-1" in refusal(capsys, export.console, "--run_dir=a", export_to, "--version=-1")
    assert "--port=seven" in refusal(capsys, server.console, "--port=seven")
    assert "no version" in refusal(capsys, server.console, f"--model_base_path={tmp_path}", "--model_name=tiny")
    RunFolder(tmp_path / "run").create(Config())
    assert "--version=2" in refusal(capsys, export.console, f"--run_dir={tmp_path / 'run'}", export_to)


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


def test_no_server_and_late_server(capsys, image_file):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with client.Client(address, "tiny", timeout=0.3) as asking, pytest.raises(UserError, match="--timeout") as late:
            asking.signatures()
    assert late.value.__cause__.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    line = refusal(capsys, client.console, f"--server={address}", "--model_name=tiny", f"--image={image_file[0]}")
    assert f"no server answers at {address}" in line


def test_process_says_what_it_does_and_stops_on_sigterm(base_path):
    command = [
        sys.executable,
        "-m",
        "serving.server",
        f"--model_base_path={base_path}",
        "--model_name=tiny",
        "--port=0",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            assert ready.startswith("serving tiny version 1 at localhost:")
            with client.Client(ready.split()[-1], "tiny") as asking:
                assert asking.predict(random_images(2))["label"].shape == (2,)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert [json.loads(line)["event"] for line in err.splitlines()][-2:] == ["stopping", "stopped"]


def test_process_refuses_in_one_line():
    command = [sys.executable, "-m", "serving.export", "--run_dir=nowhere", "--export_dir=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is not a run folder") and done.stderr.count("\n") == 1
