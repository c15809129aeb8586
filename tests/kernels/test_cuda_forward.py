"""Steps as the GPU engine launches them, against the engine of plain torch."""

import numpy as np
import pytest
import torch

from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.layout import StepPlan, StepShape
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.page_memory import open_page_memory
from splitserve.engine.protocol import DRAWN, Draw, Slice
from splitserve.engine.triton_attention import TritonAttention
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.linear import choose_products
from splitserve.models.load import Loader
from splitserve.models.triton_backend import TritonBackend
from splitserve.parallel.group import SingleGroup
from splitserve.sampling import SamplingParams

from ..tiny_model import CONFIG, CPU, RandomWeights, make_engine

DRAW = Draw(SamplingParams(temperature=0), 0, 0, (), ())
SLOTS, PAGES, BLOCK = 5, 64, 4


class Steps:
    """The GPU engine's way through a step, on the CPU."""

    def __init__(self, kv_dtype: KvDtype = "float32") -> None:
        products = choose_products(torch.float32, CPU, deterministic=False)
        loader = Loader(
            CONFIG, RandomWeights(), products, SingleGroup(), torch.float32, CPU, TritonBackend()
        )
        model = loader.load(512)
        memory = open_page_memory(PageShape(3, BLOCK, 2, 8, kv_dtype), PAGES, torch.float32, CPU)
        attention = TritonAttention(memory.layers(), model.rules, num_processors=2)
        self.slots = SlotTable(SLOTS, 32, CPU)
        self.forward = Forward(model, memory, attention, self.slots)

    @torch.inference_mode()
    def run(self, slices: list[Slice], shape: StepShape | None = None) -> torch.Tensor:
        """Logits of each slice with a draw, in their order."""
        plan = StepPlan.of(slices)
        shape = shape or plan.shape
        moved = [(part.came_from, part.slot) for part in slices if part.came_from >= 0]
        news = self.slots.news(slices, BLOCK, moved)
        sent = np.empty(news.size, np.int64)
        news.lay_out(sent)
        self.slots.apply(news, torch.from_numpy(sent))
        laid = np.empty(shape.size, np.int64)
        plan.lay_out(shape, laid, nobody=self.slots.nobody)
        logits = self.forward(shape, torch.from_numpy(laid), padded=True).float()
        rows = plan.logit_rows(shape)
        return logits[[rows[part.slot] for part in slices if part.draws]]


TOKENS = {name: [(k * i + k) % 120 for i in range(24)] for k, name in enumerate("abcd", 3)}
PAGES_OF = {"a": [7, 40, 3], "b": [60, 2, 11, 5], "c": [1, 22, 8, 50, 9, 4], "d": [33, 6, 20]}
SLOT_OF = {"a": 3, "b": 0, "c": 4, "d": 1}
SCENE = [
    [("a", 0, 1), ("b", 0, 9), ("c", 0, 20)],
    [("a", 1, 1), ("b", 9, 1), ("c", 20, 1), ("d", 0, 7)],
    [("d", 7, 5), ("b", 10, 1), ("c", 21, 1)],
    [("b", 11, 1), ("c", 22, 1), ("a", 2, 1)],
]


def slices_of(step: list[tuple[str, int, int]]) -> list[Slice]:
    return [
        Slice(TOKENS[name][start : start + count], start, PAGES_OF[name], [DRAW], SLOT_OF[name])
        for name, start, count in step
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_those_of_plain_torch(padded: bool) -> None:
    """Prompts of several lengths together, then chunks beside sequences that decode."""
    plain, steps = make_engine(), Steps()
    shape = StepShape(SLOTS, 33, 4) if padded else None
    for step in SCENE:
        expected = plain.compute(slices_of(step))
        found = steps.run(slices_of(step), shape)
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_drawn_token_goes_on_without_the_host() -> None:
    known, unknown = Steps(), Steps()
    prompt = slices_of([("b", 0, 9)])
    drawn = int(known.run(prompt)[0].argmax())
    unknown.run(prompt)
    assert int(unknown.slots.tokens[SLOT_OF["b"]]) == drawn

    def next_step(token: int) -> list[Slice]:
        return [Slice([token], 9, PAGES_OF["b"], [DRAW], SLOT_OF["b"])]

    assert torch.equal(unknown.run(next_step(DRAWN)), known.run(next_step(drawn)))


def test_a_sequence_may_change_its_slot() -> None:
    known, moving = Steps(), Steps()
    for steps in (known, moving):
        steps.run(slices_of([("b", 0, 9), ("c", 0, 20)]))
    drawn = int(known.slots.tokens[SLOT_OF["c"]])
    expected = known.run([Slice([drawn], 20, PAGES_OF["c"], [DRAW], SLOT_OF["c"])])
    found = moving.run([Slice([DRAWN], 20, PAGES_OF["c"], [DRAW], 1, came_from=SLOT_OF["c"])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rows_of_nobody_store_nothing() -> None:
    steps = Steps()
    steps.run(slices_of(SCENE[0]))
    before = [(kv.keys.clone(), kv.values.clone()) for kv in steps.forward._memory.layers()]
    steps.run([], StepShape(SLOTS, 8, 2))
    for (keys, values), kv in zip(before, steps.forward._memory.layers(), strict=True):
        assert torch.equal(keys, kv.keys)
        assert torch.equal(values, kv.values)
