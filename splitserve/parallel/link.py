"""Framed messages between two ranks over one socket. Never imports torch."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_HEADER = struct.Struct("<BQ")
MAX_MESSAGE_BYTES = 1 << 30
_SMALL_BYTES = 1 << 20
_IDLE_S, _PROBE_S, _PROBES = 1, 1, 3


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    REFUSED = 2
    PLAN = 3
    READY = 4
    FAILED = 5
    STEP = 6
    STOP = 7
    EXPORT = 8
    INSERT = 9
    DONE = 10
    STOPPING = 11


class LinkClosed(ConnectionError):
    """The peer is gone, or what it sends is no message."""


@dataclass(frozen=True)
class Links:
    """The three connections between rank 0 and a follower.

    Steps and pages travel apart, so that neither waits behind the other. Nothing travels on
    `watch` in ordinary times: it closes when a process ends, however it ended.
    """

    commands: Link
    pages: Link
    watch: Link

    def close(self) -> None:
        """Close all three."""
        for link in (self.commands, self.pages, self.watch):
            link.close()


class Link:
    """One thread sends, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_dead_hosts(connection)

    def send(self, kind: Kind, payload: bytes | bytearray | memoryview = b"") -> None:
        """Send one message. Raises `LinkClosed`."""
        header = _HEADER.pack(kind, len(payload))
        try:
            if len(payload) <= _SMALL_BYTES:
                self._socket.sendall(header + bytes(payload))
            else:
                self._socket.sendall(header)
                self._socket.sendall(payload)
        except OSError as error:
            raise LinkClosed(str(error)) from error

    def send_json(self, kind: Kind, fields: dict[str, Any]) -> None:
        """Send one message of named fields."""
        self.send(kind, json.dumps(fields).encode())

    def receive_header(self) -> tuple[Kind, int]:
        """Kind and payload bytes of the next message; `receive_into` takes the payload."""
        header = bytearray(_HEADER.size)
        self.receive_into(memoryview(header))
        kind, size = _HEADER.unpack(header)
        if size > MAX_MESSAGE_BYTES:
            raise LinkClosed(f"a message of {size} bytes")
        try:
            return Kind(kind), size
        except ValueError:
            raise LinkClosed(f"a message of unknown kind {kind}") from None

    def receive(self) -> tuple[Kind, bytearray]:
        """The next message. Raises `LinkClosed`."""
        kind, size = self.receive_header()
        payload = bytearray(size)
        self.receive_into(memoryview(payload))
        return kind, payload

    def receive_into(self, out: memoryview) -> None:
        """Fill `out` with the bytes that come next."""
        filled = 0
        while filled < len(out):
            try:
                count = self._socket.recv_into(out[filled:])
            except OSError as error:
                raise LinkClosed(str(error)) from error
            if not count:
                raise LinkClosed("the peer closed the connection")
            filled += count

    def set_timeout(self, seconds: float | None) -> None:
        """How long a call may wait before it raises `LinkClosed`; None: for ever."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close it; whoever waits in `receive`, on either side, gets `LinkClosed`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def read_fields(payload: bytearray) -> dict[str, Any]:
    """The fields of a `send_json` message. Raises `LinkClosed`."""
    try:
        fields = json.loads(payload)
    except ValueError as error:
        raise LinkClosed("a message that is no JSON") from error
    if not isinstance(fields, dict):
        raise LinkClosed("a message that has no fields")
    return fields


def _notice_dead_hosts(connection: socket.socket) -> None:
    """A host that lost its power or network sends no end. The kernel's probes find out within
    some seconds, and they are answered by the peer's kernel however busy its process is.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _PROBE_S),
        ("TCP_KEEPCNT", _PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
