"""Which launches of sampling a batch asks for."""

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from splitserve.engine.cuda import drawing
from splitserve.engine.cuda.drawing import Drawing
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.protocol import Draw, Slice
from splitserve.sampling import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.2, logprobs=0)


class Memory:
    """`Staging` where the device is the host."""

    def send(self, size: int, fill: Callable[[np.ndarray], None]) -> Tensor:
        out = torch.empty(size, dtype=torch.int64)
        fill(out.numpy())
        return out


@pytest.mark.parametrize(
    ("params", "any_top_k_or_p", "any_min_p"),
    [
        (SamplingParams(temperature=0.7), False, False),
        (SamplingParams(min_p=0.1), False, True),
        (SamplingParams(top_k=50), True, False),
        (SamplingParams(top_p=0.9999999999), True, False),
        (SamplingParams(top_k=50, top_p=0.9, min_p=0.1), True, True),
    ],
)
def test_only_launches_that_a_row_needs(
    params: SamplingParams, any_top_k_or_p: bool, any_min_p: bool
) -> None:
    """Greedy rows need none of them."""
    each = (GREEDY, SamplingParams(), params)
    slices = [Slice([7], 3, [0], [Draw(p, 0, 0, (), ())], i) for i, p in enumerate(each)]
    with (
        mock.patch.object(drawing, "sample", return_value=torch.zeros(3)) as sample,
        mock.patch.multiple(drawing, ReadBacks=mock.DEFAULT, _logprobs_of=mock.DEFAULT),
    ):
        draws = Drawing(frozenset(), SlotTable(4, 8, CPU), Memory())
        draws.draw_rows(slices, torch.zeros(3, 10))
    assert sample.call_args.kwargs == {"any_top_k_or_p": any_top_k_or_p, "any_min_p": any_min_p}
