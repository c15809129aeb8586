"""Collectives between GPUs: NCCL, and a one-shot sum over symmetric memory for small messages.

NVLink multicast (NVLS, multimem) is never used: a program that ends badly while it holds
multicast objects can leave the GPUs of a host unusable for everybody on it.
"""

from __future__ import annotations

import itertools
import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from splitserve.parallel.ending import Ending

if TYPE_CHECKING:
    # Needs triton, which only machines with a GPU have.
    from splitserve_kernels.peer_memory import PeerMemory

SmallSums: TypeAlias = Literal["torch", "own"]
SMALL_SUMS: Final[SmallSums] = "own"
"""Whose kernel adds up small messages: torch's, or our own, which takes the residual's sum and the
norm into the same launch: 4.8 to 7.5 us against 8.0 to 12.8 us on two H200
(`benchmarks/kernels/all_reduce.py`). More ranks have not been timed.
"""

TIMEOUT_S = 60.0
LEAVE_S = 5.0
ONE_SHOT_BYTES = 512 << 10
"""Above, every rank reading every other's whole message costs more than NCCL's ring."""

_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT_BYTES = 16
# Symmetric memory numbers its meetings by process: only the first group of a process can meet ranks
# that are new. A later one, of a second `LLM`, does with NCCL.
_OPENINGS = itertools.count()


class CudaGroup:
    """Implements `Group`. One in a process: NCCL and symmetric memory go by torch's default group.

    `in_rank_order` adds in the order of ranks whatever the message's size, so that the bits of a
    row do not depend on the rows beside it. With two ranks all ways give the same bits.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        ending: Ending,
        *,
        one_node: bool,
        in_rank_order: bool = False,
        small_sums: SmallSums = SMALL_SUMS,
    ) -> None:
        _keep_multicast_off()
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
            device_id=device,
        )
        self.rank = rank
        self.size = size
        self._in_rank_order = in_rank_order and size > 2
        self._ending = ending
        # Ours adds in the order of ranks anyway. But a norm may differ in its last bit between one
        # launch with the sum and one after it, and which it is depends on the rows beside it.
        self._one_shot = None
        self._lends_peers = not in_rank_order
        if one_node and (small_sums == "own" or not self._in_rank_order):
            self._one_shot = _open_one_shot(device, small_sums)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot(x)
        try:
            if self._in_rank_order:
                return self._sum_in_rank_order(x)
            dist.all_reduce(x)
        except RuntimeError as error:
            self._ending.lost("a sum between ranks", error)
        return x

    def peers(self, x: Tensor) -> PeerMemory | None:
        """See `Group.peers`."""
        if self._one_shot is None or not self._lends_peers:
            return None
        return self._one_shot.peers(x)

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """See `Group.all_gather_columns`."""
        return self._gather(x.contiguous()).transpose(0, 1).reshape(x.shape[0], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Group.broadcast`."""
        try:
            dist.broadcast(x, 0)
        except RuntimeError as error:
            self._ending.lost("a broadcast between ranks", error)
        return x

    def close(self) -> None:
        """See `Group.close`.

        NCCL's way out returns once all ranks take it, and never if one is gone: it is waited for
        no longer than that may take.
        """
        self._one_shot = None
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)

    def _sum_in_rank_order(self, x: Tensor) -> Tensor:
        parts = self._gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def _gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty((self.size, *x.shape))
        try:
            dist.all_gather_into_tensor(parts.view(-1), x.view(-1))
        except RuntimeError as error:
            self._ending.lost("a gather between ranks", error)
        return parts


class _OneShot(Protocol):
    """A sum of small messages, for which every rank reads every other's."""

    def takes(self, x: Tensor) -> bool:
        """Whether it sums such a message; alike on all ranks, as its shape is."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in new memory."""
        ...

    def peers(self, x: Tensor) -> PeerMemory | None:
        """See `Group.peers`."""
        ...


class _TorchOneShot:
    """Every rank reads every other's message out of its memory and adds it up itself.

    One kernel, safe in a CUDA graph: it waits for all ranks at its start and at its end.
    """

    def __init__(self, buffers: dict[torch.dtype, Tensor], group_name: str) -> None:
        self._buffers = buffers
        self._group_name = group_name

    def takes(self, x: Tensor) -> bool:
        """Whether a message is small and aligned; alike on all ranks, as its shape is."""
        size = x.numel() * x.element_size()
        return x.dtype in self._buffers and size <= ONE_SHOT_BYTES and not size % _ALIGNMENT_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in new memory."""
        buffer = self._buffers[x.dtype][: x.numel()].view(x.shape)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            buffer, x, "sum", self._group_name
        )
        return total

    def peers(self, x: Tensor) -> None:
        """See `Group.peers`: only torch's own kernel knows how its ranks wait."""


def _open_one_shot(device: torch.device, kernel: SmallSums) -> _OneShot | None:
    """None unless every rank can: GPUs that cannot reach each other's memory, an older torch."""
    world = dist.group.WORLD
    if world is None or not _all(device, next(_OPENINGS) == 0):
        return None
    one_shot: _OneShot | None = None
    try:
        one_shot = _open_own(device, world) if kernel == "own" else _open_torch(device, world)
    except (RuntimeError, AttributeError, ImportError, ValueError):
        one_shot = None
    return one_shot if _all(device, one_shot is not None) else None


def _open_torch(device: torch.device, world: dist.ProcessGroup) -> _OneShot | None:
    import torch.distributed._symmetric_memory as symmetric

    buffers = {}
    for dtype in _ONE_SHOT_DTYPES:
        buffer = symmetric.empty(ONE_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric.rendezvous(buffer, world)
        buffers[dtype] = buffer
    works = hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy")
    return _TorchOneShot(buffers, world.group_name) if works else None


def _open_own(device: torch.device, world: dist.ProcessGroup) -> _OneShot:
    from splitserve.parallel.peer_sums import open_peer_sums

    return open_peer_sums(world, device, TIMEOUT_S)


def _all(device: torch.device, vote: bool) -> bool:
    """Whether all ranks say yes."""
    votes = torch.tensor(int(vote), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def _keep_multicast_off() -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    os.environ["NVSHMEM_DISABLE_NVLS"] = "1"
