"""What every attack shares: batches, the budget, and that nobody has to trust it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np

from vqunet_tf.errors import UserError
from vqunet_tf.threat import NORMS, Threat

# A victim: images [B,H,W,C] float32 in [0,1] → logits [B, classes], tensors in and out, differentiable.
Victim = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """One attack with all its settings: a value whose `repr` says everything that was done.

    A subclass sets `name` and `norms` and writes `run`; calling it is the same for all:
    split into batches, perturb, move into the budget, measure that it holds.

    threat: the images the attacker may use. A `UserError` names the norms of the attack if it lacks that one.
    steps: gradients taken for each image, or queries by an attack that sees answers only; one, unless a
        subclass lets the user choose.
    """

    threat: Threat
    steps: int = field(default=1, init=False)

    name: ClassVar[str]
    norms: ClassVar[tuple[str, ...]] = NORMS
    # Whether the last batch is filled up to the size of the others, for what is compiled for one size.
    fills_up: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threat.norm not in self.norms:
            raise UserError(f"{self.name} knows the norm {' and '.join(self.norms)}, not {self.threat.norm!r}")
        if self.steps < 1:
            raise UserError(f"{self.name}: expected at least one step, got {self.steps}")

    @final
    def __call__(
        self,
        victim: Victim,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int = 100,
        seed: int = 0,
        on_batch: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Returns adversarial images `[N,H,W,C]` float32 within the budget.

        Whether they succeed is for the caller to measure, against the true labels.

        victim: images → logits. Give the same object again for the same model: each is compiled once.
        images: `[N,H,W,C]` float32 in [0,1]. labels: `[N]` integers, the true classes.
        seed: image i draws from a generator of (seed, i), so that its adversary depends neither on
            `batch_size` nor on how many images come after it.
        on_batch: called with the number of images finished, after every batch.

        Raises `ValueError` for arrays that do not fit, `RuntimeError` if the budget does not hold.
        """
        check(images, labels)
        result = images.copy()
        for rows, count in batches(len(images), batch_size):
            # A budget of zero allows one image: no attack is asked, nothing is rounded.
            if self.threat.epsilon > 0.0:
                rows = rows if self.fills_up else rows[:count]
                original = images[rows]
                candidate = self.run(victim, original, labels[rows].astype(np.int32), generators(seed, rows))
                projected = self.threat.project(np.asarray(candidate, np.float32), original)
                if not self.threat.within(projected, original).all():
                    raise RuntimeError(f"{self!r} left its budget: this is a defect of the attack, not of the victim")
                result[rows[:count]] = projected[:count]
            if on_batch is not None:
                on_batch(count)
        return result

    @abstractmethod
    def run(self, victim: Victim, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]) -> Any:
        """Perturbs one batch `[B,H,W,C]`, with one random generator for each image.

        It may leave the budget: `__call__` projects afterwards.
        """


def check(images: np.ndarray, labels: np.ndarray) -> None:
    """Raises `ValueError` for anything but images `[N,H,W,C]` float32 and labels `[N]`."""
    if images.dtype != np.float32 or images.ndim != 4:
        raise ValueError(f"expected float32 images [N,H,W,C], got {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"expected labels of shape {images.shape[:1]}, got {labels.shape}")


def generators(seed: int, rows: Iterable[int]) -> list[np.random.Generator]:
    """One random generator for each image, from the seed and its place among all images."""
    return [np.random.default_rng((seed, int(row))) for row in rows]


def batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (row indices `[batch_size]`, how many of them count) until all n rows have been seen.

    The last batch is filled up by repeating the last row: a batch of another size would be traced and
    compiled anew. Raises a `UserError` for a batch of less than one.
    """
    if batch_size < 1:
        raise UserError(f"expected a batch size of at least 1, got {batch_size}")
    size = min(batch_size, n)
    for start in range(0, n, max(size, 1)):
        yield np.minimum(np.arange(start, start + size), n - 1), min(size, n - start)
