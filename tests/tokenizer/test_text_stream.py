"""Incremental text against what the whole gives at once."""

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.tokenizer import MarkedTokenizer, Piece, StopMatcher, TextStream
from headrace.tokenizer.markers import Marker
from headrace.tokenizer.settings import TextSettings

Decided = list[tuple[int, bool]]  # (token, in the reasoning channel)
THINK, END_THINK, EOS, TOOL_CALL = range(4)
MARKERS = ("<think>", "</think>", "<eos>", "<tool_call>")
FIRST_BYTE = len(MARKERS)


def made_of(*pieces: str | bytes) -> MarkedTokenizer:
    """A tokenizer of four markers, the 256 bytes and `pieces`."""
    data = [text.encode() for text in MARKERS] + [bytes((byte,)) for byte in range(256)]
    data += [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    markers = [Marker(text, token_id) for token_id, text in enumerate(MARKERS)]
    return MarkedTokenizer(
        lambda text, _: [FIRST_BYTE + byte for byte in text.encode()], data, markers, TextSettings(eos_ids=(EOS,))
    )


def spelt(tokenizer: MarkedTokenizer, *pieces: str) -> list[int]:
    """The ids of pieces given to made_of, in order of appearance."""
    by_text = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_text[piece.encode()] for piece in pieces]


def streamed(stream: TextStream, decided: Decided) -> list[Piece]:
    pieces = [stream.push(token, reasoning) for token, reasoning in decided]
    return [piece for piece in pieces if piece is not None] + stream.finish()


def joined(pieces: Sequence[Piece], channel: str) -> str:
    return "".join(piece.text for piece in pieces if piece.channel == channel)


def at_once(
    tokenizer: MarkedTokenizer, decided: Decided, stops: Sequence[str] = (), raw: bool = False
) -> tuple[str, str, str | None]:
    """(reasoning, content, stop string) by the rules, from the whole."""
    silent = set(tokenizer.eos_ids) | (set() if raw else {tokenizer.markers["<think>"], tokenizer.markers["</think>"]})
    runs: list[tuple[bool, bytes]] = []
    new_run = True
    for token, in_reasoning in decided:
        reasoning = in_reasoning and not raw
        if token in silent:
            new_run = True
            continue
        if new_run or runs[-1][0] != reasoning:
            runs.append((reasoning, b""))
        runs[-1] = (reasoning, runs[-1][1] + tokenizer.token_bytes(token))
        new_run = False
    texts = {
        which: "".join(data.decode("utf-8", "replace") for r, data in runs if r == which) for which in (True, False)
    }
    content = texts[False] if raw else texts[False].lstrip("\n")
    for end in range(len(content) + 1):
        ending = [stop for stop in stops if content[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return texts[True].rstrip(), content[: end - len(stop)], stop
    return texts[True].rstrip(), content, None


def check(tokenizer: MarkedTokenizer, decided: Decided, stops: Sequence[str] = (), raw: bool = False) -> None:
    """The stream's deltas, put together, are the whole's; at no time was shown what may not be."""
    reasoning, content, stop = at_once(tokenizer, decided, stops, raw)
    stream = TextStream(tokenizer, stop=StopMatcher(stops) if stops else None, raw=raw)
    pieces: list[Piece] = []
    for number, (token, in_reasoning) in enumerate(decided):
        stopped = stream.stop_string is not None
        piece = stream.push(token, in_reasoning)
        assert piece is None or not stopped
        if piece is not None:
            assert piece.text
            pieces.append(piece)
        shown = joined(pieces, "content")
        assert content.startswith(shown)
        if stream.stop_string is None:
            arrived = at_once(tokenizer, decided[: number + 1], (), raw)[1]
            held = max((size for s in stops for size in range(len(s)) if arrived.endswith(s[:size])), default=0)
            assert len(shown) <= len(arrived) - held
        thought = joined(pieces, "reasoning")
        assert thought == thought.rstrip()
    pieces += stream.finish()
    assert stream.stop_string == stop
    assert joined(pieces, "content") == content
    if stop is None:
        assert joined(pieces, "reasoning") == reasoning
    else:  # what came after the stop is not shown
        assert reasoning.startswith(joined(pieces, "reasoning"))
    for channel in ("reasoning", "content"):
        named = [token for piece in pieces if piece.channel == channel for token in piece.tokens]
        assert named == sorted(set(named))


BYTES = ("é", "한", "😀", "👩‍👩‍👧", "e\u0301", "\ufffd", "\n\n", " \n", "stop", "a")


@st.composite
def decided_tokens(draw: st.DrawFn) -> tuple[MarkedTokenizer, Decided]:
    """Random tokens: whole words, words cut anywhere into bytes, lone bytes, markers, changes of channel."""
    tokenizer = made_of("ab", "bc", "abc", "\n", "\n\nHi", "x \n", "😀a", "é", b"\xf0\x9f", b"\x98\x80z", b"\x9f\x98")
    words = st.sampled_from([list(word.encode()) for word in BYTES])
    token = st.one_of(
        words.map(lambda word: [FIRST_BYTE + byte for byte in word]),
        st.integers(FIRST_BYTE + 128, FIRST_BYTE + 255).map(lambda i: [i]),
        st.integers(FIRST_BYTE + 256, tokenizer.vocab_size + 1).map(lambda i: [i]),
        st.sampled_from([[THINK], [END_THINK], [EOS], [TOOL_CALL]]),
    )
    runs = draw(st.lists(st.tuples(st.booleans(), st.lists(token, max_size=6)), max_size=4))
    return tokenizer, [(i, reasoning) for reasoning, tokens in runs for ids in tokens for i in ids]


STOPS = st.lists(st.text("abc\n😀é", min_size=1, max_size=4), max_size=3)


@given(case=decided_tokens(), stops=STOPS, raw=st.booleans())
def test_stream_equals_whole(case: tuple[MarkedTokenizer, Decided], stops: list[str], raw: bool) -> None:
    check(*case, stops, raw)


@given(data=st.data(), stops=STOPS, raw=st.booleans())
def test_stream_equals_whole_on_real_vocabularies(
    tokenizer: MarkedTokenizer, data: st.DataObject, stops: list[str], raw: bool
) -> None:
    ids = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1),
        st.integers(1000, 1400),  # single bytes and short tokens
        st.sampled_from(sorted(tokenizer.markers.values())),
        st.sampled_from(tokenizer.encode("한국어 😀 and a stop\n\n")),
    )
    check(tokenizer, data.draw(st.lists(st.tuples(ids, st.booleans()), max_size=20)), stops, raw)


@given(data=st.data())
def test_a_text_from_its_start_equals_the_tokenizers_decode(tokenizer: MarkedTokenizer, data: st.DataObject) -> None:
    """And Tokenizer.decode equals the libraries' own (test_vocabularies)."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    stream = TextStream(tokenizer, raw=True, eos_ids=(), at_start=True)
    assert joined(streamed(stream, [(i, False) for i in ids]), "content") == tokenizer.decode(ids)


@given(text=st.text(max_size=30), cut=st.integers(0, 30))
def test_goes_on_from_a_prompt(tokenizer: MarkedTokenizer, text: str, cut: int) -> None:
    """Prompt's text + generated text = text of both: a space at the front of generated text is a space."""
    ids = tokenizer.encode(text.replace("\u2581", ""))
    prompt, generated = ids[:cut], ids[cut:]
    if not prompt or "\ufffd" in tokenizer.decode(prompt):
        return
    stream = TextStream(tokenizer, raw=True)
    text_after = joined(streamed(stream, [(i, False) for i in generated]), "content")
    assert tokenizer.decode(prompt) + text_after == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["😀", "한국어", "e\u0301", "👩‍👩‍👧‍👦", "é" * 5])
def test_no_replacement_character_in_whole_text(text: str) -> None:
    """Every way to cut the bytes into up to three tokens."""
    data = text.encode()
    for cuts in combinations(range(len(data) + 1), 2):
        parts = [data[: cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]]
        tokenizer = made_of(*parts)
        ids = [tokenizer.vocab_size - 3 + place for place in range(3)]
        for raw in (True, False):
            pieces = streamed(TextStream(tokenizer, raw=raw), [(i, False) for i in ids])
            assert joined(pieces, "content") == text
            assert "\ufffd" not in joined(pieces, "content")


def test_an_incomplete_character_at_the_end_is_shown_once() -> None:
    tokenizer = made_of()
    cut = [(FIRST_BYTE + byte, False) for byte in b"a\xf0\x9f\x98"]
    stream = TextStream(tokenizer)
    assert [stream.push(*token) for token in cut] == [Piece("content", "a", (0,)), None, None, None]
    assert stream.finish() == [Piece("content", "\ufffd", (1, 2, 3))]
    assert stream.finish() == []


# Stop strings.

STOP_SETS = (["END"], ["ab", "abc", "bc"], ["aab", "ab\n"], ["\n\n"], ["한국", "국어"], ["xEND", "ENDx", "N"])


@pytest.mark.parametrize("stops", STOP_SETS)
@pytest.mark.parametrize("tail", ["", " tail"])
def test_stops_over_all_two_and_three_way_splits(stops: list[str], tail: str) -> None:
    for stop in stops:
        text = f"head a{stop}{tail}"
        for cuts in combinations(range(len(text) + 1), 2):
            parts = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
            tokenizer = made_of(*[part for part in parts if part])
            decided = [(i, False) for i in spelt(tokenizer, *[part for part in parts if part])]
            check(tokenizer, decided, stops)
            pieces = streamed(TextStream(tokenizer, stop=StopMatcher(stops) if stops else None), decided)
            assert not any(found in joined(pieces, "content") for found in stops)


def test_the_stop_complete_first_wins_and_the_longest_of_two() -> None:
    tokenizer = made_of("xabcd")
    for stops, text, found in (
        (["abc", "ab"], "x", "ab"),
        (["abcd", "bc"], "xa", "bc"),
        (["bc", "abc"], "x", "abc"),
        (["d", "xabcd"], "", "xabcd"),
    ):
        stream = TextStream(tokenizer, stop=StopMatcher(stops) if stops else None)
        assert joined(streamed(stream, [(tokenizer.vocab_size - 1, False)]), "content") == text
        assert stream.stop_string == found


def test_stops_in_reasoning_are_text() -> None:
    tokenizer = made_of("stop", "st", "op", "answer")
    stop, first, second, answer = spelt(tokenizer, "stop", "st", "op", "answer")
    stream = TextStream(tokenizer, stop=StopMatcher(["stop", "</think>"]))
    decided = [(stop, True), (END_THINK, True), (answer, False), (stop, False), (answer, False)]
    pieces = streamed(stream, decided)
    assert (joined(pieces, "reasoning"), joined(pieces, "content")) == ("stop", "answer")
    assert stream.stop_string == "stop"
    # Half in reasoning, half in the answer: two texts.
    stream = TextStream(tokenizer, stop=StopMatcher(["stop"]))
    pieces = streamed(stream, [(first, True), (END_THINK, True), (second, False)])
    assert (joined(pieces, "reasoning"), joined(pieces, "content"), stream.stop_string) == ("st", "op", None)


def test_a_stop_is_matched_on_the_stripped_answer() -> None:
    tokenizer = made_of("\n\n", "\nHi")
    newlines, hello = spelt(tokenizer, "\n\n", "\nHi")
    stream = TextStream(tokenizer, stop=StopMatcher(["\nHi"]))
    assert joined(streamed(stream, [(newlines, False), (hello, False)]), "content") == "Hi"
    stream = TextStream(tokenizer, stop=StopMatcher(["\nHi"]), raw=True)
    assert joined(streamed(stream, [(newlines, False), (hello, False)]), "content") == "\n\n"


def test_a_stop_may_be_a_marker_shown_in_the_answer() -> None:
    tokenizer = made_of("a")
    (a,) = spelt(tokenizer, "a")
    stream = TextStream(tokenizer, stop=StopMatcher(["<tool_call>"]))
    pieces = streamed(stream, [(a, False), (TOOL_CALL, False), (a, False)])
    assert (joined(pieces, "content"), stream.stop_string) == ("a", "<tool_call>")


def test_text_held_for_a_stop_is_flushed_at_the_end() -> None:
    tokenizer = made_of("abc", "EN", "D")
    stream = TextStream(tokenizer, stop=StopMatcher(["END"]))
    ids = spelt(tokenizer, "abc", "EN")
    assert [stream.push(i, False) for i in ids] == [Piece("content", "abc", (0,)), None]
    assert stream.finish() == [Piece("content", "EN", (1,))]


def test_only_what_may_become_a_stop_is_held() -> None:
    tokenizer = made_of("fooEN", "x", "DEN", "D")
    stream = TextStream(tokenizer, stop=StopMatcher(["END"]))
    foo, x, den, d = spelt(tokenizer, "fooEN", "x", "DEN", "D")
    assert stream.push(foo, False) == Piece("content", "foo", (0,))
    assert stream.push(x, False) == Piece("content", "ENx", (1,))
    assert stream.push(den, False) == Piece("content", "D", (2,))
    assert stream.push(d, False) is None
    assert stream.stop_string == "END"
    assert stream.push(x, False) is None
    assert stream.finish() == []


# White space and channels.


def test_white_space_at_the_channels_edges() -> None:
    tokenizer = made_of("think ", " \n", "more", "\n", "\nanswer", "\n\n")
    think, blank, more, newline, answer, two = spelt(tokenizer, "think ", " \n", "more", "\n", "\nanswer", "\n\n")
    stream = TextStream(tokenizer)
    assert stream.push(think, True) == Piece("reasoning", "think", (0,))
    assert stream.push(blank, True) is None
    assert stream.push(more, True) == Piece("reasoning", "  \nmore", (1, 2))
    assert stream.push(newline, True) is None
    assert stream.push(END_THINK, True) is None
    assert stream.push(newline, False) is None
    assert stream.push(answer, False) == Piece("content", "answer", (6,))
    assert stream.push(two, False) == Piece("content", "\n\n", (7,))
    assert stream.push(EOS, False) is None
    assert stream.finish() == []


def test_raw_shows_markers_and_keeps_white_space() -> None:
    tokenizer = made_of("\n", "a")
    newline, a = spelt(tokenizer, "\n", "a")
    stream = TextStream(tokenizer, raw=True)
    pieces = streamed(
        stream, [(newline, True), (THINK, True), (a, True), (END_THINK, False), (newline, False), (EOS, False)]
    )
    assert joined(pieces, "content") == "\n<think>a</think>\n"
    assert joined(pieces, "reasoning") == ""


def test_markers_that_are_not_channels_are_shown() -> None:
    tokenizer = made_of()
    pieces = streamed(TextStream(tokenizer), [(TOOL_CALL, False), (END_THINK, False), (EOS, False)])
    assert pieces == [Piece("content", "<tool_call>", (0,))]
    pieces = streamed(TextStream(tokenizer, eos_ids=()), [(EOS, False)])
    assert pieces == [Piece("content", "<eos>", (0,))]


def test_a_character_broken_off_by_a_change_of_channel() -> None:
    """Without a marker between (a tool call ends reasoning), one push has text for both channels."""
    tokenizer = made_of("a")
    (a,) = spelt(tokenizer, "a")
    stream = TextStream(tokenizer)
    assert stream.push(FIRST_BYTE + 0xE2, True) is None
    assert stream.push(TOOL_CALL, False) == Piece("reasoning", "\ufffd", (0,))
    assert stream.push(a, False) == Piece("content", "<tool_call>", (1,))
    assert stream.push(FIRST_BYTE + 0xF0, False) == Piece("content", "a", (2,))
    assert stream.finish() == [Piece("content", "\ufffd", (3,))]


@pytest.mark.parametrize("marker", [THINK, END_THINK, EOS])
def test_a_marker_without_text_ends_a_character(marker: int) -> None:
    tokenizer = made_of(b"\xf0\x9f", b"\x98\x80")
    first, second = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    pieces = streamed(TextStream(tokenizer), [(first, False), (marker, False), (second, False)])
    assert joined(pieces, "content") == "\ufffd" * 3
    assert pieces[0] == Piece("content", "\ufffd", (0,))


def test_a_token_behind_a_broken_character_begins_behind_it() -> None:
    tokenizer = made_of("EN", b"\x80EN", b"\xa9EN")
    behind, stray, whole = tokenizer.vocab_size - 3, tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    for token, shown, rest in (
        (behind, Piece("content", "\ufffd", (0,)), Piece("content", "EN", (1,))),
        (stray, Piece("content", "\ufffd\ufffd", (0, 1)), Piece("content", "EN", ())),
        (whole, Piece("content", "é", (0, 1)), Piece("content", "EN", ())),
    ):
        stream = TextStream(tokenizer, stop=StopMatcher(["END"]))
        start = 0xF0 if token == stray else 0xC3
        assert stream.push(FIRST_BYTE + start, False) is None
        assert stream.push(token, False) == shown
        assert stream.finish() == [rest]


def test_nothing_is_shown_behind_a_stop_even_of_the_other_channel() -> None:
    tokenizer = made_of("a")
    stream = TextStream(tokenizer, stop=StopMatcher(["\ufffd"]))
    assert stream.push(FIRST_BYTE + 0xE2, False) is None
    assert stream.push(tokenizer.vocab_size - 1, True) is None
    assert (stream.stop_string, stream.finish()) == ("\ufffd", [])


@given(parts=st.lists(st.text("ab\n ", min_size=1, max_size=3), max_size=12), stops=STOPS)
@example(parts=["ab"], stops=["b"])
def test_every_shown_token_is_named_with_its_first_character(parts: list[str], stops: list[str]) -> None:
    tokenizer = made_of(*sorted(set(parts)))
    decided = [(i, False) for i in spelt(tokenizer, *parts)]
    text = "".join(parts)
    lead = len(text) - len(text.lstrip("\n"))
    starts = [max(sum(map(len, parts[:number])) - lead, 0) for number in range(len(parts))]
    ends = [sum(map(len, parts[: number + 1])) - lead for number in range(len(parts))]
    at = 0
    for piece in streamed(TextStream(tokenizer, stop=StopMatcher(stops) if stops else None), decided):
        upto = at + len(piece.text)
        assert list(piece.tokens) == [n for n in range(len(parts)) if at <= starts[n] < upto and ends[n] > starts[n]]
        at = upto


def test_a_stop_of_many_characters_costs_no_more_per_token(tokenizers: Callable[[str], MarkedTokenizer]) -> None:
    """Structure instead of a clock: what is held is never longer than the stop."""
    tokenizer = made_of("aaaa")
    stream = TextStream(tokenizer, stop=StopMatcher(["a" * 255 + "b"]))
    pieces = [stream.push(tokenizer.vocab_size - 1, False) for _ in range(1000)]
    assert sum(len(piece.text) for piece in pieces if piece) == 4000 - 255


def test_a_surrogate_spelt_in_utf8_is_invalid_byte_by_byte(tokenizer: MarkedTokenizer) -> None:
    """CPython's incremental decoder waits for more behind ED A0; the whole gives one U+FFFD per byte."""
    of_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    for data in (b"\xed\xa0", b"\xed\xbf", b"\xed\xa0\x80", b"\xed\xa0A"):
        check(tokenizer, [(of_byte[bytes([byte])], False) for byte in data])
