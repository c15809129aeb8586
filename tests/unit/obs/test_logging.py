from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry import trace

from splitserve.obs.collector import Collector
from splitserve.obs.logging import (
    LogFormat,
    bind_request_id,
    current_request_id,
    log_uncaught,
    setup_logging,
)
from splitserve.obs.tracing import setup_tracing

log = logging.getLogger("splitserve.test")


@pytest.fixture(autouse=True)
def _restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _setup(log_format: LogFormat = "json", level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    setup_logging("decode", level, log_format, stream)
    return stream


def test_json_line_has_service_level_and_extra_fields() -> None:
    stream = _setup()
    log.info("step %d\nsecond line", 7, extra={"batch": 3})
    (line,) = _lines(stream)
    assert line.pop("time")
    assert line == {
        "level": "info",
        "service": "decode",
        "logger": "splitserve.test",
        "message": "step 7\nsecond line",
        "batch": 3,
    }


def test_level_is_obeyed() -> None:
    stream = _setup(level="warning")
    log.info("quiet")
    log.warning("loud")
    assert [line["message"] for line in _lines(stream)] == ["loud"]


def test_ids_of_span_and_request() -> None:
    stream = _setup()
    collector = Collector()
    tracing = setup_tracing("decode", collector.endpoint, of_process=False)
    with tracing.tracer.start_as_current_span("work") as span, bind_request_id("r-1"):
        log.info("inside")
        expected = span.get_span_context()
        assert current_request_id() == "r-1"
    log.info("outside")
    tracing.shutdown()
    collector.stop()
    inside, outside = _lines(stream)
    assert inside["trace_id"] == trace.format_trace_id(expected.trace_id)
    assert inside["span_id"] == trace.format_span_id(expected.span_id)
    assert inside["request_id"] == "r-1"
    assert not {"trace_id", "span_id", "request_id"} & set(outside)


def test_extra_cannot_shadow_what_the_formatter_writes() -> None:
    stream = _setup()
    log.info("m", extra={"service": "other", "odd": {1, 2}.__class__})
    (line,) = _lines(stream)
    assert line["service"] == "decode"
    assert line["odd"] == "<class 'set'>"


def test_traceback_stays_on_one_json_line() -> None:
    stream = _setup()
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    (line,) = _lines(stream)
    assert "ValueError: why" in str(line["exception"])


def test_text_for_people() -> None:
    stream = _setup("text")
    with bind_request_id("r-1"):
        log.warning("slow")
    assert stream.getvalue().endswith(" WARNING decode: slow request_id=r-1\n")


async def test_exception_that_nobody_took_is_logged() -> None:
    stream = _setup()
    loop = asyncio.get_running_loop()
    log_uncaught(loop)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    (line,) = _lines(stream)
    assert line["level"] == "error"
    assert "ZeroDivisionError" in str(line["exception"])


async def test_tasks_do_not_share_a_request_id() -> None:
    async def work(request_id: str) -> str | None:
        with bind_request_id(request_id):
            await asyncio.sleep(0)
            return current_request_id()

    assert await asyncio.gather(work("a"), work("b")) == ["a", "b"]
    assert current_request_id() is None
