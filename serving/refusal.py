"""Why a request is not answered: a gRPC status and one line for the client."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
LONGEST_WORDS = 500


class Refused(Exception):
    """A request that gets no answer: `code` says whose fault it is, `words` what was expected, got, and can be done.

    The words may repeat what the client sent, so they go back to the client and nowhere else.
    """

    def __init__(self, code: grpc.StatusCode, words: str):
        self.code = code
        self.words = " ".join(words.split())[:LONGEST_WORDS]  # one line: gRPC sends it in a header
        super().__init__(self.words)


def quoted(name: str) -> str:
    """Returns a name that a client sent, in quotes and not longer than is of use."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def listed(names: Iterable[str]) -> str:
    """Returns names in order, in one line."""
    return ", ".join(sorted(names))
