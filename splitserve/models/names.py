"""What a family calls its tensors. Never imports torch.

Names are of modules: `.weight` and `.bias` follow. Those within a layer lack the layer's prefix.
Which norms a layer has is said by which are named: this is most of what tells families apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BlockNorms:
    """Where a layer normalises. A layer computes, with absent norms left out,

        a = attention_output(attention(attention_input(x)))
        x = after_attention(x + a)
        m = mlp_output(mlp(mlp_input(x)))
        x = after_mlp(x + m)

    or, in parallel, `x + a + m` with both read from the same x, the MLP from the attention's
    normalised input if it has no norm of its own.
    """

    attention_input: str | None = None
    attention_output: str | None = None
    after_attention: str | None = None
    mlp_input: str | None = None
    mlp_output: str | None = None
    after_mlp: str | None = None


QkvOrder = Literal["apart", "stacked", "grouped"]
"""How query, key and value projections are stored: as three matrices, as one with the three
stacked, or as one that has, for each KV head, its queries' rows, its key's and its value's.
"""


@dataclass(frozen=True)
class ExpertNames:
    """A mixture's tensors. `gate_up` and `down` are of one expert if they contain `{}`, else of a
    stack of all of them, which has no `.weight` in its name and whose biases end in `_bias`.
    """

    router: str
    gate_up: tuple[str, ...]
    down: str
    transposed: bool = False
    """Whether a stack holds (in, out)."""


@dataclass(frozen=True)
class Names:
    """See the module. `gate_up` is one name where gate and up are stored as one, gate first, and
    where there is no gate.
    """

    embedding: str
    layer: str
    """Prefix of a layer's tensors, with `{}` for its number."""
    norms: BlockNorms
    qkv: tuple[str, ...]
    attention_out: str
    gate_up: tuple[str, ...] = ()
    down: str = ""
    final_norm: str | None = None
    unembedding: str = "lm_head"
    qkv_order: QkvOrder = "apart"
    transposed: bool = False
    """Whether projections of layers are stored (in, out), as by GPT-2's Conv1D."""
    query_norm: str | None = None
    """With `{}` in it, each head's is a tensor of its own and this stands for its number."""
    key_norm: str | None = None
    sinks: str | None = None
    experts: ExpertNames | None = None
    positions: str | None = None
    embedding_norm: str | None = None
    embedding_in: str | None = None
    embedding_out: str | None = None

    @property
    def base(self) -> str:
        """What every name but the unembedding's starts with."""
        return self.embedding.partition(".")[0] + "."
