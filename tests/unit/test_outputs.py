"""Deltas put together into one output."""

from __future__ import annotations

import pytest

from splitserve.engine.protocol import Logprob
from splitserve.errors import SplitserveError
from splitserve.outputs import ChoiceDelta, OutputBuilder, OutputDelta, PositionLogprobs, Usage


def test_deltas_of_two_choices_are_put_together_by_index():
    usage = Usage(prompt_tokens=3, cached_prompt_tokens=0, completion_tokens=3)
    logprobs = [PositionLogprobs(Logprob(7, -0.5))]
    output = OutputBuilder("abc", None).extend(
        [
            OutputDelta("r1", [ChoiceDelta(1, 0, [9], text="z")], seed=4),
            OutputDelta("r1", [ChoiceDelta(0, 0, [7], logprobs, text="x")]),
            OutputDelta(
                "r1",
                [ChoiceDelta(1, 1, [8], text="y", finish_reason="length")],
                usage=usage,
            ),
        ]
    )
    assert (output.request_id, output.prompt, output.seed) == ("r1", "abc", 4)
    first, second = output.outputs
    assert (first.index, first.text, first.token_ids, first.logprobs) == (0, "x", [7], logprobs)
    assert (second.text, second.token_ids, second.finish_reason) == ("zy", [9, 8], "length")
    assert second.logprobs is None
    assert output.usage == usage


@pytest.mark.parametrize("next_index", [0, 2])
def test_a_gap_or_a_duplicate_is_an_error(next_index: int):
    builder = OutputBuilder(None, [1])
    builder.add(OutputDelta("r", [ChoiceDelta(0, 0, [5])]))
    with pytest.raises(SplitserveError, match=f"token {next_index} came where token 1 was due"):
        builder.add(OutputDelta("r", [ChoiceDelta(0, next_index, [6])]))


def test_a_delta_without_tokens_may_carry_text_and_the_end():
    builder = OutputBuilder(None, [1])
    builder.add(OutputDelta("r", [ChoiceDelta(0, 0, [5])]))
    builder.add(OutputDelta("r", [ChoiceDelta(0, 0, [], text="held", finish_reason="stop")]))
    [output] = builder.build().outputs
    assert (output.text, output.token_ids, output.finish_reason) == ("held", [5], "stop")
