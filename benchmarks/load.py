"""A closed loop of calls, in a process of its own: as many at a time as asked, each sent when one before it is answered.

    python benchmarks/load.py ADDRESS REQUEST_FILE CONCURRENCY SECONDS

REQUEST_FILE holds a serialised PredictRequest, which is sent as it is. Prints one JSON object. It imports gRPC alone, so
that it starts in a moment and takes little of the machine it shares with the server.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import grpc

METHOD = "/tensorflow.serving.PredictionService/Predict"
LIMITS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def load(address: str, request: bytes, concurrency: int, seconds: float) -> dict[str, float]:
    """Calls for `seconds`; raises the gRPC error of a call that fails."""
    latencies: list[float] = []
    failures: list[grpc.RpcError] = []
    done = threading.Semaphore(0)
    with grpc.insecure_channel(address, LIMITS) as channel:
        method = channel.unary_unary(METHOD)
        for _ in range(3):
            method(request)
        before, start = _cpu_seconds(), time.perf_counter()
        end = start + seconds

        def issue() -> None:
            began = time.perf_counter()
            if began >= end or failures:
                done.release()
                return

            def answered(future: grpc.Future) -> None:
                latencies.append(time.perf_counter() - began)
                if future.exception() is not None:
                    failures.append(future.exception())
                issue()

            method.future(request).add_done_callback(answered)

        for _ in range(concurrency):
            issue()
        for _ in range(concurrency):
            done.acquire()
        took, cpu = time.perf_counter() - start, _cpu_seconds() - before
    if failures:
        raise failures[0]
    latencies.sort()
    percentiles = {f"p{q}_ms": round(1000 * latencies[len(latencies) * q // 100], 2) for q in (50, 95, 99)}
    return {"calls": len(latencies), "seconds": took, "cpu_seconds": cpu, **percentiles}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3]), float(sys.argv[4]))))
