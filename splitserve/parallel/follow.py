"""A rank other than 0: opens its part of the model and computes what rank 0 says."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch._C._distributed_c10d import Store

from splitserve.config import EXIT_CONFIG
from splitserve.engine.protocol import Slice
from splitserve.errors import CheckpointError, ConfigError
from splitserve.parallel.commands import decode_step
from splitserve.parallel.ending import Ending
from splitserve.parallel.link import Kind, LinkClosed, Links, read_fields
from splitserve.parallel.meeting import join
from splitserve.parallel.pages import RankPages, serve_pages
from splitserve.parallel.rendezvous import ParallelConfig

START_TIMEOUT_S = 600.0
REFUSAL_S = 10.0
_log = logging.getLogger(__name__)


class RankEngine(RankPages, Protocol):
    """One rank's part of an engine. `rank_layer_bytes` are those of one layer of its pages."""

    rank_layer_bytes: int

    def follow(self, slices: Sequence[Slice]) -> None:
        """Compute a step as `Engine.step` does, drawing nothing."""
        ...

    def describe(self) -> dict[str, Any]:
        """What rank 0 must know of it, as JSON."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


@dataclass(frozen=True)
class Membership:
    """What a rank opens its engine with."""

    config: ParallelConfig
    plan: dict[str, Any]
    store: Store
    ending: Ending


OpenRank = Callable[[Membership], RankEngine]


def follow(
    config: ParallelConfig,
    open_rank: OpenRank,
    ending: Ending,
    *,
    is_child: bool,
    start_timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Serve rank 0 until it says stop. Call from the main thread.

    Raises ConfigError or CheckpointError at start. What it cannot open rank 0 hears of, too: a
    child of rank 0's process leaves the line to it and raises SystemExit.
    """
    store, links = join(config, start_timeout_s)
    with contextlib.closing(links):
        engine = _open(links, store, config, open_rank, ending, is_child)
        _serve(links, engine, config, ending, is_child)
        ending.expect()
        engine.close()


def _serve(
    links: Links, engine: RankEngine, config: ParallelConfig, ending: Ending, is_child: bool
) -> None:
    pages = threading.Thread(target=_serve_pages, args=(links, engine, config, ending), daemon=True)
    pages.start()
    try:
        _serve_steps(links, engine)
    except LinkClosed:
        if not ending.is_expected:
            _rank0_gone(config, ending, is_child)
    except Exception as error:
        _report(links, config, ending, error)


def _open(
    links: Links,
    store: Store,
    config: ParallelConfig,
    open_rank: OpenRank,
    ending: Ending,
    is_child: bool,
) -> RankEngine:
    try:
        kind, payload = links.commands.receive()
        fields = read_fields(payload)
    except LinkClosed as error:
        raise ConfigError(f"rank 0 ended before rank {config.rank} had joined: {error}") from None
    if kind is Kind.REFUSED:
        raise ConfigError(str(fields["line"]))
    watch = threading.Thread(target=_watch, args=(links, config, ending, is_child), daemon=True)
    watch.start()
    signal.signal(signal.SIGTERM, lambda *_: _pass_on_stop(links))
    try:
        engine = open_rank(Membership(config, fields, store, ending))
    except (ConfigError, CheckpointError) as error:
        ending.expect()
        refusal = {"type": type(error).__name__, "line": error.message}
        with contextlib.suppress(LinkClosed):
            links.commands.send_json(Kind.FAILED, refusal)
            # Until rank 0 has read it and hung up: the end of this process says less.
            watch.join(REFUSAL_S)
        if is_child:
            raise SystemExit(EXIT_CONFIG) from None
        raise
    except Exception as error:
        _report(links, config, ending, error)
    links.commands.send_json(Kind.READY, engine.describe())
    return engine


def _serve_steps(links: Links, engine: RankEngine) -> None:
    while True:
        kind, payload = links.commands.receive()
        if kind is Kind.STOP:
            return
        if kind is not Kind.STEP:
            raise ValueError(f"{kind.name} where a step was expected")
        engine.follow(decode_step(payload))


def _serve_pages(links: Links, engine: RankEngine, config: ParallelConfig, ending: Ending) -> None:
    try:
        serve_pages(links.pages, engine, engine.rank_layer_bytes)
    except LinkClosed as error:
        _log.debug("pages are not asked for any more: %s", error)  # the watch knows why
    except Exception as error:
        _report(links, config, ending, error)


def _watch(links: Links, config: ParallelConfig, ending: Ending, is_child: bool) -> None:
    try:
        while True:
            kind, _ = links.watch.receive()
            if kind is Kind.STOP:
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
