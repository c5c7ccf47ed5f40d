"""What attacks share that look for the nearest adversary, however far it is."""

from __future__ import annotations

import numpy as np

from vqunet_tf.attacks.base import Attack, Victim, batches, check, generators


class MinimumNorm(Attack):
    """An attack that looks for the nearest adversary of each image.

    Its row is measured within a budget like any other: an image whose nearest adversary lies beyond epsilon is
    projected, and then seldom fools.
    """

    def unbounded(
        self, victim: Victim, images: np.ndarray, labels: np.ndarray, *, batch_size: int = 100, seed: int = 0
    ) -> np.ndarray:
        """Returns what was found before any projection, `[N,H,W,C]` float32 in [0,1]; the arguments of a call.

        `attack.threat.distance(found, images)` says how far; an image that is still given its class was not fooled.
        """
        check(images, labels)
        result = images.copy()
        for rows, count in batches(len(images), batch_size):
            rows = rows if self.fills_up else rows[:count]
            found = self.run(victim, images[rows], labels[rows].astype(np.int32), generators(seed, rows))
            result[rows[:count]] = np.clip(found, 0.0, 1.0)[:count]
        return result
