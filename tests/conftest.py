"""What tests share: quiet logs, one seed, prepared data where there is any, models made once, no process left behind."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Before TensorFlow is imported by any test.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # whatever the shell says: servers' logs are read line by line
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # on a GPU, compare true float32

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
    return 0


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
    """Where prepared TFDS data sets lie; the test is skipped where there are none."""
    folder = Path(os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "tfds").expanduser()
    if not folder.is_dir():
        pytest.skip("no prepared data sets: set TFDS_DATA_DIR")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fails the run if a test started a process and did not end it."""
    before = _children()
    yield
    left = {pid: command for pid, command in _children().items() if pid not in before}
    assert not left, f"processes left behind: {left}"


def _children() -> dict[int, str]:
    """Process id → command of this process's living children; empty where there is no /proc."""
    found = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended in between
                continue
            if command and "resource_tracker" not in command:  # zombies have none; Python keeps the tracker itself
                found[int(pid)] = command
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


# === Shared by a few files, what is costly made once; imported late, for most tests need none of it ===


@pytest.fixture(scope="session")
def problem() -> tuple:
    """A classifier with a fragile habit, images and labels."""
    import fragile

    return fragile.problem()


@pytest.fixture(scope="session")
def averaging():
    """A purifier that takes away most of what is added pixel by pixel."""
    import fragile

    return fragile.averaging()


@pytest.fixture(scope="session")
def untrained() -> tuple:
    """The classifier and the purifier that a made-up report speaks of."""
    import reported

    return reported.untrained()


@pytest.fixture(scope="session")
def config():
    """The configuration of a made-up report."""
    import reported

    return reported.config()


@pytest.fixture(scope="session")
def evaluation():
    """The evaluation that a made-up report is built from."""
    import reported

    return reported.evaluation()


@pytest.fixture(scope="session")
def finished(config, evaluation) -> dict:
    """That report, report.json as a dict."""
    import reported

    return reported.finished(config, evaluation)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """A folder that holds version 0 of the small model, with all of its signatures."""
    import served

    base = tmp_path_factory.mktemp("versions")
    served.write_version(base, 0, signatures=[*served.ALL, "slow"])
    return base


@pytest.fixture
def start(tmp_path) -> Iterator[Callable]:
    """Starts servers of the small model from `tmp_path`."""
    import served

    with served.starting(tmp_path) as start:
        yield start


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Closed, it keeps models from running."""
    import served

    with served.gated(monkeypatch) as gate:
        yield gate


@pytest.fixture(scope="session")
def models() -> tuple:
    """A purifier and a classifier to export."""
    import exported

    return exported.models()


@pytest.fixture(scope="session")
def base_path(models, tmp_path_factory) -> Path:
    """A folder of versions, holding version 1: their export."""
    import exported

    from serving import export

    base = tmp_path_factory.mktemp("exported")
    export.export(*models, exported.NAMES, base / "1")
    return base


@pytest.fixture
def image_file(tmp_path) -> tuple[Path, np.ndarray]:
    """A PNG of the size that they take, and its pixels."""
    import exported
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 256, exported.SHAPE, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png", pixels


def pytest_configure() -> None:
    """Four logical CPUs, before TensorFlow starts, so that replicas can be tested on any machine."""
    import tensorflow as tf

    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 4)
