"""Defences by name: what is done to an image before the classifier sees it.

To add one: a line in `DEFENSES`, from the trained purifier and the run folder (which it may ignore) to a `Defense`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from vqunet_tf.defenses import ablations, classic, smooth
from vqunet_tf.errors import choice
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder

Purify = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Defense:
    """Images `[B,H,W,C]` float32 in [0,1] → the same shape and range; inside a `tf.function` or on arrays, the same
    answer every time and for every image alone.

    differentiable: whether the gradient that it passes leads somewhere. Where it does not, a white-box attacker takes
        the identity for it on the way back (BPDA, "Obfuscated Gradients Give a False Sense of Security", Athalye et al.
        2018, arXiv 1802.00420).
    setting: what it is and how strong, in words for a report.
    smooth: a differentiable function close to it, whose gradient such an attacker takes as well.
    """

    name: str
    purify: Purify
    differentiable: bool
    setting: str
    smooth: Purify | None = None

    def __call__(self, images: Any) -> Any:
        return self.purify(images)


Maker = Callable[[keras.Model, RunFolder | None], Defense]


def _plain(name: str, purify: Purify, differentiable: bool, setting: str, stand_in: Purify | None = None) -> Maker:
    """A defence that needs neither the purifier nor the folder."""
    return lambda purifier, folder: Defense(name, purify, differentiable, setting, stand_in)


def _model(name: str, load: Callable[[keras.Model, RunFolder | None], keras.Model], setting: str) -> Maker:
    """A trained model as a defence."""
    return lambda purifier, folder: Defense(
        name, functools.partial(load(purifier, folder), training=False), True, setting
    )


def _ablation(name: str) -> Maker:
    return _model(name, lambda purifier, folder: ablations.load(name, folder), ablations.WORDS[name])


def _strength(name: str) -> str:
    """A strength in words, for images of one channel and for others."""
    gray, colour = getattr(classic.GRAY, name), getattr(classic.COLOUR, name)
    return f"{gray}" if gray == colour else f"{gray} (of colour images {colour})"


# What classic defences are set to: see `benchmarks/defenses.py`, which compares the settings of each.
DEFENSES: dict[str, Maker] = {
    "none": _plain("none", lambda images: images, True, "no defence"),
    "vqunet": _model("vqunet", lambda purifier, folder: purifier, "the purifier of the run"),
    "jpeg": _plain("jpeg", classic.jpeg, False, f"JPEG, quality {_strength('quality')}", smooth.jpeg),
    "bit_depth": _plain("bit_depth", classic.bit_depth, False, f"bits a channel: {_strength('bits')}"),
    "median": _plain("median", classic.median, True, f"median, window {_strength('window')}"),
    "total_variation": _plain(
        "total_variation",
        classic.total_variation,
        False,
        f"total variation, weight {_strength('weight')}",
        smooth.total_variation,
    ),
    **{name: _ablation(name) for name in ABLATIONS},
}


def build(name: str, purifier: keras.Model, folder: RunFolder | None = None) -> Defense:
    """Returns the defence `name`.

    purifier: of the run, which the defence `vqunet` is.
    folder: of the run, where the trained ablations lie.

    Raises a `UserError` for an unknown name, with the known ones, and for an ablation that is not in the folder (or is
    no such thing), with the command that trains it.
    """
    return DEFENSES[choice("defense", name, DEFENSES)](purifier, folder)


def available(folder: RunFolder | None = None) -> list[str]:
    """The names that `build` can make for this folder: all but the ablations that were not trained in it."""
    return [name for name in DEFENSES if name not in ABLATIONS or (folder and folder.baseline(name).exists())]
