"""A user's mistake is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Something the user can mend: says what was expected, what was got and what to do.

    The text is one sentence or two on one line; commands print it as it is.
    """


class Interrupted(Exception):
    """A signal asked long work to stop, and it has saved where it was. The argument names the signal."""


def choice(kind: str, name: str, known: Iterable[str], hint: str = "") -> str:
    """Returns `name` if it is one of `known`, else raises a `UserError` that lists them."""
    names = sorted(known)
    if name in names:
        return name
    raise UserError(f"unknown {kind} {name!r}: expected one of {', '.join(names)}{hint}")


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command so that a `UserError`, or a file that cannot be read or written, ends it in one line, status 2.

    Ctrl-C ends it with status 130, SIGTERM (where it is noticed) with 143.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            line = " ".join(str(error).split())
            status = 2
        except OSError as error:  # a full disk, a folder of somebody else
            place = f"{error.filename}: " if error.filename else ""
            line = f"{place}{error.strerror or error}: mend it and give the same command again; what was saved is whole"
            status = 2
        except Interrupted as stop:
            line = f"interrupted by {stop}: all is saved, give the same command again to go on"
            status = 128 + signal.Signals[str(stop)].value
        except KeyboardInterrupt:
            line = "interrupted: training goes on from its last checkpoint when the same command is given again"
            status = 130
        sys.stderr.write(f"error: {line}\n")
        sys.exit(status)

    return guarded
