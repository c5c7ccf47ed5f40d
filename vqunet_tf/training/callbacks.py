"""Callbacks: a bar with images per second and time left, the metrics file, usage of the codes, a stop on NaN."""

from __future__ import annotations

import csv
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
        if epoch != self.batches.epoch:
            self.batches.start(epoch)


class Progress(keras.callbacks.Callback):
    """One bar for the whole stage: images done, images per second, time left, losses, codes in use."""

    def __init__(self, stage: str, batches: Batches, epochs: int, done: int, purifier: VQUNet | None = None):
        super().__init__()
        self.batches, self.epochs, self.purifier = batches, epochs, purifier
        self.postfix: dict[str, str] = {}
        self.bar = tqdm(
            desc=stage,
            total=batches.batch_size * batches.per_epoch * epochs,
            initial=batches.batch_size * done,
            unit="img",
            unit_scale=True,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.done, self.shown = epoch * self.batches.per_epoch + self.batches.first, 0
        self.postfix = {"epoch": f"{epoch + 1}/{self.epochs}"}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        done = self.batches.steps_after(batch)
        if done >= self.shown:
            self.shown = done + 10
            self.postfix |= {name: f"{float(value):.4f}" for name, value in (logs or {}).items()}
            if self.purifier is not None and self.purifier.quantizers:
                _ = self.model  # under JAX, reading this property brings the weights up to date
                used = [f"{quantizer.usage():.0%}" for quantizer in self.purifier.quantizers]
                self.postfix["codes"] = "/".join(used)
            self.bar.set_postfix(self.postfix, refresh=False)
        self.bar.update(self.batches.batch_size * (done - self.done))
        self.done = done

    def close(self) -> None:
        self.bar.close()


class StopOnNaN(keras.callbacks.Callback):
    """Ends a diverging run with a `UserError` that names the step and the part; the checkpoint before it stays."""

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        logs = logs or {}
        if math.isfinite(float(logs.get("loss", 0.0))):
            return
        parts = {name: float(value) for name, value in logs.items()}
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        named = [name for name in bad if name != "loss"] or bad
        step = self.batches.steps_after(batch)
        raise UserError(
            f"training diverged: {', '.join(named)} is {parts[named[0]]} at step {step}, epoch {self.batches.epoch + 1}; "
            "the last checkpoint is kept, lower the learning rate with --set in another --run_dir"
        )


class Usage(keras.callbacks.Callback):
    """Adds each code book's usage (share of codes chosen at least once) and perplexity over the epoch to the logs."""

    def __init__(self, purifier: VQUNet, batches: Batches):
        super().__init__()
        self.purifier, self.batches = purifier, batches

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        if not self.batches.first:  # resumed inside an epoch, the count goes on
            for quantizer in self.purifier.quantizers:
                quantizer.reset_usage()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        if logs is not None:
            for level, quantizer in enumerate(self.purifier.quantizers):
                logs[f"codes_used_{level}"] = quantizer.usage()
                logs[f"perplexity_{level}"] = quantizer.perplexity()


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
                whole = [row for row in csv.reader(file) if len(row) == 4]  # one cut by a kill or a full disk is not
                rows = [row for row in whole if row[0] != stage or int(row[1]) <= done_epochs]
        write_text(path, "".join(",".join(row) + "\n" for row in rows))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for name, value in (logs or {}).items():
                file.write(f"{self.stage},{epoch + 1},{name},{float(value):.6g}\n")
