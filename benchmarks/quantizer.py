"""The quantizer against its peers on the same shapes, in one run.

    python -m benchmarks.quantizer [--repeats=7]

Prints one JSON line per shape, task and contender: the median milliseconds of the repeats, taken in turns so that what
else the machine does falls on all alike, and the ratio to ours; on Linux also the memory one call takes at its peak
beyond what was there before it. Contenders: `ours`; `vector_quantize_pytorch` (if
installed: extra `bench`); `one_hot`, the formulation of the Keras example; `matmul`, the bare product
z @ codebook.T, whose time is the yardstick: all the distances have to be computed somehow. The task `forward` is nearest codes and their
content; `train` is forward, straight-through backward to the inputs, and the moving-average update.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from vqunet_tf import VectorQuantizer

SHAPES = [(32768, 16, 512), (32768, 64, 512), (131072, 64, 1024)]
DECAY = 0.99


def ours(vectors: np.ndarray, codes: np.ndarray) -> dict[str, Callable[[], Any]]:
    layer = VectorQuantizer(*codes.shape, decay=DECAY, revive_after=0)
    layer.build(vectors.shape)
    layer.placed.assign(codes)
    layer.steps.assign(1.0)
    return _tensorflow(vectors, lambda z, training: layer(z, training=training))


def one_hot(vectors: np.ndarray, codes: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Distances and one-hot matrix in full, as in the VQ-VAE example of keras.io, with the same EMA update."""
    codebook, counts = tf.Variable(codes), tf.Variable(tf.ones(len(codes)))
    sums = tf.Variable(codes)

    def call(z: Any, training: bool) -> dict[str, Any]:
        distances = (
            tf.reduce_sum(z**2, axis=1, keepdims=True)
            + tf.reduce_sum(codebook**2, axis=1)
            - 2 * tf.matmul(z, codebook, transpose_b=True)
        )
        encodings = tf.one_hot(tf.argmin(distances, axis=1), len(codes))
        quantized = tf.matmul(encodings, codebook)
        loss = 0.25 * tf.reduce_mean((tf.stop_gradient(quantized) - z) ** 2)
        if training:
            counts.assign(DECAY * counts + (1 - DECAY) * tf.reduce_sum(encodings, axis=0))
            sums.assign(DECAY * sums + (1 - DECAY) * tf.matmul(encodings, tf.stop_gradient(z), transpose_a=True))
            codebook.assign(sums / counts[:, None])
        return {"quantized": z + tf.stop_gradient(quantized - z), "loss": loss}

    return _tensorflow(vectors, call)


def matmul(vectors: np.ndarray, codes: np.ndarray) -> dict[str, Callable[[], Any]]:
    z, e = tf.constant(vectors), tf.constant(codes)
    product = tf.function(lambda: tf.matmul(z, e, transpose_b=True))
    return {"forward": lambda: product().numpy().shape}


def vector_quantize_pytorch(vectors: np.ndarray, codes: np.ndarray) -> dict[str, Callable[[], Any]]:
    import torch
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(
        dim=codes.shape[1],
        codebook_size=codes.shape[0],
        decay=DECAY,
        commitment_weight=0.25,
        kmeans_init=False,
        threshold_ema_dead_code=0,
        rotation_trick=False,
    )
    z = torch.tensor(vectors)[None]

    def forward() -> Any:
        layer.eval()
        with torch.no_grad():
            return layer(z)[0]

    def train() -> Any:
        layer.train()
        at = z.clone().requires_grad_(True)
        quantized, _, loss = layer(at)
        (quantized.sum() + loss.sum()).backward()
        return at.grad

    return {"forward": forward, "train": train}


def _tensorflow(vectors: np.ndarray, call: Callable[[Any, bool], dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    z = tf.constant(vectors)

    @tf.function
    def forward() -> Any:
        return call(z, False)["quantized"]

    @tf.function
    def train() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(z)
            result = call(z, True)
            total = tf.reduce_sum(result["quantized"]) + result["loss"]
        return tape.gradient(total, z)

    return {"forward": lambda: forward().numpy().shape, "train": lambda: train().numpy().shape}


def measure(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns, after two calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mebibytes(name: str, task: str, shape: tuple[int, int, int]) -> float | None:
    """How far resident memory rises in the first call at this shape, in a process of its own; None if it cannot be told.

    A small call goes before, so that what libraries allocate once does not count. Later calls reuse what the
    allocator kept, and would show nothing.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, task, shape))


def _peak(name: str, task: str, shape: tuple[int, int, int]) -> float | None:
    make = globals()[name]
    make(*data(64, 4, 8))[task]()
    run = make(*data(*shape))[task]
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _kibibytes(status.read_text(), "VmRSS")
        run()
        return round((_kibibytes(status.read_text(), "VmHWM") - before) / 1024, 1)
    except OSError:
        return None


def data(count: int, width: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [count, width] and codes [number, width]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, width)).astype("float32"), rng.normal(size=(number, width)).astype("float32")


def _kibibytes(status: str, name: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    makers = {"ours": ours, "one_hot": one_hot, "matmul": matmul}
    try:
        import vector_quantize_pytorch as _  # noqa: F401

        makers["vector_quantize_pytorch"] = vector_quantize_pytorch
    except ImportError:
        print(json.dumps({"left_out": "vector_quantize_pytorch", "why": "not installed: pip install -e '.[bench]'"}))
    for shape in SHAPES:
        tasks = {name: make(*data(*shape)) for name, make in makers.items()}
        for task in ("forward", "train"):
            runs = {name: runs[task] for name, runs in tasks.items() if task in runs}
            found = measure(runs, repeats)
            for name, milliseconds in found.items():
                row = {"shape": shape, "task": task, "contender": name, "ms": round(milliseconds, 2)}
                row["times_ours"] = round(milliseconds / found["ours"], 2)
                row["peak_mib"] = peak_mebibytes(name, task, shape)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
