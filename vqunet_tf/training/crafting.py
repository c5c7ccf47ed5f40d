"""The training adversaries of a run: crafted copy by copy, kept with the checkpoints, renewed when asked for."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from vqunet_tf import backend, pixels
from vqunet_tf.config import Config
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, workers
from vqunet_tf.training.augment import Views
from vqunet_tf.training.batches import GrayBoxBatches

_MOST_ANSWERS = 2**30  # bytes of memory for what the classifier says about clean images


class Crafting:
    """Gives the views of the images and their adversaries, by turns; a copy that is on disk is not crafted again.

    Args:
        images: uint8 [N, H, W, C].
        guide: makes the frozen classifier with its features; asked only if something is to be crafted.
        stop: asked after every batch; a truth raises `Interrupted`, and the copies that are done stay.
        exact: makes the same in float32, for adversaries that are less than a grey level away.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        images: np.ndarray,
        guide: Callable[[], keras.Model],
        stop: Callable[[], Any],
        exact: Callable[[], keras.Model] | None = None,
    ):
        self.config, self.run, self.images, self.guide, self.stop = config, run, images, guide, stop
        self.exact = guide if exact is None else exact

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

    def nearest(self, views: Views) -> np.ndarray:
        """The nearest adversaries of the first view of every image, float16 [N, H, W, C]; not made again where they are on disk."""
        path, count = self.run.checkpoints / "nearest.npy", len(self.images)
        with (
            workers.chief_first(),
            tqdm(desc="nearest", total=count, unit="img", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            workers.appears(path)
            kept = _load_array(path, self.images.shape, np.float16) if path.exists() else None
            if kept is None:
                shown = views(np.zeros(count, int), np.arange(count))
                size, seed = self.config.attack.batch_size, (self.config.training.seed, -1 % 2**32)
                kept = adversaries.nearest(self.exact(), shown, size, seed, partial(self._report, bar))
                _save_array(path, kept)
        return kept

    def answers(self, views: Views) -> dict[str, np.ndarray] | None:
        """What the classifier says about every view: `logits` and `features` float32 [copies, N, ...], asked once and not
        at every step; logits alone where both would take more than a gibibyte, None where they would too."""
        copies, number = views.drawn.shape[:2]
        size, look = self.config.attack.batch_size, backend.compiled(_caller(self.guide()))

        def fits(said: dict[str, np.ndarray]) -> bool:
            return copies * number * sum(4 * out[0].size for out in said.values()) <= _MOST_ANSWERS

        found: dict[str, np.ndarray] = {}
        with tqdm(desc="clean answers", total=copies * number, unit="img", unit_scale=True, dynamic_ncols=True) as bar:
            for copy, start in itertools.product(range(copies), range(0, number, size)):
                chosen = np.arange(start, min(start + size, number))
                batch = views(np.full(size, copy), np.resize(chosen, size))  # one size, one compilation
                said = {name: keras.ops.convert_to_numpy(out) for name, out in look(pixels.to_unit(batch)).items()}
                if not found:
                    said = said if fits(said) else {"logits": said["logits"]}
                    if not fits(said):
                        return None
                    found = {name: np.empty((copies, number, *out.shape[1:]), "float32") for name, out in said.items()}
                for name, known in found.items():
                    known[copy, chosen] = said[name][: len(chosen)]
                self._report(bar, len(chosen))
        return found

    def _copy(self, views: Views, turn: int, copy: int, bar: tqdm) -> np.ndarray:
        path = self.run.checkpoints / f"adversaries.{turn}.{copy}.npy"
        workers.appears(path)
        if path.exists():
            kept = _load_array(path, self.images.shape)
            if kept is not None:
                bar.update(len(self.images))
                return kept
            bar.write(f"warning: {path} is damaged: that copy is crafted again", file=sys.stderr)

        shown = views(np.full(len(self.images), copy), np.arange(len(self.images)))
        seed = (self.config.training.seed, turn, copy)
        crafted = adversaries.craft(self.guide(), shown, self.config.attack, seed, partial(self._report, bar))
        _save_array(path, crafted)
        return crafted

    def _report(self, bar: tqdm, done: int) -> None:
        bar.update(done)
        reason = self.stop()
        if reason:
            raise Interrupted(reason)


def _caller(guide: keras.Model) -> Callable[[Any], dict[str, Any]]:
    """A new function: JAX would know an old one, with its old weights."""
    return lambda x: guide(x)


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
            self.batches.answers = self.make.answers(self.batches.views)


def _load_array(path: Path, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray | None:
    """A kept copy; None if it cannot be read, or is not one of these images."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == dtype else None


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
