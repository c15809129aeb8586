"""A fake engine whose pool other processes can map, as those of GPUs can be: tests of that need no
GPU.

The pool is a memory file. Its handle says where the kernel shows this process's descriptor of it,
for as long as the process lives.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from splitserve_kernels.page_digest_rules import digest_pages_reference

from splitserve.engine.fake import FakeEngine
from splitserve.kv.pages import HostPool, LayerRun, PeerPool

_HANDLE = struct.Struct("<QQQ")
"""Process, descriptor, bytes of a page."""


class SharedFakeEngine(FakeEngine):
    """Implements `SharesPages`."""

    _fd = -1

    @cached_property
    def pool_domain(self) -> str:
        """See `SharesPages.pool_domain`."""
        return f"fake {boot_id()} {os.readlink('/proc/self/ns/pid')}"

    def prepare_pages(self) -> None:
        """See `SharesPages.prepare_pages`."""

    def pages_handle(self) -> bytes:
        """See `SharesPages.pages_handle`."""
        return _HANDLE.pack(os.getpid(), self._fd, self.spec.block_bytes)

    def open_peer(self, handle: bytes) -> FakePeer:
        """See `SharesPages.open_peer`."""
        try:
            pid, fd, page_bytes = _HANDLE.unpack(handle)
        except struct.error as error:
            raise ConnectionError("the handle is not a fake engine's") from error
        if page_bytes != self.spec.block_bytes:
            raise ConnectionError(f"the pool has pages of {page_bytes} bytes")
        with Path(f"/proc/{pid}/fd/{fd}").open("rb") as file:
            return FakePeer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), page_bytes)

    def copy_from_peer(
        self, peer: PeerPool, runs: Sequence[LayerRun], digested: Sequence[int] = ()
    ) -> list[bytes]:
        """See `SharesPages.copy_from_peer`."""
        if not isinstance(peer, FakePeer):
            raise TypeError("the pool is not a fake engine's")
        theirs = peer.pages()
        layer = self.spec.layer_bytes
        for run in runs:
            if any(not 0 <= page < len(theirs) for page in run.pages):
                raise OSError(f"the pool has {len(theirs)} pages")
            part = slice(run.first_layer * layer, run.end_layer * layer)
            self._bytes[list(run.own_pages), part] = theirs[list(run.pages), part]
        return self.digest_pages(digested)

    def open_host(self, memory: memoryview) -> FakeHost:
        """See `SharesPages.open_host`."""
        return FakeHost(memory)

    def copy_to_host(
        self,
        host: HostPool,
        pages: Sequence[int],
        first_layer: int,
        end_layer: int,
        offsets: Sequence[int],
        begin_by_s: float,
    ) -> bool:
        """See `SharesPages.copy_to_host`."""
        if time.monotonic() >= begin_by_s:
            return False
        first, end = first_layer * self.spec.layer_bytes, end_layer * self.spec.layer_bytes
        for page, offset in zip(pages, offsets, strict=True):
            _span(host, offset + first, end - first)[:] = self._bytes[page, first:end]
        return True

    def copy_from_host(
        self, host: HostPool, offsets: Sequence[int], own_pages: Sequence[int]
    ) -> list[bytes]:
        """See `SharesPages.copy_from_host`."""
        for page, offset in zip(own_pages, offsets, strict=True):
            self._bytes[page] = _span(host, offset, self.spec.block_bytes)
        return self.digest_pages(own_pages)

    def digest_pages(self, pages: Sequence[int]) -> list[bytes]:
        """See `SharesPages.digest_pages`."""
        return digest_pages_reference(self._bytes, pages)

    def close(self) -> None:
        """See `Engine.close`."""
        os.close(self._fd)

    @property
    def _bytes(self) -> NDArray[np.uint8]:
        return self._pool.view(np.uint8).reshape(self.spec.num_pages, -1)

    def _memory(self, size_bytes: int) -> mmap.mmap:
        self._fd = os.memfd_create("splitserve-fake-pool", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size_bytes)
        return mmap.mmap(self._fd, size_bytes)


class FakePeer:
    """Another fake engine's pool."""

    def __init__(self, mapping: mmap.mmap, page_bytes: int) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._page_bytes = page_bytes

    def pages(self) -> NDArray[np.uint8]:
        """(pages, bytes). Raises OSError once closed."""
        if self._mapping is None:
            raise OSError("the pool was closed")
        return np.frombuffer(self._mapping, np.uint8).reshape(-1, self._page_bytes)

    def close(self) -> None:
        """See `PeerPool.close`. The kernel unmaps when the last copy lets go."""
        self._mapping = None


class FakeHost:
    """Memory of the host."""

    def __init__(self, memory: memoryview) -> None:
        self.bytes: NDArray[np.uint8] | None = np.frombuffer(memory, np.uint8)

    def prepare(self) -> None:
        """See `HostPool.prepare`."""

    def close(self) -> None:
        """See `HostPool.close`."""
        self.bytes = None


def _span(host: HostPool, first: int, size: int) -> NDArray[np.uint8]:
    memory = host.bytes if isinstance(host, FakeHost) else None
    if memory is None or not 0 <= first <= first + size <= len(memory):
        raise OSError("the memory was given up, or ends before the block does")
    return memory[first : first + size]


def boot_id() -> str:
    """This run of this host's kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
