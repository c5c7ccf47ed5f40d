"""How a client reaches a server: the channel with its limits and TLS, and calls that are tried again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import grpc

from serving.listening import read_pem
from serving.tensors import MESSAGE_LIMITS
from vqunet_tf.errors import UserError

FIRST_PAUSE = 0.1  # seconds before the second try; each pause is twice the one before
LONGEST_PAUSE = 2.0
CHANNEL_OPTIONS = [
    *MESSAGE_LIMITS,
    # A server that comes back is found within the pauses between tries.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True)
class ClientTls:
    """Files in PEM for a TLS connection.

    ca: who signs the server's certificate; None for the authorities that gRPC knows.
    certificate, key: the client's own, where the server asks for them (mutual TLS).
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises a `UserError` for a file that cannot be read."""
        if bool(self.certificate) != bool(self.key):
            raise UserError("expected --tls_certificate and --tls_key together, got one of them")
        ca = read_pem("--tls_ca", self.ca) if self.ca else None
        key = read_pem("--tls_key", self.key) if self.key else None
        chain = read_pem("--tls_certificate", self.certificate) if self.certificate else None
        return grpc.ssl_channel_credentials(ca, key, chain)


def open_channel(server: str, tls: ClientTls | None) -> grpc.Channel:
    """Returns a channel to `host:port`; it connects at the first call."""
    if tls is None:
        return grpc.insecure_channel(server, CHANNEL_OPTIONS)
    return grpc.secure_channel(server, tls.credentials(), CHANNEL_OPTIONS)


def call(method: Any, request: Any, seconds: float, retries: int) -> Any:
    """Returns `method(request)`, tried again while the server is UNAVAILABLE, all within `seconds`.

    Predicting changes nothing on a server, so it may be asked twice. Raises gRPC's error of the last try.
    """
    end = time.monotonic() + seconds
    pause = FIRST_PAUSE
    for left in range(retries, -1, -1):
        try:
            return method(request, timeout=max(0.001, end - time.monotonic()))
        except grpc.RpcError as error:
            wait = pause * random.uniform(0.5, 1.0)  # so that many clients do not come back at once
            if error.code() != grpc.StatusCode.UNAVAILABLE or not left or time.monotonic() + wait >= end:
                raise
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError("the last try returns or raises")
