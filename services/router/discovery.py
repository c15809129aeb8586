"""Where workers are: a fixed list of addresses, or a DNS name that is asked again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Protocol

from splitserve.errors import ConfigError

_log = logging.getLogger(__name__)
DNS_PREFIX = "dns:///"


class Targets(Protocol):
    """A set of worker addresses that may change."""

    async def resolve(self) -> frozenset[str]:
        """The addresses now, each `host:port`. Never raises; keeps the last answer instead."""
        ...

    @property
    def refresh_s(self) -> float | None:
        """Seconds until it is worth asking again. None: the answer never changes."""
        ...


class StaticTargets:
    """Addresses that were given once."""

    refresh_s = None

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = frozenset(addresses)

    async def resolve(self) -> frozenset[str]:
        """Always the same addresses."""
        return self._addresses


class DnsTargets:
    """Every address behind one name, such as a headless Kubernetes service.

    Each address becomes a worker of its own: the router chooses among them, not gRPC.
    """

    def __init__(self, host: str, port: int, refresh_s: float) -> None:
        self._host, self._port = host, port
        self._refresh_s = refresh_s
        self._last: frozenset[str] = frozenset()
        self._failing = False

    @property
    def refresh_s(self) -> float:
        """Seconds between two questions."""
        return self._refresh_s

    async def resolve(self) -> frozenset[str]:
        """The addresses now. A name that cannot be resolved leaves the last answer in force."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            if not self._failing:
                _log.warning("cannot resolve %s: %s", self._host, error)
            self._failing = True
            return self._last
        self._failing = False
        self._last = frozenset(_join(str(address[0]), self._port) for *_, address in found)
        return self._last


NO_WORKERS = "none"
"""In place of a tier's targets."""


def parse_targets(text: str, *, variable: str, refresh_s: float) -> Targets:
    """Targets from `HOST:PORT,HOST:PORT`, `dns:///NAME:PORT`, or `none`.

    Raises ConfigError that names `variable`.
    """
    if text.startswith(DNS_PREFIX):
        host, port = _split(text[len(DNS_PREFIX) :], variable)
        return DnsTargets(host, port, refresh_s)
    if text == NO_WORKERS:
        return StaticTargets([])
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    if not addresses:
        raise ConfigError(f"{variable}: names no address; give HOST:PORT,… or dns:///NAME:PORT")
    return StaticTargets([_join(*_split(address, variable)) for address in addresses])


def _split(address: str, variable: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{variable}: {address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
