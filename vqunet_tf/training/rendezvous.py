"""Where workers meet before TensorFlow joins them: its own wait has no end on the first worker and takes no signal."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

from vqunet_tf.errors import UserError

_GREETING = b"vqunet_tf worker %d of %d\n"


def meet(index: int, addresses: Sequence[str], seconds: float) -> None:
    """Returns when all workers have called it; the first one listens at its address and tells the others.

    Args:
        index: this worker's place in `addresses`, `host:port` each.
        seconds: to wait; then, or if the first worker's port is taken, a `UserError` is raised.
    """
    end = time.monotonic() + seconds
    if len(addresses) > 1:
        (_listen if index == 0 else _call)(index, addresses, end, seconds)


def _listen(index: int, addresses: Sequence[str], end: float, seconds: float) -> None:
    port = int(addresses[index].rpartition(":")[2])
    known = {_GREETING % (i, len(addresses)): i for i in range(1, len(addresses))}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        except OSError as error:
            raise UserError(
                f"worker {index} cannot listen at {addresses[index]} ({error.strerror}): end what uses that port, or "
                "give another in the TF_CONFIG of all workers"
            ) from None
        server.settimeout(0.5)
        come: dict[int, socket.socket] = {}
        while len(come) < len(known):
            if time.monotonic() > end:
                missing = ", ".join(addresses[i] for i in known.values() if i not in come)
                raise _nobody(index, missing, seconds)
            with contextlib.suppress(OSError):  # nobody yet, or a stranger at the door
                line, _ = server.accept()
                stack.callback(line.close)
                line.settimeout(5.0)
                found = known.get(line.makefile("rb").readline(100))
                if found is not None:
                    come[found] = line
        for line in come.values():
            with contextlib.suppress(OSError):
                line.sendall(b"go\n")
                line.recv(1)  # they hang up first, so that the port is free at once


def _call(index: int, addresses: Sequence[str], end: float, seconds: float) -> None:
    host, _, port = addresses[0].rpartition(":")
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 5.0) as line:
            line.sendall(_GREETING % (index, len(addresses)))
            line.settimeout(max(0.1, end - time.monotonic()))
            if line.recv(3) == b"go\n":
                return
        time.sleep(0.2)
    raise _nobody(index, addresses[0], seconds)


def _nobody(index: int, missing: str, seconds: float) -> UserError:
    return UserError(
        f"worker {index} waited {seconds:g} s for {missing}: expected the same command on every worker, with the same "
        "list of addresses that all of them can reach"
    )
