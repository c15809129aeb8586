"""The engine that computes a model with torch, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitserve.engine.attention import Attention
from splitserve.engine.batch import StepBatch, build_batch
from splitserve.engine.layer_groups import reporting
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import DrawnToken, EngineSpec, LayersDone, Slice
from splitserve.engine.sampler import Sampler
from splitserve.models.decoder import Decoder
from splitserve.models.layers.rotary import Rotation
from splitserve.parallel.group import Group


class TorchEngine:
    """Implements `Engine`. Everything it is made of is chosen by `factory.open_engine`.

    Of a tensor-parallel group it is one rank's part (`parallel.rank.RankEngine`): it computes
    together with the others, and its pages have its own KV heads alone. `spec` is the worker's.
    """

    def __init__(
        self,
        spec: EngineSpec,
        model: Decoder,
        memory: PageMemory,
        attention: Attention,
        group: Group,
        *,
        threads: int = 0,
    ) -> None:
        """`threads` is how many compute a step together; 0 leaves torch's choice."""
        self.spec = spec
        self._group = group
        self._threads = threads
        self._model = model
        self._memory = memory
        self._attention = attention
        self._sampler = Sampler(spec.eos_token_ids)

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        return self.draw(self.compute(slices, layers_done), slices)

    @torch.inference_mode()
    def compute(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> Tensor | None:
        """The part of a step that all ranks have: keys and values into the pool, and the logits
        of all draws, (draws, vocab_size) fp32, None if there are none.
        """
        if self._threads:
            torch.set_num_threads(self._threads)  # which is the calling thread's own number
        batch = build_batch(slices, self._memory, self._model.device)
        draws = len(batch.last_rows)
        # Some row where nothing is drawn: no product has an empty input.
        wanted = batch.last_rows if draws else batch.last_rows.new_zeros(1)
        hidden = self._forward(batch, layers_done, wanted)
        return self._model.logits(hidden) if draws else None

    @torch.inference_mode()
    def draw(self, logits: Tensor | None, slices: Sequence[Slice]) -> list[list[DrawnToken]]:
        """The tokens of each slice, in its draws' order."""
        draws = [draw for part in slices for draw in part.draws]
        drawn = iter([] if logits is None else self._sampler.draw(logits, draws))
        return [[next(drawn) for _ in part.draws] for part in slices]

    @torch.inference_mode()
    def score(self, part: Slice) -> Tensor:
        """Logits after every token of a slice: (tokens, vocab_size) fp32. For measuring a model:
        serving needs the last row only.
        """
        batch = build_batch([part], self._memory, self._model.device)
        return self._model.logits(self._forward(batch))

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        self._memory.export(page, first_layer, end_layer, out)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        self._memory.insert(page, content)

    def close(self) -> None:
        """See `Engine.close`."""
        self._group.close()

    def _forward(
        self,
        batch: StepBatch,
        layers_done: LayersDone | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        def attend(
            layer: int, queries: Tensor, keys: Tensor, values: Tensor, _: Rotation | None
        ) -> Tensor:
            self._memory.write(layer, batch.kv_rows, keys, values)
            return self._attention(layer, queries, batch)

        with reporting(self.spec, layers_done, shared=self._group.size > 1) as layer_done:
            return self._model.hidden(batch.token_ids, batch.positions, attend, layer_done, wanted)
