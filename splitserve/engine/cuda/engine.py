"""The engine of one GPU, or of one rank's GPU.

A step's life:

1. Its slices are laid out as numbers (`layout`) and sent in one copy, with what the device does not
   know yet of their pages (`slots`).
2. It is launched: a recorded graph if one holds it (`graphs`), else kernel by kernel (`forward`).
   Either way the host goes on at once.
3. The likeliest tokens are there with the logits; others are drawn on the device (`drawing`), and
   stay there for the next step, which may be launched before they are read.
4. They are copied to the host behind the step. `Launched.tokens` waits for that copy and for
   nothing else.
5. Layers of prompts that somebody waits for are reported by a thread of its own (`layers`), when
   the device has computed them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from splitserve.engine.cuda.drawing import Drawing, Drawn
from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.graphs import NEWS_ROOM, StepGraphs
from splitserve.engine.cuda.layers import LayerReports
from splitserve.engine.cuda.layout import Numbers, StepPlan, StepShape, placed_by_order
from splitserve.engine.cuda.slots import SlotNews, SlotTable
from splitserve.engine.cuda.staging import Staging
from splitserve.engine.device_pages import DevicePages
from splitserve.engine.layer_groups import ends_group, reporting
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import DrawnToken, EngineSpec, LayersDone, Slice
from splitserve.engine.triton_attention import TritonAttention
from splitserve.models.decoder import Decoder
from splitserve.parallel.group import Group

_WARM_UP_ROWS = 2048
_WARM_UP_SLOTS = (1, 9, 17, 33, 65, 128, 256)
"""Where products of few rows change their plans, and the likeliest tokens of all are found by fewer
programs a row.
"""


class CudaEngine:
    """Implements `AsyncEngine`; of a tensor-parallel group it is one rank's part, `LeadingRank`.

    Its calls but `export_page` and `insert_page` are of one thread.
    """

    def __init__(
        self,
        spec: EngineSpec,
        model: Decoder,
        memory: PageMemory,
        attention: TritonAttention,
        group: Group,
        *,
        max_batch: int,
    ) -> None:
        device = model.device
        self.spec = spec
        self._group = group
        self._memory = memory
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Somebody waits for these copies, and they are small: they go ahead of a prompt's kernels.
        self._copies = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        max_pages = -(-spec.max_context_tokens // spec.block_tokens)
        self._slots = SlotTable(max_batch, max_pages, device)
        self._forward = Forward(model, memory, attention, self._slots)
        self._graphs = StepGraphs(
            self._forward,
            self._stream,
            nobody=self._slots.nobody,
            ends_part=partial(ends_group, spec),
        )
        self._staging = Staging(device)
        self._drawing = Drawing(spec.eos_token_ids, self._slots, self._staging)
        self._reports = LayerReports()
        torch.cuda.synchronize(device)  # what was loaded and zeroed on other streams is there

    @torch.inference_mode()
    def record(self, shapes: Collection[StepShape], progress: Callable[[], object]) -> None:
        """Record graphs of these shapes; `progress` is called after each."""
        self._graphs.record(shapes, progress)

    @torch.inference_mode()
    def warm_up(self, max_step_tokens: int) -> None:
        """Compile what steps without a graph need, and every kind of draw, on steps of nobody's."""
        shapes = [StepShape(0, min(_WARM_UP_ROWS, max_step_tokens), 1)]
        if not self._graphs.is_recorded:
            shapes += [StepShape(s) for s in _WARM_UP_SLOTS if s <= self._slots.num_slots]
        with self._launching():
            for shape in shapes:
                numbers = self._send(StepPlan([], []), shape)
                logits = self._forward(shape, numbers, padded=True)
            self._slots.warm_up()
            self._drawing.warm_up(logits[:1])
        self._stream.synchronize()

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        return self.launch(slices, layers_done).tokens()

    @torch.inference_mode()
    def launch(self, slices: Sequence[Slice], layers_done: LayersDone | None = None) -> Drawn:
        """See `AsyncEngine.launch`."""
        if any(part.slot < 0 for part in slices):
            slices = placed_by_order(slices)
        with self._launching():
            plan, shape, logits = self._compute(slices, layers_done)
            return self._drawing.draw(slices, plan.logit_rows(shape), logits)

    @torch.inference_mode()
    def compute(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> Tensor | None:
        """See `RankEngine.compute`. A row of logits for each draw.

        Every rank must lay the step out alike, and only rank 0 knows the batch's slots.
        """
        slices = placed_by_order(slices)
        with self._launching():
            plan, shape, logits = self._compute(slices, layers_done)
            rows = plan.logit_rows(shape)
            drawn = [rows[part.slot] for part in slices for _ in part.draws]
            if not drawn:
                return None
            return logits[self._staging.send_lists(drawn)[0]]

    @torch.inference_mode()
    def draw(self, logits: Tensor | None, slices: Sequence[Slice]) -> list[list[DrawnToken]]:
        """See `LeadingRank.draw`."""
        if logits is None:
            return [[] for _ in slices]
        with torch.cuda.stream(self._stream):
            return self._drawing.draw_rows(slices, logits).tokens()

    @torch.inference_mode()
    def score(self, part: Slice) -> Tensor:
        """See `TorchEngine.score`."""
        part = part._replace(slot=0)
        with torch.cuda.stream(self._stream):
            plan = StepPlan([], [part])
            numbers = self._send(plan, plan.shape)
            logits = self._forward.model.logits(self._forward.hidden(plan.shape, numbers))
        self._stream.synchronize()
        return logits

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        with torch.cuda.stream(self._copies):
            self._memory.export(page, first_layer, end_layer, out)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        with torch.cuda.stream(self._copies):
            self._memory.insert(page, content)

    @cached_property
    def device_pages(self) -> DevicePages:
        """See `HasDevicePages`."""
        return DevicePages(self._memory.storage, self.spec.layer_bytes, self._copies)

    def close(self) -> None:
        """See `Engine.close`."""
        self._stream.synchronize()
        self._reports.close()
        self._group.close()

    @contextmanager
    def _launching(self) -> Iterator[None]:
        """On the engine's stream. What has been launched when something fails has run to its end
        before the failure is told: whoever hears of it gives the step's pages away.
        """
        with torch.cuda.stream(self._stream):
            try:
                yield
            except BaseException:
                self._stream.synchronize()
                raise

    def _compute(
        self, slices: Sequence[Slice], layers_done: LayersDone | None
    ) -> tuple[StepPlan, StepShape, Tensor]:
        """The step's shape as it was launched, and its logits."""
        plan = StepPlan.of(slices)
        shape = self._graphs.fitting(plan.shape.telling() if layers_done else plan.shape)
        told, shared = self._reports.when_computed(layers_done), self._group.size > 1
        with reporting(self.spec, told, shared=shared) as layer_done:
            if shape:
                self._send(plan, shape, self._graphs.numbers(shape))
                return plan, shape, self._graphs.replay(shape, layer_done)
            shape = plan.shape
            return plan, shape, self._forward(shape, self._send(plan, shape), layer_done)

    def _send(self, plan: StepPlan, shape: StepShape, out: Tensor | None = None) -> Tensor:
        """The step's numbers on the device, first of what is returned. What it needs of slots is
        there, too.

        One copy brings both. A recorded step's `out` has room for `NEWS_ROOM` numbers of news: more
        of them, as when long sequences join, go ahead in one of their own.
        """
        moves = [(part.came_from, part.slot) for part in plan.decoding if part.came_from >= 0]
        self._drawing.move(moves)
        slices = [*plan.decoding, *plan.chunks]
        news = self._slots.news(slices, self.spec.block_tokens, moves)
        if out is not None and news.size > NEWS_ROOM:
            self._slots.apply(news, self._staging.send(news.size, news.lay_out))
            news = SlotNews()

        def fill(numbers: Numbers) -> None:
            plan.lay_out(shape, numbers[: shape.size], nobody=self._slots.nobody)
            news.lay_out(numbers[shape.size :])

        sent = self._staging.send(shape.size + news.size, fill, out)
        if news.size:
            self._slots.apply(news, sent[shape.size :])
        return sent
