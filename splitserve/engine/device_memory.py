"""A GPU's memory mapped from one process into another, by the CUDA driver's handles.

The driver knows whole allocations only, so a handle is one of these and where in it the memory
begins. No byte of it is code.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_uint64
from functools import cache

import torch
from torch import Tensor

HANDLE = struct.Struct("<64sQQ")
"""The driver's handle, first byte and bytes of the memory in its allocation."""

_LAZY_PEER_ACCESS = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


def export_memory(memory: Tensor) -> bytes:
    """The handle of a contiguous tensor on a GPU. Raises `OSError` if it cannot be shared."""
    driver, base, size, handle = _driver(), c_uint64(), c_size_t(), _IpcHandle()
    address = memory.data_ptr()
    with _context_of(memory.device):
        _check(driver.cuMemGetAddressRange_v2(byref(base), byref(size), c_uint64(address)))
        _check(driver.cuIpcGetMemHandle(byref(handle), base))
    return HANDLE.pack(bytes(handle), address - base.value, memory.nbytes)


class MappedMemory:
    """Another process's memory. `bytes` is a flat uint8 tensor over it, until `close`.

    It seems to be on this process's device, whichever it is on: that is what its kernels run on.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        """Raises `OSError` if it cannot be mapped from here."""
        if len(handle) != HANDLE.size:
            raise ConnectionError("the handle is not a GPU's")
        reserved, offset, size = HANDLE.unpack(handle)
        self._base = c_uint64()
        self._device = device
        opened = _IpcHandle.from_buffer_copy(reserved)
        try:
            with _context_of(device):
                base = byref(self._base)
                _check(_driver().cuIpcOpenMemHandle_v2(base, opened, _LAZY_PEER_ACCESS))
                self.bytes = self._view(offset, size)
        except BaseException:
            self.close()
            raise

    def _view(self, offset: int, size: int) -> Tensor:
        if not self._holds(offset + size):
            raise ConnectionError("the handle names more memory than there is")
        storage = torch._C._construct_storage_from_data_pointer(
            self._base.value + offset, self._device, size
        )
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def _holds(self, size_bytes: int) -> bool:
        """A kernel that reads past the end would take the whole process down."""
        base, mapped = c_uint64(), c_size_t()
        _check(_driver().cuMemGetAddressRange_v2(byref(base), byref(mapped), self._base))
        return self._base.value - base.value + size_bytes <= mapped.value

    def close(self) -> None:
        """Unmap. No kernel may use it any more. Doing it twice is no error."""
        if self._base.value:
            with _context_of(self._device):
                _driver().cuIpcCloseMemHandle(self._base)
            self._base = c_uint64()


@contextmanager
def _context_of(device: torch.device) -> Iterator[None]:
    """Have the driver work in torch's context of the device, whichever the thread had before: what
    is mapped in another one's context is not there for this one's kernels.
    """
    with torch.cuda.device(device):
        # Torch takes a device up with the first call that needs it.
        torch.cuda.current_stream().synchronize()
        yield


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemGetAddressRange_v2.argtypes = (POINTER(c_uint64), POINTER(c_size_t), c_uint64)
    driver.cuIpcGetMemHandle.argtypes = (POINTER(_IpcHandle), c_uint64)
    driver.cuIpcOpenMemHandle_v2.argtypes = (POINTER(c_uint64), _IpcHandle, c_uint)
    driver.cuIpcCloseMemHandle.argtypes = (c_uint64,)
    for function in (
        driver.cuMemGetAddressRange_v2,
        driver.cuIpcGetMemHandle,
        driver.cuIpcOpenMemHandle_v2,
        driver.cuIpcCloseMemHandle,
    ):
        function.restype = c_int
    return driver


def _check(result: int) -> None:
    if result:
        raise OSError(f"the CUDA driver refuses with error {result}")
