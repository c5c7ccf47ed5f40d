"""Fifty thousand requests: the server's memory stays flat. Minutes, so only by `pytest -m slow`."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from served import predict_request, random_images, write_version
from tensorflow_serving.apis import prediction_service_pb2_grpc

ROOT = Path(__file__).parents[1]
REQUESTS, WARM = 50_000, 5_000


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such process")


@pytest.mark.slow
def test_memory_is_flat_over_many_requests(tmp_path):
    """Of all sizes, good and bad, sixteen at a time."""
    write_version(tmp_path, 0)
    flags = [f"--model_base_path={tmp_path}", "--model_name=tiny", "--port=0"]
    command = [sys.executable, "-m", "serving.server", *flags]
    requests = [predict_request(random_images(1 + number % 40)) for number in range(80)]
    requests += [predict_request(random_images(1), "unknown"), predict_request(random_images(1) + 1)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(16) as pool:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

                def ask(number):
                    call = stub.Predict.future(requests[number % len(requests)], timeout=120)
                    return call.code()

                def ask_many(count):
                    return sum(code == grpc.StatusCode.OK for code in pool.map(ask, range(count)))

                assert ask_many(WARM) > 0.9 * WARM
                before = resident_bytes(process.pid)
                seen = []
                for _ in range(10):
                    assert ask_many(REQUESTS // 10) > 0.9 * REQUESTS // 10
                    seen.append(resident_bytes(process.pid))
        finally:
            process.terminate()
            process.wait(60)
    print("resident MiB:", [round(size / 2**20, 1) for size in (before, *seen)])
    assert max(seen) <= 1.05 * before and min(seen) >= 0.95 * before
