"""Pages to and from an arena that other processes map, by the GPU itself."""

from __future__ import annotations

import math
import mmap
import os

import pytest
import torch
from splitserve_kernels.page_digest_rules import digest_pages_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PAGES, LAYERS, LAYER_BYTES = 40, 4, 65536
PAGE_BYTES = LAYERS * LAYER_BYTES


def test_pages_go_to_the_arena_and_back() -> None:
    from splitserve.engine import host_memory
    from splitserve.engine.device_pages import DevicePages

    torch.manual_seed(3)
    content = torch.randint(0, 256, (PAGES, PAGE_BYTES), dtype=torch.uint8)
    source, target = content.cuda(), torch.zeros_like(content).cuda()
    arena_bytes = host_memory._PIECE_BYTES + 64 * PAGE_BYTES
    fd = os.memfd_create("arena")
    os.ftruncate(fd, arena_bytes)
    there, here = mmap.mmap(fd, arena_bytes), mmap.mmap(fd, arena_bytes)
    os.close(fd)
    writer = DevicePages(source, LAYER_BYTES, torch.cuda.Stream())
    reader = DevicePages(target, LAYER_BYTES, torch.cuda.Stream())
    writes, reads = writer.open_host(memoryview(there)), reader.open_host(memoryview(here))
    # Of the first piece none is used to begin with, nor was it registered ahead.
    last = [arena_bytes - PAGE_BYTES]
    assert writer.copy_to_host(writes, [2], 0, LAYERS, last, math.inf)
    assert reader.copy_from_host(reads, last, [2]) == digest_pages_reference(content.numpy(), [2])
    target[2] = 0
    # The second one lies in two pieces, and no block at a multiple of its size.
    offsets = [4096, host_memory._PIECE_BYTES - 3 * 4096, arena_bytes - PAGE_BYTES]
    for first, end in ((0, 3), (3, LAYERS)):
        assert writer.copy_to_host(writes, [7, 39, 0], first, end, offsets, math.inf)
    for offset, page in zip(offsets, [7, 39, 0], strict=True):
        assert here[offset : offset + PAGE_BYTES] == content[page].numpy().tobytes()
    digests = reader.copy_from_host(reads, [*offsets, offsets[0]], [5, 6, 20, 1])
    assert digests == digest_pages_reference(content.numpy(), [7, 39, 0, 7])
    assert torch.equal(target[[5, 6, 20, 1]].cpu(), content[[7, 39, 0, 7]])
    assert int(target.count_nonzero(1).bool().sum()) == 4
    writes.close()
    reads.close()
    with pytest.raises(OSError, match="given up"):
        reader.copy_from_host(reads, offsets, [1, 2, 3])
    assert torch.equal(torch.ones(3, device="cuda").cpu(), torch.ones(3)), "nothing was left behind"
