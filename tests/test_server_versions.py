"""The versions of a server come and go: none is taken half-written, no request is lost."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import tensorflow as tf
from served import NAMES, asking, predict_request, random_images, until, write_version
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc, prediction_log_pb2

from serving import model


def statuses(running):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "tiny"
    with grpc.insecure_channel(f"localhost:{running.port}") as channel:
        found = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=60)
    name = get_model_status_pb2.ModelVersionStatus.State.Name
    return {status.version: (name(status.state), status.status) for status in found.model_version_status}


def states(running):
    return {version: state for version, (state, _) in statuses(running).items()}


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
