"""Small sums between GPUs by our own kernel. Imports triton: only for GPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from splitserve_kernels.all_reduce import all_reduce, takes, takes_rows
from splitserve_kernels.peer_memory import BLOCK_BYTES, MOST_PROGRAMS, PeerMemory
from torch import Tensor


class PeerSums:
    """Sums of one rank. See `splitserve_kernels.peer_memory` for the protocol between ranks."""

    def __init__(self, block: Tensor, peers: PeerMemory) -> None:
        """`block` is this rank's own, which is kept for as long as this is."""
        self._block = block
        self._peers = peers

    def takes(self, x: Tensor) -> bool:
        """Whether a message is small; alike on all ranks, as its shape is."""
        return takes(x)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in new memory."""
        return all_reduce(x, self._peers)

    def peers(self, x: Tensor) -> PeerMemory | None:
        """See `Group.peers`."""
        return self._peers if takes_rows(x) else None


def open_peer_sums(
    world: dist.ProcessGroup,
    device: torch.device,
    timeout_s: float,
    *,
    programs: int = MOST_PROGRAMS,
) -> PeerSums:
    """Every rank of the group calls this together, and none sums before all have returned.

    A rank that waits longer than `timeout_s` for another traps. `programs` are the grid of every
    launch. Raises `RuntimeError` where GPUs cannot reach each other's memory, `ValueError` for more
    ranks than the kernel knows.
    """
    block = symmetric.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)
    block.zero_()
    torch.cuda.synchronize(device)
    addresses = tuple(symmetric.rendezvous(block, world).buffer_ptrs)
    rank = world.rank()
    if addresses[rank] != block.data_ptr():
        raise RuntimeError("symmetric memory does not say where the blocks of other ranks are")
    epochs = torch.zeros(programs, dtype=torch.int64, device=device)
    return PeerSums(block, PeerMemory(rank, addresses, epochs, timeout_s))
