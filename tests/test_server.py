"""The server: right answers in any company, versions that come and go, deadlines, overload, TLS, health, metrics."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import keras
import numpy as np
import ovmsclient
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import (
    ALL,
    NAMES,
    QUIET,
    SHAPE,
    answer,
    assert_equal,
    certificates,
    predict_request,
    random_images,
    until,
    write_version,
)
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

from serving import export, model, server
from serving.batching import BatchingOptions
from serving.client import Client
from serving.connection import ClientTls
from serving.listening import Tls
from vqunet_tf import DefendedClassifier
from vqunet_tf.errors import UserError

ROOT = Path(__file__).parents[1]
CODE = grpc.StatusCode
QUEUE_LENGTH = ":tensorflow:serving:batching_session:queue_length"


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    base = tmp_path_factory.mktemp("versions")
    write_version(base, 0, signatures=[*ALL, "slow"])
    return base


@pytest.fixture(scope="module")
def running(base_path):
    running = server.start(server.Options("tiny", base_path, port=0, metrics_port=0), QUIET)
    yield running
    running.stop(0)


@pytest.fixture(scope="module")
def channel(running):
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        yield channel


@pytest.fixture
def start(tmp_path):
    """Starts servers of `tmp_path`, polling fast, and stops them; their logs are lists of dicts."""
    started = []

    def start(**options):
        lines = []
        log = lambda event, **fields: lines.append({"event": event, **fields})  # noqa: E731
        options = {"port": 0, "poll_seconds": 0.02, **options}
        started.append(server.start(server.Options("tiny", tmp_path, **options), log))
        return started[-1], lines

    yield start
    for running in started:
        running.stop(0)


@pytest.fixture
def gate(monkeypatch):
    """Models run only while the gate is open; `gate.runs` are the batch sizes that began to."""
    gate = threading.Event()
    gate.runs = []
    run = model.Signature.__call__

    def gated(self, inputs):
        gate.runs.append(len(next(iter(inputs.values()))))
        assert gate.wait(60)
        return run(self, inputs)

    gate.set()
    monkeypatch.setattr(model.Signature, "__call__", gated)
    yield gate
    gate.set()


def asking(running, **options):
    return Client(f"localhost:{running.port}", "tiny", **{"timeout": 60.0, **options})


def statuses(running):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "tiny"
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        found = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=60)
    name = get_model_status_pb2.ModelVersionStatus.State.Name
    return {status.version: (name(status.state), status.status) for status in found.model_version_status}


def states(running):
    return {version: state for version, (state, _) in statuses(running).items()}


# === Answers ===


def test_answers_equal_the_defended_classifier(tmp_path):
    """Over gRPC and from Keras' own predict, for every signature of a real export."""
    images = keras.Input(SHAPE)
    hidden = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(images)
    purifier = keras.Model(images, keras.layers.Conv2D(3, 3, padding="same", activation="sigmoid")(hidden))
    classifier = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(len(NAMES))])
    export.export(purifier, classifier, NAMES, tmp_path / "1")
    defended = DefendedClassifier(purifier, classifier)
    floats, pixels = random_images(5), random_images(5, "uint8")
    files = [tf.io.encode_png(image).numpy() for image in pixels]
    unit = np.float32(pixels) / np.float32(255)

    def probabilities(logits):
        return np.asarray(keras.ops.softmax(np.float64(logits)))

    wanted = {
        "serving_default": (floats, probabilities(defended.predict(floats, verbose=0))),
        "serve_uint8": (pixels, probabilities(defended.predict(unit, verbose=0))),
        "serve_encoded": (files, probabilities(defended.predict(unit, verbose=0))),
        "undefended": (floats, probabilities(classifier.predict(floats, verbose=0))),
        "purify": (floats, purifier.predict(floats, verbose=0)),
    }
    running = server.start(server.Options("tiny", tmp_path, port=0), QUIET)
    try:
        with asking(running) as client:
            signatures = client.signatures()
            assert signatures.keys() <= wanted.keys()
            for name in signatures:
                given, expected = wanted[name]
                found = client.predict(given, name)
                np.testing.assert_allclose(
                    found["purified" if name == "purify" else "probabilities"], expected, rtol=0, atol=1e-5
                )
                if "class_id" in found:
                    np.testing.assert_array_equal(found["class_id"], expected.argmax(axis=-1))
                    np.testing.assert_array_equal(found["label"], np.array(NAMES)[expected.argmax(axis=-1)])
    finally:
        running.stop(0)


def test_everybody_gets_their_own_answer(running):
    """Many at once, of all sizes and signatures: batching mixes nothing up."""

    def ask(number):
        batch, signature = 1 + number % 7, ("serving_default", "serve_uint8", "undefended")[number % 3]
        images = random_images(batch, "uint8" if signature == "serve_uint8" else "float32", seed=number)
        return client.predict(images, signature), answer(images, defended=signature != "undefended")

    with asking(running) as client, ThreadPoolExecutor(32) as pool:
        for found, wanted in pool.map(ask, range(300)):
            assert_equal(found, wanted)
    sizes = scrape(running)
    assert (
        sizes['batching_session:processed_batch_size_sum{model_name="tiny"}']
        > sizes['batching_session:processed_batch_size_count{model_name="tiny"}']
    )


def test_a_request_larger_than_a_batch(running):
    images = random_images(100)
    assert len(images) > running.options.batching.max_batch_size
    with asking(running) as client:
        assert_equal(client.predict(images), answer(images))


def test_an_independent_client_agrees(running):
    """ovmsclient shares no code with ours."""
    images = random_images(3)
    other = ovmsclient.make_grpc_client(f"localhost:{running.port}")
    found = other.predict({"images": images}, "tiny", timeout=60)
    found["label"] = np.array([label.decode() for label in np.ravel(found["label"])])
    assert_equal(found, answer(images))
    assert other.get_model_status("tiny")[0] == {"state": "AVAILABLE", "error_code": 0, "error_message": ""}
    metadata = other.get_model_metadata("tiny")
    assert metadata["inputs"]["images"]["dtype"] == "DT_FLOAT"
    assert metadata["inputs"]["images"]["shape"] == [-1, *SHAPE]


@pytest.mark.parametrize("feature", ["image/encoded", "picture"])
def test_classify_takes_image_files(channel, feature):
    pixels = random_images(2, "uint8")
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "tiny"
    for image in pixels:
        example = request.input.example_list.examples.add()
        example.features.feature[feature].bytes_list.value.append(tf.io.encode_png(image).numpy())
        example.features.feature["id"].int64_list.value.append(1)
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Classify(request, timeout=60)
    found = [[(found.label, found.score) for found in row.classes] for row in response.result.classifications]
    wanted = answer(pixels)["probabilities"]
    assert [[label for label, _ in row] for row in found] == [list(NAMES)] * 2
    np.testing.assert_allclose([[score for _, score in row] for row in found], wanted, atol=1e-5)


# === Versions ===


def test_a_new_version_takes_over_under_load_and_no_request_is_lost(start, tmp_path):
    write_version(tmp_path, 1)
    running, lines = start()
    stop, seen, images = threading.Event(), [], random_images(2)

    def ask():
        with asking(running, retries=0) as client:
            while not stop.is_set():
                seen.append(client.predict(images)["class_id"][0])  # raises if it is refused

    with ThreadPoolExecutor(8) as pool:
        askers = [pool.submit(ask) for _ in range(8)]
        try:
            until(lambda: len(seen) > 50)
            write_version(tmp_path, 2)
            until(lambda: states(running) == {1: "END", 2: "AVAILABLE"})
            count = len(seen)
            until(lambda: len(seen) > count + 50)
        finally:
            stop.set()
        for asker in askers:
            asker.result()
    assert set(seen) == {1, 2}
    assert set(seen[-40:]) == {2}
    told = [(line["version"], line["status"]) for line in lines if line["event"] == "version"]
    assert told[-4:] == [(2, "LOADING"), (2, "AVAILABLE"), (1, "UNLOADING"), (1, "END")]


def test_a_version_is_unloaded_only_when_its_requests_are_done(start, tmp_path, gate):
    write_version(tmp_path, 1)
    running, _ = start()
    gate.clear()
    gate.runs.clear()
    with ThreadPoolExecutor(1) as pool, asking(running) as client:
        old = pool.submit(client.predict, random_images(1))
        until(lambda: gate.runs)
        running.versions.load = lambda path: model.Model(path)  # a warm-up would wait at the gate
        write_version(tmp_path, 2)
        until(lambda: states(running) == {1: "UNLOADING", 2: "AVAILABLE"})
        time.sleep(0.2)
        assert states(running)[1] == "UNLOADING"
        gate.set()
        assert old.result(60)["class_id"].tolist() == [1]
        until(lambda: states(running)[1] == "END")


def damaged_weights(version):
    """Cut off, as by a copy that is not finished."""
    (data,) = (version / "variables").glob("variables.data*")
    data.write_bytes(data.read_bytes()[:100])


def damaged_graph(version):
    (version / "saved_model.pb").write_bytes(b"not a model")


def no_weights(version):
    shutil.rmtree(version / "variables")


def failing_warm_up(version):
    request = predict_request(random_images(1, "uint8"))  # the wrong type for serving_default
    log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


@pytest.mark.parametrize("damage", [damaged_weights, damaged_graph, no_weights, failing_warm_up])
def test_a_corrupt_version_is_refused_and_the_old_one_serves(start, tmp_path, damage):
    write_version(tmp_path, 1)
    running, lines = start()
    damaged = write_version(tmp_path, 2, name=".damaged")
    shutil.copytree(damaged, tmp_path / ".whole")
    damage(damaged)
    damaged.rename(tmp_path / "2")
    until(lambda: states(running).get(2) == "END")
    state, status = statuses(running)[2]
    assert status.error_code != 0 and "2 cannot be loaded" in status.error_message
    with asking(running) as client:
        assert client.predict(random_images(1))["class_id"].tolist() == [1]
    time.sleep(0.1)  # a few more looks at the folder
    assert len([line for line in lines if line.get("error")]) == 1  # told once, not at every look
    shutil.rmtree(tmp_path / "2")
    (tmp_path / ".whole").rename(tmp_path / "2")  # mended: tried again
    until(lambda: states(running) == {1: "END", 2: "AVAILABLE"})


def test_a_half_written_version_is_not_looked_at(start, tmp_path):
    whole = write_version(tmp_path, 1)
    running, lines = start()
    shutil.copytree(whole, tmp_path / "2", ignore=shutil.ignore_patterns("saved_model.pb"))
    (tmp_path / "latest").mkdir()
    time.sleep(0.2)
    assert states(running) == {1: "AVAILABLE"}
    shutil.copy(whole / "saved_model.pb", tmp_path / "2")
    until(lambda: states(running) == {1: "END", 2: "AVAILABLE"})


def test_a_version_that_changes_while_it_loads_waits(start, tmp_path):
    write_version(tmp_path, 1)
    running, lines = start()
    load = running.versions.load

    def load_while_copied(path):
        loaded = load(path)
        (path / "late").write_text("one more file")
        running.versions.load = load
        return loaded

    running.versions.load = load_while_copied
    write_version(tmp_path, 2)
    until(lambda: states(running) == {1: "END", 2: "AVAILABLE"})
    assert [line["error"] for line in lines if "still being copied" in line.get("error", "")]


def test_several_versions_serve_and_a_removed_one_makes_way(start, tmp_path):
    for version in (1, 2, 3):
        write_version(tmp_path, version)
    running, _ = start(num_versions=2)
    assert running.versions.numbers == [2, 3]
    for version, wanted in ((None, 3), (2, 2), (3, 3)):
        with asking(running, version=version) as client:
            assert client.predict(random_images(1))["class_id"].tolist() == [wanted % len(NAMES)]
    shutil.rmtree(tmp_path / "3")
    until(lambda: running.versions.numbers == [1, 2] and states(running)[3] == "END")
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    time.sleep(0.2)
    assert running.versions.numbers[-1] == 2  # an empty folder takes nothing away


# === Overload, deadlines, the end ===


def test_overload_is_refused_quickly(start, tmp_path, gate):
    write_version(tmp_path, 1)
    running, _ = start(batching=BatchingOptions(max_batch_size=2, max_enqueued_batches=4))
    stub, calls = prediction_service_pb2_grpc.PredictionServiceStub, []
    gate.clear()
    gate.runs.clear()
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        calls = [stub(channel).Predict.future(predict_request(random_images(1)), timeout=60) for _ in range(40)]
        until(lambda: sum(call.done() for call in calls) == 32)  # 8 may wait; the model has not moved
        assert {call.code() for call in calls if call.done()} == {CODE.RESOURCE_EXHAUSTED}
        start_time = time.monotonic()
        for _ in range(20):
            with pytest.raises(grpc.RpcError, match="the queue is full"):
                stub(channel).Predict(predict_request(random_images(1)), timeout=60)
        assert (time.monotonic() - start_time) / 20 < 0.25
        gate.set()
        assert [call.code() for call in calls if call.code() == CODE.OK] == [CODE.OK] * 8
        assert stub(channel).Predict(predict_request(random_images(1)), timeout=60).outputs


def test_more_requests_than_threads_are_refused(start, tmp_path, gate):
    write_version(tmp_path, 1)
    running, _ = start(max_requests=3)
    gate.clear()
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        calls = [stub.Predict.future(predict_request(random_images(1)), timeout=60) for _ in range(10)]
        until(lambda: sum(call.done() for call in calls) == 7)
        gate.set()
        assert sorted(call.code().name for call in calls) == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 7


def test_late_and_cancelled_calls_do_not_run(start, tmp_path, gate):
    write_version(tmp_path, 1)
    running, _ = start()
    gate.clear()
    gate.runs.clear()
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        first = stub.Predict.future(predict_request(random_images(1)), timeout=60)
        until(lambda: gate.runs)
        late = stub.Predict.future(predict_request(random_images(2)), timeout=0.3)
        cancelled = stub.Predict.future(predict_request(random_images(3)), timeout=60)
        kept = stub.Predict.future(predict_request(random_images(4)), timeout=60)
        assert late.code() == CODE.DEADLINE_EXCEEDED  # while the model is busy
        until(lambda: waiting(running) == 8)
        cancelled.cancel()
        until(lambda: waiting(running) == 5)
        gate.set()
        assert (first.code(), kept.code()) == (CODE.OK, CODE.OK)
    assert gate.runs == [1, 4]


def waiting(running):
    """Images taken in and not yet answered."""
    return running._metrics.registry.get_sample_value(QUEUE_LENGTH, {"model_name": "tiny"})


def command(base, *arguments):
    flags = [f"--model_base_path={base}", "--model_name=tiny", "--port=0", *arguments]
    return [sys.executable, "-m", "serving.server", *flags]


def test_sigterm_drains(base_path):
    """A running call is answered, a new one refused, and the process ends by itself."""
    with subprocess.Popen(
        command(base_path, "--grace_seconds=60"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with grpc.insecure_channel(address) as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                slow = [stub.Predict.future(predict_request(random_images(1), "slow"), timeout=60) for _ in range(4)]
                time.sleep(0.3)  # they are on their way
                process.send_signal(signal.SIGTERM)
                line = process.stderr.readline()
                while json.loads(line)["event"] != "stopping":
                    line = process.stderr.readline()
                assert [call.code() for call in slow] == [CODE.OK] * 4
                out, err = process.communicate(timeout=60)
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Predict(predict_request(random_images(1)), timeout=5)
                assert refused.value.code() == CODE.UNAVAILABLE
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"


# === TLS ===


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(base_path, pem, mutual):
    tls = Tls(pem["server.pem"], pem["server.key"], pem["ca.pem"] if mutual else None)
    running = server.start(server.Options("tiny", base_path, port=0, tls=tls), QUIET)
    images = random_images(1)
    trusting = ClientTls(pem["ca.pem"])
    proven = ClientTls(pem["ca.pem"], pem["client.pem"], pem["client.key"])
    try:
        with asking(running, tls=proven) as client:
            assert_equal(client.predict(images), answer(images))
        for refused in [None, ClientTls(pem["client.pem"])] + [trusting] * mutual:
            with asking(running, tls=refused, retries=0, timeout=10) as client, pytest.raises(UserError):
                client.predict(images)
        if not mutual:
            with asking(running, tls=trusting) as client:
                assert_equal(client.predict(images), answer(images))
    finally:
        running.stop(0)


def test_wrong_certificates_are_refused(base_path, pem, tmp_path):
    (tmp_path / "text").write_text("no certificate")
    for tls, words in (
        (Tls(str(tmp_path / "nowhere"), pem["server.key"]), "--tls_certificate .*nowhere cannot be read"),
        (Tls(pem["server.pem"], str(tmp_path / "text")), "--tls_key .*PEM"),
        (Tls(pem["server.pem"], pem["client.key"]), "the key does not belong"),
    ):
        with pytest.raises(UserError, match=words):
            server.start(server.Options("tiny", base_path, port=0, tls=tls), QUIET)


# === Health and metrics ===


def test_health_follows_the_versions(running, channel):
    stub = health_pb2_grpc.HealthStub(channel)

    def check(service):
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    names = ["", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "PredictionService"]
    assert [check(name) for name in names] == [serving] * 4
    running._serves([])
    assert [check(name) for name in names] == [not_serving] * 4
    running._serves([0])
    with pytest.raises(grpc.RpcError) as refused:
        check("other")
    assert refused.value.code() == CODE.NOT_FOUND


def scrape(running):
    """Series without TF Serving's prefix → value."""
    url = f"http://localhost:{running.metrics_port}/monitoring/prometheus/metrics"
    text = urllib.request.urlopen(url, timeout=60).read().decode()
    lines = [line.removeprefix(":tensorflow:serving:") for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_count_what_happens(running, channel):
    before = scrape(running)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    for _ in range(3):
        stub.Predict(predict_request(random_images(2)), timeout=60)
    with pytest.raises(grpc.RpcError):
        stub.Predict(predict_request(random_images(2), "nothing"), timeout=60)
    after = scrape(running)

    def gained(series):
        return after[series] - before.get(series, 0.0)

    assert gained('request_count{model_name="tiny",status="OK"}') == 3
    assert gained('request_count{model_name="tiny",status="INVALID_ARGUMENT"}') == 1
    latency = 'request_latency_{}{{API="Predict",entrypoint="GRPC",model_name="tiny"}}'
    assert gained(latency.format("count")) == 4
    assert 1 < gained(latency.format("sum")) < 240e6
    assert gained('runtime_latency_count{model_name="tiny"}') == 3
    assert gained('batching_session:queuing_latency_count{model_name="tiny"}') == 3
    assert gained('batching_session:processed_batch_size_sum{model_name="tiny"}') == 6
    assert after['batching_session:queue_length{model_name="tiny"}'] == 0
    assert after['model_version_available{model_name="tiny",version="0"}'] == 1


def test_taken_metrics_port_is_refused(base_path, running):
    with pytest.raises(UserError, match="choose another --metrics_port"):
        server.start(server.Options("tiny", base_path, port=0, metrics_port=running.metrics_port), QUIET)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls_key=a"], "--tls_certificate and --tls_key together"),
        (["--tls_client_ca=a"], "needs --tls_certificate"),
        (["--max_batch_size=0"], "--max_batch_size=0"),
    ],
)
def test_wrong_flags_are_refused(base_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        server.console(command(base_path, *flags)[2:])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_help_says_what_production_is(capsys):
    with pytest.raises(SystemExit):
        server.console(["server", "--help"])
    assert "In production run TF Serving" in capsys.readouterr().out


def test_threads_end_with_the_server(base_path):
    before = set(threading.enumerate())
    running = server.start(server.Options("tiny", base_path, port=0, metrics_port=0), QUIET)
    with asking(running) as client:
        client.predict(random_images(1))
    own = set(threading.enumerate()) - before
    assert {thread.name for thread in own} >= {"versions", "batch-0", "request_0"}
    running.stop(1)
    until(lambda: not [t for t in own if t.name.startswith(("versions", "batch", "request")) and t.is_alive()])
