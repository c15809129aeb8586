"""A layer's attention, from hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from splitserve.models.layers.norm import Norm
from splitserve.models.layers.rotary import Rotary, Rotation
from splitserve.models.linear import Linear
from splitserve.quant.linear_protocol import Rows, multiply

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, Rotation | None], Tensor]
"""`attend(layer, queries, keys, values, rotation)`: stores the new keys and values, returns the
mixed values. Queries and result are (rows, heads, head_dim), keys and values (rows, kv_heads,
head_dim). Where a rotation is given, queries and keys have not been turned by it yet, and may be
overwritten.
"""


@dataclass(frozen=True)
class AttentionRules:
    """What decides which keys a layer's queries see and how. Heads are this rank's.

    Scores are `scale` * q.k, bounded by `soft_cap` * tanh(score / soft_cap), plus `slopes` *
    (key's position - query's position). A query sees `window` tokens, itself included. `sinks`
    take part in the softmax and have no value.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    slopes: Tensor | None = None
    """(heads,) fp32."""
    sinks: Tensor | None = None
    """(heads,) fp32."""

    @property
    def plain(self) -> bool:
        """Whether every key up to the query's is seen, by its scaled score alone."""
        return self.window is None and self.soft_cap is None and not self.learned

    @property
    def learned(self) -> bool:
        """Whether heads have slopes or sinks."""
        return self.slopes is not None or self.sinks is not None


@dataclass(frozen=True)
class SelfAttention:
    """Projections, norms and rotation around `Attend`. One layer's, one rank's heads."""

    layer: int
    qkv: Linear
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norms_all_heads: bool = False
    """Whether the norms are over all heads together."""
    clip: float | None = None
    turns_in_attend: bool = False
    """Whether `Attend` turns queries and keys on their way into the pool."""

    def __call__(
        self, x: Rows, rotation: Rotation | None, attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """(rows, hidden_size), to be summed over ranks; of the rows with the numbers `wanted`."""
        qkv = multiply(self.qkv, x)
        rows = qkv.shape[0]
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        heads = qkv.view(rows, -1, self.head_dim)
        if self.turns_in_attend:
            queries = self._norm(self.query_norm, heads, 0, self.num_heads)
            keys = self._norm(self.key_norm, heads, self.num_heads, self.num_kv_heads)
        elif self.query_norm is None and self.key_norm is None:
            # Queries and keys are turned alike: as one tensor, in half the calls.
            turned = self._turn(heads[:, : self.num_heads + self.num_kv_heads], rotation)
            queries, keys = turned[:, : self.num_heads], turned[:, self.num_heads :]
        else:
            queries = self._turn(self._norm(self.query_norm, heads, 0, self.num_heads), rotation)
            keys = self._norm(self.key_norm, heads, self.num_heads, self.num_kv_heads)
            keys = self._turn(keys, rotation)
        values = heads[:, self.num_heads + self.num_kv_heads :]
        mixed = attend(
            self.layer, queries, keys, values, rotation if self.turns_in_attend else None
        )
        mixed = mixed.reshape(rows, -1)
        return self.out(mixed if wanted is None else mixed[wanted])

    def _turn(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        if self.rotary is None or rotation is None:
            return x
        return self.rotary.turn(x, rotation)

    def _norm(self, norm: Norm | None, heads: Tensor, first: int, count: int) -> Tensor:
        part = heads[:, first : first + count]
        if norm is None:
            return part
        if not self.norms_all_heads:
            return norm(part)
        return norm(part.reshape(part.shape[0], -1)).view(part.shape)


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2021): a geometric series for a power of two
    heads; for another number, that of the next lower power and then every second one of the
    series twice as long. Shape (num_heads,), fp32.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-bias_max * i / lower) for i in range(1, lower + 1)]
    missing = num_heads - lower
    slopes += [2.0 ** (-bias_max * i / (2 * lower)) for i in range(1, 2 * missing + 1, 2)]
    return torch.tensor(slopes)
