import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.prefill_rate import PrefillRate

STEPS = st.lists(st.tuples(st.integers(256, 512), st.floats(0.001, 10)), min_size=1, max_size=30)


@given(STEPS)
def test_is_between_the_slowest_and_the_fastest_step(steps: list[tuple[int, float]]) -> None:
    rate = PrefillRate(512)
    for tokens, seconds in steps:
        rate.add(tokens, tokens, seconds)
    each = [tokens / seconds for tokens, seconds in steps]
    assert min(each) * 0.999 <= rate.per_s <= max(each) * 1.001


def test_a_long_step_weighs_more_than_a_short_one() -> None:
    rate = PrefillRate(1000)
    rate.add(1000, 1000, 1.0)
    rate.add(1000, 1000, 0.01)
    assert rate.per_s == pytest.approx((0.9 * 1000 + 1000) / (0.9 * 1.0 + 0.01))


def test_a_few_tokens_beside_decoding_say_nothing() -> None:
    rate = PrefillRate(200)
    rate.add(16, 90, 0.01)
    rate.add(0, 180, 0.01)
    assert rate.per_s == 0.0
    rate.add(30, 100, 0.01)
    assert rate.per_s == pytest.approx(3000)
