"""What TensorBoard shows of a run: losses, learning rate, code books, and a few images before and after."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from vqunet_tf import backend, pixels
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.training.batches import Batches

_EVERY = 50  # steps between two points of a curve


def available() -> bool:
    """Whether event files can be written: TensorFlow beside another backend would take a GPU's memory from it."""
    return backend.is_tensorflow() and importlib.util.find_spec("tensorboard") is not None


class TensorBoard(keras.callbacks.Callback):
    """Writes event files: the losses and the learning rate by step, all that the logs hold by epoch.

    Args:
        folder: of this stage; events of an earlier part of the run stay beside those of this one.
        batches: what the model is trained on.
    """

    def __init__(self, folder: Path, batches: Batches):
        super().__init__()
        import tensorflow as tf

        self.summary, self.batches = tf.summary, batches
        self.writer = tf.summary.create_file_writer(str(folder))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.batches.steps_after(batch)
        if step % _EVERY == 0:
            rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
            self._scalars(
                {**{f"step/{name}": float(value) for name, value in (logs or {}).items()}, "rate": rate}, step
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        step = (epoch + 1) * self.batches.per_epoch
        self._scalars({f"epoch/{name}": float(value) for name, value in (logs or {}).items()}, step)
        self.writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        self.writer.flush()

    def _scalars(self, values: dict[str, float], step: int) -> None:
        with self.writer.as_default():
            for name, value in values.items():
                self.summary.scalar(name, value, step=step)


class PurifierBoard(TensorBoard):
    """Adds usage and perplexity of each code book, and after each epoch a grid of images.

    The columns of the grid are `images` [n, H, W, C] uint8, always the same; below each, purified.
    """

    def __init__(self, folder: Path, batches: Batches, purifier: VQUNet, images: np.ndarray):
        super().__init__(folder, batches)
        self.purifier, self.images = purifier, images

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, logs)
        step = self.batches.steps_after(batch)
        if step % _EVERY == 0:
            for level, book in enumerate(self.purifier.quantizers):
                self._scalars(
                    {f"codes/used_{level}": book.usage(), f"codes/perplexity_{level}": book.perplexity()}, step
                )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        shown = pixels.to_unit(self.images)
        grid = tile(np.stack([ops.convert_to_numpy(shown), ops.convert_to_numpy(self.purifier(shown))]))
        with self.writer.as_default():
            self.summary.image("before and after", grid[None], step=(epoch + 1) * self.batches.per_epoch)


def tile(rows: np.ndarray) -> np.ndarray:
    """Images [R, n, H, W, C] as one picture [R H, n W, C or 3]; of other channel counts the first is shown."""
    _, _, height, width, channels = rows.shape
    if channels not in (1, 3):
        rows, channels = rows[..., :1], 1
    return rows.transpose(0, 2, 1, 3, 4).reshape(len(rows) * height, -1, channels)
