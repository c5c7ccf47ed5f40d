"""What purifying costs: operations, parameters, images per second, share of the machine's matrix-product peak.

    python -m benchmarks.purifier [--presets=digits,fashion_mnist,cifar10] [--batch_size=128]

Prints one JSON line per preset. The peak is measured in the same run: the best of several float32 products of large
square matrices. A multiply-accumulate counts as two operations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from vqunet_tf import VQUNet
from vqunet_tf.models.operations import multiply_accumulates, of_layers, of_search
from vqunet_tf.recipes import preset

__all__ = ["SHAPES", "best_seconds", "matmul_peak", "measure", "of_layers", "of_search"]

SHAPES = {"digits": (32, 32, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def best_seconds(run: Callable[[], Any], repeats: int = 15) -> float:
    """The fastest of some calls, after two to warm up."""
    times = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        run()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return min(times)


def matmul_peak() -> float:
    """Operations per second of large float32 products."""
    found = []
    for side in (1024, 2048, 4096):
        a = tf.random.normal((side, side))
        product = tf.function(lambda a=a: tf.matmul(a, a))
        found.append(2 * side**3 / best_seconds(lambda product=product: product().shape, repeats=7))
    return max(found)


def measure(name: str, batch_size: int, peak: float) -> dict[str, Any]:
    """One row: the purifier of a preset on random images."""
    shape = SHAPES[name]
    model = VQUNet(**dataclasses.asdict(preset(name, name).purifier), channels=shape[-1])
    operations = multiply_accumulates(model, shape)
    images = tf.random.uniform((batch_size, *shape))
    purify = tf.function(lambda x: model(x, training=False))
    rate = batch_size / best_seconds(lambda: purify(images).shape)
    return {
        "preset": name,
        "image": shape,
        "million_macs": round(operations / 1e6, 2),
        "parameters": model.count_params(),
        "batch_size": batch_size,
        "images_per_second": round(rate),
        "share_of_peak": round(2 * operations * rate / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=",".join(SHAPES))
    parser.add_argument("--batch_size", type=int, default=128)
    options = parser.parse_args()
    peak = matmul_peak()
    print(json.dumps({"matmul_peak_gflops": round(peak / 1e9, 1)}), flush=True)
    for name in options.presets.split(","):
        print(json.dumps(measure(name, options.batch_size, peak)), flush=True)


if __name__ == "__main__":
    main()
