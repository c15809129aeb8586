"""How the arena's file descriptor travels from the store to a process of the same node."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

HANDLE_MESSAGE = struct.Struct("<QQ")
"""The store's epoch and the arena's size in bytes."""

_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Handle:
    """The arena of one run of a store. The receiver owns and closes `fd`."""

    fd: int
    epoch: int
    arena_bytes: int


def socket_address(name: str) -> str:
    """The address to bind or connect to; a leading `@` names an abstract socket."""
    return "\0" + name[1:] if name.startswith("@") else name


def peer_uid(peer: socket.socket) -> int:
    """The user that the kernel says is at the other end of a Unix socket."""
    credentials = struct.Struct("3i")  # pid, uid, gid
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(raw)[1])


def receive_handle(name: str) -> Handle:
    """Asks the socket `name` for the arena. Blocks up to a second or so.

    Raises OSError if it cannot be reached, is another user's, or answers anything else.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(_TIMEOUT_S)
        peer.connect(socket_address(name))
        if peer_uid(peer) != os.geteuid():
            raise PermissionError(f"{name} belongs to another user")
        message, fds, _, _ = socket.recv_fds(peer, HANDLE_MESSAGE.size, 1)
    if len(message) != HANDLE_MESSAGE.size or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ConnectionError(f"{name} did not hand out an arena")
    epoch, arena_bytes = HANDLE_MESSAGE.unpack(message)
    if os.fstat(fds[0]).st_size != arena_bytes:
        os.close(fds[0])
        raise ConnectionError(f"{name} handed out something else than its arena")
    return Handle(fds[0], epoch, arena_bytes)
