"""The arenas that a worker's device reaches by itself: no copy through the host's own memory."""

from __future__ import annotations

import logging
from functools import partial

from splitserve.kv.copier import Copier
from splitserve.kv.pages import HostPool, SharesPages
from splitserve.kv.transports.base import Transport
from splitserve.kv.transports.shm import ShmTransport

_log = logging.getLogger(__name__)


class DeviceArenas:
    """Of the stores that a worker's client is connected to, one after the other. Used on the event
    loop; given up with their transports.
    """

    def __init__(self, shared: SharesPages, copier: Copier) -> None:
        self._shared = shared
        self._copier = copier
        self._open: dict[ShmTransport, HostPool] = {}
        self._beyond_reach: ShmTransport | None = None

    def of(self, transport: Transport) -> HostPool | None:
        """The transport's arena; None if there is none or the device cannot reach it. Raises
        Unavailable if the transport is closed.
        """
        if transport is self._beyond_reach or not isinstance(transport, ShmTransport):
            return None
        host = self._open.get(transport)
        if host is None:
            transport.span(0, 0)  # raises if it is closed
            host = self._open[transport] = self._shared.open_host(transport.arena)
            transport.when_closed(lambda: self._close(transport))
            self._copier.later(partial(_prepare, host))
        return host

    def failed(self, transport: Transport, error: OSError) -> None:
        """A copy failed and goes another way; all of this transport do if the device may not reach
        the arena.
        """
        if isinstance(transport, ShmTransport) and transport in self._open:
            _log.warning("KV blocks take a detour through the worker's memory: %s", error)
            if not isinstance(error, PermissionError):
                return
            self._beyond_reach = transport
            self._close(transport)

    def close(self) -> None:
        """Gives up all of them, in the calling thread. No copy may be under way."""
        while self._open:
            self._open.popitem()[1].close()

    def _close(self, transport: ShmTransport) -> None:
        host = self._open.pop(transport, None)
        if host is not None:
            self._copier.later(host.close)


def _prepare(host: HostPool) -> None:
    try:
        host.prepare()
    except PermissionError as error:
        _log.warning("KV blocks will take a detour through the worker's memory: %s", error)
    except OSError as error:
        _log.info("the arena is not prepared ahead: %s", error)
