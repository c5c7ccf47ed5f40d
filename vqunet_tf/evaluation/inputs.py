"""What a user gives an evaluation, looked at before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from vqunet_tf import pixels
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation.rows import UNDEFENDED
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import VQUNet


def unit_images(images: Any) -> np.ndarray:
    """Returns images as float32 `[N,H,W,C]` in [0,1], a copy; a `UserError` says what is wrong with others."""
    try:
        found = np.array(keras.ops.convert_to_numpy(pixels.to_unit(images)))
    except ValueError as error:
        raise UserError(str(error)) from None
    if found.ndim != 4 or not len(found):
        raise UserError(f"expected images [N,H,W,C], at least one, got shape {list(found.shape)}")
    if not (found.min() >= 0.0 and found.max() <= 1.0):  # not a number fails both
        raise UserError(f"expected images as uint8 or floats in [0,1], got {found.min():.4g} to {found.max():.4g}")
    return found


def true_labels(labels: Any, n: int, classes: int) -> np.ndarray:
    """Returns labels as int32 `[n]` in 0..classes-1; a `UserError` says what is wrong with others."""
    found = np.asarray(keras.ops.convert_to_numpy(labels) if keras.ops.is_tensor(labels) else labels)
    if found.ndim == 2:
        cure = "give labels[:, 0]" if found.shape[1] == 1 else "of one-hot labels give labels.argmax(axis=1)"
        raise UserError(f"expected labels [{n}], one whole number for each image, got {list(found.shape)}: {cure}")
    if found.shape != (n,):
        raise UserError(f"expected labels [{n}], one for each image, got {list(found.shape)}")
    if not np.issubdtype(found.dtype, np.number) or not np.equal(found, np.round(found)).all():
        raise UserError(f"expected labels as whole numbers from 0, got {found.dtype} such as {found[0]!r}")
    if found.min() < 0 or found.max() >= classes:
        raise UserError(
            f"expected labels 0..{classes - 1} for the {classes} logits of the classifier, got labels "
            f"{found.min():g}..{found.max():g}: give the classifier of this data set"
        )
    return found.astype(np.int32)


def answers(chain: Chain, name: str, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the logits `[n,K]` of a few images; a `UserError` says what is wrong with a chain that gives none.

    name: of the defence.
    """
    who = "the classifier" if name == UNDEFENDED else f"the classifier behind the defense {name!r}"
    try:
        logits = chain.logits(images, batch_size)
    except UserError:
        raise
    except Exception as error:  # whatever somebody's model raises
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{who} cannot be called on images {list(images.shape)}: {line}") from None
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise UserError(
            f"expected logits [{len(images)}, classes], {who} gives {list(logits.shape)}: "
            "give a classifier with one output for each class"
        )
    return logits


def check_agreement(config: Config, classifier: keras.Model, purifier: keras.Model, source: str) -> None:
    """Raises a `UserError` if the models of a run folder are not those that its config.json says.

    source: the folder, for the message.
    """
    again = "they are of different runs: train again, or put back the files of one run"
    shape, names = config.data.image_shape, config.data.class_names
    for role, model in (("classifier", classifier), ("purifier", purifier)):
        found = _sides(model)
        if shape and found is not None and not _fits(found, shape):
            raise UserError(
                f"{source}: config.json is for images {list(shape)}, {role}.keras takes {_shown(found)}: {again}"
            )
    found = tuple(getattr(classifier, "output_shape", None) or ())
    if names and len(found) == 2 and found[1] is not None and found[1] != len(names):
        raise UserError(
            f"{source}: config.json names {len(names)} classes, classifier.keras gives {found[1]} logits: {again}"
        )
    if isinstance(purifier, VQUNet):
        for name, wanted in vars(config.purifier).items():
            value: Any = getattr(purifier, name)
            if isinstance(wanted, tuple) and len(wanted) == 1:
                wanted = wanted * len(value)
            if value != wanted:
                raise UserError(
                    f"{source}: config.json says purifier.{name} {_shown(wanted)}, purifier.keras has "
                    f"{_shown(value)}: {again}"
                )


def _sides(model: keras.Model) -> tuple[int | None, ...] | None:
    """The images that a model takes, (H, W, C), None where any will do; None if it does not say."""
    if isinstance(model, VQUNet):
        return None, None, model.channels
    shape = getattr(model, "input_shape", None)
    return tuple(shape[1:]) if isinstance(shape, tuple) and len(shape) == 4 else None


def _fits(found: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(found) == len(shape) and all(a is None or a == b for a, b in zip(found, shape, strict=True))


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    return f"[{', '.join('any' if each is None else str(each) for each in value)}]"
