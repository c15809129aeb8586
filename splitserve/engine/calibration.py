"""Quantises a model while it is loaded, by what its layers see of some text.

Layer by layer: the layer is read as it is, run on the text, quantised, and only then the next one
is read. So there is never more than one layer in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.engine.attention import BatchedAttention
from splitserve.engine.batch import build_batch
from splitserve.engine.page_memory import open_page_memory
from splitserve.engine.protocol import Slice
from splitserve.errors import CheckpointError
from splitserve.kv.page_shape import PageShape
from splitserve.models.decoder import Block, Residual
from splitserve.models.layers.embedding import Embedding
from splitserve.models.layers.rotary import Rotation
from splitserve.models.linear import Linear, MakeLinear
from splitserve.quant.matrix import QuantizedMatrix, Weight
from splitserve.quant.scales import InputSeen

Quantize = Callable[[Tensor, InputSeen | None], QuantizedMatrix]
"""Of a weight, by its inputs if any were seen: an expert may have had none."""


class Calibration:
    """Observes a model's loading; see `models.load.LoadObserver`."""

    def __init__(
        self, texts: Sequence[Sequence[int]], quantize: Quantize, make: MakeLinear
    ) -> None:
        """`texts` are token ids; `make` makes products of what `quantize` returns."""
        self._texts = [torch.tensor(list(text)) for text in texts]
        self._quantize = quantize
        self._make = make
        self._waiting: list[_Recorder] = []
        self._hidden: list[Tensor] = []

    def projection(self, weight: Weight, bias: Tensor | None) -> Linear:
        """A `MakeLinear` whose products are quantised once their layer has been observed."""
        if not isinstance(weight, Tensor):
            return self._make(weight, bias)
        recorder = _Recorder(weight, bias)
        self._waiting.append(recorder)
        return recorder

    @torch.inference_mode()
    def embedded(self, embedding: Embedding) -> None:
        """See `LoadObserver.embedded`."""
        for text in self._texts:
            tokens = text.to(embedding.device)
            self._hidden.append(embedding(tokens, torch.arange(len(text), device=tokens.device)))

    @torch.inference_mode()
    def loaded(self, block: Block) -> None:
        """See `LoadObserver.loaded`. The next layer sees what this one gives unquantised.

        Raises `CheckpointError` if that is not finite: nothing could be learned from it.
        """
        self._hidden = [_run(block, hidden) for hidden in self._hidden]
        if not all(hidden.isfinite().all() for hidden in self._hidden):
            layer = block.attention.layer
            raise CheckpointError(f"layer {layer} gives numbers that are not finite on plain text")
        for recorder in self._waiting:
            recorder.finish(self._quantize, self._make)
        self._waiting.clear()


def _run(block: Block, hidden: Tensor) -> Tensor:
    """One layer on one text."""
    tokens, device = hidden.shape[0], hidden.device
    attention = block.attention
    shape = PageShape(1, tokens, attention.num_kv_heads, attention.head_dim, "float32")
    memory = open_page_memory(shape, 1, torch.float32, device)
    attend_paged = BatchedAttention(memory, [block.rules])
    batch = build_batch([Slice(range(tokens), 0, [0], ())], memory, device)

    def attend(
        _: int, queries: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> Tensor:
        if rotary and rotation:
            queries, keys = rotary.turn(queries, rotation), rotary.turn(keys, rotation)
        memory.write(0, batch.kv_rows, keys.float(), values.float())
        return attend_paged(0, queries.float(), batch).to(queries.dtype)

    rotary = attention.rotary
    rotation = rotary.rotation(batch.positions) if rotary else None
    return block(Residual(hidden), rotation, attend).total()


class _Recorder:
    """A product that remembers its inputs until it is quantised."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor | None = weight
        self._bias = bias
        self._inputs: list[Tensor] = []
        self._product: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if self._product is not None:
            return self._product(x)
        assert self._weight is not None
        self._inputs.append(x)
        return functional.linear(x, self._weight, self._bias)

    def finish(self, quantize: Quantize, make: MakeLinear) -> None:
        """Quantise by what was seen; the weight is given back."""
        assert self._weight is not None
        self._product = make(quantize(self._weight, self._seen()), self._bias)
        self._weight = None
        self._inputs.clear()

    def _seen(self) -> InputSeen | None:
        if not self._inputs:
            return None
        return InputSeen(torch.cat(self._inputs))
