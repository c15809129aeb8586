"""Collectives of a tensor-parallel group, as a forward pass calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    # Needs triton, which only machines with a GPU have.
    from splitserve_kernels.peer_memory import PeerMemory


class Group(Protocol):
    """The ranks that compute one model together.

    All ranks call the same methods in the same order with tensors of the same shapes, each from
    the thread that computes its steps. Every rank gets the same bits. A group that is broken
    never returns from a call: it ends the process (`ending.Ending`).
    """

    @property
    def rank(self) -> int:
        """This process's number."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, contiguous of any shape. `x` itself may be overwritten."""
        ...

    def peers(self, x: Tensor) -> PeerMemory | None:
        """What a kernel needs to sum (rows, width) `x` over all ranks in its own launch, in place
        of `all_reduce`; None where it cannot. Alike on all ranks, as the shape of `x` is.
        """
        ...

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """(rows, columns) of each rank as (rows, size * columns), in the order of ranks."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, which is overwritten on the others."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class SingleGroup:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        return x

    def peers(self, x: Tensor) -> None:
        """See `Group.peers`."""

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """See `Group.all_gather_columns`."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Group.broadcast`."""
        return x

    def close(self) -> None:
        """See `Group.close`."""
