"""Host memory that a GPU's kernels read and write where it is.

It is registered with the driver piece by piece: that takes a second for some GiB, which nobody
should have to wait for, and what is used first is registered first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import numpy as np
import torch
from torch import Tensor

OFFSET_BYTES: Final = 4096
"""What places in host memory are multiples of."""

_PIECE_BYTES: Final = 64 << 20


class HostMemory:
    """Memory that others share, for as long as this is open. Implements `HostPool`.

    May be used from several threads. It is given up by `close`, or by the last copy under way then.
    """

    def __init__(
        self, memory: memoryview, device: torch.device, warm_up: Callable[[], None]
    ) -> None:
        """`warm_up` is called by `prepare`, ahead of what it does."""
        self._bytes = np.frombuffer(memory, np.uint8)
        self._device = device
        self._warm_up = warm_up
        self._lock = threading.Lock()
        self._registering = threading.Lock()
        self._registered: set[int] = set()
        self._users = 0
        self._closed = False

    @contextmanager
    def places(self, offsets: Sequence[int], first: int, size: int) -> Iterator[Tensor]:
        """The memory for copies of bytes [first, first + size) of blocks that lie at `offsets`.

        Yields (n, size) uint8 as the device sees it, whose rows are `OFFSET_BYTES` apart, not
        `size`: the one of a block is `offset // OFFSET_BYTES`.

        Raises `OSError` if it was closed or has no such bytes, `PermissionError` if it cannot be
        registered.
        """
        with self._lock:
            if self._closed:
                raise OSError("the memory was given up")
            self._users += 1
        try:
            self._check(offsets, first + size)
            # What is given to a kernel is where rows begin, and that must be known to the driver.
            self._register(first, first + 1)
            for offset in offsets:
                self._register(offset + first, offset + first + size)
            yield self._rows(first, size)
        finally:
            with self._lock:
                self._users -= 1
                self._give_up_if_unused()

    def prepare(self) -> None:
        """See `HostPool.prepare`."""
        self._warm_up()
        for first in range(0, len(self._bytes), _PIECE_BYTES):
            with self.places([first], 0, 1):
                pass

    def close(self) -> None:
        """See `HostPool.close`. Doing it twice is no error."""
        with self._lock:
            self._closed = True
            self._give_up_if_unused()

    def _check(self, offsets: Sequence[int], size: int) -> None:
        """A kernel that reads past the end would take the whole process down."""
        if any(offset < 0 or offset % OFFSET_BYTES for offset in offsets):
            raise OSError("a block begins in the middle of a page, or before the memory")
        end = max(offsets, default=0) + size
        if end > len(self._bytes):
            raise OSError(f"the memory has {len(self._bytes)} bytes, a block ends at {end}")

    def _rows(self, first: int, size: int) -> Tensor:
        address = self._bytes.ctypes.data + first
        rows = max(0, (len(self._bytes) - first - size) // OFFSET_BYTES + 1)
        # Registered memory has the same address for the device.
        storage = torch._C._construct_storage_from_data_pointer(
            address, self._device, len(self._bytes) - first
        )
        whole = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        return whole.as_strided((rows, size), (OFFSET_BYTES, 1))

    def _register(self, first: int, end: int) -> None:
        for piece in range(first // _PIECE_BYTES, -(-end // _PIECE_BYTES)):
            if piece not in self._registered:
                with self._registering:
                    if piece not in self._registered:
                        part = self._bytes[piece * _PIECE_BYTES :][:_PIECE_BYTES]
                        register(part.ctypes.data, part.nbytes, self._device)
                        self._registered.add(piece)

    def _give_up_if_unused(self) -> None:
        if self._closed and not self._users:
            while self._registered:
                piece = self._registered.pop()
                unregister(self._bytes[piece * _PIECE_BYTES :].ctypes.data, self._device)
            self._bytes = np.empty(0, np.uint8)


def register(address: int, size_bytes: int, device: torch.device) -> None:
    """Has the driver map host memory for the device. Raises `PermissionError` if it will not."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        refused = int(runtime.cudaHostRegister(address, size_bytes, 0))
        if refused:
            # torch would take the refusal for a failure of this thread's next launch.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
            raise PermissionError(
                f"{size_bytes >> 20} MiB of host memory cannot be pinned: CUDA error {refused}"
            )


def unregister(address: int, device: torch.device) -> None:
    """Undoes `register`. Nothing may use the memory any more."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        runtime.cudaHostUnregister(address)
