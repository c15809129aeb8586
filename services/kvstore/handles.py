"""Hands the arena's file descriptor to processes of this node and user.

One message on a Unix socket, then the connection ends: 16 bytes, the store's epoch and the
arena's size as little-endian 64-bit numbers, with the descriptor beside them. An abstract socket
(the default) has no name in the file system. A path is for pods that share a directory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
import uuid
from pathlib import Path

from splitserve.errors import ConfigError
from splitserve.kv.transports.handle import HANDLE_MESSAGE, peer_uid, socket_address

_PAUSE_S = 1.0
_log = logging.getLogger(__name__)


def abstract_name() -> str:
    """A fresh name; the leading `@` stands for the NUL byte that makes it abstract."""
    return f"@splitserve-kv-{uuid.uuid4()}"


class HandleServer:
    """Listens from `start` to `stop`. Callers of another user are turned away."""

    def __init__(self, name: str, *, fd: int, epoch: int, arena_bytes: int) -> None:
        self.name = name
        self._fd = fd
        self._message = HANDLE_MESSAGE.pack(epoch, arena_bytes)
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Binds and listens. Raises ConfigError if the name cannot be bound."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setblocking(False)
            if not self.name.startswith("@"):
                _remove_stale(Path(self.name))
            listener.bind(socket_address(self.name))
            if not self.name.startswith("@"):
                os.chmod(self.name, stat.S_IRUSR | stat.S_IWUSR)
            listener.listen(128)
        except OSError as err:
            listener.close()
            raise ConfigError(
                f"SPLITSERVE_HANDLE_SOCKET (--handle-socket): cannot listen on {self.name}: {err}"
            ) from err
        self._socket = listener
        asyncio.get_running_loop().add_reader(listener, self._serve_waiting, listener)

    def stop(self) -> None:
        """Stops listening and removes the path, if it is one."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        if not self.name.startswith("@"):
            Path(self.name).unlink(missing_ok=True)

    def _serve_waiting(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as err:  # out of descriptors; callers time out and take grpc
                _log.warning("cannot accept on the handle socket, pausing: %s", err)
                self._pause(listener)
                return
            with peer:
                self._hand_out(peer)

    def _pause(self, listener: socket.socket) -> None:
        """Looks away for a while: the waiting caller would wake the loop again and again."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def resume() -> None:
            if self._socket is listener:
                loop.add_reader(listener, self._serve_waiting, listener)

        loop.call_later(_PAUSE_S, resume)

    def _hand_out(self, peer: socket.socket) -> None:
        try:
            peer.setblocking(False)  # the message fits the socket's buffer, always
            if peer_uid(peer) != os.geteuid():
                _log.warning("refused the arena to user %d", peer_uid(peer))
                return
            socket.send_fds(peer, [self._message], [self._fd])
        except (OSError, struct.error) as err:
            _log.warning("could not hand out the arena: %s", err)


def _remove_stale(path: Path) -> None:
    """Removes what a killed store left behind, but only a socket."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        pass
