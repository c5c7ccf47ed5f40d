"""What one training step sees: batches made from bytes in memory, the same ones for the same seed and step."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from vqunet_tf.config import AttackConfig, ClassifierConfig, TrainingConfig
from vqunet_tf.errors import UserError
from vqunet_tf.training.augment import Augment, Cutout, Views


class Batches(keras.utils.PyDataset):
    """Whole batches in an order decided by (seed, epoch) alone, so that a resumed run sees the same images.

    `start(epoch, first)` chooses the epoch and the batch in it to begin with.
    """

    def __init__(self, size: int, batch_size: int, seed: int, replicas: int = 1):
        super().__init__()
        # Equal shards: only then is the mean over replicas the mean over the batch, and Keras accepts no others.
        self.batch_size = min(batch_size, size) // replicas * replicas
        if not self.batch_size:
            raise UserError(
                f"expected at least {replicas} images a batch, one for each replica, got {min(batch_size, size)}"
            )
        self.size, self.seed = size, seed
        self.per_epoch = size // self.batch_size  # what is left over comes in another epoch: one shape, one compilation
        self.start(0)

    def start(self, epoch: int, first: int = 0) -> None:
        self.epoch, self.first = epoch, first
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def __len__(self) -> int:
        return self.per_epoch - self.first

    def steps_after(self, batch: int) -> int:
        """Steps of the stage done after this batch of a `fit`; Keras counts a last call that is cut short as a whole one."""
        return self.epoch * self.per_epoch + self.first + min(batch + 1, len(self))

    def __getitem__(self, index: int) -> Any:
        place = self.first + index
        chosen = self.order[place * self.batch_size : (place + 1) * self.batch_size]
        return self.batch(chosen, np.random.default_rng((self.seed, self.epoch, place)))

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        raise TypeError(f"{type(self).__name__} must say what a batch is")


class ClassifierBatches(Batches):
    """(images uint8 [B, H, W, C] shifted, flipped and cut out at random, labels int32 [B])."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: ClassifierConfig, seed: int, replicas: int = 1):
        super().__init__(len(images), config.batch_size, seed, replicas)
        self.labels = labels
        self.augment = Augment(images, config.max_shift, config.flip)
        self.cutout = Cutout(images, config.cutout)

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        shown = self.augment(chosen, self.augment.draw(rng, len(chosen)))
        return self.cutout(shown, rng), self.labels[chosen]


class GrayBoxBatches(Batches):
    """What the purifier is shown, "seen" uint8 [B, H, W, C]; what it should give, "clean" uint8 [B, H, W, C]; "attacked" float32 [B].

    An image is seen clean, noisy, adversarial or as its nearest adversary (of its first view; "seen" is float32 in [0, 1] then), in the
    shares of the configuration. Noise is Gaussian, uniform or of
    random sign, its size drawn up to the attack's radius. "attacked" is 1 for an adversarial one. Where the weight of the
    pixels fades, "pixel_weight" float32 [B] is what it is at this step; where there are labels, "label" int32 [B]. With
    `training.loop_epsilon` an attack in the loop goes on from there: "epsilon" float32 [B, 1, 1, 1] is its radius,
    loop_epsilon sqrt(u) with u uniform, and "start" float32 [B, H, W, C] where it begins, uniform in that ball.

    Where the purifier is to learn to be mixed with pixels, "share" float32 [B, 1, 1, 1] is how much of them is mixed in, uniform in
    [0, 1), and "open" float32 [B] is 1 for clean images and nearest adversaries, which a gate may let pass.

    Args:
        views: of the images. adversarial: of the same views, uint8 [copies, N, H, W, C].
        labels: [N], for a head.
        nearest: adversaries of the first view, float16 [N, H, W, C].
        mixed: whether "open" and "share" are given.
        answers: what the classifier says about those views, by name [copies, N, ...]; given along by that name [B, ...].
    """

    def __init__(
        self,
        views: Views,
        adversarial: np.ndarray,
        training: TrainingConfig,
        attack: AttackConfig,
        replicas: int = 1,
        answers: dict[str, np.ndarray] | None = None,
        labels: np.ndarray | None = None,
        nearest: np.ndarray | None = None,
        mixed: bool = False,
    ):
        super().__init__(adversarial.shape[1], training.batch_size, training.seed, replicas)
        self.views, self.adversarial, self.answers = views, adversarial, answers
        self.labels = labels
        self.nearest, self.mixed = nearest, mixed
        if training.nearest and nearest is None:
            raise ValueError(
                "Expected the nearest adversaries where training.nearest is above 0. Received: nearest=None"
            )
        shares = np.array([training.clean, training.noisy, training.adversarial, training.nearest])
        self.shares = shares / shares.sum()
        self.radius, self.power = 255.0 * attack.epsilon, attack.radius_power
        self.further = training.loop_epsilon
        self.weights = (training.pixel_weight, training.final_pixel_weight)
        self.fading = training.pixel_fade * training.epochs * self.per_epoch

    def __getitem__(self, index: int) -> Any:
        batch = super().__getitem__(index)
        first, last = self.weights
        if last is not None:
            step = self.epoch * self.per_epoch + self.first + index
            weight = first * (last / first) ** min(1.0, step / self.fading)
            batch["pixel_weight"] = np.full(self.batch_size, weight, np.float32)
        return batch

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        copies = rng.integers(len(self.adversarial), size=len(chosen))
        kind = rng.choice(4, size=len(chosen), p=self.shares)
        copies[kind == 3] = 0
        clean = self.views(copies, chosen)
        seen: np.ndarray = clean.copy()
        noisy = np.flatnonzero(kind == 1)
        seen[noisy] = self.with_noise(clean[noisy], rng)
        attacked = np.flatnonzero(kind == 2)
        seen[attacked] = self.adversarial[copies[attacked], chosen[attacked]]
        said = {name: values[copies, chosen] for name, values in (self.answers or {}).items()}
        said["attacked"] = (kind >= 2).astype(np.float32)
        if self.nearest is not None:
            seen = seen.astype(np.float32) / np.float32(255.0)
            seen[kind == 3] = self.nearest[chosen[kind == 3]]
        if self.mixed:
            said["open"] = ((kind == 0) | (kind == 3)).astype(np.float32)
            said["share"] = rng.random((len(chosen), 1, 1, 1), dtype=np.float32)
        if self.labels is not None:
            said["label"] = self.labels[chosen].astype(np.int32)
        if self.further:
            radius = np.float32(self.further) * np.sqrt(rng.random((len(chosen), 1, 1, 1), dtype=np.float32))
            start = radius * (2.0 * rng.random(clean.shape, dtype=np.float32) - 1.0)
            said.update(epsilon=radius, start=start)
        return {"seen": seen, "clean": clean, **said}

    def with_noise(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal(images.shape, dtype=np.float32)
        kind = rng.integers(3, size=(len(images), 1, 1, 1))
        uniform = rng.random(images.shape, dtype=np.float32) * 2.0 - 1.0
        noise = np.where(kind == 0, 0.5 * normal, np.where(kind == 1, uniform, np.sign(uniform)))
        radius = self.radius * rng.random((len(images), 1, 1, 1), dtype=np.float32) ** self.power
        return np.clip(np.rint(images + radius * noise), 0, 255).astype(np.uint8)


class EncoderBatches(Batches):
    """{"seen": uint8 [B, H, W, C], "label": int32 [B]}: what the purifier is shown, shifted, flipped and cut out once more, anew each time.

    What was crafted for one view is no adversary of another; but a head is asked for the class alone, and that stays. With
    `training.encoder_guidance` "logits" float32 [B, K] are the classifier's answers to the views as they were.

    Args:
        shown: with labels, and with answers where they are asked for.
    """

    def __init__(self, shown: GrayBoxBatches, training: TrainingConfig):
        super().__init__(shown.size, shown.batch_size, training.seed)
        self.shown, self.max_shift, self.flip = shown, training.max_shift, training.flip
        self.cutout = Cutout(shown.views.images, training.cutout)
        self.wanted = ("label", "logits") if training.encoder_guidance else ("label",)

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        found = self.shown.batch(chosen, rng)
        bytes_ = found["seen"] if self.shown.nearest is None else np.rint(255.0 * found["seen"]).astype(np.uint8)
        augment = Augment(bytes_, self.max_shift, self.flip)
        seen = augment(np.arange(len(chosen)), augment.draw(rng, len(chosen)))
        return {"seen": self.cutout(seen, rng), **{name: found[name] for name in self.wanted}}


class AdaptiveBatches(Batches):
    """{"clean": uint8 [B, H, W, C], "label": int32 [B], "start": float32 [B, H, W, C], "epsilon": float32 [B, 1, 1, 1]}.

    The images are shifted and flipped at random; `start` is where an attack in the loop begins, uniform in the ball of
    radius `epsilon`, which grows linearly over the first share `epsilon_warmup` of all steps.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        training: TrainingConfig,
        attack: AttackConfig,
        replicas: int = 1,
    ):
        super().__init__(len(images), training.batch_size, training.seed, replicas)
        self.labels = labels.astype(np.int32)
        self.augment = Augment(images, training.max_shift, training.flip)
        self.epsilon = attack.epsilon
        self.warmup = max(1.0, training.epsilon_warmup * training.epochs * self.per_epoch)

    def __getitem__(self, index: int) -> Any:
        batch = super().__getitem__(index)
        step = self.epoch * self.per_epoch + self.first + index
        epsilon = np.float32(self.epsilon * min(1.0, (step + 1) / self.warmup))
        batch["epsilon"] = np.full((self.batch_size, 1, 1, 1), epsilon)
        batch["start"] *= epsilon
        return batch

    def batch(self, chosen: np.ndarray, rng: np.random.Generator) -> Any:
        clean = self.augment(chosen, self.augment.draw(rng, len(chosen)))
        start = rng.random(clean.shape, dtype=np.float32) * 2.0 - 1.0
        return {"clean": clean, "label": self.labels[chosen], "start": start}
