from __future__ import annotations

from dataclasses import dataclass

import pytest

from splitserve.errors import DeadlineExceeded
from splitserve.rpc.deadline import next_hop_timeout, remaining_s


@dataclass
class _Call:
    remaining: float | None

    def time_remaining(self) -> float | None:
        return self.remaining


@pytest.mark.parametrize(("remaining", "expected"), [(None, None), (2.0, 2.0), (-0.1, 0.0)])
def test_remaining(remaining: float | None, expected: float | None) -> None:
    assert remaining_s(_Call(remaining)) == expected


def test_next_hop_gets_less_by_the_margin() -> None:
    assert next_hop_timeout(_Call(2.0), margin_s=0.5) == 1.5
    assert next_hop_timeout(_Call(None)) is None


@pytest.mark.parametrize("remaining", [0.05, 0.0, -1.0])
def test_no_call_is_made_when_nothing_is_left(remaining: float) -> None:
    with pytest.raises(DeadlineExceeded):
        next_hop_timeout(_Call(remaining), margin_s=0.05)
