"""The l2 form of the Square attack, image by image.

"Square Attack: a query-efficient black-box adversarial attack via random search", Andriushchenko et al.,
https://arxiv.org/abs/1912.00049, algorithm 3.

ART 1.20.1 divides by the length that a window may have where the algorithm multiplies by it: where the window was empty
that is a division by zero, and what is tried is hardly better than noise.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

# How far along the search is → by which power of two its windows have shrunk.
_SHRINK = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_TILES = 5


def search(
    ask: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    queries: int,
    rngs: list[np.random.Generator],
    share: float = 0.8,
) -> np.ndarray:
    """Returns the images `[B,H,W,C]` with the smallest margin found.

    ask: images → logits. queries: for each image; one that is fooled asks no more. share: of the pixels, in the first
    window. Every random thing about image i comes from `rngs[i]`.
    """
    best = np.stack([_begin(image, epsilon, rng) for image, rng in zip(images, rngs, strict=True)])
    margins = _margins(ask(best), labels)
    for turn in range(queries - 1):
        rows = np.flatnonzero(margins > 0.0)
        if not len(rows):
            break
        size = _window(images.shape[1:3], share, turn / max(queries, 1))
        tried = np.stack([_move(images[row], best[row], epsilon, size, rngs[row]) for row in rows])
        found = _margins(ask(tried), labels[rows])
        better = found < margins[rows]
        best[rows[better]], margins[rows[better]] = tried[better], found[better]
    return best


def _margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By how much the true class is ahead of every other, `[B]`; zero or less where the model is wrong."""
    others, rows = logits.copy(), np.arange(len(labels))
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(axis=1)


def _window(shape: tuple[int, ...], share: float, progress: float) -> int:
    """The side of a window: odd, at least 3, and inside the image."""
    side = max(round(math.sqrt(share / 2 ** bisect_left(_SHRINK, progress) * shape[0] * shape[1])), 3)
    side += 1 - side % 2
    inside = min(shape) - 1
    return min(side, inside - 1 + inside % 2)


def _begin(image: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Five by five tiles of bumps, of random sign in each channel."""
    delta, tile = np.zeros_like(image), min(image.shape[:2]) // _TILES
    for top in range(0, tile * _TILES, tile):
        for left in range(0, tile * _TILES, tile):
            delta[top : top + tile, left : left + tile] += _bumps(tile, image.shape[-1], rng)
    return np.clip(image + epsilon * delta / _length(delta), 0.0, 1.0)


def _move(image: np.ndarray, best: np.ndarray, epsilon: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Moves the perturbation of one window, and what the budget has left, into another."""
    height, width, channels = image.shape
    delta = best - image
    corners = [(rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)) for _ in range(2)]
    to, off = (np.s_[top : top + size, left : left + size] for top, left in corners)
    either = np.zeros_like(delta)
    either[to] = either[off] = 1.0
    spare = max(epsilon**2 - _length(delta) ** 2, 0.0)
    may_have = np.sqrt(spare / channels + np.sum(np.square(delta * either), axis=(0, 1)))
    old = delta[to] / (1e-10 + np.sqrt(np.sum(np.square(delta[to]), axis=(0, 1))))
    fresh = _bumps(size, channels, rng) + old
    fresh *= may_have / (1e-10 + np.sqrt(np.sum(np.square(fresh), axis=(0, 1))))
    delta[off] = 0.0
    delta[to] = fresh
    return np.clip(image + epsilon * delta / max(_length(delta), 1e-10), 0.0, 1.0).astype(np.float32)


def _bumps(size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Two neighbouring bumps of opposite sign, `[size,size,channels]`, each channel of length one and random sign."""
    half = size // 2
    pattern = np.concatenate([_bump(half, size), -_bump(size - half, size)])
    pattern /= _length(pattern)
    if rng.random() > 0.5:
        pattern = pattern.T
    return (pattern[..., None] * rng.choice([-1.0, 1.0], channels)).astype(np.float32)


def _bump(height: int, width: int) -> np.ndarray:
    """Falls off from the middle as 1 / 1, 1 / 4, 1 / 9, ...: nested rectangles."""
    bump = np.zeros((height, width))
    top, left = height // 2, width // 2
    for ring in range(max(top, left) + 1):
        rows = slice(max(top - ring, 0), min(top + ring + 1, height))
        bump[rows, max(left - ring, 0) : min(left + ring + 1, width)] += 1.0 / (ring + 1) ** 2
    return bump / _length(bump)


def _length(array: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(array))))
