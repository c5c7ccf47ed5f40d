"""Colours that mean the same everywhere in a report: good and bad, who attacks, which defence, which code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vqunet_tf.evaluation.rows import UNDEFENDED

# Accuracy from 0 to 1 in eleven steps, from bad to good through neutral; text on it is INK of the same scheme.
LIGHT, DARK = "light", "dark"
_ANCHORS = {LIGHT: ("#ee9a84", "#f5edda", "#7dc2b0"), DARK: ("#8a3222", "#3b3a35", "#17594d")}
INK = {LIGHT: "#1d2126", DARK: "#eceae4"}
PAPER = {LIGHT: "#ffffff", DARK: "#16181b"}
STEPS = 11

# Lines on either paper: each has a contrast of at least 3 with both.
_NONE, _MAIN = "#85888d", "#3f7fe0"
_OTHERS = ("#c9772b", "#9a69d1", "#3f9a5f", "#cf568e", "#2a96a8", "#a57a4c", "#8b8d2e", "#d05a50")


def _channels(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def ramp(scheme: str) -> list[str]:
    """The colours of 0, 0.1 … 1 as `#rrggbb`."""
    bad, neutral, good = (np.array(_channels(color), float) for color in _ANCHORS[scheme])
    mixed = []
    for share in np.linspace(0.0, 2.0, STEPS):
        low, high, part = (bad, neutral, share) if share <= 1.0 else (neutral, good, share - 1.0)
        mixed.append("#" + "".join(f"{round(value):02x}" for value in low + part * (high - low)))
    return mixed


def step(share: float) -> int:
    """Which colour of the ramp an accuracy gets, 0..10."""
    return round((STEPS - 1) * min(max(share, 0.0), 1.0))


def lines(defenses: Sequence[str], main: str) -> dict[str, str]:
    """A colour for each defence: grey without one, blue for the one a report is about."""
    others = iter([*_OTHERS] * (1 + len(defenses) // len(_OTHERS)))
    return {name: _NONE if name == UNDEFENDED else _MAIN if name == main else next(others) for name in defenses}


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.1, 1 to 21."""

    def luminance(color: str) -> float:
        unit = np.array(_channels(color)) / 255
        linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def codes(book: np.ndarray) -> np.ndarray:
    """A colour `[T,3]` uint8 for each vector of a code book `[T,D]`: codes that are close get colours that are close.

    The three directions in which the codes differ most become lightness (the first), red–green and blue–yellow,
    each by rank, so that every code book uses the whole range.
    """
    centred = book - book.mean(axis=0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    ranks = np.full((len(book), 3), 0.5)
    for i, direction in enumerate(directions[:3]):
        if spread[i] > 1e-6 * max(spread[0], 1e-12):  # along the others there is nothing but rounding to rank
            ranks[:, i] = (centred @ direction).argsort().argsort() / (len(book) - 1)
    light, red, blue = (0.25 + 0.5 * ranks[:, 0], ranks[:, 1] - 0.5, ranks[:, 2] - 0.5)
    mixed = np.stack([light + 0.45 * red, light - 0.3 * red - 0.15 * blue, light + 0.6 * blue], axis=1)
    return np.rint(255 * np.clip(mixed, 0.0, 1.0)).astype(np.uint8)
