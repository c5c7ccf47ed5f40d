"""Gradients against finite differences: is what an attack follows the slope of what it attacks?

A quantizer's output moves in jumps, so its chain has no slope to compare with. What is compared there is the same
network with the quantizers switched off, which shares every other piece of the path; where a function turns out
to have no slope, no verdict is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vqunet_tf.evaluation.findings import Check, because

LENGTH = 0.01  # of a step (l2): float32 still resolves it, and few kinks of a network lie within it
STEADY = 0.05  # differences of this and of half the length agree this well where there is a slope
SMOOTH = 1 / 3  # of the comparisons must be steady for a verdict
TOLERANCE = 0.25  # median relative error; measured on sound chains 0.01 to 0.14, the most with max pooling
MARGIN = 0.05  # images are moved this far into (0,1), where no clipping bends a slope

Answer = Callable[[np.ndarray], np.ndarray]  # images [N,H,W,C] → logits [N,K]


def inside(images: np.ndarray) -> np.ndarray:
    """The images, a little paler: away from 0 and 1."""
    return (MARGIN + (1 - 2 * MARGIN) * images).astype(np.float32)


def slope_error(
    answer: Answer, gradient: np.ndarray, images: np.ndarray, labels: np.ndarray, seed: int = 0
) -> float | None:
    """Median relative error of a gradient `[N,H,W,C]` of the cross-entropy, None where there is no slope.

        (loss(x + h u) - loss(x - h u)) / 2h   against   gradient · u

    along the gradient itself (its length) and along two random directions (whatever it may leave out).
    The loss is summed in float64 from the logits.
    """
    rng, size = np.random.default_rng(seed), np.sqrt(np.prod(images.shape[1:]))
    gradient = gradient.astype(np.float64)
    length = np.sqrt(np.square(gradient).sum(axis=(1, 2, 3), keepdims=True))
    directions = [rng.choice([-1.0, 1.0], images.shape) / size for _ in range(2)]
    if np.isfinite(gradient).all():
        directions.append(gradient / np.maximum(length, 1e-30))

    def difference(along: np.ndarray, step: float) -> np.ndarray:
        ahead, behind = (answer((images + sign * step * along).astype(np.float32)) for sign in (1.0, -1.0))
        return (_loss(ahead, labels) - _loss(behind, labels)) / (2 * step)

    errors, steady = [], []
    for along in directions:
        coarse, fine = difference(along, LENGTH), difference(along, LENGTH / 2)
        steady.append((fine != 0.0) & (_apart(coarse, fine) <= STEADY))
        errors.append(_apart(fine, (gradient * along).sum(axis=(1, 2, 3))))
    found = np.concatenate(steady)
    if found.mean() < SMOOTH:
        return None
    return float(np.median(np.concatenate(errors)[found]))


def gradients_match_differences(errors: Mapping[str, float | None]) -> Check:
    """The finding on the errors of each function, by name."""
    said = [f"{name} {'has no slope' if error is None else f'{error:.1%}'}" for name, error in errors.items()]
    # Not a number is an error too.
    wrong = [f"{name} is off by {e:.0%}" for name, e in errors.items() if e is not None and not e <= TOLERANCE]
    detail = f"median relative error of the gradient: {', '.join(said)}"
    return Check("gradients_match_differences", not wrong, because(detail, wrong))


def _apart(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """How far two numbers lie apart, relative to the larger; 1 where one is not a number."""
    largest = np.maximum(np.maximum(np.abs(one), np.abs(two)), 1e-30)
    return np.nan_to_num(np.abs(one - two) / largest, nan=1.0)


def _loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
