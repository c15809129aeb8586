"""Where the ranks of a group find each other.

On one node whose ranks are one process's children: a private folder with a Unix socket and a
file store, so that nothing listens on the network. Otherwise rank 0's address: a TCP store at the
known port and a listener on a free one. That traffic is neither encrypted nor authenticated, as
NCCL's and Gloo's are not: the ranks of one worker trust the network between them, and network
policies keep others out of it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import FileStore, Store, TCPStore

from splitserve.errors import ConfigError
from splitserve.parallel.link import Kind, Link, LinkClosed, Links, read_fields
from splitserve.parallel.rendezvous import ParallelConfig

CHANNELS = ("commands", "pages", "watch")
POLL_S = 0.05
HELLO_S = 2.0
RETRY_S = 0.2
_KEY = "splitserve/meeting"
_log = logging.getLogger(__name__)


class Meeting:
    """Rank 0's side: waits for the others. Close it once they are there."""

    def __init__(self, config: ParallelConfig, start_timeout_s: float) -> None:
        self._config = config
        self._nonce = secrets.token_hex(16)
        self._timeout_s = start_timeout_s
        self._found: dict[int, dict[str, Link]] = {r: {} for r in range(1, config.size)}
        self.folder = "" if config.uses_network else tempfile.mkdtemp(prefix="splitserve-ranks-")
        try:
            self.store = _open_store(config, self.folder, start_timeout_s)
            self._listener = self._listen()
        except BaseException:
            self.remove_folder()
            raise

    def admit(self, check: Callable[[], None]) -> dict[int, Links]:
        """The links to every other rank. `check` is called often and may raise.

        Raises ConfigError that names the ranks that did not come in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while self._missing:
            check()
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, self._missing))
                raise ConfigError(
                    f"rank {missing} of tensor_parallel_size {self._config.size} did not join "
                    f"within {self._timeout_s:.0f} s; see its own log"
                )
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(HELLO_S)
                self._welcome(Link(connection))
        return {rank: Links(**links) for rank, links in self._found.items()}

    def close(self) -> None:
        """Take no more connections. Groups that are complete stay, and the store does."""
        self._listener.close()
        if self._missing:
            for links in self._found.values():
                for link in links.values():
                    link.close()

    def remove_folder(self) -> None:
        """Remove what the store and the socket left on disk."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _missing(self) -> list[int]:
        return [rank for rank, links in self._found.items() if len(links) < len(CHANNELS)]

    def _listen(self) -> socket.socket:
        if self.folder:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(Path(self.folder) / "rank0.sock"))
            address = [str(Path(self.folder) / "rank0.sock")]
        else:
            listener = _tcp_listener(self._config)
            address = [self._config.master_addr, str(listener.getsockname()[1])]
        listener.listen(len(CHANNELS) * self._config.size)
        listener.settimeout(POLL_S)
        self.store.set(_KEY, json.dumps({"address": address, "nonce": self._nonce}))
        return listener

    def _welcome(self, link: Link) -> None:
        """Take a connection that says who it is; close any other."""
        try:
            kind, payload = link.receive()
            hello = read_fields(payload)
            known = hmac.compare_digest(str(hello.get("nonce")), self._nonce)
            if kind is not Kind.HELLO or not known:
                raise LinkClosed("not one of ours")
            fault = self._fault(hello)
            if fault:
                link.send_json(Kind.REFUSED, {"line": fault})
                raise LinkClosed(fault)
        except LinkClosed as error:
            _log.debug("a connection was refused: %s", error)
            link.close()
            return
        link.set_timeout(None)
        self._found[hello["rank"]][hello["channel"]] = link

    def _fault(self, hello: dict[str, Any]) -> str:
        rank, size, channel = (hello.get(name) for name in ("rank", "size", "channel"))
        if size != self._config.size:
            return (
                f"tensor_parallel_size is {size} on rank {rank} and {self._config.size} on rank 0"
            )
        if rank not in self._found or channel not in CHANNELS:
            return f"rank {rank} is not one of 1 to {self._config.size - 1}"
        if channel in self._found[rank]:
            return f"rank {rank} is there already: two processes were given the same rank"
        return ""


def join(config: ParallelConfig, start_timeout_s: float) -> tuple[Store, Links]:
    """A follower's side. Raises ConfigError if rank 0 is not found in time."""
    try:
        store = _open_store(config, config.meeting_folder, start_timeout_s)
        place = json.loads(store.get(_KEY))
        with contextlib.ExitStack() as stack:
            links = {}
            for channel in CHANNELS:
                links[channel] = _connect(config, place, channel)
                stack.callback(links[channel].close)
            stack.pop_all()
    except (OSError, RuntimeError, LinkClosed) as error:
        where = config.meeting_folder or f"{config.master_addr}:{config.master_port}"
        raise ConfigError(
            f"rank {config.rank} does not reach rank 0 at {where}: {' '.join(str(error).split())}"
        ) from None
    return store, Links(**links)


def _connect(config: ParallelConfig, place: dict[str, Any], channel: str) -> Link:
    address = place["address"]
    if len(address) == 1:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address[0])
    else:
        connection = socket.create_connection((address[0], int(address[1])), timeout=HELLO_S)
        connection.settimeout(None)
    link = Link(connection)
    link.send_json(
        Kind.HELLO,
        {
            "nonce": place["nonce"],
            "rank": config.rank,
            "size": config.size,
            "channel": channel,
        },
    )
    return link


def _open_store(config: ParallelConfig, folder: str, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    if folder:
        store: Store = FileStore(str(Path(folder) / "store"), config.size)
        store.set_timeout(timeout)
        return store
    if config.rank:
        _await_listener(config.master_addr, config.master_port, timeout_s)
    try:
        return TCPStore(
            config.master_addr,
            config.master_port,
            world_size=None,
            is_master=config.rank == 0 and not config.store_is_hosted,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if config.rank:
            raise
        line = " ".join(str(error).split())
        raise ConfigError(
            f"master_port {config.master_port}: the ranks' store cannot be opened there: {line}"
        ) from None


def _await_listener(address: str, port: int, timeout_s: float) -> None:
    """Wait for rank 0, which may start much later, as long as its name or port is not there.

    The store would wait, too, but prints a stack trace for every try. Raises OSError.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=HELLO_S).close()
            return
        except OSError:
            if time.monotonic() + RETRY_S > deadline:
                raise
            time.sleep(RETRY_S)


def _tcp_listener(config: ParallelConfig) -> socket.socket:
    """Where `master_addr` is an address of this machine, only there; it may be a name that the
    machine does not know itself by, such as a service's.
    """
    with contextlib.suppress(OSError):
        return socket.create_server((config.master_addr, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
