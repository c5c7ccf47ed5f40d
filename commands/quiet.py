"""Loads TensorFlow with its start-up lines held back, so that a command's terminal shows the command.

Import it before anything that imports TensorFlow. Set `TF_CPP_MIN_LOG_LEVEL=0` to see the lines.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def _stderr_held() -> Iterator[None]:
    """Holds back what is written to file descriptor 2, and writes it after all if the block raises."""
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # there is no standard error to keep clean
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


# TensorFlow 2.21 prints its first lines before it reads the level, so the level alone does not silence them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Where it is not installed, other backends train without it.
if "tensorflow" not in sys.modules and importlib.util.find_spec("tensorflow"):
    with _stderr_held() if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "0" else contextlib.nullcontext():
        import tensorflow  # noqa: F401
