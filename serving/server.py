"""A local gRPC server for an exported model, speaking TF Serving's protocol. In production run TF Serving.

  python -m serving.server --model_base_path=exported/digits --model_name=digits

It is for machines without Docker, for tests and for demos: the same folder, the same protocol, and clients need no
change when TF Serving takes over. It serves on loopback until SIGTERM or Ctrl-C, and finishes what it has begun. It
watches the folder: a new version is loaded beside the old one and takes over between two requests; one that cannot be
loaded changes nothing. Requests that come at the same time are run together. A message may have 64 MiB.

Its log is JSON lines on stderr, and never holds what a client sent.
"""

from __future__ import annotations

import functools
import os
import queue
import signal
import threading
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from absl import flags
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from commands.run import run
from serving.batching import Batcher, BatchingOptions
from serving.interceptor import Interceptor
from serving.listening import Tls, listen, refuse_taken
from serving.logs import Log, Sparing, log
from serving.metrics import Metrics
from serving.model import Model
from serving.services import ModelService, PredictionService
from serving.tensors import MESSAGE_LIMITS
from serving.versions import Versions
from vqunet_tf.errors import UserError

GRACE_SECONDS = 10.0
EXIT_SECONDS = 10.0  # beyond the grace, before the process ends the hard way
CHANNEL_OPTIONS = [
    *MESSAGE_LIMITS,
    ("grpc.so_reuseport", 0),  # else two servers share a port and each gets half the calls
    ("grpc.server_handshake_timeout_ms", 10_000),  # a connection that says nothing is closed
    ("grpc.keepalive_time_ms", 60_000),  # and one whose other end is gone
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]
# Whom a health check may ask about; TF Serving answers to the short names.
HEALTH_NAMES = (
    "",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
    "PredictionService",
    "ModelService",
)


@dataclass(frozen=True)
class Options:
    """What a server is to be.

    name, base_path: the model, a folder of versions.
    host, port: where to listen; port 0 leaves the choice to the system.
    metrics_port: None for none, 0 for a free one.
    num_versions: how many of the highest versions serve.
    poll_seconds: how often the folder is looked at, 0 for never.
    max_images: of one request.
    max_requests: at the same time; each has a thread.
    """

    name: str
    base_path: Path | str
    host: str = "localhost"
    port: int = 8500
    metrics_port: int | None = None
    num_versions: int = 1
    poll_seconds: float = 1.0
    max_images: int = 8192
    max_requests: int = 512
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    tls: Tls | None = None


class Server:
    """A running server: `port`, `metrics_port`, `versions`, and `stop`."""

    def __init__(self, options: Options, log: Log = log):
        self.options = options
        self._log = log
        # What a flag is to blame for comes out before minutes are spent on the model.
        refuse_taken(options.host, options.port)
        if options.metrics_port is not None:
            refuse_taken(options.host, options.metrics_port, "--metrics_port")
        if options.tls:
            options.tls.credentials()
        self._metrics = Metrics(options.name)
        self._health = health.HealthServicer()
        self._serves([])
        sizes = (1, options.batching.max_batch_size)
        self.versions = Versions(
            options.name,
            Path(options.base_path),
            functools.partial(_load, sizes),
            log,
            options.num_versions,
            self._serves,
        )
        self.versions.open(options.poll_seconds)  # TF Serving too opens its port when the model is there
        self._batcher = Batcher(options.batching, self._metrics)
        self._threads = futures.ThreadPoolExecutor(options.max_requests, thread_name_prefix="request")
        try:
            self._server, self.port = self._listen()
            self._http = self._start_http()
        except BaseException:
            self.versions.close()
            self._batcher.close()
            raise
        self.metrics_port = self._http.server_port if self._http else None

    def _listen(self) -> tuple[grpc.Server, int]:
        options = self.options
        server = grpc.server(
            self._threads,
            interceptors=[Interceptor(self._metrics, self._log, Sparing(self._log))],
            options=CHANNEL_OPTIONS,
            maximum_concurrent_rpcs=options.max_requests,
        )
        prediction = PredictionService(self.versions, self._batcher, options.max_images)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(prediction, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self.versions), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = listen(server, options.host, options.port, options.tls)
        server.start()
        return server, port

    def _start_http(self) -> Any:
        if self.options.metrics_port is None:
            return None
        try:
            return self._metrics.start_http(self.options.host, self.options.metrics_port)
        except OSError as error:
            self._server.stop(0).wait()
            words = f"cannot listen at {self.options.host}:{self.options.metrics_port} ({error.strerror or error})"
            raise UserError(f"{words}: choose another --metrics_port (0 for a free one)") from None

    def _serves(self, numbers: list[int]) -> None:
        """Tells health checks and metrics which versions serve."""
        self._metrics.serves(numbers)
        status = health_pb2.HealthCheckResponse
        for name in HEALTH_NAMES:
            self._health.set(name, status.SERVING if numbers else status.NOT_SERVING)

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Takes no more calls, waits up to `grace` seconds for those that run, and ends every thread."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._threads.shutdown(wait=False)
        self.versions.close()
        self._batcher.close()
        if self._http:
            self._http.shutdown()
            self._http.server_close()


def _load(batch_sizes: Sequence[int], path: Path) -> Model:
    model = Model(path)
    model.warm_up(batch_sizes)
    return model


def start(options: Options, log: Log = log) -> Server:
    """Serves a model in threads.

    A model that cannot be served, a port or a host that cannot be had raise a `UserError`.
    """
    return Server(options, log)


# === Command ===


def main(values: flags.FlagValues) -> None:
    # An Event may not be set from a handler: where the signal comes as the main thread begins to wait, both hang.
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.put(number))
    server = start(_options(values))
    versions = ", ".join(map(str, server.versions.numbers))
    log("ready", model=values.model_name, port=server.port, metrics_port=server.metrics_port)
    print(f"serving {values.model_name} version {versions} at {values.host}:{server.port}", flush=True)
    received = stop.get()
    log("stopping", signal=signal.Signals(received).name, grace_seconds=values.grace_seconds)
    _end_anyway_after(values.grace_seconds + EXIT_SECONDS)
    server.stop(values.grace_seconds)
    log("stopped")


def _end_anyway_after(seconds: float) -> None:
    """Ends the process if it has not ended by itself: whoever sent the signal waits for that."""

    def end() -> None:
        log("stopped", forced=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _options(values: flags.FlagValues) -> Options:
    if bool(values.tls_certificate) != bool(values.tls_key):
        raise UserError("expected --tls_certificate and --tls_key together, got one of them")
    if values.tls_client_ca and not values.tls_certificate:
        raise UserError("--tls_client_ca needs --tls_certificate and --tls_key: clients prove themselves over TLS")
    tls = Tls(values.tls_certificate, values.tls_key, values.tls_client_ca) if values.tls_certificate else None
    batching = BatchingOptions(
        values.max_batch_size, values.batch_timeout_micros, values.max_enqueued_batches, values.num_batch_threads
    )
    return Options(
        name=values.model_name,
        base_path=values.model_base_path,
        host=values.host,
        port=values.port,
        metrics_port=values.metrics_port,
        num_versions=values.num_versions,
        poll_seconds=values.poll_seconds,
        max_images=values.max_images,
        max_requests=values.max_requests,
        batching=batching,
        tls=tls,
    )


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def text(name: str, default: str | None, words: str) -> None:
        flags.DEFINE_string(name, default, words, flag_values=values)

    def whole(name: str, default: int | None, words: str, least: int = 1, most: int | None = None) -> None:
        flags.DEFINE_integer(name, default, words, least, most, flag_values=values)

    def number(name: str, default: float, words: str) -> None:
        flags.DEFINE_float(name, default, words, lower_bound=0, flag_values=values)

    text("model_base_path", None, "the --export_dir of serving.export")
    text("model_name", None, "the name clients ask for")
    whole("port", 8500, "the port, 0 for a free one", 0, 65535)
    text("host", "localhost", "the address to listen at")
    whole("num_versions", 1, "how many of the highest versions serve; clients get the highest or the one they name")
    number("poll_seconds", 1.0, "how often the folder is looked at for new versions, 0 for never")
    whole("max_batch_size", BatchingOptions.max_batch_size, "images run at once")
    whole("batch_timeout_micros", BatchingOptions.batch_timeout_micros, "how long an image waits for others", 0)
    whole("max_enqueued_batches", BatchingOptions.max_enqueued_batches, "batches that may wait; more are refused")
    whole("num_batch_threads", BatchingOptions.num_batch_threads, "batches run at the same time")
    whole("max_images", Options.max_images, "images in one request")
    whole("max_requests", Options.max_requests, "requests at the same time; more are refused")
    text("tls_certificate", None, "the server's certificate in PEM; switches TLS on")
    text("tls_key", None, "the key of --tls_certificate in PEM")
    text("tls_client_ca", None, "who signs the certificates of clients, in PEM; only such clients are served")
    whole("metrics_port", None, "a port for Prometheus, 0 for a free one; none without it", 0, 65535)
    number("grace_seconds", GRACE_SECONDS, "how long running calls may take to end after SIGTERM")
    return values


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    run(main, _flags(), str(__doc__), required=("model_base_path", "model_name"), argv=argv)


if __name__ == "__main__":
    console()
