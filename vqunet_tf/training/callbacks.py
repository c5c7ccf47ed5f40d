"""Callbacks: a bar with images per second and time left, the metrics file, checkpoints that are whole or absent."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import keras
from tqdm import tqdm

from vqunet_tf.errors import UserError
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.runs import write_text
from vqunet_tf.training.batches import Batches


class Epochs(keras.callbacks.Callback):
    """Gives the batches their epoch, so that their order follows from the seed also after a resume."""

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.batches.start_epoch(epoch)


class Progress(keras.callbacks.Callback):
    """One bar for the whole stage: images done, images per second, time left, the current losses."""

    def __init__(self, stage: str, images_per_step: int, steps: int, epochs: int, done_epochs: int):
        super().__init__()
        self.per_step = images_per_step
        self.epochs = epochs
        self.bar = tqdm(
            desc=stage,
            total=images_per_step * steps * epochs,
            initial=images_per_step * steps * done_epochs,
            unit="img",
            unit_scale=True,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch % 10 == 0:
            values = {name: f"{float(value):.4f}" for name, value in (logs or {}).items()}
            self.bar.set_postfix({"epoch": f"{self.epoch + 1}/{self.epochs}", **values}, refresh=False)
        self.bar.update(self.per_step)

    def on_train_end(self, logs: Any = None) -> None:
        del logs
        self.bar.close()


class StopOnNaN(keras.callbacks.Callback):
    """Ends a diverging run with a `UserError` that names the epoch; the checkpoint before it stays."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for name, value in (logs or {}).items():
            if not math.isfinite(float(value)):
                raise UserError(
                    f"training diverged: {name} is {value} in epoch {epoch + 1}; "
                    "the last checkpoint is kept, lower the learning rate with --set in another --run_dir"
                )


class Usage(keras.callbacks.Callback):
    """Adds each code book's usage over the epoch (share of codes chosen at least once) to the logs."""

    def __init__(self, purifier: VQUNet):
        super().__init__()
        self.purifier = purifier

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        for quantizer in self.purifier.quantizers:
            quantizer.reset_usage()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        if logs is not None:
            for level, quantizer in enumerate(self.purifier.quantizers):
                logs[f"codes_used_{level}"] = quantizer.usage()


class MetricsFile(keras.callbacks.Callback):
    """Appends one row per epoch and metric to metrics.csv: stage, epoch, name, value.

    Rows of epochs after `done_epochs` are of a run that was interrupted before its checkpoint, and go.
    """

    def __init__(self, path: Path, stage: str, done_epochs: int):
        super().__init__()
        self.path, self.stage = path, stage
        rows = [["stage", "epoch", "name", "value"]]
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row[0] != stage or int(row[1]) <= done_epochs]
        write_text(path, "".join(",".join(row) + "\n" for row in rows))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for name, value in (logs or {}).items():
                file.write(f"{self.stage},{epoch + 1},{name},{float(value):.6g}\n")


class Checkpoint(keras.callbacks.Callback):
    """Saves weights and optimizer after each epoch, `<stage>.<epoch>.weights.h5`, whole or not at all.

    A small JSON file names the one that counts and is replaced last, so that a kill at any moment leaves a checkpoint
    that knows its epoch.
    """

    def __init__(self, folder: Path, stage: str):
        super().__init__()
        self.folder, self.stage = folder, stage
        self.state = folder / f"{stage}.json"

    def restore(self, model: keras.Model) -> int:
        """Loads the checkpoint into a compiled model, if there is one; returns the number of finished epochs."""
        if not self.state.exists():
            return 0
        try:
            epochs = int(json.loads(self.state.read_text(encoding="utf-8"))["epochs"])
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self._weights(epochs))
        except Exception as error:  # h5py, JSON and Keras each raise their own
            raise UserError(
                f"the checkpoint of {self.stage} in {self.folder} cannot be read ({error}): "
                f"delete {self.state} to train this stage anew"
            ) from None
        return epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.folder.mkdir(parents=True, exist_ok=True)
        old = set(self.folder.glob(f"{self.stage}.*.weights.h5"))
        new = self._weights(epoch + 1)
        self.model.save_weights(new)
        write_text(self.state, json.dumps({"epochs": epoch + 1}))
        for path in old - {new}:
            path.unlink()

    def _weights(self, epochs: int) -> Path:
        return self.folder / f"{self.stage}.{epochs}.weights.h5"


def remove_checkpoints(folder: Path) -> None:
    """Deletes what training keeps for a resume, and the folder if nothing else is in it."""
    for pattern in ("*.weights.h5", "classifier.json", "purifier.json", "*adversaries.npy"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
