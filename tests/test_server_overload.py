"""More than a server can take is refused at once, and nothing runs that nobody waits for."""

from __future__ import annotations

import time

import grpc
import pytest
from served import predict_request, random_images, until, write_version
from tensorflow_serving.apis import prediction_service_pb2_grpc

from serving.batching import BatchingOptions

CODE = grpc.StatusCode
QUEUE_LENGTH = ":tensorflow:serving:batching_session:queue_length"


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
