"""Logs: one JSON object a line on stderr, or text for people, with the trace's ids in each."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from opentelemetry import trace

from splitserve.obs import names

LogFormat = Literal["text", "json"]

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def current_request_id() -> str | None:
    """The request that the current task works on."""
    return _request_id.get()


@contextmanager
def bind_request_id(request_id: str | None) -> Iterator[None]:
    """Every log line inside carries `request_id`. Enter and leave in the same task."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def setup_logging(
    service: str,
    level: str = "info",
    log_format: LogFormat = "json",
    stream: TextIO | None = None,
) -> None:
    """Points the root logger at `stream` (stderr), and only there."""
    # gRPC's core writes to stderr past this module; it reads this when its first channel is made.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service) if log_format == "json" else TextFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def log_uncaught(loop: asyncio.AbstractEventLoop) -> None:
    """Exceptions that no task of `loop` took are logged as errors of the suite."""
    logger = logging.getLogger("splitserve.asyncio")

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        logger.error("uncaught: %s", context.get("message", "no message"), exc_info=error)

    loop.set_exception_handler(handle)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. What was passed as `extra=` becomes fields of its own."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            names.LOG_TIME: _iso_time(record),
            names.LOG_LEVEL: record.levelname.lower(),
            names.LOG_SERVICE: self._service,
            names.LOG_LOGGER: record.name,
            names.LOG_MESSAGE: record.getMessage(),
            **_ids(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD_FIELDS:
                line.setdefault(key, value)
        if record.exc_info:
            line[names.LOG_EXCEPTION] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For terminals: time, level, service, message and the ids that there are."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows on further lines."""
        ids = "".join(f" {key}={value}" for key, value in _ids().items())
        clock = _iso_time(record)[11:23]
        line = f"{clock} {record.levelname:<7} {self._service}: {record.getMessage()}{ids}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _iso_time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _ids() -> dict[str, str]:
    ids = {}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        ids[names.LOG_TRACE_ID] = trace.format_trace_id(span.trace_id)
        ids[names.LOG_SPAN_ID] = trace.format_span_id(span.span_id)
    request_id = _request_id.get()
    if request_id is not None:
        ids[names.LOG_REQUEST_ID] = request_id
    return ids
