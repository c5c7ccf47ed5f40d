"""Checkpoints that are whole or absent: weights, optimizer, averages and the step they belong to."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.training.batches import Batches

_KEPT = 2  # the newest, and one to fall back to
# These end the names of the stages in which an encoder, a gate or the head that is certain of a class learns alone.
ENCODER, GATE, CERTAINTY = "_encoder", "_gate", "_certainty"


class Keeper(Protocol):
    """Something beside the model that must survive an interruption."""

    def state(self) -> dict[str, np.ndarray]: ...

    def restore(self, state: dict[str, np.ndarray]) -> None: ...


class Checkpoints(keras.callbacks.Callback):
    """Saves `<stage>.<step>/` at the end of each epoch and at most every `seconds`, and when it is asked to stop.

    A checkpoint is written under a temporary name and renamed; the two newest stay. Order, augmentation and noise of
    the batches follow from seed and step, so that the step is all they need.

    Args:
        folder: where the checkpoints of all stages lie.
        stage: `classifier`, `purifier` or the name of a baseline, or one of these with `ENCODER`, `GATE` or `CERTAINTY`.
        batches: what the model is trained on.
        keepers: what else is saved, by name.
        stop: asked after every call of the backend; a truth saves and raises `Interrupted`.
        writes: False on machines that only compute, whose chief saves.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        batches: Batches,
        keepers: dict[str, Keeper],
        seconds: float = 300.0,
        stop: Callable[[], Any] = lambda: None,
        writes: bool = True,
    ):
        super().__init__()
        self.folder, self.stage, self.batches, self.keepers = folder, stage, batches, keepers
        self.seconds, self.stop, self.writes = seconds, stop, writes
        self.saved = time.monotonic()
        self.step = 0

    def restore(self, model: keras.Model, say: Callable[[str], Any]) -> int:
        """Loads the newest whole checkpoint into a compiled model, if there is one; returns its step, else 0.

        One that cannot be read is passed over with a warning to `say`; a `UserError` if none of several can.
        """
        found = self._found()
        if not found:
            return 0
        for path in reversed(found):
            try:
                self._load(path, model)
            except UserError:
                raise
            except Exception as error:  # h5py, JSON, NumPy and Keras each raise their own
                say(f"warning: the checkpoint {path} cannot be read ({error}): going on from the one before")
            else:
                self.step = int(path.suffix[1:])
                return self.step
        raise UserError(
            f"no checkpoint of {self.stage} in {self.folder} can be read: delete {self.stage}.* there to train this stage anew"
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self.step = self.batches.steps_after(batch)
        if self.step % self.batches.per_epoch == 0:
            return  # on_epoch_end saves, after the epoch has been scored
        reason = self.stop()
        if reason or time.monotonic() - self.saved >= self.seconds:
            self.save()
        if reason:
            raise Interrupted(reason)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.save()
        reason = self.stop()
        if reason:
            raise Interrupted(reason)

    def save(self) -> None:
        """Writes the checkpoint of this step; a weight that is not finite or a full disk raises a `UserError`."""
        self.saved = time.monotonic()
        path = self.folder / f"{self.stage}.{self.step}"
        if not self.writes:
            return
        for weight in self.model.weights:
            if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
                raise UserError(
                    f"training diverged: the weight {weight.path} is not finite after step {self.step}; "
                    "the last checkpoint is kept, lower the learning rate with --set in another --run_dir"
                )
        part = path.with_name(f"part.{path.name}")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self.model.save_weights(part / "model.weights.h5")
            for name, keeper in {**self.keepers, "others": _Others(self.model)}.items():
                np.savez(part / f"{name}.npz", **keeper.state())  # type: ignore[arg-type]
            sums = {file.name: _sha256(file) for file in part.iterdir()}
            known = {"images_a_step": self.batches.batch_size, "sha256": sums}
            (part / "checkpoint.json").write_text(json.dumps(known), encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)  # a damaged one that was passed over
            part.replace(path)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"the checkpoint {path} cannot be written ({error.strerror or error}): the one before is kept, "
                "make room there and give the same command again"
            ) from None
        for old in self._found()[:-_KEPT]:
            shutil.rmtree(old)

    def _load(self, path: Path, model: keras.Model) -> None:
        known = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        if known["images_a_step"] != self.batches.batch_size:
            raise UserError(
                f"{path} counts steps of {known['images_a_step']} images, these devices take {self.batches.batch_size}: "
                "go on with a number of replicas that the batch can be shared out to as before"
            )
        for name, expected in known["sha256"].items():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} is damaged")
        model.load_weights(path / "model.weights.h5")
        for name, keeper in {**self.keepers, "others": _Others(model)}.items():
            with np.load(path / f"{name}.npz") as file:
                keeper.restore(dict(file))

    def _found(self) -> list[Path]:
        """Whole checkpoints of this stage, oldest first."""
        paths = [path for path in self.folder.glob(f"{self.stage}.*") if path.suffix[1:].isdecimal()]
        return sorted(paths, key=lambda path: int(path.suffix[1:]))


class _Others:
    """The variables of a model that Keras does not save with its weights, such as the random state of a dropout."""

    def __init__(self, model: keras.Model):
        saved = {id(weight) for weight in model.weights}
        self.variables = [variable for variable in model.variables if id(variable) not in saved]

    def state(self) -> dict[str, np.ndarray]:
        return {str(i): keras.ops.convert_to_numpy(variable) for i, variable in enumerate(self.variables)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        for i, variable in enumerate(self.variables):
            variable.assign(state[str(i)])


def remove(folder: Path, unfinished: Collection[str] = ()) -> None:
    """Deletes what training keeps for a resume, and the folder if nothing else is in it.

    Checkpoints of stages that are `unfinished` stay, if there are any, and with them the training adversaries.
    """
    stages = ("", ENCODER, GATE, CERTAINTY)
    kept = {name: [f"{name}{stage}.*" for stage in stages] for name in ("classifier", "purifier", *ABLATIONS)}
    begun = [name for name in unfinished if any(path for pattern in kept[name] for path in folder.glob(pattern))]
    done = [pattern for name, patterns in kept.items() if name not in begun for pattern in patterns]
    for pattern in [*done, "part.*", *(() if begun else ("adversaries.*", "nearest.npy"))]:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
