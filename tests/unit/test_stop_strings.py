from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.stop_strings import StopMatcher


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Looks at every prefix of the text, the shortest first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def cut_at(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    places=st.lists(st.integers(0, 40), max_size=12),
)
def test_equals_the_naive_search_however_the_text_is_cut(text, stops, places):
    matcher = StopMatcher(stops)
    out = ""
    expected, stopped = naive(text, stops)
    for piece in cut_at(text, places):
        out += matcher.push(piece)
        assert expected.startswith(out)
    out += matcher.flush()
    assert (out, matcher.stopped) == (expected, stopped)


def test_holds_back_no_more_than_needed():
    matcher = StopMatcher(["</answer>", "STOP"])
    assert matcher.push("yes </ans") == "yes "
    assert matcher.push("wer no") == "</answer no"
    assert matcher.push(" ST") == " "
    assert matcher.push("OP and more") == ""
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_first_complete_stop_wins_and_the_longest_of_equals():
    matcher = StopMatcher(["bcd", "b"])
    assert matcher.push("abcd") == "a"
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xab") == "x"


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="empty stop string"):
        StopMatcher(["a", ""])
