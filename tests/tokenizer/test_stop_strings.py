"""The stop automaton against a plain search."""

from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.tokenizer.stops import StopMatcher


def first_match(text: str, stops: list[str]) -> tuple[str | None, int]:
    """The stop complete first, the longest of several, and where it ends."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return max(ending, key=len), end
    return None, len(text)


def longest_prefix_at_end(text: str, stops: list[str]) -> int:
    return max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))


few_letters = st.text("ab", min_size=1, max_size=5)


@given(stops=st.lists(few_letters, min_size=1, max_size=4), chunks=st.lists(st.text("abc", max_size=6), max_size=6))
@example(stops=["ab", "abc", "bc"], chunks=["a", "b", "c"])
@example(stops=["abcd", "bc"], chunks=["ab", "c"])
@example(stops=["aab"], chunks=["aaa", "b"])
def test_equals_a_plain_search(stops: list[str], chunks: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = "".join(chunks)
    state, match, seen = 0, None, 0
    for chunk in chunks:
        state, match, used = matcher.feed(state, chunk)
        seen += used
        if match is not None:
            break
        assert matcher.depth[state] == longest_prefix_at_end(text[:seen], stops)
    assert (match, seen) == first_match(text, stops)


def test_the_cut_makes_no_difference() -> None:
    stops = ["ab", "abc", "bc", "cab"]
    matcher = StopMatcher(stops)
    text = "xxacabbc"
    for cuts in combinations(range(len(text) + 1), 2):
        chunks = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
        state, seen = 0, 0
        for chunk in chunks:
            state, match, used = matcher.feed(state, chunk)
            seen += used
            if match is not None:
                assert (match, seen) == ("cab", 6)
                break
        else:
            pytest.fail("no match")


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopMatcher(("a", ""))
