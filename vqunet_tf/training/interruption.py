"""SIGTERM and Ctrl-C as a wish to stop that training fulfils when it has saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruption:
    """While entered, notes the first SIGTERM or SIGINT instead of dying of it; a second one takes effect at once.

    Call it for the name of the signal that came, or None. Outside the main thread it notes nothing: only there may
    Python handle signals.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, object] = {}

    def __call__(self) -> str | None:
        return self.name

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = signal.Signals(number).name
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}
