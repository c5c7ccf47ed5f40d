"""Perturbations that need no gradient: the stripes and squares of a random search, and noise of low frequency."""

from __future__ import annotations

import numpy as np

_MOST_SQUARES, _FEWEST_ALONE = 256, 8
# The share of an image that a square covers at first, and how often that is halved in a search: AutoAttack's and ART's schedule.
_LARGEST, _HALVINGS = 0.8, 9
_VERTICAL = 0.75  # of the stripes; Square Attack has no others


def patterns(shape: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """One pattern for each image, float32 [B, H, W, C] in [-1, 1].

    A third are squares of random sign in each channel, from large ones to ever smaller ones, over stripes of random sign, one pixel
    wide: what Square Attack begins with, and is left with after so many steps (Andriushchenko et al. 2020,
    https://arxiv.org/abs/1912.00049, algorithms 1 and 2). Of the stripes the squares leave little. A third are such squares alone,
    with nothing between them. Their number is log-uniform below 256, from 1 and from 8. The rest is noise on a coarse grid, of random
    sign or uniform, with sharp or blurred edges.
    """
    kind = rng.integers(3, size=shape[0])
    found = np.zeros(shape, np.float32)
    for image, drawn in zip(found, kind, strict=True):
        if drawn == 2:
            image[:] = _coarse_noise(shape[1:], rng)
            continue
        if drawn == 0:
            lines = (1, shape[2], shape[3]) if rng.random() < _VERTICAL else (shape[1], 1, shape[3])
            image[:] = rng.choice((-1.0, 1.0), lines)
        fewest = 1 if drawn == 0 else _FEWEST_ALONE
        _add_squares(image, int(fewest * (_MOST_SQUARES / fewest) ** rng.random()), rng)
    return found


def _add_squares(image: np.ndarray, number: int, rng: np.random.Generator) -> None:
    height, width, channels = image.shape
    sides = _sides(height, width, number, rng)
    tops, lefts = (rng.integers(0, length - sides + 1) for length in (height, width))
    signs = rng.choice((-1.0, 1.0), (number, channels))
    for side, top, left, sign in zip(sides, tops, lefts, signs, strict=True):
        image[top : top + side, left : left + side] = sign


def _sides(height: int, width: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Those of a search that has got so far: from the largest down to some size."""
    reached = _HALVINGS * rng.random()
    shares = _LARGEST * 0.5 ** (reached * np.sort(rng.random(number)))
    return np.clip(np.rint(np.sqrt(shares * height * width)).astype(int), 1, min(height, width))


def _coarse_noise(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """On a grid of 2 cells a side, or up to half as many as there are pixels."""
    cells = [int(rng.integers(2, max(length // 2, 2) + 1)) for length in shape[:2]]
    noise = rng.uniform(-1.0, 1.0, (*cells, shape[2])).astype(np.float32)
    if rng.random() < 0.5:
        noise = np.sign(noise)
    method = "nearest" if rng.random() < 0.5 else "bilinear"
    # Not with Keras, which would compile anew for every size of grid.
    rows, columns = (_places(length, number, method) for length, number in zip(shape[:2], cells, strict=True))
    return np.clip(np.einsum("hi,wj,ijc->hwc", rows, columns, noise, optimize=True), -1.0, 1.0)


def _places(length: int, cells: int, method: str) -> np.ndarray:
    """How much each of `length` pixels has of each cell, [length, cells]; rows add up to one."""
    if method == "nearest":
        return np.eye(cells, dtype=np.float32)[np.arange(length) * cells // length]
    centres = np.clip((np.arange(length) + 0.5) * cells / length - 0.5, 0.0, cells - 1.0)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(cells))).astype(np.float32)
