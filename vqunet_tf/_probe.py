"""Whether a host answers, found out in seconds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import requests


def answers(urls: Sequence[str], seconds: float = 4.0) -> bool:
    """Returns True as soon as one of `urls` gives any answer, False when all have failed or time is up."""
    results: queue.SimpleQueue[bool] = queue.SimpleQueue()
    deadline = time.monotonic() + seconds
    for url in urls:
        # Daemon threads: a name look-up has no timeout of its own and must not hold up the exit.
        threading.Thread(target=lambda url=url: results.put(_answers(url, seconds)), daemon=True).start()
    for _ in urls:
        try:
            if results.get(timeout=max(0.0, deadline - time.monotonic())):
                return True
        except queue.Empty:
            return False
    return False


def _answers(url: str, seconds: float) -> bool:
    try:
        # Refused methods and missing pages (4xx) come from a living host; gateways answer 5xx for dead ones.
        return requests.head(url, timeout=seconds).status_code < 500
    except (requests.RequestException, ValueError):
        return False
