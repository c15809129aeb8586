"""Rank 0: starts its group, tells it what to compute, and ends when any of it does.

1. The meeting place is opened, and the ranks of this node are started.
2. Every other rank, of this node or another, joins with three connections.
3. Each gets the plan, opens its part of the model, and says that it is ready.
4. Every step is sent to all before rank 0 computes it, too; pages are read and written beside it.
5. A rank that ends, however it does, ends this process with one line (`ending.Ending`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from torch._C._distributed_c10d import Store

from splitserve.engine.protocol import Slice
from splitserve.errors import CheckpointError, ConfigError, SplitserveError
from splitserve.parallel.children import FOLLOWER_COMMAND, LocalRanks
from splitserve.parallel.commands import encode_step
from splitserve.parallel.ending import Ending
from splitserve.parallel.link import Kind, Link, LinkClosed, Links, read_fields
from splitserve.parallel.meeting import Meeting
from splitserve.parallel.rendezvous import ParallelConfig

START_TIMEOUT_S = 600.0
"""Ranks of other nodes may wait for an image to be pulled."""

VERDICT_S = 0.5
JOIN_S = 1.0
_START_ERRORS: dict[str, type[SplitserveError]] = {
    "CheckpointError": CheckpointError,
    "ConfigError": ConfigError,
}
_log = logging.getLogger(__name__)


class Leader:
    """The other ranks, as rank 0 sees them."""

    def __init__(
        self,
        config: ParallelConfig,
        ending: Ending,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        command: Sequence[str] = FOLLOWER_COMMAND,
    ) -> None:
        """Opens the meeting place and starts this node's ranks; returns at once."""
        self._ending = ending
        self._links: dict[int, Links] = {}
        self._watches: list[threading.Thread] = []
        self._meeting = Meeting(config, start_timeout_s)
        ending.before_exit(self._meeting.remove_folder)
        self._children: LocalRanks | None = None
        if config.starts_ranks:
            self._children = LocalRanks(config, self._meeting.folder, ending, command)

    @property
    def store(self) -> Store:
        """Where the ranks' collectives meet."""
        return self._meeting.store

    @property
    def store_folder(self) -> str:
        """Where this node's ranks meet; empty if they meet over the network."""
        return self._meeting.folder

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of this node's other ranks."""
        return self._children.pids if self._children else {}

    @property
    def page_links(self) -> dict[int, Link]:
        """The connections for pages, by rank."""
        return {rank: links.pages for rank, links in self._links.items()}

    def assemble(self, plan: dict[str, Any]) -> None:
        """Wait until every rank is there, and give each the plan. Raises `ConfigError`."""
        self._links = self._meeting.admit(check=lambda: None)
        self._meeting.close()
        for rank, links in self._links.items():
            watch = threading.Thread(
                target=self._watch, args=(rank, links.watch), name=f"watch-rank-{rank}", daemon=True
            )
            watch.start()
            self._watches.append(watch)
            self._send(links.commands, Kind.PLAN, plan)

    def await_ready(self) -> dict[int, dict[str, Any]]:
        """Wait until every rank has opened its part and joined the collectives, which this rank
        has done before; returns what each says of its part, by rank.

        Raises the ConfigError or CheckpointError that a rank met.
        """
        said = {}
        for rank, links in self._links.items():
            try:
                kind, payload = links.commands.receive()
                fields = read_fields(payload)
            except LinkClosed as error:
                self._ending.lost(f"starting rank {rank}", error)
            if kind is Kind.FAILED:
                # The rank waits for this end of the connection, and then ends itself.
                self._ending.expect()
                links.close()
                raise _START_ERRORS.get(fields["type"], ConfigError)(fields["line"])
            said[rank] = fields
        # All collectives are open. What is removed now is not left behind by a kill.
        self._meeting.remove_folder()
        return said

    def send_step(self, slices: Sequence[Slice], block_tokens: int) -> None:
        """Let every other rank compute a step."""
        command = encode_step(slices, block_tokens)
        for links in self._links.values():
            try:
                links.commands.send(Kind.STEP, command)
            except LinkClosed as error:
                self._ending.lost("sending a step", error)

    def dismiss(self) -> None:
        """Tell all ranks to stop, and do not wait for it."""
        self._ending.expect()
        for links in self._links.values():
            try:
                # First where the end of the connection will be seen, so that it is no surprise.
                links.watch.send(Kind.STOP)
                links.commands.send(Kind.STOP)
            except LinkClosed:
                _log.debug("a rank was gone before it was stopped")

    def close(self) -> None:
        """Stop all ranks and wait for those of this node. Can be called again."""
        self.dismiss()
        if self._children:
            self._children.stop()
        for links in self._links.values():
            links.close()
        # Python ends threads that it outlives by unwinding them, which libraries may not survive.
        for watch in self._watches:
            watch.join(JOIN_S)
        self._links.clear()
        self._meeting.close()
        self._meeting.remove_folder()

    def _send(self, link: Link, kind: Kind, fields: dict[str, Any]) -> None:
        try:
            link.send_json(kind, fields)
        except LinkClosed as error:
            self._ending.lost("starting the other ranks", error)

    def _watch(self, rank: int, link: Link) -> None:
        """Wait for the end of a rank, or for what it says before it."""
        try:
            while True:
                kind, payload = link.receive()
                if kind is Kind.STOPPING:
                    _log.info("rank %d was asked to stop, so this worker drains", rank)
                    os.kill(os.getpid(), signal.SIGTERM)
                elif kind is Kind.FAILED:
                    self._ending.fail(str(read_fields(payload)["line"]))
        except LinkClosed:
            if self._ending.is_expected:
                return
        if self._children:
            self._children.await_verdict(rank, VERDICT_S)
        self._ending.fail(
            f"rank {rank} is gone, so this worker ends; its own log says why; start it again"
        )
