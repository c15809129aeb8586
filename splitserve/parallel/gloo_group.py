"""Collectives between processes on CPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from splitserve.parallel.ending import Ending

TIMEOUT_S = 60.0
"""Longest that ranks wait for each other within a step; they never do between steps."""


class GlooGroup:
    """Implements `Group` with torch's Gloo backend.

    A sum gathers all ranks' values and adds them in the order of ranks, in fp32. Gloo's own
    all-reduce adds in an order that depends on an element's place in the tensor, so that with
    more than two ranks a row's bits would change with the rows beside it. For two ranks both
    move as many bytes, and this takes fewer messages.
    """

    def __init__(
        self, store: Store, rank: int, size: int, ending: Ending, *, host: str | None = None
    ) -> None:
        """Meets the others through `store`. `host` is the address of this machine that they
        reach; None takes GLOO_SOCKET_IFNAME's, or the one that the machine's name stands for.
        """
        self._gloo = _open(store, rank, size, host)
        self._ending = ending
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        parts = self._gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def peers(self, x: Tensor) -> None:
        """See `Group.peers`."""

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """See `Group.all_gather_columns`."""
        return torch.cat(self._gather(x.contiguous()), dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Group.broadcast`."""
        try:
            self._gloo.broadcast(_bytes(x), 0).wait()
        except RuntimeError as error:
            self._ending.lost("a broadcast between ranks", error)
        return x

    def close(self) -> None:
        """See `Group.close`."""
        self._gloo.shutdown()
        # Its threads end when it goes. Where they still run at the interpreter's end, it aborts.
        self._gloo = None

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        try:
            # As bytes: Gloo knows fewer types than torch.
            self._gloo.allgather([[_bytes(part) for part in parts]], [_bytes(x)]).wait()
        except RuntimeError as error:
            self._ending.lost("a sum between ranks", error)
        return parts


def _open(store: Store, rank: int, size: int, host: str | None) -> Any:  # the stubs lack methods
    gloo: Any = ProcessGroupGloo
    timeout = timedelta(seconds=TIMEOUT_S)
    if host is None:
        return gloo(store, rank, size, timeout)
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, size, options)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
