from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from splitserve.parallel.link import Kind, Link, LinkClosed, read_fields


@pytest.fixture
def ends() -> Iterator[tuple[Link, socket.socket]]:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    yield link, theirs
    link.close()
    theirs.close()


def test_large_messages_arrive_whole(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    content = bytes(range(256)) * 20_000
    sending = threading.Thread(target=link.send, args=(Kind.INSERT, content))
    sending.start()
    assert Link(other).receive() == (Kind.INSERT, content)
    sending.join(10)


def test_fields(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    link.send_json(Kind.PLAN, {"model": "a", "threads": 2})
    kind, payload = Link(other).receive()
    assert (kind, read_fields(payload)) == (Kind.PLAN, {"model": "a", "threads": 2})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x06",
        struct.pack("<BQ", Kind.STEP, 10) + b"short",
        struct.pack("<BQ", Kind.STEP, 1 << 62),
        struct.pack("<BQ", 200, 0),
    ],
)
def test_what_is_no_message_closes_the_link(
    ends: tuple[Link, socket.socket], content: bytes
) -> None:
    link, other = ends
    other.sendall(content)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkClosed):
        link.receive()


@pytest.mark.parametrize("payload", [b"", b"[1]", b"{", b"\xff"])
def test_what_are_no_fields(payload: bytes) -> None:
    with pytest.raises(LinkClosed):
        read_fields(bytearray(payload))


def test_closing_wakes_who_waits() -> None:
    ours, theirs = socket.socketpair()
    link, faults = Link(ours), []

    def wait() -> None:
        try:
            link.receive()
        except LinkClosed as error:
            faults.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    link.close()
    waiting.join(10)
    theirs.close()
    assert len(faults) == 1
