"""The pages of a GPU's pool for hand-overs: to and from host memory, and to other processes.

Everything runs on one stream beside the compute's, from any thread; each call waits for its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import torch
from splitserve_kernels.kv_pages import copy_pages
from splitserve_kernels.page_digest import digest_pages
from torch import Tensor

from splitserve.engine.device_memory import MappedMemory, export_memory
from splitserve.engine.host_memory import OFFSET_BYTES, HostMemory, register, unregister
from splitserve.kv.pages import HostPool, LayerRun, PeerPool

_HEAD: Final = struct.Struct("<16sQ")
"""In front of a handle: the pool's random name and the bytes of a page."""

_WRITING_PROGRAMS: Final = 32
_READING_PROGRAMS: Final = 128
"""So many keep the bus to the host busy. One that reads waits for each tile."""

_log = logging.getLogger(__name__)


class DevicePages:
    """Implements `PageAccess` but `shared`, and `SharesPages`.

    pool: (num_pages, page_bytes) uint8, contiguous, on a GPU
    """

    def __init__(self, pool: Tensor, layer_bytes: int, stream: torch.cuda.Stream) -> None:
        self._pool = pool
        self._layer_bytes = layer_bytes
        self._stream = stream
        self._name = secrets.token_bytes(16)
        self._warming = threading.Lock()
        self._warm = False

    @torch.inference_mode()
    def export_pages(
        self, pages: Sequence[int], first_layer: int, end_layer: int, outs: Sequence[memoryview]
    ) -> None:
        """See `PageAccess.export_pages`."""
        first, end = first_layer * self._layer_bytes, end_layer * self._layer_bytes
        with self._queued():
            for page, out in zip(pages, outs, strict=True):
                host = torch.frombuffer(out, dtype=torch.uint8)
                host.copy_(self._pool[page, first:end], non_blocking=True)

    @torch.inference_mode()
    def insert_pages(self, pages: Sequence[int], contents: Sequence[memoryview]) -> None:
        """See `PageAccess.insert_pages`."""
        with self._queued():
            for page, content in zip(pages, contents, strict=True):
                host = torch.frombuffer(content, dtype=torch.uint8)
                self._pool[page].copy_(host, non_blocking=True)

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """See `PageAccess.pin`."""
        address = np.frombuffer(memory, np.uint8).ctypes.data
        try:
            register(address, memory.nbytes, self._pool.device)
        except OSError as error:
            _log.warning("copies take a detour: %s", error)
            return _nothing
        return partial(unregister, address, self._pool.device)

    @cached_property
    def pool_domain(self) -> str:
        """See `SharesPages.pool_domain`."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"cuda {boot} {os.readlink('/proc/self/ns/ipc')}"

    def pages_handle(self) -> bytes:
        """See `SharesPages.pages_handle`. Raises `OSError` if the pool cannot be shared."""
        self.prepare_pages()
        return _HEAD.pack(self._name, self._pool.shape[1]) + export_memory(self._pool)

    def open_peer(self, handle: bytes) -> DevicePeer:
        """See `SharesPages.open_peer`. A process cannot map its own memory and need not."""
        if len(handle) < _HEAD.size:
            raise ConnectionError("the handle is not a GPU's")
        name, page_bytes = _HEAD.unpack_from(handle)
        if page_bytes != self._pool.shape[1]:
            raise ConnectionError(f"the pool has pages of {page_bytes} bytes")
        if name == self._name:
            return DevicePeer(self._pool, None)
        self.prepare_pages()
        memory = MappedMemory(handle[_HEAD.size :], self._pool.device)
        try:
            if memory.bytes.numel() % page_bytes:
                raise ConnectionError("the pool has a part of a page")
            return DevicePeer(memory.bytes.view(-1, page_bytes), memory)
        except BaseException:
            memory.close()
            raise

    @torch.inference_mode()
    def copy_from_peer(
        self, peer: PeerPool, runs: Sequence[LayerRun], digested: Sequence[int] = ()
    ) -> list[bytes]:
        """See `SharesPages.copy_from_peer`."""
        if not isinstance(peer, DevicePeer):
            raise TypeError("the pool is not a GPU's")
        theirs = peer.pages()
        if any(not 0 <= page < len(theirs) for run in runs for page in run.pages):
            raise OSError(f"the pool has {len(theirs)} pages")
        lists = [pages for run in runs for pages in (run.pages, run.own_pages)]
        with self._copying():
            *of_runs, of_digested = self._sent(*lists, digested)
            for run, pages, own_pages in zip(runs, of_runs[::2], of_runs[1::2], strict=True):
                part = self._part(run.first_layer, run.end_layer)
                copy_pages(theirs[:, part], pages, self._pool[:, part], own_pages)
            return digest_pages(self._pool, digested, of_digested)

    def open_host(self, memory: memoryview) -> HostMemory:
        """See `SharesPages.open_host`."""
        return HostMemory(memory, self._pool.device, self.prepare_pages)

    @torch.inference_mode()
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
        part = self._part(first_layer, end_layer)
        size = part.stop - part.start
        with _host_memory(host).places(offsets, part.start, size) as places, self._copying():
            own_pages, rows = self._sent(pages, [at // OFFSET_BYTES for at in offsets])
            # What was queued ahead is over with this, as is all that may have taken long.
            self._settle()
            if time.monotonic() >= begin_by_s:
                return False
            copy_pages(self._pool[:, part], own_pages, places, rows, programs=_WRITING_PROGRAMS)
            return True

    @torch.inference_mode()
    def copy_from_host(
        self, host: HostPool, offsets: Sequence[int], own_pages: Sequence[int]
    ) -> list[bytes]:
        """See `SharesPages.copy_from_host`."""
        size = self._pool.shape[1]
        with _host_memory(host).places(offsets, 0, size) as places, self._copying():
            rows, own = self._sent([at // OFFSET_BYTES for at in offsets], own_pages)
            copy_pages(places, rows, self._pool, own, programs=_READING_PROGRAMS)
            return digest_pages(self._pool, own_pages, own)

    @torch.inference_mode()
    def digest_pages(self, pages: Sequence[int]) -> list[bytes]:
        """See `SharesPages.digest_pages`."""
        with self._queued():
            return digest_pages(self._pool, pages)

    def _part(self, first_layer: int, end_layer: int) -> slice:
        """The bytes of these layers in each page."""
        return slice(first_layer * self._layer_bytes, end_layer * self._layer_bytes)

    def _sent(self, *lists: Sequence[int]) -> Sequence[Tensor]:
        """The lists on the device. In one copy: to wait for it, beside busy threads, costs more
        than any of the work.
        """
        numbers = torch.tensor(list(chain(*lists)), dtype=torch.int64, device=self._pool.device)
        return torch.split(numbers, list(map(len, lists)))

    def prepare_pages(self) -> None:
        """See `SharesPages.prepare_pages`."""
        with self._warming:
            if self._warm:
                return
            scratch = torch.zeros_like(self._pool[:1])
            with torch.inference_mode(), self._queued():
                numbers = torch.tensor([[0], [0]], device=self._pool.device)
                for size in (self._layer_bytes, scratch.shape[1]):
                    part = scratch[:, :size]
                    copy_pages(part, numbers[0], part, numbers[1])
                digest_pages(scratch, [0])
            self._warm = True

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """`_queued`. Raises `OSError` for what torch or Triton raise."""
        try:
            with self._queued():
                yield
        except (RuntimeError, ValueError) as error:
            raise OSError(f"the copy failed: {error}") from error

    def _settle(self) -> None:
        """Wait for what is queued by now."""
        self._stream.synchronize()

    @contextmanager
    def _queued(self) -> Iterator[None]:
        """Work on the stream of copies, over when the block ends."""
        with torch.cuda.stream(self._stream):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                event.record(self._stream)
                if not event.query():  # type: ignore[no-untyped-call]
                    event.synchronize()


class DevicePeer:
    """Another GPU worker's pool, or this one's own."""

    def __init__(self, pool: Tensor, memory: MappedMemory | None) -> None:
        self._pool: Tensor | None = pool
        self._memory = memory

    def pages(self) -> Tensor:
        """(pages, bytes) uint8. Raises OSError once closed."""
        if self._pool is None:
            raise OSError("the pool was closed")
        return self._pool

    def close(self) -> None:
        """See `PeerPool.close`."""
        self._pool = None
        if self._memory is not None:
            self._memory.close()


def _host_memory(host: HostPool) -> HostMemory:
    if not isinstance(host, HostMemory):
        raise TypeError("the memory is not a GPU's to reach")
    return host


def _nothing() -> None:
    """Nothing was pinned."""
