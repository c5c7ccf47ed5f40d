"""What every call goes through: decoding, the clock, the count, the log, and one way to be refused."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.logs import Log
from serving.metrics import Metrics
from serving.refusal import INVALID, Refused

WATCHED = "/tensorflow.serving."  # not the health checks, which come every second


class Interceptor(grpc.ServerInterceptor):
    """Turns what a servicer raises into a gRPC status; nothing a client sends ends a thread or enters a log.

    sparing: is told of each refused request: its method, status and duration, never its words, which may repeat what
        the client sent.
    """

    def __init__(self, metrics: Metrics, log: Log, sparing: Log):
        self._metrics = metrics
        self._log = log
        self._sparing = sparing
        self._handlers: dict[str, Any] = {}

    def intercept_service(self, continuation: Callable, details: grpc.HandlerCallDetails) -> Any:
        known = self._handlers.get(details.method)
        if known is None:
            known = continuation(details)  # None for a method that no service has: gRPC answers UNIMPLEMENTED
            if known is not None:
                if details.method.startswith(WATCHED):
                    known = self._wrapped(details.method.rpartition("/")[2], known)
                self._handlers[details.method] = known
        return known

    def _wrapped(self, method: str, handler: Any) -> Any:
        def call(data: bytes, context: grpc.ServicerContext) -> Any:
            start = time.perf_counter()
            refused = response = None
            try:
                response = handler.unary_unary(_decoded(handler.request_deserializer, data, method), context)
            except Refused as error:
                refused = error
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                where = f"{frames[-1].filename}:{frames[-1].lineno}"
                self._log("error", method=method, error=type(error).__name__, where=where)
                refused = Refused(grpc.StatusCode.INTERNAL, "the server failed at this request: its log says where")
            status = (refused.code if refused else grpc.StatusCode.OK).name
            seconds = time.perf_counter() - start
            self._metrics.answered(method, status, seconds)
            if refused:
                self._sparing("refused", method=method, status=status, milliseconds=round(1000 * seconds, 1))
                context.abort(refused.code, refused.words)
            return response

        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)


def _decoded(parse: Callable[[bytes], Any], data: bytes, method: str) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise Refused(INVALID, f"the {len(data)} bytes are no request of {method}: send its protocol buffer") from None
