"""A rank other than 0: opens its part of the model and computes what rank 0 says."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import Store

from splitserve.config import EXIT_CONFIG
from splitserve.errors import CheckpointError, ConfigError
from splitserve.parallel.commands import decode_step
from splitserve.parallel.ending import Ending
from splitserve.parallel.link import Kind, LinkClosed, Links, read_fields
from splitserve.parallel.meeting import join
from splitserve.parallel.pages import serve_pages
from splitserve.parallel.rank import RankEngine
from splitserve.parallel.rendezvous import ParallelConfig

START_TIMEOUT_S = 600.0
REFUSAL_S = 10.0
JOIN_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Membership:
    """What a rank opens its engine with."""

    config: ParallelConfig
    plan: dict[str, Any]
    store: Store
    ending: Ending
    watch: threading.Thread
    """Ends when rank 0 has said stop, or has hung up."""


OpenRank = Callable[[Membership], RankEngine]

OnStop = Callable[[Callable[[], None]], object]
"""Arranges that the callback is called when this process is asked to stop."""


def on_sigterm(act: Callable[[], None]) -> None:
    """For a process whose main thread follows."""
    signal.signal(signal.SIGTERM, lambda *_: act())


def follow(
    config: ParallelConfig,
    open_rank: OpenRank,
    ending: Ending,
    *,
    is_child: bool,
    on_stop: OnStop = on_sigterm,
    opened: Callable[[], object] = lambda: None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Serve rank 0 until it says stop; `opened` is called once this rank's part is there.

    Raises ConfigError or CheckpointError at start. What it cannot open rank 0 hears of, too: a
    child of rank 0's process leaves the line to it and raises SystemExit.
    """
    store, links = join(config, start_timeout_s)
    with contextlib.ExitStack() as stack:
        stack.callback(links.close)
        membership = _await_plan(links, store, config, ending, is_child)
        on_stop(lambda: _pass_on_stop(links))
        engine = _open(links, membership, open_rank, is_child)
        opened()
        pages = threading.Thread(
            target=_serve_pages, args=(links, engine, config, ending), daemon=True
        )
        pages.start()
        _serve(links, engine, config, ending, is_child)
        ending.expect()
        engine.close()
        links.close()
        # Python ends threads that it outlives by unwinding them, which libraries may not survive.
        for thread in (pages, membership.watch):
            thread.join(JOIN_S)


def _serve(
    links: Links, engine: RankEngine, config: ParallelConfig, ending: Ending, is_child: bool
) -> None:
    try:
        _serve_steps(links, engine)
    except LinkClosed:
        if not ending.is_expected:
            _rank0_gone(config, ending, is_child)
    except Exception as error:
        _report(links, config, ending, error)


def _await_plan(
    links: Links, store: Store, config: ParallelConfig, ending: Ending, is_child: bool
) -> Membership:
    """Also starts the watch over rank 0."""
    try:
        kind, payload = links.commands.receive()
        fields = read_fields(payload)
    except LinkClosed as error:
        raise ConfigError(f"rank 0 ended before rank {config.rank} had joined: {error}") from None
    if kind is Kind.REFUSED:
        raise ConfigError(str(fields["line"]))
    watch = threading.Thread(target=_watch, args=(links, config, ending, is_child), daemon=True)
    watch.start()
    return Membership(config, fields, store, ending, watch)


def _open(links: Links, membership: Membership, open_rank: OpenRank, is_child: bool) -> RankEngine:
    config, ending = membership.config, membership.ending
    try:
        engine = open_rank(membership)
    except (ConfigError, CheckpointError) as error:
        ending.expect()
        refusal = {"type": type(error).__name__, "line": error.message}
        with contextlib.suppress(LinkClosed):
            links.commands.send_json(Kind.FAILED, refusal)
            # Until rank 0 has read it and hung up: the end of this process says less.
            membership.watch.join(REFUSAL_S)
        if is_child:
            raise SystemExit(EXIT_CONFIG) from None
        raise
    except Exception as error:
        if not ending.is_expected:
            _report(links, config, ending, error)
        if is_child:
            raise SystemExit(EXIT_CONFIG) from None
        raise ConfigError(
            f"rank 0 ended before rank {config.rank} was ready; rank 0's log says why"
        ) from None
    spec = engine.spec
    said = {"fingerprint": spec.fingerprint.hex(), "num_pages": spec.num_pages}
    with contextlib.suppress(LinkClosed):  # of a rank 0 that is gone, or could not open its own
        links.commands.send_json(Kind.READY, said)
    return engine


def _serve_steps(links: Links, engine: RankEngine) -> None:
    while True:
        kind, payload = links.commands.receive()
        if kind is Kind.STOP:
            return
        if kind is not Kind.STEP:
            raise ValueError(f"{kind.name} where a step was expected")
        engine.compute(decode_step(payload))


def _serve_pages(links: Links, engine: RankEngine, config: ParallelConfig, ending: Ending) -> None:
    try:
        serve_pages(links.pages, engine)
    except LinkClosed as error:
        _log.debug("pages are not asked for any more: %s", error)  # the watch knows why
    except Exception as error:
        _report(links, config, ending, error)


def _watch(links: Links, config: ParallelConfig, ending: Ending, is_child: bool) -> None:
    try:
        while links.watch.receive()[0] is not Kind.STOP:
            continue
        ending.expect()
    except LinkClosed:
        if not ending.is_expected:
            _rank0_gone(config, ending, is_child)


def _rank0_gone(config: ParallelConfig, ending: Ending, is_child: bool) -> None:
    line = f"rank 0 is gone, so rank {config.rank} ends; rank 0's log says why"
    ending.fail(None if is_child else line)


def _report(links: Links, config: ParallelConfig, ending: Ending, error: Exception) -> None:
    """A rank that failed has left its place in the step: the group is over."""
    _log.error("rank %d failed", config.rank, exc_info=error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    with contextlib.suppress(LinkClosed):
        line = f"rank {config.rank} failed, so this worker ends: {text}"
        links.watch.send_json(Kind.FAILED, {"line": line})
    ending.fail(None)


def _pass_on_stop(links: Links) -> None:
    """Whoever wants this rank gone wants the worker gone: rank 0 drains and then stops all."""
    with contextlib.suppress(LinkClosed):
        links.watch.send(Kind.STOPPING)
