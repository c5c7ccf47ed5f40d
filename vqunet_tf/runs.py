"""A run folder: the models, the configuration that made them, and nothing half-written."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import keras

from vqunet_tf import checksums
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError


class RunFolder:
    """The files of one run, by name.

    config.json, classifier.keras, purifier.keras, baselines/, metrics.csv, tensorboard/, checkpoints/, report.json,
    report.md, plots/.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.classifier = checksums.path_of(self.path, "classifier.keras")  # presets may share one
        self.purifier = self.path / "purifier.keras"
        self.baselines = self.path / "baselines"
        self.images = self.path / "images.sha256"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.json"

    def create(self, config: Config) -> None:
        """Makes the folder for `config`, or checks that it was made for the same one.

        Raises a `UserError` if the folder holds a run with another configuration, or something that is no run: nothing
        is overwritten. Where the data lie and which devices train may change from one call to the next.
        """
        if self.config.exists():
            differs = difference(self.load_config(), config)
            if differs:
                raise UserError(
                    f"{self.path} holds a run with another configuration ({differs}): "
                    "choose another --run_dir, or give the flags of that run"
                )
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--run_dir {self.path} is a file: expected a folder, or a name that is free")
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                f"--run_dir {self.path} holds files but no run (no config.json): expected an empty folder or a free name"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, config.to_json())
        except OSError as error:
            raise UserError(f"the run folder cannot be written ({error}): choose another --run_dir") from None

    def contents(self) -> dict[Path, str]:
        """What lies in the folder, and what each thing is."""
        known = {
            self.config: "the settings; --config takes it for another run",
            self.images: "which training images: a hash, and how many",
            self.classifier: "the frozen classifier, images in [0, 1] to logits",
            self.purifier: "the purifier, images to images",
            self.baselines: "purifiers to compare with",
            self.metrics: "losses, accuracies and code usage by epoch",
            self.tensorboard: "the same as curves, and images: tensorboard --logdir",
            self.checkpoints: "what an interrupted run goes on from",
            self.report: "what was measured",
            self.path / "report.html": "the same as a page",
            self.path / "adversaries": "what an evaluation crafted; it goes on from there",
        }
        return {path: what for path, what in known.items() if path.exists()}

    def load_config(self) -> Config:
        if not self.config.exists():
            raise UserError(
                f"{self.path} is not a run folder (it has no config.json): give the --run_dir of a finished training run"
            )
        return Config.from_json(self.config.read_text(encoding="utf-8"))

    def load_classifier(self) -> keras.Model:
        return load_model(self.classifier)

    def load_purifier(self) -> keras.Model:
        return load_model(self.purifier)

    def baseline(self, name: str) -> Path:
        """Where the trained ablation `name` lies, or would."""
        return self.baselines / f"{name}.keras"

    def load_baseline(self, name: str) -> keras.Model:
        return load_model(self.baseline(name))


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def save_model(model: keras.Model, path: Path) -> None:
    """Saves a `.keras` file beside and renames, so that a file under its final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part.keras")
    model.save(beside)
    beside.replace(path)


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Loads a `.keras` file; a missing, corrupted or foreign one raises a `UserError`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing: train first, or give the path of a Keras model saved as .keras")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not a .keras file (it is corrupted, or another format): save it again with model.save('name.keras')"
        )
    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises many kinds for a foreign file
        raise UserError(f"{path} cannot be loaded as a Keras {keras.__version__} model: {error}") from None
    if not isinstance(model, keras.Model):
        raise UserError(f"{path} holds a {type(model).__name__}: expected a keras.Model")
    return model


# What may differ between two calls that work on the same run.
_FREE = {
    ("data", "data_dir"),
    *(("training", name) for name in ("strategy", "jit_compile", "steps_per_execution", "checkpoint_seconds")),
}


def difference(found: Config, wanted: Config) -> str:
    """The first setting in which two configurations differ, in words; empty if they are those of the same run."""
    for section in vars(found):
        old: Any = getattr(found, section)
        new: Any = getattr(wanted, section)
        for key in vars(old):
            # The shape and the names of the classes are not known before the data are read.
            unknown = key in ("image_shape", "class_names") and not getattr(new, key)
            if getattr(old, key) != getattr(new, key) and (section, key) not in _FREE and not unknown:
                return f"{section}.{key} is {getattr(old, key)!r} there, {getattr(new, key)!r} here"
    return ""
