"""The decoder stack that all families share.

Rows of all sequences go through the layers as one (rows, hidden_size) tensor; only attention
knows which row belongs to whom. Each rank of a tensor-parallel group has its part of every
layer; hidden states are whole on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from splitserve.models.config import ModelConfig
from splitserve.models.layers.embedding import Embedding
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.layers.norm import Norm
from splitserve.models.layers.rotary import Rotary, Rotation
from splitserve.models.layers.self_attention import Attend, AttentionRules, SelfAttention
from splitserve.models.layers.unembedding import Unembedding
from splitserve.parallel.group import Group
from splitserve.quant.linear_protocol import Rows, rows_of


@dataclass(frozen=True)
class BlockNorms:
    """A layer's norms by their places; see `names.BlockNorms`."""

    attention_input: Norm | None = None
    attention_output: Norm | None = None
    after_attention: Norm | None = None
    mlp_input: Norm | None = None
    mlp_output: Norm | None = None
    after_mlp: Norm | None = None


@dataclass(frozen=True)
class Residual:
    """The residual stream: (rows, hidden_size) hidden states, and what is yet to be added to them.

    The sum is left to the norm that reads it next, which may make it in its own pass, the ranks'
    sum with it. It is made once: a group may overwrite what it sums.
    """

    x: Tensor
    delta: Tensor | None = None
    group: Group | None = None
    """Whose ranks each have a part of `delta`; None where it is whole."""

    def total(self) -> Tensor:
        """The sum."""
        if self.delta is None:
            return self.x
        whole = self.delta if self.group is None else self.group.all_reduce(self.delta)
        return self.x + whole

    def read(self, norm: Norm | None) -> tuple[Tensor, Rows]:
        """The sum, and that normalised for the products that read it."""
        if norm is not None:
            return norm.read(self.x, self.delta, self.group)
        x = self.total()
        return x, x


@dataclass(frozen=True)
class Block:
    """One layer: attention and MLP, norms around them, sums with what came in."""

    attention: SelfAttention
    mlp: Mlp | Experts
    norms: BlockNorms
    rules: AttentionRules
    parallel: bool
    group: Group

    def __call__(
        self,
        stream: Residual,
        rotation: Rotation | None,
        attend: Attend,
        attended: Callable[[], None] | None = None,
        wanted: Tensor | None = None,
    ) -> Residual:
        """`attended` is called when keys and values have been stored. Of all rows those of the
        (n,) numbers `wanted` go on from there; None is all of them.
        """
        norms = self.norms
        x, normed = stream.read(norms.attention_input)
        mixed = self.attention(normed, rotation, attend, wanted)
        if attended:
            attended()
        if wanted is not None:
            x = x[wanted]
        if self.parallel:
            normed = normed if wanted is None else rows_of(normed, wanted)
            own = norms.mlp_input.read(x, None)[1] if norms.mlp_input else normed
            return Residual(x, mixed + self.mlp(own), self.group)
        stream = self._with(x, mixed, norms.attention_output)
        if norms.after_attention:
            stream = Residual(norms.after_attention(stream.total()))
        x, normed = stream.read(norms.mlp_input)
        stream = self._with(x, self.mlp(normed), norms.mlp_output)
        return Residual(norms.after_mlp(stream.total())) if norms.after_mlp else stream

    def _with(self, x: Tensor, part: Tensor, norm: Norm | None) -> Residual:
        """The stream with the sum of all ranks' `part`, which a norm of its own has to know."""
        if norm is None:
            return Residual(x, part, self.group)
        return Residual(x, norm(self.group.all_reduce(part)))


class Decoder:
    """Computes hidden states and logits. Holds no state between calls."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        rotaries: Collection[Rotary],
        blocks: Sequence[Block],
        final_norm: Norm | None,
        unembedding: Unembedding,
    ) -> None:
        """`rotaries` are all that the blocks have, each once."""
        self.config = config
        self._embedding = embedding
        self._rotaries = rotaries
        self._blocks = blocks
        self._final_norm = final_norm
        self._unembedding = unembedding

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @property
    def rules(self) -> list[AttentionRules]:
        """What each layer's attention has to heed."""
        return [block.rules for block in self._blocks]

    def keeps_to_device(self, rows: int) -> bool:
        """Whether, with so many rows, nothing on the way has to be read by the host."""
        return all(block.mlp.keeps_to_device(rows) for block in self._blocks)

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        layer_done: Callable[[int], None] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states (rows, hidden_size) for (rows,) tokens at (rows,) positions;
        (n, hidden_size) of the rows with the (n,) numbers `wanted`, if it is given.

        `layer_done(layer)` is called when a layer's keys and values have been stored. What comes
        after that in the last layer is computed for the rows that are wanted.
        """
        stream = Residual(self._embedding(token_ids, positions))
        rotations = {rotary: rotary.rotation(positions) for rotary in self._rotaries}
        for index, block in enumerate(self._blocks):
            rotary = block.attention.rotary
            rotation = None if rotary is None else rotations[rotary]
            done = partial(layer_done, index) if layer_done else None
            is_last = index == len(self._blocks) - 1
            stream = block(stream, rotation, attend, done, wanted if is_last else None)
        hidden = stream.read(self._final_norm)[1]
        assert isinstance(hidden, Tensor)  # codes are for products that are known
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab_size) in fp32 for (rows, hidden_size)."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """`logits` in the type that they are computed in."""
        return self._unembedding(hidden)
