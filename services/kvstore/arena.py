"""The bytes that blocks live in: one anonymous file in memory.

A memfd has no name in any file system, so nothing is left behind however the process ends: the
kernel frees it with its last mapping. Its size is sealed, so that no process that was handed the
descriptor can truncate it and make another fault on access.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from services.kvstore.space import PAGE_BYTES, round_up
from splitserve.errors import ConfigError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """Shared memory of a fixed size. `fd` is what handles.py hands out."""

    def __init__(self, arena_bytes: int) -> None:
        """Makes it, rounded up to whole pages. Raises ConfigError if the machine has not as much.

        Pages are taken from the system when they are first written, so a size that can never be
        had would only be noticed, as a kill, in the middle of serving.
        """
        if arena_bytes < PAGE_BYTES:
            raise ValueError(f"arena_bytes must be at least {PAGE_BYTES}")
        self.size_bytes = round_up(arena_bytes)
        if self.size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise _config_error(self.size_bytes, "more than this machine's memory")
        self.fd = os.memfd_create("splitserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, self.size_bytes)
        except OSError as err:
            os.close(self.fd)
            raise _config_error(self.size_bytes, str(err)) from err
        self._view = memoryview(self._map)

    def write(self, offset: int, data: bytes) -> None:
        """Copies `data` to [offset, offset + len(data)); the caller has checked the bounds."""
        self._view[offset : offset + len(data)] = data

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of [offset, offset + size_bytes); the caller has checked the bounds."""
        return bytes(self._view[offset : offset + size_bytes])

    def close(self) -> None:
        """Gives up this process's mapping and descriptor."""
        self._view.release()
        self._map.close()
        os.close(self.fd)


def _config_error(size_bytes: int, reason: str) -> ConfigError:
    return ConfigError(f"SPLITSERVE_ARENA_BYTES (--arena-bytes): {size_bytes}: {reason}")
