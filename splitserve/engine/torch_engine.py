"""The engine that computes a model with torch, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from splitserve.engine.attention import Attention
from splitserve.engine.batch import StepBatch, build_batch
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import DrawnToken, EngineSpec, LayersDone, Slice
from splitserve.engine.sampler import Sampler
from splitserve.models.decoder import Decoder


class TorchEngine:
    """Implements `Engine`. Everything it is made of is chosen by `factory.open_engine`."""

    def __init__(
        self,
        spec: EngineSpec,
        model: Decoder,
        memory: PageMemory,
        attention: Attention,
        *,
        threads: int = 0,
    ) -> None:
        """`threads` is how many compute a step together; 0 leaves torch's choice."""
        self.spec = spec
        self._threads = threads
        self._model = model
        self._memory = memory
        self._attention = attention
        self._sampler = Sampler(spec.eos_token_ids)

    @torch.inference_mode()
    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        if self._threads:
            torch.set_num_threads(self._threads)  # which is the calling thread's own number
        batch = build_batch(slices, self._memory, self._model.device)
        hidden = self._forward(batch, layers_done)
        drawn = iter(self._draw(hidden, batch, slices))
        return [[next(drawn) for _ in part.draws] for part in slices]

    @torch.inference_mode()
    def score(self, part: Slice) -> Tensor:
        """Logits after every token of a slice: (tokens, vocab_size) fp32. For measuring a model:
        serving needs the last row only.
        """
        batch = build_batch([part], self._memory, self._model.device)
        return self._model.logits(self._forward(batch, None))

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        self._memory.export(page, first_layer, end_layer, out)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        self._memory.insert(page, content)

    def _forward(self, batch: StepBatch, layers_done: LayersDone | None) -> Tensor:
        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self._memory.write(layer, batch.kv_rows, keys, values)
            return self._attention(layer, queries, batch)

        layer_done = self._report_groups(layers_done) if layers_done else None
        return self._model.hidden(batch.token_ids, batch.positions, attend, layer_done)

    def _draw(self, hidden: Tensor, batch: StepBatch, slices: Sequence[Slice]) -> list[DrawnToken]:
        draws = [draw for part in slices for draw in part.draws]
        if not draws:
            return []
        return self._sampler.draw(self._model.logits(hidden[batch.last_rows]), draws)

    def _report_groups(self, layers_done: LayersDone) -> Callable[[int], None]:
        group, total = self.spec.layer_group, self.spec.num_layers

        def report(layer: int) -> None:
            end = layer + 1
            if end % group == 0 or end == total:
                layers_done((end - 1) // group * group, end)

        return report
