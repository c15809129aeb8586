"""What a hand-over needs of an engine's pool. Never imports torch.

`PageAccess` moves bytes between pages and host memory. An engine whose pages others on its node can
read where they are offers `SharesPages` as well; then bytes need not pass through host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

PAGE_DIGEST_BYTES = 16


class PageAccess(Protocol):
    """The pool of one worker. All methods may be called from several threads at a time, for pages
    that nobody else writes, and return when the bytes are where they belong.
    """

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one page."""

    @property
    def shared(self) -> SharesPages | None:
        """The same pool for others of this node; None if they cannot read it."""

    def export_pages(
        self, pages: Sequence[int], first_layer: int, end_layer: int, outs: Sequence[memoryview]
    ) -> None:
        """Copy layers [first_layer, end_layer) of each page to its own of `outs`."""

    def insert_pages(self, pages: Sequence[int], contents: Sequence[memoryview]) -> None:
        """Overwrite each page with its own of `contents`."""

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Let the device copy to and from host memory by itself, until the result is called. Does
        nothing where there is no device or it cannot.
        """


class PeerPool(Protocol):
    """Another process's pool, mapped into this one."""

    def close(self) -> None:
        """Unmap it. No copy may be under way."""


class HostPool(Protocol):
    """Memory of the host that a device reaches."""

    def close(self) -> None:
        """Give it up. What is copied now is copied to its end."""

    def prepare(self) -> None:
        """Do ahead what the first copies would have to wait for. Raises `PermissionError` if the
        device may not reach it, `OSError` if it was closed meanwhile.
        """


class LayerRun(NamedTuple):
    """Layers [first_layer, end_layer) of pages of a peer, each to be copied to an own one."""

    pages: Sequence[int]
    own_pages: Sequence[int]
    first_layer: int
    end_layer: int


@runtime_checkable
class SharesPages(Protocol):
    """A pool that other processes of the node can map. Methods may be called from any thread."""

    @property
    def pool_domain(self) -> str:
        """Names host, namespace and kind of memory: an engine can map the pools of its own domain.
        At most 256 characters.
        """

    def prepare_pages(self) -> None:
        """Do ahead what the first copies and digests would have to wait for. The second time is no
        work.
        """

    def pages_handle(self) -> bytes:
        """What `open_peer` needs, in another process; at most 4 KiB. Raises `OSError` if the pool
        cannot be shared.
        """

    def open_peer(self, handle: bytes) -> PeerPool:
        """Map another engine's pool. Raises `OSError` if that is not possible from here."""

    def copy_from_peer(
        self, peer: PeerPool, runs: Sequence[LayerRun], digested: Sequence[int] = ()
    ) -> list[bytes]:
        """Copy each run, and wait. The digests of the `digested` own pages as they are then.

        Raises `OSError` if the peer has no such page or the copy fails.
        """

    def open_host(self, memory: memoryview) -> HostPool:
        """Have the device reach memory of this host that others may share: an arena."""

    def copy_to_host(
        self,
        host: HostPool,
        pages: Sequence[int],
        first_layer: int,
        end_layer: int,
        offsets: Sequence[int],
        begin_by_s: float,
    ) -> bool:
        """Copy layers [first_layer, end_layer) of each page to where they belong in the block that
        begins at its own of `offsets`, a multiple of 4 KiB, and wait. False: no copy has begun
        by `begin_by_s` of the monotonic clock, and none will.

        Raises `OSError` if the copy fails, `PermissionError` if the device may not reach the
        memory.
        """

    def copy_from_host(
        self, host: HostPool, offsets: Sequence[int], own_pages: Sequence[int]
    ) -> list[bytes]:
        """Copy each block to an own page, and wait. The digests of these pages then. Raises what
        `copy_to_host` does.
        """

    def digest_pages(self, pages: Sequence[int]) -> list[bytes]:
        """PAGE_DIGEST_BYTES of each page: equal for equal bytes, whatever engine took it."""
