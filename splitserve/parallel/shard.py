"""Which part of a model one rank of a tensor-parallel group has. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`. `Shard(0, 1)`, the default, has everything.

    Parts are contiguous and in the order of ranks, so that gathering ranks in order restores the
    whole. What does not divide raises `ConfigError`, one line that names the number at fault.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"tensor_parallel_size {self.size} must be at least 1")
        if not 0 <= self.rank < self.size:
            raise ConfigError(
                f"rank {self.rank} is outside tensor_parallel_size {self.size}: ranks are "
                f"0 to {self.size - 1}"
            )

    def span(self, count: int, what: str, multiple: int = 1) -> range:
        """This rank's equal part of `count` rows, columns or heads, called `what` in errors.

        A part that must hold whole units, such as the groups that share a quantisation scale,
        gives the unit as `multiple`.
        """
        if count % self.size:
            raise ConfigError(f"{what} {count} does not divide by tensor_parallel_size {self.size}")
        part = count // self.size
        if part % multiple:
            raise ConfigError(
                f"{what} {count} does not divide by tensor_parallel_size {self.size} into "
                f"multiples of {multiple}"
            )
        return range(self.rank * part, (self.rank + 1) * part)

    def query_heads(self, num_heads: int, num_kv_heads: int) -> range:
        """The query heads of this rank: exactly those that read its `kv_heads`."""
        self.kv_heads(num_kv_heads)
        return self.span(num_heads, "num_heads")

    def kv_heads(self, num_kv_heads: int) -> range:
        """The KV heads of this rank.

        With fewer KV heads than ranks, each is on `kv_replicas` neighbouring ranks.
        """
        if num_kv_heads >= self.size:
            return self.span(num_kv_heads, "num_kv_heads")
        if self.size % num_kv_heads:
            raise ConfigError(
                f"num_kv_heads {num_kv_heads} does not divide tensor_parallel_size {self.size}"
            )
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def kv_replicas(self, num_kv_heads: int) -> int:
        """On how many ranks each KV head is."""
        self.kv_heads(num_kv_heads)
        return max(1, self.size // num_kv_heads)

    def padded_width(self, count: int) -> int:
        """Rows a rank has room for where `count` is padded up to a multiple of the size."""
        return -(-count // self.size)

    def padded_span(self, count: int) -> range:
        """The real ones among this rank's `padded_width(count)` rows, such as of a vocabulary.

        Only the end is padded: the last ranks may have fewer, down to none, and the ranks' rows,
        gathered in order, have the `count` real ones first.
        """
        width = self.padded_width(count)
        return range(min(self.rank * width, count), min((self.rank + 1) * width, count))

    def share(self, count: int) -> range:
        """This rank's part of `count` things that need not divide, such as experts.

        The ranks' parts differ by one at most; a rank beyond `count` has none.
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)
