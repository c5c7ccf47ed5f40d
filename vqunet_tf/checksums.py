"""SHA256SUMS of a folder, as `sha256sum` writes and checks it.

A line may name a file of a neighbour, `../other/classifier.keras`: two folders then share that file, and both check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"


def of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder: Path) -> dict[str, str]:
    """Sums by file, as the folder's list names them; empty for a folder without a list."""
    path = folder / NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {file: expected for expected, file in (line.split(maxsplit=1) for line in lines)}


def write(folder: Path, files: Iterable[str]) -> None:
    """Writes the list of these files, named from the folder."""
    lines = [f"{of(folder / file)}  {file}\n" for file in files]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def path_of(folder: Path, name: str) -> Path:
    """Where the file `name` of a folder lies: in it, unless its list names that of a neighbour."""
    shared = [file for file in read(folder) if file.startswith("../") and Path(file).name == name]
    return folder / (shared[0] if shared else name)
