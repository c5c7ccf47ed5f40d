"""Real handwritten digits that come with scikit-learn: a data set that needs no network."""

from __future__ import annotations

import numpy as np
from PIL import Image

_SIDE = 32  # what the purifier's halvings are made for; the scans are 8×8
_TEST = 400
_TEST_SEED = 1797  # the test images never change, whatever the configuration's seed


def read(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns images uint8 `[N,32,32,1]`, labels `[N]` and class names of `train` (1,397) or `test` (400).

    The 1,797 scans of sklearn.datasets.load_digits, 8×8 with values 0..16, are enlarged bicubically.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    # RandomState's streams are frozen by NumPy's promise; a Generator's may change with its version.
    order = np.random.RandomState(_TEST_SEED).permutation(len(scans.images))
    chosen = order[:_TEST] if split == "test" else order[_TEST:]
    images = np.stack([_enlarge(scan) for scan in scans.images[chosen]])
    return images[..., None], scans.target[chosen], tuple(str(name) for name in scans.target_names)


def _enlarge(scan: np.ndarray) -> np.ndarray:
    """`[8,8]` with values 0..16 → uint8 `[32,32]`; the bicubic overshoot is clipped."""
    bright = Image.fromarray((scan * (255 / 16)).astype(np.float32))
    smooth = np.asarray(bright.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    return np.rint(np.clip(smooth, 0, 255)).astype(np.uint8)
