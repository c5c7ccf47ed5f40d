"""Watches a folder of versions: loads what is new beside what serves, swaps, drains what is old.

A version is a folder named by a number with `saved_model.pb` in it. The highest ones that can be loaded serve. One that
cannot is told of once and tried again only when its files change; those that served go on serving. So a version that is
still being copied, or a damaged one, changes nothing for a client.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorflow_serving.apis import get_model_status_pb2

from serving.logs import Log
from serving.model import Model
from serving.refusal import INVALID, NOT_FOUND, Refused, quoted
from vqunet_tf.errors import UserError

State = get_model_status_pb2.ModelVersionStatus
DRAIN_SECONDS = 60.0
UNKNOWN = 2  # the error codes of gRPC: 0 is OK

Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass
class Status:
    """Of one version, as GetModelStatus tells it."""

    state: int
    error_code: int = 0
    error_message: str = ""


@dataclass(eq=False)
class _Served:
    """A loaded version and how many requests are using it."""

    model: Model
    users: int = 0


@dataclass
class Versions:
    """The versions of one model.

    load: makes a ready model of a version's folder.
    keep: how many of the highest versions serve at the same time.
    changed: is called with the numbers of the serving versions whenever they change.
    """

    name: str
    base_path: Path
    load: Callable[[Path], Model]
    log: Log
    keep: int = 1
    changed: Callable[[list[int]], None] = lambda numbers: None
    drain_seconds: float = DRAIN_SECONDS
    _serving: dict[int, _Served] = field(default_factory=dict)
    _status: dict[int, Status] = field(default_factory=dict)
    _failed: dict[int, Fingerprint] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread | None = None

    # === Use ===

    @property
    def numbers(self) -> list[int]:
        """The serving versions, lowest first."""
        with self._lock:
            return sorted(self._serving)

    @contextmanager
    def use(self, spec: Any) -> Iterator[Model]:
        """Gives the model that a `ModelSpec` asks for, which stays loaded inside the `with`.

        A `Refused`, with TF Serving's status and opening words, if this server does not have it.
        """
        self.check(spec)
        wanted = spec.version.value if spec.HasField("version") else None
        with self._lock:
            number = max(self._serving, default=None) if wanted is None else wanted
            served = self._serving.get(number) if number is not None else None
            if served is not None:
                served.users += 1
        if served is None:
            asked = f"Latest({self.name})" if wanted is None else f"Specific({self.name}, {wanted})"
            raise Refused(NOT_FOUND, f"Servable not found for request: {asked}: {self._here()}")
        try:
            yield served.model
        finally:
            with self._lock:
                served.users -= 1

    def check(self, spec: Any) -> None:
        """Raises a `Refused` if a `ModelSpec` asks for another model, or by a label."""
        if spec.name != self.name:
            asked = quoted(spec.name)[1:-1]
            raise Refused(NOT_FOUND, f"Servable not found for request: Latest({asked}): {self._here()}")
        if spec.version_label:
            asked = quoted(spec.version_label)[1:-1]
            raise Refused(INVALID, f"Unrecognized servable version label: {asked}: {self._here()} and no labels")

    def statuses(self, wanted: int | None = None) -> dict[int, Status]:
        """Returns number → status of every version seen, or of one."""
        with self._lock:
            found = {number: status for number, status in self._status.items() if wanted in (None, number)}
        if not found:
            raise Refused(NOT_FOUND, f"Could not find version {wanted} of model {self.name}: {self._here()}")
        return dict(sorted(found.items(), reverse=True))

    def _here(self) -> str:
        numbers = self.numbers
        versions = f"version{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else "no version"
        return f"this server has {self.name!r} {versions}"

    # === Watching ===

    def open(self, poll_seconds: float) -> None:
        """Loads what there is, and watches from now on; a `UserError` if there is nothing that can serve."""
        errors = self.scan()
        if not self.numbers:
            self._refuse_nothing(errors)
        if poll_seconds > 0:
            self._watcher = threading.Thread(target=self._watch, args=(poll_seconds,), name="versions", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        """Ends the watching; what serves stays loaded."""
        self._stop.set()
        if self._watcher:
            self._watcher.join()

    def _watch(self, poll_seconds: float) -> None:
        while not self._stop.wait(poll_seconds):
            try:
                self.scan()
            except Exception as error:  # a network folder may be away for a while
                self.log("watching_failed", model=self.name, error=f"{type(error).__name__}: {error}")

    def scan(self) -> list[str]:
        """Looks at the folder once: loads, swaps, drains. Returns why versions could not be loaded."""
        chosen: list[int] = []
        errors = []
        for number, path in sorted(find_versions(self.base_path).items(), reverse=True):
            if len(chosen) == self.keep:
                break
            if number not in self._serving:
                error = self._load(number, path)
                if error is not None:
                    errors.append(error)
                    continue
            chosen.append(number)
        if chosen:  # an empty or absent folder is a mistake more often than a wish to serve nothing
            for number in [number for number in self.numbers if number not in chosen]:
                self._retire(number)
        return errors

    def _load(self, number: int, path: Path) -> str | None:
        """Loads a version and lets it serve; returns an error if that cannot be."""
        before = _fingerprint(path)
        if self._failed.get(number) == before:
            return self._status[number].error_message
        start = time.monotonic()
        self._tell(number, Status(State.LOADING), path=path)
        try:
            model = self.load(path)
            if _fingerprint(path) != before:
                raise ValueError("its files changed while it was loaded: is it still being copied?")
        except Exception as error:  # TensorFlow raises many kinds for a damaged file
            words = error.words if isinstance(error, Refused) else " ".join(str(error).split())
            message = f"{path} cannot be loaded: {words or type(error).__name__}"
            self._failed[number] = before
            self._tell(number, Status(State.END, UNKNOWN, message), error=message)
            return message
        self._failed.pop(number, None)
        with self._lock:
            self._serving[number] = _Served(model)
        self._tell(number, Status(State.AVAILABLE), seconds=round(time.monotonic() - start, 3))
        self.changed(self.numbers)
        return None

    def _retire(self, number: int) -> None:
        """Takes a version out of service, waits for the requests that use it, and frees it."""
        with self._lock:
            served = self._serving.pop(number)
        self.changed(self.numbers)
        self._tell(number, Status(State.UNLOADING))
        end = time.monotonic() + self.drain_seconds
        while served.users and time.monotonic() < end and not self._stop.wait(0.02):
            pass
        left = served.users
        del served
        gc.collect()  # a loaded model is full of cycles
        self._tell(number, Status(State.END), requests_left=left or None)

    def _tell(self, number: int, status: Status, **fields: Any) -> None:
        with self._lock:
            self._status[number] = status
        self.log("version", model=self.name, version=number, status=State.State.Name(status.state), **fields)

    def _refuse_nothing(self, errors: list[str]) -> None:
        path = self.base_path
        if errors:
            raise UserError(errors[0])
        if not path.is_dir():
            raise UserError(f"--model_base_path {path} is not a folder: give the --export_dir of serving.export")
        hint = f"did you mean {path.parent}?" if (path / "saved_model.pb").exists() else "export a run there first"
        raise UserError(f"no version to serve: expected {path}/<number>/saved_model.pb, found none; {hint}")


def find_versions(base_path: Path) -> dict[int, Path]:
    """Returns number → folder of the versions in `base_path`; a folder without a readable model is none yet."""
    return {
        int(path.parent.name): path.parent
        for path in base_path.glob("*/saved_model.pb")
        if path.parent.name.isdecimal() and path.is_file()
    }


def _fingerprint(path: Path) -> Fingerprint:
    """Changes whenever a file of a version does."""
    found = []
    for file in sorted(path.rglob("*")):
        try:
            facts = file.stat()
        except OSError:  # it went away in between
            continue
        found.append((file.name, facts.st_size, facts.st_mtime_ns))
    return tuple(found)
