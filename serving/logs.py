"""Structured logs: one JSON object a line on stderr. What a client sent never gets into them."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

Log = Callable[..., None]
LINES_PER_SECOND = 20

_lock = threading.Lock()


def log(event: str, **fields: Any) -> None:
    """Writes `{"time": ..., "event": event, **fields}`, without the fields that are None."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    known = {name: value for name, value in fields.items() if value is not None}
    line = json.dumps({"time": now, "event": event, **known}, default=str)
    with _lock:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Sparing:
    """A log of at most some lines a second, so that a flood of bad requests does not fill a disk.

    What is left out is counted, and the next line says how many.
    """

    def __init__(self, write: Log = log, lines_per_second: int = LINES_PER_SECOND):
        self._write = write
        self._most = lines_per_second
        self._lock = threading.Lock()
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def __call__(self, event: str, **fields: Any) -> None:
        second = int(time.monotonic())
        with self._lock:
            if second != self._second:
                self._second, self._lines = second, 0
            if self._lines >= self._most:
                self._left_out += 1
                return
            self._lines += 1
            left_out, self._left_out = self._left_out, 0
        self._write(event, **fields, left_out=left_out or None)
