"""How a command starts: flags in, one line out if they are wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from absl import flags

from vqunet_tf import errors


def run(
    main: Callable[[flags.FlagValues], None],
    values: flags.FlagValues,
    description: str,
    required: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Parses `argv` (default: the command line) into `values` and calls `main(values)`.

    required: the flags that must be given.
    Each command brings its own `values`, not absl's global one, so that several of them can be imported together.
    `--help` prints `description` and the flags and exits with 0; a wrong flag or a `UserError` is one line, status 2.
    """
    arguments = list(sys.argv if argv is None else argv)
    if {"-h", "-help", "--help"} & set(arguments[1:]):
        print(_help(values, description))
        sys.exit(0)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    errors.guard(lambda: main(_parse(values, arguments, required)))()


def _parse(values: flags.FlagValues, arguments: list[str], required: Sequence[str]) -> flags.FlagValues:
    """Returns `values` filled in; a `UserError` says which flag is unknown, missing or out of range."""
    try:
        rest = values(arguments)[1:]
    except flags.Error as error:
        raise errors.UserError(f"{error} (--help lists the flags)") from None
    if rest:
        raise errors.UserError(f"unexpected argument {rest[0]!r}: every setting is a --flag=value (--help lists them)")
    missing = ", ".join(f"--{name}" for name in required if not values[name].value)
    if missing:
        raise errors.UserError(f"missing {missing} (--help lists the flags)")
    return values


def _help(values: flags.FlagValues, description: str) -> str:
    lines = [description.strip(), "", "flags:"]
    for name in values:
        default = values[name].default_as_str
        lines.append(f"  --{name}: {values[name].help}" + (f" (default: {default})" if default else ""))
    return "\n".join(lines)
