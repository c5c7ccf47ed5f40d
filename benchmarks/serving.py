"""What serving costs: a closed loop of calls over loopback against the same model in the same process.

    python -m benchmarks.serving [--exported=DIR | --run_dir=DIR | --preset=digits] [--seconds=5] [--rounds=3]

Starts serving.server in a process of its own and loads it from another one, single images and batches, 1, 8 and 64 calls
at a time, the defended model and the classifier alone. The limit is the same SavedModel called in this process on full
batches. All take turns. Prints JSON lines: rates and percentiles are medians over the rounds. CPU seconds are counted
too, and change less than rates do when other work shares the machine. A preset's weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow_serving.apis import predict_pb2

from serving.export import export
from serving.model import Model, Signature
from serving.tensors import to_proto
from vqunet_tf import VQUNet
from vqunet_tf.models import classifiers
from vqunet_tf.recipes import preset

SIGNATURES = ("serving_default", "undefended")
LIMIT_BATCH = 32
SHAPES = {"digits": (32, 32, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def export_preset(name: str, base: Path) -> None:
    """Exports a preset with random weights: they do not change the time."""
    config, shape = preset(name, name), SHAPES[name]
    purifier = VQUNet(**dataclasses.asdict(config.purifier), channels=shape[-1])
    names = [str(number) for number in range(10)]
    target = config.classifier
    classifier = classifiers.build(target.name, shape, len(names), target.widths, target.blocks)
    export(purifier, classifier, names, base / "1", shape)


@contextmanager
def serving(base: Path) -> Iterator[tuple[str, int, float]]:
    """Runs the server; gives its address, process id, and the seconds until it was ready."""
    command = [sys.executable, "-m", "serving.server", f"--model_base_path={base}", "--model_name=model", "--port=0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            yield line.split()[-1], process.pid, time.perf_counter() - start
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """Of a process so far, by Linux's account."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def direct(signature: Signature, batch: int, seconds: float) -> dict[str, float]:
    """The function called in this process, from NumPy to NumPy."""
    images = _images(signature, batch)
    for _ in range(3):
        signature({"images": images})
    times, begin = [], resource.getrusage(resource.RUSAGE_SELF)
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        signature({"images": images})
        times.append(time.perf_counter() - start)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - begin.ru_utime - begin.ru_stime
    count = batch * len(times)
    return {
        "images_per_second": count / sum(times),
        "p50_ms": 1000 * statistics.median(times),
        "cpu_ms_per_image": 1000 * cpu / count,
    }


def loaded(address: str, pid: int, request: Path, batch: int, concurrency: int, seconds: float) -> dict[str, float]:
    """The server under a closed loop."""
    script = Path(__file__).with_name("load.py")
    before = cpu_seconds(pid)
    command = [sys.executable, str(script), address, str(request), str(concurrency), str(seconds)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    images = batch * found["calls"]
    return {
        "images_per_second": images / found["seconds"],
        **{name: found[name] for name in ("p50_ms", "p95_ms", "p99_ms")},
        "cpu_ms_per_image": 1000 * (cpu_seconds(pid) - before) / images,
        "load_cpu_ms_per_image": 1000 * found["cpu_seconds"] / images,
    }


def _images(signature: Signature, batch: int) -> np.ndarray:
    shape = signature.inputs["images"].shape[1:]
    return np.random.default_rng(0).random((batch, *shape), dtype=np.float32)


def _write_request(folder: Path, signature: Signature, batch: int) -> Path:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "model", signature.name
    request.inputs["images"].CopyFrom(to_proto(_images(signature, batch)))
    path = folder / f"{signature.name}.{batch}"
    path.write_bytes(request.SerializeToString())
    return path


def measure(base: Path, options: argparse.Namespace) -> None:
    version = max((path for path in base.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    model = Model(version)
    signatures = [model.signature(name) for name in SIGNATURES]
    found: dict[tuple, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, serving(base) as (address, pid, ready):
        start = {"ready_seconds": round(ready, 1), "ready_cpu_seconds": round(cpu_seconds(pid), 1)}
        print(json.dumps({**start, "load_average": os.getloadavg()}), flush=True)
        for _ in range(options.rounds):
            for signature in signatures:
                for batch in options.batches:
                    key = ("in process", signature.name, 1, batch)
                    found.setdefault(key, []).append(direct(signature, batch, options.seconds))
                    request = _write_request(Path(folder), signature, batch)
                    for concurrency in options.concurrency:
                        row = loaded(address, pid, request, batch, concurrency, options.seconds)
                        found.setdefault(("gRPC", signature.name, concurrency, batch), []).append(row)
    rows = {
        key: {name: statistics.median(row[name] for row in many) for name in many[0]} for key, many in found.items()
    }
    for key, row in rows.items():
        print(
            json.dumps(
                {**dict(zip(("how", "signature", "concurrency", "batch"), key, strict=True)), **_judged(rows, key, row)}
            )
        )
    print(json.dumps({"load_average": os.getloadavg()}))


def _judged(rows: dict[tuple, dict[str, float]], key: tuple, row: dict[str, float]) -> dict[str, Any]:
    """A row with the ratios that mean something."""
    how, signature, concurrency, batch = key
    shown = {name: round(value, 3 if "cpu" in name else 2) for name, value in row.items()}
    limit = rows.get(("in process", signature, 1, LIMIT_BATCH))
    if how == "gRPC" and limit:
        shown["of_in_process_batched"] = round(row["images_per_second"] / limit["images_per_second"], 3)
    if how == "gRPC" and concurrency == 1:
        shown["over_direct_call_ms"] = round(row["p50_ms"] - rows["in process", signature, 1, batch]["p50_ms"], 2)
    if how == "gRPC" and signature == "serving_default":
        alone = rows[how, "undefended", concurrency, batch]
        shown["of_undefended"] = round(row["images_per_second"] / alone["images_per_second"], 3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exported", type=Path, help="a folder of versions from serving.export")
    parser.add_argument("--run_dir", help="a run folder, exported first")
    parser.add_argument("--preset", default="digits", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, LIMIT_BATCH])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.exported or Path(folder)
        if options.exported is None and options.run_dir:
            export = [sys.executable, "-m", "serving.export", f"--run_dir={options.run_dir}", f"--export_dir={base}"]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        elif options.exported is None:
            export_preset(options.preset, base)
        measure(base, options)


if __name__ == "__main__":
    main()
