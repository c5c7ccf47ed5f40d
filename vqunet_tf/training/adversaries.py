"""Perturbations for training and for choosing an epoch: crafted against the frozen classifier and kept as bytes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from vqunet_tf import backend, pixels
from vqunet_tf.config import FAMILIES, AttackConfig

# What maps images [B, H, W, C] to {"logits": [B, K], "features": [B, F]}.
Guide = Callable[[Any], dict[str, Any]]


def craft(
    guide: Guide,
    images: np.ndarray,
    config: AttackConfig,
    seed: int | tuple[int, ...],
    progress: Callable[[int], Any] = lambda done: None,
) -> np.ndarray:
    """An adversarial version of every image, by a family of iterated linf attacks that never sees a label.

    Each image draws its radius (epsilon u^radius_power, u uniform from a fifth to 1) and, in the shares `aims`, where it
    aims: `targeted` (towards a random class other than the predicted one), `untargeted` (away from the predicted class)
    or `features` (far from the clean features, in any direction). Each batch draws, all alike and in the shares `climbs`,
    how it climbs: in one step (`single_step`), in 2 to `max_steps` (`iterated`), or in as many that follow a running mean
    of the gradients (`momentum`, Dong et al. 2018, arXiv 1710.06081: its perturbations lie in the corners of the budget, as
    those of one step do); and the step size. Each image draws whether its start is random. `leave_out` names kinds that are not
    made. No aim is given the true label: a perturbation made with it carries it, and a purifier learns to read
    it ("label leaking", Kurakin et al. 2017, arXiv 1611.01236). The aim `untargeted` still comes close, where the
    classifier is right; what it does is seen by comparing targeted and untargeted attacks.

    Args:
        guide: the frozen classifier with its features (`classifiers.with_features`).
        images: uint8 [N, H, W, C].
        seed: same seed, same adversaries.
        progress: called with the number of images done, after every batch.

    Returns:
        uint8 [N, H, W, C], each within its radius up to half a grey level.
    """
    look = backend.compiled(lambda x: guide(x))  # a new function: JAX would know an old one, with its old weights
    ascend = ascent(guide)
    rng = np.random.default_rng(seed)

    def attack(batch: np.ndarray) -> np.ndarray:
        return _attack(look, ascend, batch, config, rng)

    return _in_batches(attack, config.batch_size, progress, images)


def pgd(
    guide: Guide,
    images: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    steps: int,
    targeted: bool,
    seed: int,
    batch_size: int,
    first: bool = False,
) -> np.ndarray:
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083), to choose between epochs on validation images.

    Away from the true label, or towards a random other class; random start, steps of 2.5 epsilon / steps. A single step
    starts at the image and has length epsilon: the fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572).

    Args:
        images: uint8 [N, H, W, C]. labels: [N].
        first: an image stays at the first step that is misclassified, not only the last one counts: the answers of a chain
            with quantizers jump, and a later step may be right again.

    Returns:
        uint8 [N, H, W, C].
    """
    ascend = ascent(guide)
    look = backend.compiled(lambda x: guide(pixels.to_unit(x)))
    rng = np.random.default_rng(seed)

    def attack(batch: np.ndarray, true: np.ndarray) -> np.ndarray:
        clean = pixels.to_unit(batch)
        reference = guide(clean)
        classes = reference["logits"].shape[1]
        aim = (true + rng.integers(1, classes, size=len(true))) % classes if targeted else true
        pull = np.eye(classes, dtype="float32")[aim] * (1.0 if targeted else -1.0)
        radius = np.full((len(batch), 1, 1, 1), epsilon, "float32")
        noise = radius * rng.uniform(-1.0, 1.0, size=batch.shape).astype("float32") * (steps > 1)
        settings = (radius, radius * np.float32(2.5 / steps), pull, np.zeros(len(batch), "float32"))
        found = _climb(ascend, clean, noise, steps, 0.0, settings, reference["features"])
        crafted, right = batch, np.ones(len(batch), bool)
        for x in found:
            crafted = np.where(right[:, None, None, None], pixels.to_uint8(x), crafted)
            if first:
                right &= ops.convert_to_numpy(look(crafted)["logits"]).argmax(axis=-1) == true
        return crafted

    return _in_batches(attack, batch_size, lambda done: None, images, labels)


def nearest(
    guide: Guide,
    images: np.ndarray,
    batch_size: int,
    seed: int | tuple[int, ...],
    progress: Callable[[int], Any] = lambda done: None,
) -> np.ndarray:
    """An image just beyond the classifier's nearest boundary for every image, in l2: a few steps of DeepFool.

    Each step goes to where the linearised logits of the predicted class and of the runner-up meet (Moosavi-Dezfooli et al. 2016,
    arXiv 1511.04599, with the runner-up in place of all other classes), two percent further; what is misclassified stays. The whole
    way is then made longer by up to 30 %, at random. No label is seen.

    Args:
        guide: the frozen classifier with its features (`classifiers.with_features`).
        images: uint8 [N, H, W, C].
        seed: same seed, same adversaries.
        progress: called with the number of images done, after every batch.

    Returns:
        float16 [N, H, W, C] in [0, 1]: many lie less than a grey level away.
    """

    def lead(x: Any, own: Any) -> Any:
        logits = ops.cast(guide(x)["logits"], "float32")
        return ops.max(logits - 1e9 * own, axis=-1) - ops.sum(logits * own, axis=-1)

    gradient = backend.input_gradient(lead)

    def step(x: Any, own: Any) -> Any:
        behind = ops.reshape(-lead(x, own), (-1, 1, 1, 1))
        slope = gradient(x, own)
        square = ops.maximum(ops.sum(ops.square(slope), axis=(1, 2, 3), keepdims=True), _LEAST_GRADIENT)
        return ops.where(behind > 0, ops.clip(x + 1.02 * (behind + 1e-4) * slope / square, 0.0, 1.0), x)

    look, walk = backend.compiled(lambda x: guide(x)), backend.compiled(step)
    rng = np.random.default_rng(seed)

    def attack(batch: np.ndarray) -> np.ndarray:
        x = clean = pixels.to_unit(batch)
        logits = look(clean)["logits"]
        own = ops.one_hot(ops.argmax(logits, axis=-1), logits.shape[1], dtype="float32")
        for _ in range(_NEAREST_STEPS):
            x = walk(x, own)
        further = 1.0 + 0.3 * rng.random((len(batch), 1, 1, 1), dtype=np.float32)
        return ops.convert_to_numpy(ops.clip(clean + further * (x - clean), 0.0, 1.0)).astype(np.float16)

    return _in_batches(attack, batch_size, progress, images, dtype=np.float16)


def ascent(guide: Guide) -> Callable[..., Any]:
    """One projected sign-gradient step, compiled for a guide whose weights do not change.

    `step(x, velocity, decay, clean, epsilon, alpha, pull, distance, reference)` gives the next x and velocity: climbs
    sum(pull * log softmax) + distance * |features - reference|^2 by the sign of `decay` velocity + g / mean |g|, stays
    within `epsilon` of `clean` and within [0, 1].
    """

    def objective(x: Any, pull: Any, distance: Any, reference: Any) -> Any:
        found = guide(x)
        towards = ops.sum(pull * ops.log_softmax(ops.cast(found["logits"], "float32")), axis=-1)
        away = ops.mean(ops.square(ops.cast(found["features"], "float32") - reference), axis=-1)
        return towards + distance * away

    gradient = backend.input_gradient(objective)

    def step(
        x: Any,
        velocity: Any,
        decay: Any,
        clean: Any,
        epsilon: Any,
        alpha: Any,
        pull: Any,
        distance: Any,
        reference: Any,
    ) -> tuple[Any, Any]:
        found = gradient(x, pull, distance, reference)
        size = ops.mean(ops.abs(found), axis=(1, 2, 3), keepdims=True)
        velocity = decay * velocity + found / ops.maximum(size, _LEAST_GRADIENT)
        moved = x + alpha * ops.sign(velocity)
        return ops.clip(ops.clip(moved, clean - epsilon, clean + epsilon), 0.0, 1.0), velocity

    return backend.compiled(step)


def _attack(guide: Guide, ascend: Callable[..., Any], batch: np.ndarray, config: AttackConfig, rng: Any) -> np.ndarray:
    """Perturbs one batch uint8 [B, H, W, C] with aims and radii drawn from `rng`."""
    clean = pixels.to_unit(batch)
    reference = guide(clean)
    size, classes = reference["logits"].shape
    predicted = ops.convert_to_numpy(ops.argmax(reference["logits"], axis=-1))
    aim = rng.choice(len(_AIMS), size=size, p=_shares(_AIMS, config.aims, config))
    target = (predicted + rng.integers(1, max(classes, 2), size=size)) % classes
    attract = np.eye(classes, dtype="float32")[target] * (aim == 0)[:, None]
    repel = np.eye(classes, dtype="float32")[predicted] * (aim == 1)[:, None]

    radius = config.epsilon * rng.uniform(0.2, 1.0, size=(size, 1, 1, 1)) ** config.radius_power
    radius = radius.astype("float32")
    steps, decay = _steps(config, rng)
    alpha = radius * np.float32(1.0 if steps == 1 else rng.uniform(1.0, 2.5) / steps)
    noise = rng.uniform(-1.0, 1.0, size=batch.shape).astype("float32")
    # A random start always where the aim is distance: at the clean image its gradient is zero.
    spread = np.where((aim == 2) | (rng.random(size) < 0.5), 0.5, 0.0).astype("float32")[:, None, None, None]
    settings = (radius, alpha, attract - repel, (aim == 2).astype("float32"))
    found = _climb(ascend, clean, radius * spread * noise, steps, decay, settings, reference["features"])
    return pixels.to_uint8(collections.deque(found, maxlen=1).pop())


_NEAREST_STEPS = 5
_LEAST_GRADIENT = 1e-30  # below it there is none to follow
_AIMS, _CLIMBS = FAMILIES[:3], FAMILIES[3:]


def _steps(config: AttackConfig, rng: np.random.Generator) -> tuple[int, float]:
    """Number of steps of a batch, and how much of the gradients before each of them keeps."""
    kind = str(rng.choice(_CLIMBS, p=_shares(_CLIMBS, config.climbs, config)))
    several, decay = int(rng.integers(2, max(config.max_steps, 2) + 1)), float(rng.uniform(0.5, 1.0))
    if config.max_steps == 1 or kind == "single_step":
        return 1, 0.0
    return several, decay if kind == "momentum" else 0.0


def _shares(names: Sequence[str], shares: Sequence[float], config: AttackConfig) -> np.ndarray:
    """Probabilities of these kinds: the shares of those that are not left out."""
    kept = np.array([0.0 if name in config.leave_out else share for name, share in zip(names, shares, strict=True)])
    return kept / kept.sum()


def _climb(
    ascend: Callable[..., Any],
    clean: Any,
    start: np.ndarray,
    steps: int,
    decay: float,
    settings: tuple[Any, ...],
    features: Any,
) -> Iterator[Any]:
    """Takes `steps` from clean + start, each keeping `decay` of the gradients before it, and gives the images after each."""
    settings = tuple(ops.convert_to_tensor(part) for part in settings)
    reference = ops.cast(features, "float32")
    x = ops.clip(clean + ops.convert_to_tensor(start), 0.0, 1.0)
    velocity, kept = ops.zeros_like(x), ops.convert_to_tensor(decay, "float32")
    for _ in range(steps):
        x, velocity = ascend(x, velocity, kept, clean, *settings, reference)
        yield x


def _in_batches(
    attack: Callable[..., np.ndarray],
    size: int,
    progress: Callable[[int], Any],
    *arrays: np.ndarray,
    dtype: Any = np.uint8,
) -> np.ndarray:
    """Attacks arrays [N, ...] batch by batch; the last batch is filled up: one size, one compilation."""
    images = arrays[0]
    adversarial = np.empty(images.shape, dtype)
    for start in range(0, len(images), size):
        batch = [array[start : start + size] for array in arrays]
        kept = len(batch[0])
        filled = [np.resize(part, (size, *part.shape[1:])) for part in batch] if kept < size else batch
        adversarial[start : start + kept] = attack(*filled)[:kept]
        progress(kept)
    return adversarial
