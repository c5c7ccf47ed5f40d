"""Two hundred requests of twenty wrong kinds: each gets the right status and words, others are served meanwhile, and
nothing that was sent enters the log."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import zlib

import grpc
import numpy as np
import pytest
import tensorflow as tf
from served import ALL, SHAPE, answer, assert_equal, predict_request, random_images, write_version
from tensorflow_serving.apis import prediction_service_pb2_grpc

from serving import server
from serving.client import Client
from serving.tensors import MAX_MESSAGE_BYTES, to_proto

TIMES = 10
SECRET = "Tr0ub4dor"  # is in whatever a client can choose
CODE = grpc.StatusCode


class Log:
    """Keeps what is logged, as text."""

    def __init__(self):
        self.lines = []

    def __call__(self, event, **fields):
        self.lines.append(f"{event} {fields}")


@pytest.fixture(scope="module")
def log():
    return Log()


@pytest.fixture(scope="module")
def port(tmp_path_factory, log):
    base = tmp_path_factory.mktemp("versions")
    write_version(base, 0, signatures=ALL)
    running = server.start(server.Options("tiny", base, port=0), log)
    yield running.port
    running.stop(0)


@pytest.fixture(scope="module")
def channel(port):
    with grpc.insecure_channel(f"localhost:{port}", [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


def one(seed, dtype="float32"):
    return random_images(1, dtype, seed)


def spoiled(seed, value):
    images = one(seed)
    images.flat[seed * 7] = value
    return predict_request(images)


def many(seed):
    request = predict_request(one(0, "uint8"), "serve_uint8")
    request.inputs["images"].CopyFrom(to_proto(np.zeros((10_001, *SHAPE), np.uint8)))
    return request


def png(seed):
    return tf.io.encode_png(one(seed, "uint8")[0]).numpy()


def files(*data):
    return predict_request(np.array(data, object), "serve_encoded")


def text_file(seed):
    return files(png(seed), f"{SECRET} is no image, number {seed}".encode() * 20)


def bomb(seed):
    """A PNG of a few kilobytes that unpacks to 10 GB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000 + seed, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def of_version(seed):
    request = predict_request(one(seed))
    request.model_spec.version.value = 40 + seed
    return request


def oversize(seed):
    request = predict_request(one(seed))
    request.inputs["images"].tensor_content = SECRET.encode() * (MAX_MESSAGE_BYTES // len(SECRET) + 1)
    return request


REQUESTS = {
    "missing input": (
        lambda i: predict_request(None, **{f"{SECRET}{i}": one(i)}),
        CODE.INVALID_ARGUMENT,
        "expected images, got",
    ),
    "wrong dtype": (lambda i: predict_request(one(i, "uint8")), CODE.INVALID_ARGUMENT, "as float32, got uint8"),
    "rank": (lambda i: predict_request(one(i)[0]), CODE.INVALID_ARGUMENT, r"of shape \[None, 8, 12, 3\].*got \[8"),
    "size": (lambda i: predict_request(one(i)[:, : i % 7 + 1]), CODE.INVALID_ARGUMENT, r"got \[1, \d, 12, 3\]"),
    "channel count": (lambda i: predict_request(one(i)[..., :1]), CODE.INVALID_ARGUMENT, r"got \[1, 8, 12, 1\]"),
    "NaN": (lambda i: spoiled(i, np.nan), CODE.INVALID_ARGUMENT, "finite numbers"),
    "infinity": (lambda i: spoiled(i, (-1) ** i * np.inf), CODE.INVALID_ARGUMENT, "finite numbers"),
    "out of range": (lambda i: spoiled(i, (-1) ** i * 1.5), CODE.INVALID_ARGUMENT, r"in \[0,1\], got .*divide bytes"),
    "empty batch": (lambda i: predict_request(one(i)[:0]), CODE.INVALID_ARGUMENT, "at least one image"),
    "10,001 images": (many, CODE.INVALID_ARGUMENT, "at most 8192 images in a request, got 10001"),
    "truncated PNG": (lambda i: files(png(i)[: 60 + i]), CODE.INVALID_ARGUMENT, "cannot read the images|PNG or JPEG"),
    "text file": (text_file, CODE.INVALID_ARGUMENT, r"PNG or JPEG files in 'images', got \d+ bytes .* at 1"),
    "decompression bomb": (lambda i: files(bomb(i)), CODE.INVALID_ARGUMENT, "images of at most 16777216 pixels"),
    "unknown signature": (
        lambda i: predict_request(one(i), f"{SECRET}{i}"),
        CODE.INVALID_ARGUMENT,
        "not found: expected one of .*serve_uint8",
    ),
    "unknown model": (
        lambda i: predict_request(one(i), model=f"{SECRET}{i}"),
        CODE.NOT_FOUND,
        "this server has 'tiny' version 0",
    ),
    "unknown version": (of_version, CODE.NOT_FOUND, r"Specific\(tiny, 4\d\): this server has 'tiny' version 0"),
    "oversize message": (oversize, CODE.RESOURCE_EXHAUSTED, "larger than max"),
}


def send(channel, kind, seed):
    """Sends a malformed request, and says what is wrong with the way it is refused."""
    make, code, words = REQUESTS[kind]
    call = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict.future(make(seed), timeout=60)
    assert call.code() == code, f"{kind}: {call.code()} {call.details()}"
    assert re.search(words, call.details()) and "\n" not in call.details(), f"{kind}: {call.details()}"


def cancel(channel, seed):
    call = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict.future(
        predict_request(one(seed)), timeout=60
    )
    call.cancel()
    assert call.code() in (CODE.CANCELLED, CODE.OK)  # it may have been quicker


def garbage(port, seed):
    """Bytes that are no HTTP/2: the server hangs up, or says why and then does."""
    with socket.create_connection(("localhost", port), timeout=60) as connection:
        data = SECRET.encode() + np.random.default_rng(seed).bytes(500)
        with contextlib.suppress(OSError):
            connection.sendall(data)
            while connection.recv(4096):
                pass


def half_open(port, stack, seed):
    """A connection that begins and says no more."""
    connection = stack.enter_context(socket.create_connection(("localhost", port), timeout=60))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: 3 * seed])


def test_two_hundred_malformed_requests(port, channel, log, capfd):
    stop, answered, failed = threading.Event(), [], []

    def ask_properly():
        images = random_images(3)
        with Client(f"localhost:{port}", "tiny", 60.0, retries=0) as client:
            while not stop.is_set():
                try:
                    assert_equal(client.predict(images), answer(images))
                    answered.append(1)
                except BaseException as error:
                    failed.append(error)
                    return

    asker = threading.Thread(target=ask_properly)
    asker.start()
    sent = 0
    with contextlib.ExitStack() as stack:
        try:
            for seed in range(TIMES):
                half_open(port, stack, seed)
                garbage(port, seed)
                cancel(channel, seed)
                for kind in REQUESTS:
                    send(channel, kind, seed)
                sent += 3 + len(REQUESTS)
            count = len(answered)
            while not failed and len(answered) < count + 3:
                stop.wait(0.05)
        finally:
            stop.set()
            asker.join()
    assert (sent, failed) == (200, [])
    assert len(answered) > TIMES
    output = capfd.readouterr()
    for text in (*log.lines, output.out, output.err):
        assert SECRET not in text
    refused = [line for line in log.lines if line.startswith("refused")]
    assert len(refused) >= 20 and all("'status': '" in line for line in refused)
    assert not [line for line in log.lines if line.startswith("error")]


def test_bytes_that_are_no_request(channel, log):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as refused:
        call(b"\xff" + SECRET.encode(), timeout=60)
    assert refused.value.code() == CODE.INVALID_ARGUMENT
    assert "are no request of Predict" in refused.value.details()
    assert not [line for line in log.lines if SECRET in line]


def test_an_unknown_method_and_what_is_not_for_a_classifier(channel):
    for method in ("/tensorflow.serving.PredictionService/Guess", "/tensorflow.serving.PredictionService/Regress"):
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(b"", timeout=60)
        assert refused.value.code() == CODE.UNIMPLEMENTED


def test_a_bad_file_does_not_spoil_the_batch_of_others(port):
    """The graph fails for a whole batch; only the one who sent the damaged file is told so."""
    whole, damaged = png(1), png(2)[:-40]
    results = {}

    def ask(number):
        with Client(f"localhost:{port}", "tiny", 60.0) as client:
            try:
                results[number] = client.predict([damaged if number % 4 == 0 else whole], "serve_encoded")
            except Exception as error:
                results[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = answer(one(1, "uint8"))
    for number, found in results.items():
        if number % 4 == 0:
            assert "INVALID_ARGUMENT" in str(found)
        else:
            assert_equal(found, wanted)


def test_a_failure_of_the_server_says_where_but_not_what(port, channel, log, monkeypatch):
    def fail(self, inputs):
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr("serving.model.Signature.__call__", fail)
    with pytest.raises(grpc.RpcError) as refused:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(predict_request(one(0)), timeout=60)
    assert refused.value.code() == CODE.INTERNAL
    (line,) = [line for line in log.lines if line.startswith("error")]
    assert "ZeroDivisionError" in line and "test_malformed.py" in line and SECRET not in line
