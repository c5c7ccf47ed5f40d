"""Where a server listens: a port that is really free, with or without TLS."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

from vqunet_tf.errors import UserError


@dataclass(frozen=True)
class Tls:
    """Files in PEM: the certificate (chain) and key of the server, and whose clients it takes (mutual TLS) if given."""

    certificate: str
    key: str
    client_ca: str | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Raises a `UserError` for a file that cannot be read."""
        pair = (read_pem("--tls_key", self.key), read_pem("--tls_certificate", self.certificate))
        client_ca = read_pem("--tls_client_ca", self.client_ca) if self.client_ca else None
        return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def read_pem(flag: str, path: str) -> bytes:
    """Returns the bytes of a PEM file; a `UserError` names the flag."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    if b"-----BEGIN" not in data:
        raise UserError(f"{flag} {path}: expected a file in PEM format, got something else")
    return data


def listen(server: grpc.Server, host: str, port: int, tls: Tls | None) -> int:
    """Binds `server`; returns the port, which port 0 leaves to the system. A `UserError` if it cannot."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, tls.credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError:  # in the moment since it was free, or a certificate that is none
        bound = 0
    if not bound:
        reason = "gRPC could not bind it" + (", or the key does not belong to the certificate" if tls else "")
        _refuse(host, port, reason)
    return bound


def refuse_taken(host: str, port: int, flag: str = "--port") -> None:
    """Tries every address of `host`: gRPC itself is content if one of them is free."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        _refuse(host, port, error.strerror or str(error), flag)
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last server's closed calls linger
                probe.bind(address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as ::1 where there is no IPv6
                _refuse(host, port, error.strerror or str(error), flag)


def _refuse(host: str, port: int, reason: str, flag: str = "--port") -> NoReturn:
    raise UserError(f"cannot listen at {host}:{port} ({reason}): choose another {flag} (0 for a free one) or --host")
