"""What one training step sees: batches made from bytes in memory, the same ones for the same seed and epoch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from vqunet_tf.config import AttackConfig, ClassifierConfig, TrainingConfig
from vqunet_tf.errors import UserError


class Batches(keras.utils.PyDataset):
    """Whole batches in an order decided by (seed, epoch) alone, so that a resumed run sees the same images."""

    def __init__(self, size: int, batch_size: int, seed: int, replicas: int = 1):
        super().__init__()
        # Equal shards: only then is the mean over replicas the mean over the batch, and Keras accepts no others.
        self.batch_size = min(batch_size, size) // replicas * replicas
        if not self.batch_size:
            raise UserError(
                f"expected at least {replicas} images a batch, one for each replica, got {min(batch_size, size)}"
            )
        self.size, self.seed = size, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def __len__(self) -> int:
        return self.size // self.batch_size  # what is left over comes in another epoch: one shape, one compilation

    def __getitem__(self, index: int) -> Any:
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.batch(chosen, np.random.default_rng((self.seed, self.epoch, index)))

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        raise TypeError(f"{type(self).__name__} must say what a batch is")


class ClassifierBatches(Batches):
    """(images uint8 [B, H, W, C] shifted and flipped at random, labels int32 [B])."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: ClassifierConfig, seed: int, replicas: int = 1):
        super().__init__(len(images), config.batch_size, seed, replicas)
        self.labels, self.shift, self.flip = labels, config.max_shift, config.flip
        self.shape = images.shape[1:3]
        border = [(0, 0), (self.shift, self.shift), (self.shift, self.shift), (0, 0)]
        self.padded = np.pad(images, border, mode="reflect")

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        height, width = self.shape
        corners = rng.integers(0, 2 * self.shift + 1, size=(len(chosen), 2))
        flipped = rng.random(len(chosen)) < (0.5 if self.flip else 0.0)
        images = np.empty((len(chosen), height, width, self.padded.shape[-1]), np.uint8)
        for i, (source, (top, left), mirror) in enumerate(zip(chosen, corners, flipped, strict=True)):
            crop = self.padded[source, top : top + height, left : left + width]
            images[i] = crop[:, ::-1] if mirror else crop
        return images, self.labels[chosen]


class PurifierBatches(Batches):
    """({"seen": uint8 [B, H, W, C], "clean": uint8 [B, H, W, C]}, logits of the clean images float32 [B, K]).

    An image is seen clean, noisy or adversarial, in the shares of the configuration. Noise is Gaussian, uniform or of
    random sign, its size drawn up to the attack's radius.
    """

    def __init__(
        self,
        images: np.ndarray,
        logits: np.ndarray,
        adversarial: np.ndarray,
        training: TrainingConfig,
        attack: AttackConfig,
        replicas: int = 1,
    ):
        super().__init__(len(images), training.batch_size, training.seed, replicas)
        self.images, self.logits, self.adversarial = images, logits, adversarial
        shares = np.array([training.clean, training.noisy, training.adversarial])
        self.shares = shares / shares.sum()
        self.radius = 255.0 * attack.epsilon

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        clean = self.images[chosen]
        kind = rng.choice(3, size=len(chosen), p=self.shares)
        seen = clean.copy()
        noisy = np.flatnonzero(kind == 1)
        seen[noisy] = self._with_noise(clean[noisy], rng)
        attacked = np.flatnonzero(kind == 2)
        seen[attacked] = self.adversarial[rng.integers(len(self.adversarial), size=len(attacked)), chosen[attacked]]
        return {"seen": seen, "clean": clean}, self.logits[chosen]

    def _with_noise(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal(images.shape, dtype=np.float32)
        kind = rng.integers(3, size=(len(images), 1, 1, 1))
        uniform = rng.random(images.shape, dtype=np.float32) * 2.0 - 1.0
        noise = np.where(kind == 0, 0.5 * normal, np.where(kind == 1, uniform, np.sign(uniform)))
        radius = self.radius * rng.random((len(images), 1, 1, 1), dtype=np.float32)
        return np.clip(np.rint(images + radius * noise), 0, 255).astype(np.uint8)
