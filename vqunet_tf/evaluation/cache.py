"""What was crafted and measured, kept on disk: an evaluation that was interrupted, or is given again, goes on from it.

    adversaries/<defence>-<victim>/<key>.npz        images of one attack on this victim, lossless, and what made them
    adversaries/<defence>-<victim>/on-<key>.npz     which images this victim got right, whomever they were made for

`<victim>` is the start of a hash of the victim's weights and configuration: see `Chain.fingerprint`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqunet_tf.errors import UserError

# What the numbers mean; a change of the attacks that their `repr` does not show changes it.
VERSION = 1


class Cache:
    """Arrays by victim and key; a file under its final name is whole.

    folder: where they lie; made when something is kept.
    fresh: read nothing, so that all is measured again and replaces what lies there.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder, self.fresh = folder, fresh

    def load(self, victim: str, key: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept; None if there are none, or none that can be read."""
        if self.fresh:
            return None
        try:
            with np.load(self._path(victim, key), allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, victim: str, key: str, arrays: Mapping[str, Any]) -> None:
        """Keeps arrays; written beside and renamed."""
        path = self._path(victim, key)
        beside = path.with_name(f".{path.stem}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                np.savez_compressed(file, **arrays)
            beside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}): make room there, or make it writable") from None

    def prune(self, victims: Mapping[str, str]) -> None:
        """Forgets what belongs to earlier models of these defences; `victims` maps defences to fingerprints."""
        for defense, fingerprint in victims.items():
            own = place(defense, fingerprint)
            for path in self.folder.glob(f"{own[:-_LENGTH]}{'[0-9a-f]' * _LENGTH}"):
                if path.name != own:
                    shutil.rmtree(path, ignore_errors=True)

    def _path(self, victim: str, key: str) -> Path:
        return self.folder / victim / f"{key}.npz"


def place(defense: str, fingerprint: str) -> str:
    """The name of a victim's folder."""
    return f"{re.sub(r'[^A-Za-z0-9_.]', '_', defense)}-{fingerprint[:_LENGTH]}"


def key(*parts: Any) -> str:
    """A hash of values and arrays that decide a result: of an array its bytes, of anything else its `repr`."""
    found = hashlib.sha256(repr(VERSION).encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update(repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:_LENGTH]


_LENGTH = 16
