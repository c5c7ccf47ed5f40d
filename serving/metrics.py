"""What Prometheus may scrape, under TF Serving's names where it has them, so that one dashboard fits both.

| series | type | labels |
|---|---|---|
| `:tensorflow:serving:request_count` | count | `model_name`, `status` (`OK`, `INVALID_ARGUMENT`, ...) |
| `:tensorflow:serving:request_latency` | histogram, microseconds | `model_name`, `API`, `entrypoint` |
| `:tensorflow:serving:runtime_latency` | histogram, microseconds: one run of the model | `model_name` |
| `:tensorflow:serving:batching_session:queuing_latency` | histogram, microseconds | `model_name` |
| `:tensorflow:serving:batching_session:processed_batch_size` | histogram, images | `model_name` |
| `:tensorflow:serving:batching_session:queue_length` | gauge, images taken in and not answered; ours | `model_name` |
| `:tensorflow:serving:model_version_available` | gauge, 1 while it serves; ours | `model_name`, `version` |
"""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram

PREFIX = ":tensorflow:serving:"
MICROSECONDS = [10 * 1.8**step for step in range(33)]  # TF Serving's buckets
BATCH_SIZES = [2.0**step for step in range(14)]


class _Count(Gauge):
    """A counter whose name stays as it is: `Counter` would add `_total`, which TF Serving does not."""

    _type = "unknown"


class Metrics:
    """The series of one model; knows the work of a server only by what it is told."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        batching = f"{PREFIX}batching_session:"
        self._counts = self._make(_Count, f"{PREFIX}request_count", "Requests by status", ["status"])
        self._latency = self._make(
            Histogram, f"{PREFIX}request_latency", "Microseconds", ["API", "entrypoint"], buckets=MICROSECONDS
        )
        self._runtime = self._child(
            Histogram, f"{PREFIX}runtime_latency", "Microseconds in the model", buckets=MICROSECONDS
        )
        self._queuing = self._child(
            Histogram, f"{batching}queuing_latency", "Microseconds of the oldest in a batch", buckets=MICROSECONDS
        )
        self._sizes = self._child(
            Histogram, f"{batching}processed_batch_size", "Images run at once", buckets=BATCH_SIZES
        )
        self._length = self._child(Gauge, f"{batching}queue_length", "Images taken in and not yet answered")
        self._versions = self._make(Gauge, f"{PREFIX}model_version_available", "1 while it serves", ["version"])

    def _make(self, kind: Any, name: str, text: str, labels: list[str] | None = None, **options: Any) -> Any:
        return kind(name, text, ["model_name", *(labels or [])], registry=self.registry, **options)

    def _child(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        return self._make(kind, name, text, **options).labels(self._model_name)

    def answered(self, method: str, status: str, seconds: float) -> None:
        """Counts a request of any outcome."""
        self._counts.labels(self._model_name, status).inc()
        self._latency.labels(self._model_name, method, "GRPC").observe(seconds * 1e6)

    def waiting(self, images: int) -> None:
        """Sets the length of the queue."""
        self._length.set(images)

    def ran(self, images: int, queued_seconds: float, run_seconds: float) -> None:
        """Counts a batch."""
        self._sizes.observe(images)
        self._queuing.observe(queued_seconds * 1e6)
        self._runtime.observe(run_seconds * 1e6)

    def serves(self, versions: list[int]) -> None:
        """Sets which versions serve."""
        self._versions.clear()
        for version in versions:
            self._versions.labels(self._model_name, str(version)).set(1)

    def start_http(self, host: str, port: int) -> Any:
        """Answers scrapes on any path; returns the HTTP server, whose `server_port` is the port."""
        server, _ = prometheus_client.start_http_server(port, host, self.registry)
        return server
