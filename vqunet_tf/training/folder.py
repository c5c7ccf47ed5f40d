"""What a run asks of its folder: that nobody else trains in it, and that it goes on with the images it began with."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np

from vqunet_tf import data
from vqunet_tf.errors import UserError
from vqunet_tf.runs import RunFolder, write_text
from vqunet_tf.training import devices, workers

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(run: RunFolder) -> Iterator[None]:
    """Keeps a second process out while this one trains: they would rotate away each other's checkpoints.

    Of several workers the chief holds the folder. Where files cannot be locked, nothing is kept out.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None and devices.is_chief():
            file = stack.enter_context(run.config.open("rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process trains in {run.path}: wait until it has ended, stop it, or give another --run_dir"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield


def same_images(run: RunFolder, split: data.Split) -> None:
    """Raises a `UserError` if the run began with other training images; the first call writes down which they are.

    Training adversaries that were crafted of other images would be taken for those of these.
    """
    found = hashlib.sha256(np.ascontiguousarray(split.images).tobytes())
    found.update(np.asarray(split.labels, np.int64).tobytes())
    line = f"{found.hexdigest()} {len(split.labels)}\n"
    with workers.chief_first():
        workers.appears(run.images)
        if not run.images.exists():
            write_text(run.images, line)
    known = run.images.read_text(encoding="utf-8")
    if known != line:
        raise UserError(
            f"{run.path} began with other training images ({known.split()[-1]} of them, here {len(split.labels)}): "
            "give it those, or another --run_dir"
        )
