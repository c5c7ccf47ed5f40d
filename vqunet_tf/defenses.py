"""Defences by name: what is done to an image before the classifier sees it.

To add one: a line in `DEFENSES`, from the trained purifier (which it may ignore) to a function
images `[B,H,W,C]` float32 in [0,1] → the same shape and range. A white-box attack follows the gradient of
that function, so one that passes none needs a stand-in gradient to be measured honestly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from vqunet_tf.errors import choice

Purify = Callable[[Any], Any]

DEFENSES: dict[str, Callable[[keras.Model], Purify]] = {
    "none": lambda purifier: _unchanged,
    "vqunet": lambda purifier: functools.partial(purifier, training=False),
}


def build(name: str, purifier: keras.Model) -> Purify:
    """Returns the defence `name`; an unknown name raises a `UserError` that lists the known ones."""
    return DEFENSES[choice("defense", name, DEFENSES)](purifier)


def _unchanged(images: Any) -> Any:
    return images
