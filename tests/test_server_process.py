"""The server as a process: flags, threads, and SIGTERM, after which it answers what it has taken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from served import QUIET, asking, predict_request, random_images, until
from tensorflow_serving.apis import prediction_service_pb2_grpc

from serving import server

ROOT = Path(__file__).parents[1]
CODE = grpc.StatusCode


def command(base, *arguments):
    flags = [f"--model_base_path={base}", "--model_name=tiny", "--port=0", *arguments]
    return [sys.executable, "-m", "serving.server", *flags]


def test_sigterm_drains(tiny_path):
    """A running call is answered, a new one refused, and the process ends by itself."""
    with subprocess.Popen(
        command(tiny_path, "--grace_seconds=60"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
                process.wait(timeout=60)
                # Not communicate(): it passes over lines that readline() has taken from the pipe beforehand.
                out, err = process.stdout.read(), process.stderr.read()
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Predict(predict_request(random_images(1)), timeout=5)
                assert refused.value.code() == CODE.UNAVAILABLE
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls_key=a"], "--tls_certificate and --tls_key together"),
        (["--tls_client_ca=a"], "needs --tls_certificate"),
        (["--max_batch_size=0"], "--max_batch_size=0"),
    ],
)
def test_wrong_flags_are_refused(tiny_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        server.console(command(tiny_path, *flags)[2:])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_help_says_what_production_is(capsys):
    with pytest.raises(SystemExit):
        server.console(["server", "--help"])
    assert "In production run TF Serving" in capsys.readouterr().out


def test_threads_end_with_the_server(tiny_path):
    before = set(threading.enumerate())
    running = server.start(server.Options("tiny", tiny_path, port=0, metrics_port=0), QUIET)
    with asking(running) as client:
        client.predict(random_images(1))
    own = set(threading.enumerate()) - before
    assert {thread.name for thread in own} >= {"versions", "batch-0", "request_0"}
    running.stop(1)
    until(lambda: not [t for t in own if t.name.startswith(("versions", "batch", "request")) and t.is_alive()])
