"""Released weights: `vqunet_tf/presets/<name>/` is a run folder with a model card and checksums.

It holds purifier.keras, classifier.keras, config.json, CARD.md and SHA256SUMS (as `sha256sum` writes it). A preset whose
classifier is that of another one names `../other/classifier.keras` there instead of holding it. `commands/release.py`
makes these folders.
"""

from __future__ import annotations

from pathlib import Path

import keras

from vqunet_tf import checksums

FOLDER = Path(__file__).resolve().parents[1] / "presets"


def names() -> list[str]:
    """The presets that come with this version."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{checksums.NAME}"))


def folder(name: str) -> Path:
    """Where a preset lies, after checking its files against their checksums.

    Raises a `ValueError` for an unknown preset (the known ones are listed) or a damaged file.
    """
    if name not in names():
        raise ValueError(f"Unknown preset {name!r}. Known: {', '.join(names()) or 'none in this installation'}")
    for file, expected in checksums.read(FOLDER / name).items():
        path = FOLDER / name / file
        found = checksums.of(path) if path.exists() else "no file"
        if found != expected:
            raise ValueError(f"{path} is damaged: expected SHA-256 {expected}, got {found}. Install the package again.")
    return FOLDER / name


def load(name: str, part: str) -> keras.Model:
    """Loads the `purifier` or the `classifier` of a preset; raises what `folder` does."""
    return keras.models.load_model(checksums.path_of(folder(name), f"{part}.keras"), compile=False)
