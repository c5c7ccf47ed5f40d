"""The client: retries within the deadline, images from everywhere, what it prints."""

from __future__ import annotations

import io
import json
import time
from concurrent import futures
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from PIL import Image
from served import ALL, QUIET, SHAPE, answer, random_images, write_version
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving import client, connection, server
from serving.client import Client
from serving.tensors import to_proto
from vqunet_tf.errors import UserError

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    base = tmp_path_factory.mktemp("versions")
    write_version(base, 0, signatures=ALL)
    running = server.start(server.Options("tiny", base, port=0), QUIET)
    yield running.port
    running.stop(0)


@pytest.fixture
def pictures(tmp_path):
    """A folder with three PNG files, one of them deeper, and a text; and their pixels in the order of names."""
    pixels = random_images(3, "uint8")
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for image, name in zip(pixels, ("a.png", "b.PNG", "deep/c.png"), strict=True):
        Image.fromarray(image).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    return tmp_path / "pictures", pixels


def ask(capsys, port, *arguments):
    """Runs the command and returns the JSON it prints."""
    client.console(["client", f"--server=localhost:{port}", "--model_name=tiny", "--json", *map(str, arguments)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys, port, *arguments):
    with pytest.raises(SystemExit) as stopped:
        ask(capsys, port, *arguments)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    return output.err


def assert_says(records, pixels, defended=True):
    """The records are what the model thinks of the pixels."""
    wanted = answer(pixels, defended=defended)
    assert [record["class_id"] for record in records] == wanted["class_id"].tolist()
    assert [record["label"] for record in records] == wanted["label"].tolist()
    best = wanted["probabilities"].max(axis=-1)
    np.testing.assert_allclose([record["probability"] for record in records], best, atol=1e-5)
    if defended:
        scores = [record["adversarial_score"] for record in records]
        np.testing.assert_allclose(scores, wanted["adversarial_score"], atol=1e-5)


# === Retries ===


class Flaky(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Refuses the first calls with a status, then answers."""

    def __init__(self, code, times):
        self.code, self.left, self.calls = code, times, 0

    def Predict(self, request, context):
        self.calls += 1
        if self.left:
            self.left -= 1
            context.abort(self.code, "not now")
        response = predict_pb2.PredictResponse()
        response.outputs["y"].CopyFrom(to_proto(np.float32([1.0])))
        return response


@pytest.fixture
def flaky():
    """Starts servers that fail some times, and stops them."""
    started = []

    def start(code, times):
        running = grpc.server(futures.ThreadPoolExecutor(2))
        service = Flaky(code, times)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, running)
        port = running.add_insecure_port("localhost:0")
        running.start()
        started.append(running)
        return f"localhost:{port}", service

    yield start
    for running in started:
        running.stop(0).wait()


def test_unavailable_is_tried_again(flaky):
    address, service = flaky(CODE.UNAVAILABLE, 3)
    with Client(address, "tiny", 60.0) as asking:
        assert asking.predict(random_images(1))["y"].tolist() == [1.0]
    assert service.calls == 4


def test_all_tries_share_one_deadline():
    class Unavailable(grpc.RpcError):
        def code(self):
            return CODE.UNAVAILABLE

    given = []

    def method(request, timeout):
        given.append(timeout)
        raise Unavailable

    with pytest.raises(Unavailable):
        connection.call(method, None, 60.0, retries=3)
    pauses = -np.diff(given)
    assert given[0] <= 60.0 and len(pauses) == 3
    assert (pauses >= [0.05, 0.1, 0.2]).all()  # half of 0.1, 0.2 and 0.4 seconds at least


@pytest.mark.parametrize(
    ("code", "retries", "tries"),
    [
        (CODE.UNAVAILABLE, 2, 3),
        (CODE.UNAVAILABLE, 0, 1),
        (CODE.RESOURCE_EXHAUSTED, 4, 1),
        (CODE.INVALID_ARGUMENT, 4, 1),
    ],
)
def test_tries_are_counted_and_other_refusals_are_final(flaky, code, retries, tries):
    address, service = flaky(code, 100)
    with Client(address, "tiny", 60.0, retries=retries) as asking, pytest.raises(UserError) as refused:
        asking.predict(random_images(1))
    assert refused.value.__cause__.code() == code
    assert service.calls == tries


def test_tries_end_with_the_deadline(flaky):
    address, service = flaky(CODE.UNAVAILABLE, 1000)
    start = time.monotonic()
    with Client(address, "tiny", 1.0, retries=1000) as asking, pytest.raises(UserError):
        asking.predict(random_images(1))
    assert time.monotonic() - start < 5
    assert 2 <= service.calls < 20


def test_a_server_that_comes_late_is_found(tmp_path):
    write_version(tmp_path, 0)
    first = server.start(server.Options("tiny", tmp_path, port=0), QUIET)
    port = first.port
    with Client(f"localhost:{port}", "tiny", 60.0, retries=100) as asking, futures.ThreadPoolExecutor(1) as pool:
        asking.predict(random_images(1))
        first.stop(0)
        waiting = pool.submit(asking.predict, random_images(1))
        time.sleep(0.5)
        assert not waiting.done()
        second = server.start(server.Options("tiny", tmp_path, port=port), QUIET)
        assert len(waiting.result(60)["label"]) == 1
        second.stop(0)


# === Images ===


@pytest.mark.parametrize("signature", ["serving_default", "serve_uint8", "serve_encoded"])
@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_a_folder(capsys, port, pictures, signature, batch_size):
    folder, pixels = pictures
    records = ask(capsys, port, f"--image={folder}", f"--signature={signature}", f"--batch_size={batch_size}")
    assert [record["image"] for record in records] == [str(folder / name) for name in ("a.png", "b.PNG", "deep/c.png")]
    assert_says(records, pixels)
    assert all(record["milliseconds"] > 0 for record in records)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_an_array(capsys, port, tmp_path, dtype):
    pixels = random_images(4, "uint8" if dtype == "uint8" else "float32").astype(dtype)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "single.npy", pixels[2])
    records = ask(capsys, port, f"--image={tmp_path / 'images.npy'}", f"--image={tmp_path / 'single.npy'}")
    assert [record["image"] for record in records[:2]] == [f"{tmp_path}/images.npy[0]", f"{tmp_path}/images.npy[1]"]
    assert_says(records, pixels[[0, 1, 2, 3, 2]])


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_standard_input(capsys, port, monkeypatch, kind):
    pixels = random_images(1, "uint8")
    data = io.BytesIO()
    if kind == "png":
        Image.fromarray(pixels[0]).save(data, "PNG")
    else:
        np.save(data, pixels)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data.getvalue())))
    records = ask(capsys, port, "--image=-")
    assert records[0]["image"].startswith("stdin")
    assert_says(records, pixels)


def test_files_of_any_size_where_the_graph_decodes_them(capsys, port, tmp_path):
    Image.fromarray(np.full((30, 20, 3), 51, np.uint8)).save(tmp_path / "large.png")
    (record,) = ask(capsys, port, f"--image={tmp_path / 'large.png'}", "--signature=serve_encoded")
    assert abs(record["adversarial_score"] - 0.2) < 1e-5


def test_what_cannot_be_sent_is_refused(capsys, port, tmp_path):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "small.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "whole.npy", np.zeros((2, *SHAPE), np.int32))
    np.save(tmp_path / "floats.npy", random_images(1))
    (tmp_path / "text.npy").write_text("no array")
    for arguments, words in (
        (["--image=empty"], "holds no images"),
        (["--image=small.npy"], r"small.npy[0]: expected an image of shape [8, 12, 3], got [8, 8, 3]"),
        (["--image=whole.npy"], "expected uint8 or floats in [0,1], got int32"),
        (["--image=text.npy"], "cannot be read as a NumPy array"),
        (["--image=floats.npy", "--signature=serve_uint8"], "expected uint8 for this signature, got float32"),
        (["--image=floats.npy", "--signature=serve_encoded"], "is an array: expected a PNG or JPEG file"),
        (["--image=floats.npy", "--tls_certificate=a"], "--tls_certificate and --tls_key together"),
        (["--image=floats.npy", "--signature=undefended", "--alarm=0.5"], "needs the output 'adversarial_score'"),
    ):
        placed = [argument.replace("--image=", f"--image={tmp_path}/") for argument in arguments]
        assert words in refusal(capsys, port, *placed)


# === What it prints ===


def test_comparison_and_alarm(capsys, port, tmp_path):
    pixels = random_images(6, "uint8")
    np.save(tmp_path / "images.npy", pixels)
    scores = answer(pixels)["adversarial_score"]
    threshold = float(np.median(scores))
    image = f"--image={tmp_path / 'images.npy'}"
    records = ask(capsys, port, image, "--compare", f"--alarm={threshold}", "--batch_size=4")
    assert_says(records, pixels)
    assert_says([record["undefended"] for record in records], pixels, defended=False)
    assert [record["alarm"] for record in records] == (scores > threshold).tolist()

    ask_for_lines = ["client", f"--server=localhost:{port}", "--model_name=tiny", image]
    client.console([*ask_for_lines, "--compare", f"--alarm={threshold}"])
    lines = capsys.readouterr().out.splitlines()
    for line, record in zip(lines, records, strict=True):
        alone = record["undefended"]
        assert f"  {record['label']}  {record['probability']:.4f}  score {record['adversarial_score']:.4f}" in line
        assert f"undefended {alone['label']} {alone['probability']:.4f}" in line
        assert ("DIFFERS" in line) == (alone["label"] != record["label"])
        assert ("ALARM" in line) == record["alarm"]
    assert any("DIFFERS" in line for line in lines) and any("ALARM" in line for line in lines)

    client.console(ask_for_lines)
    plain = capsys.readouterr().out
    assert "undefended" not in plain and "ALARM" not in plain and "score" in plain


def test_version_and_status(capsys, port, tmp_path):
    np.save(tmp_path / "one.npy", random_images(1))
    assert len(ask(capsys, port, f"--image={tmp_path / 'one.npy'}", "--version=0")) == 1
    assert "NOT_FOUND" in refusal(capsys, port, f"--image={tmp_path / 'one.npy'}", "--version=5")
    with Client(f"localhost:{port}", "tiny", 60.0) as asking:
        assert asking.status() == {0: "AVAILABLE"}
