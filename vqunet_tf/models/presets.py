"""Released weights: `vqunet_tf/presets/<name>/` is a run folder with a model card and checksums.

It holds purifier.keras, classifier.keras, config.json, CARD.md and SHA256SUMS (as `sha256sum` writes it).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import keras

FOLDER = Path(__file__).resolve().parents[1] / "presets"


def names() -> list[str]:
    """The presets that come with this version."""
    return sorted(path.parent.name for path in FOLDER.glob("*/SHA256SUMS"))


def folder(name: str) -> Path:
    """Where a preset lies, after checking its files against their checksums.

    Raises a `ValueError` for an unknown preset (the known ones are listed) or a damaged file.
    """
    if name not in names():
        raise ValueError(f"Unknown preset {name!r}. Known: {', '.join(names()) or 'none in this installation'}")
    for line in (FOLDER / name / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, file = line.split()
        path = FOLDER / name / file
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{path} is damaged: expected SHA-256 {expected}, got {found}. Install the package again.")
    return FOLDER / name


def load(name: str, part: str) -> keras.Model:
    """Loads the `purifier` or the `classifier` of a preset; raises what `folder` does."""
    return keras.models.load_model(folder(name) / f"{part}.keras", compile=False)
