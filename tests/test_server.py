"""The server: right answers in any company, health, metrics."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import keras
import numpy as np
import ovmsclient
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import NAMES, QUIET, SHAPE, answer, asking, assert_equal, predict_request, random_images
from tensorflow_serving.apis import classification_pb2, prediction_service_pb2_grpc

from serving import export, server
from vqunet_tf import DefendedClassifier
from vqunet_tf.errors import UserError


@pytest.fixture(scope="module")
def running(tiny_path):
    running = server.start(server.Options("tiny", tiny_path, port=0, metrics_port=0), QUIET)
    yield running
    running.stop(0)


@pytest.fixture(scope="module")
def channel(running):
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        yield channel


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


def test_taken_metrics_port_is_refused(tiny_path, running):
    with pytest.raises(UserError, match="choose another --metrics_port"):
        server.start(server.Options("tiny", tiny_path, port=0, metrics_port=running.metrics_port), QUIET)


CODE = grpc.StatusCode
