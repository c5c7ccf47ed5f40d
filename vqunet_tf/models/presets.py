"""Released weights: `vqunet_tf/presets/<name>/` holds purifier.keras, classifier.keras, a model card and checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import keras

FOLDER = Path(__file__).resolve().parents[1] / "presets"


def names() -> list[str]:
    """The presets that come with this version."""
    return sorted(path.parent.name for path in FOLDER.glob("*/SHA256SUMS"))


def load(name: str, part: str) -> keras.Model:
    """Loads the `purifier` or the `classifier` of a preset, after checking the file against its checksum.

    Raises a `ValueError` for an unknown preset (the known ones are listed) or a damaged file.
    """
    if name not in names():
        raise ValueError(f"Unknown preset {name!r}. Known: {', '.join(names()) or 'none in this installation'}")
    path = FOLDER / name / f"{part}.keras"
    lines = (FOLDER / name / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    expected = {file: digest for digest, file in (line.split() for line in lines)}[path.name]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} is damaged: expected SHA-256 {expected}, got {found}. Install the package again.")
    return keras.models.load_model(path, compile=False)
