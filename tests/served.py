"""A small SavedModel with the signatures of an export, and servers of it, for tests of what serves it.

Its arithmetic is repeated in NumPy by `answer`. Each version prefers another class, so that an answer tells its version.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from serving import model, server
from serving.client import Client

SHAPE = (8, 12, 3)  # neither square nor grey, so that a swapped axis shows
NAMES = ("cat", "dög", "bird", "fish")
WEIGHTS = np.random.default_rng(7).normal(size=(int(np.prod(SHAPE)), len(NAMES))).astype(np.float32)
DEFAULT = ("serving_default",)
ALL = ("serving_default", "serve_uint8", "serve_encoded", "purify", "undefended")
_kept: list[tempfile.TemporaryDirectory] = []
QUIET = lambda *_, **__: None  # noqa: E731  a log that says nothing


class Tiny(tf.Module):
    """Purifies by flipping black and white; the score is the mean of the image."""

    def __init__(self, version: int):
        super().__init__()
        self.weights = tf.Variable(WEIGHTS)
        self.preference = tf.Variable(preference(version))

    def classified(self, images):
        flat = tf.reshape(images, (-1, WEIGHTS.shape[0]))
        logits = tf.matmul(flat, self.weights) + self.preference
        class_id = tf.argmax(logits, axis=-1)
        return {
            "probabilities": tf.nn.softmax(logits),
            "class_id": class_id,
            "label": tf.gather(tf.constant(list(NAMES)), class_id),
        }

    def defended(self, images):
        return {**self.classified(1.0 - images), "adversarial_score": tf.reduce_mean(images, axis=[1, 2, 3])}

    def decoded(self, files):
        def one(data):
            image = tf.io.decode_image(data, channels=SHAPE[-1], expand_animations=False)
            return tf.image.resize(tf.cast(image, tf.float32) / 255.0, SHAPE[:2])

        return tf.ensure_shape(tf.map_fn(one, files, fn_output_signature=tf.float32), (None, *SHAPE))

    def endpoint(self, name):
        floats = tf.TensorSpec((None, *SHAPE), tf.float32, name="images")
        pixels = tf.TensorSpec((None, *SHAPE), tf.uint8, name="images")
        files = tf.TensorSpec((None,), tf.string, name="images")
        body, spec = {
            "serving_default": (self.defended, floats),
            "serve_uint8": (lambda images: self.defended(tf.cast(images, tf.float32) / 255.0), pixels),
            "serve_encoded": (lambda images: self.defended(self.decoded(images)), files),
            "purify": (lambda images: {"purified": 1.0 - images}, floats),
            "undefended": (self.classified, floats),
            "slow": (self.slow, floats),
        }[name]
        return tf.function(body, input_signature=[spec])

    def slow(self, images):
        """Takes about a second, however many images there are."""
        square = tf.fill((512, 512), 1.0 / 512)
        busy = tf.while_loop(lambda i, _: i < 150, lambda i, x: (i + 1, tf.matmul(x, square)), (0, square))[1]
        return {"busy": tf.reduce_mean(images, axis=[1, 2, 3]) * busy[0, 0] * 512}


def preference(version: int) -> np.ndarray:
    """What a version adds to the logits: so much that its class always wins."""
    return (1000.0 * np.eye(len(NAMES))[version % len(NAMES)] if version else np.zeros(len(NAMES))).astype(np.float32)


def write_version(base: Path, version: int, name: str | None = None, signatures: Sequence[str] = DEFAULT) -> Path:
    """Puts a version there the way `serving.export` does: beside its place, then renamed."""
    beside = base / f".{version}.part"
    shutil.copytree(_written(version, tuple(signatures)), beside)
    return beside.rename(base / (name or str(version)))


@functools.cache
def _written(version: int, signatures: tuple[str, ...]) -> Path:
    """Writing takes a second, copying does not: each is written once and kept until the tests end."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    module = Tiny(version)
    module.endpoints = {name: module.endpoint(name) for name in signatures}
    tf.saved_model.save(module, folder.name, signatures=module.endpoints)
    labels = "".join(f"{label}\n" for label in NAMES)
    (Path(folder.name) / "assets" / "labels.txt").write_text(labels, encoding="utf-8")
    return Path(folder.name)


def random_images(batch: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Images as floats, for every other signature as bytes."""
    generator = np.random.default_rng(seed + batch)
    if dtype != "float32":
        return generator.integers(0, 256, (batch, *SHAPE), dtype=np.uint8)
    return generator.random((batch, *SHAPE), dtype=np.float32)


def answer(images: np.ndarray, version: int = 0, defended: bool = True) -> dict[str, np.ndarray]:
    """What `Tiny` says, in NumPy."""
    unit = np.float64(images) / 255 if images.dtype == np.uint8 else np.float64(images)
    seen = 1 - unit if defended else unit
    logits = seen.reshape(len(images), -1) @ WEIGHTS.astype(np.float64) + preference(version)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found = {
        "probabilities": powers / powers.sum(axis=-1, keepdims=True),
        "class_id": logits.argmax(axis=-1),
        "label": np.array(NAMES)[logits.argmax(axis=-1)],
    }
    return {**found, "adversarial_score": unit.mean(axis=(1, 2, 3))} if defended else found


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], array)


def predict_request(
    images: np.ndarray, signature: str = "", model: str = "tiny", **inputs
) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, array in (inputs or {"images": images}).items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return request


def until(condition, seconds: float = 60.0) -> None:
    """Waits for a condition: machines differ in speed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@contextlib.contextmanager
def starting(base: Path) -> Iterator[Callable]:
    """Starts servers of `base`, polling fast, and stops them; their logs are lists of dicts."""
    started = []

    def start(**options):
        lines = []
        log = lambda event, **fields: lines.append({"event": event, **fields})  # noqa: E731
        options = {"port": 0, "poll_seconds": 0.02, **options}
        started.append(server.start(server.Options("tiny", base, **options), log))
        return started[-1], lines

    try:
        yield start
    finally:
        for running in started:
            running.stop(0)


@contextlib.contextmanager
def gated(monkeypatch) -> Iterator[threading.Event]:
    """Models run only while the gate is open; `gate.runs` are the batch sizes that began to."""
    gate = threading.Event()
    gate.runs = []
    run = model.Signature.__call__

    def call(self, inputs):
        gate.runs.append(len(next(iter(inputs.values()))))
        assert gate.wait(60)
        return run(self, inputs)

    gate.set()
    monkeypatch.setattr(model.Signature, "__call__", call)
    try:
        yield gate
    finally:
        gate.set()


def asking(running: server.Server, **options) -> Client:
    """A client of a server that runs."""
    return Client(f"localhost:{running.port}", "tiny", **{"timeout": 60.0, **options})


def certificates(folder: Path) -> dict[str, str]:
    """Makes an authority, a server's certificate for localhost and a client's, with OpenSSL; name → file."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    fresh = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *fresh, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test", "-days", "2")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *fresh, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return {path.name: str(path) for path in folder.iterdir()}
