"""The training adversaries of a run: crafted copy by copy, kept with the checkpoints, renewed when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from vqunet_tf.config import Config
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, workers
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import GrayBoxBatches


class Crafting:
    """Gives the views of the images and their adversaries, by turns; a copy that is on disk is not crafted again.

    Args:
        images: uint8 [N, H, W, C].
        guide: makes the frozen classifier with its features; asked only if something is to be crafted.
        stop: asked after every batch; a truth raises `Interrupted`, and the copies that are done stay.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        images: np.ndarray,
        guide: Callable[[], keras.Model],
        stop: Callable[[], Any],
    ):
        self.config, self.run, self.images, self.guide, self.stop = config, run, images, guide, stop

    def __call__(self, turn: int) -> tuple[Views, np.ndarray]:
        """Views and, uint8 [copies, N, H, W, C], their adversaries; of several workers the chief crafts and the others read."""
        settings, training = self.config.attack, self.config.training
        views = Views(self.images, settings.copies, training.max_shift, training.flip, training.seed + turn)
        total = settings.copies * len(self.images)
        with (
            workers.chief_first(),
            tqdm(desc="adversaries", total=total, unit="img", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            copies = [self._copy(views, turn, copy, bar) for copy in range(settings.copies)]
        return views, np.stack(copies)

    def _copy(self, views: Views, turn: int, copy: int, bar: tqdm) -> np.ndarray:
        path = self.run.checkpoints / f"adversaries.{turn}.{copy}.npy"
        workers.appears(path)
        if path.exists():
            bar.update(len(self.images))
            return np.load(path)

        def progress(done: int) -> None:
            bar.update(done)
            reason = self.stop()
            if reason:
                raise Interrupted(reason)

        shown = views(np.full(len(self.images), copy), np.arange(len(self.images)))
        seed = (self.config.training.seed, turn, copy)
        crafted = adversaries.craft(self.guide(), shown, self.config.attack, seed, progress)
        _save_array(path, crafted)
        return crafted


class Refresh(keras.callbacks.Callback):
    """Gives the batches new adversaries every few epochs."""

    def __init__(self, batches: GrayBoxBatches, every: int, make: Crafting):
        super().__init__()
        self.batches, self.every, self.make, self.turn = batches, every, make, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        if epoch // self.every != self.turn:
            self.turn = epoch // self.every
            self.batches.views, self.batches.adversarial = self.make(self.turn)


def _save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array beside and renames."""
    beside = path.with_name(f"part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(beside, array)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make room there and give the same command again"
        ) from None
