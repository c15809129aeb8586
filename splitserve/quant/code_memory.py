"""Whether this process may run code that it makes: LLVM and oneDNN both take it for granted."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from functools import cache

import torch

_log = logging.getLogger(__name__)


@cache
def may_run_made_code() -> bool:
    """False, with a warning, where memory that was written may not be executed.

    systemd's MemoryDenyWriteExecute, `PR_SET_MDWE` and SELinux refuse that. LLVM does not notice
    and its code would end the process; oneDNN's bf16 products would raise.
    """
    if sys.platform != "linux" or _may_execute_written_page():
        return True
    _log.warning(
        "written memory may not be executed here (MemoryDenyWriteExecute or the like): "
        "products take slower kernels"
    )
    return False


@cache
def has_onednn() -> bool:
    """Whether torch has oneDNN and it can run; else torch is told to multiply without it.

    Called before products are made for a CPU, since any of torch's bf16 products may be oneDNN's.
    """
    if not torch._C._has_mkldnn:
        return False
    if not may_run_made_code():
        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
        return False
    return True


def _may_execute_written_page() -> bool:
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(
        -1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE
    ) as page:
        page[0] = 1  # SELinux minds pages that were written
        first_byte = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(first_byte)
        refused = libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
        del first_byte  # the page cannot be closed while something points into it
    return not refused
