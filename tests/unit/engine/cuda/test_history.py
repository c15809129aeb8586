from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.cuda.history import Histories, History
from splitserve.engine.protocol import Draw
from splitserve.sampling import SamplingParams

PARAMS = SamplingParams(presence_penalty=0.5)
TOKENS = st.lists(st.integers(0, 9), max_size=20)


def counted(history: History) -> dict[int, int]:
    assert len(set(history.tokens)) == len(history.tokens) == len(history)
    return dict(zip(history.tokens, history.counts, strict=True))


def expected(prompt: list[int], output: list[int]) -> dict[int, int]:
    return {**dict.fromkeys(prompt, 0), **Counter(output)}


@given(prompt=TOKENS, output=TOKENS, steps=st.lists(TOKENS, max_size=5))
def test_it_follows_an_output(prompt: list[int], output: list[int], steps: list[list[int]]) -> None:
    histories = Histories()
    first = histories.of(3, Draw(PARAMS, 0, 0, prompt, output))
    for news in steps:
        output += news
        history = histories.of(3, Draw(PARAMS, 0, 0, prompt, output))
        assert history is first
        assert counted(history) == expected(prompt, output)


def test_a_slot_may_get_another_sequence() -> None:
    histories = Histories()
    one, other = ([1, 2], [2]), ([1, 2], [2])
    first = histories.of(0, Draw(PARAMS, 0, 0, *one))
    other[1].append(5)
    second = histories.of(0, Draw(PARAMS, 0, 0, *other))
    assert counted(first) == {1: 0, 2: 1}
    assert counted(second) == {1: 0, 2: 1, 5: 1}
    one[1].append(1)
    assert counted(histories.of(0, Draw(PARAMS, 0, 0, *one))) == {1: 1, 2: 1}


def test_sequences_keep_to_their_slots() -> None:
    histories = Histories()
    one, other = Draw(PARAMS, 0, 0, [1], [4]), Draw(PARAMS, 0, 0, [2], [4])
    first, second = histories.of(0, one), histories.of(1, other)
    assert histories.of(0, one) is first
    assert histories.of(1, other) is second


def test_a_history_moves_with_its_sequence() -> None:
    histories = Histories()
    one, other = Draw(PARAMS, 0, 0, [1], [4]), Draw(PARAMS, 0, 0, [2], [4])
    first, second = histories.of(6, one), histories.of(5, other)
    histories.of(1, Draw(PARAMS, 0, 0, [9], [9]))
    histories.move([(6, 0), (5, 1), (7, 2)])
    assert histories.of(0, one) is first
    assert histories.of(1, other) is second
    assert histories.of(6, one) is not first


def test_an_output_that_was_cut_is_counted_anew() -> None:
    histories, output = Histories(), [1, 2, 3]
    histories.of(0, Draw(PARAMS, 0, 0, [], output))
    del output[1:]
    assert counted(histories.of(0, Draw(PARAMS, 0, 0, [], output))) == {1: 1}
