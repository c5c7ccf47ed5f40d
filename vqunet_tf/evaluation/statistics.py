"""How sure a share is, and whether one share really lies above another."""

from __future__ import annotations

import math

import numpy as np


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share, 95 % by default; (0, 1) for n = 0.

        centre ± half,  centre = (p + z²/2n) / (1 + z²/n),  half = z/(1 + z²/n) · sqrt(p(1-p)/n + z²/4n²)

    "Probable Inference, the Law of Succession, and Statistical Inference", Wilson 1927. Unlike p ± z·s it
    stays inside [0,1] and has a width at p = 0 and p = 1.
    """
    if n == 0:
        return 0.0, 1.0
    share, scale = correct / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def above(ours: np.ndarray, theirs: np.ndarray, margin: float = 0.0, z: float = 2.58) -> bool:
    """Whether the share of `ours` exceeds that of `theirs` by more than `margin` and more than chance.

    Both are booleans `[N]` of the same images, so only the images on which they differ carry noise
    (McNemar 1947). z = 2.58: chance alone gets there once in 200 comparisons of equals.
    """
    difference = ours.astype(np.float64) - theirs
    noise = z * difference.std() / math.sqrt(max(len(difference), 1))
    return bool(difference.size and difference.mean() - margin > noise)
