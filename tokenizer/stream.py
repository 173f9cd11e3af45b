"""Token ids to text while they are generated: whole characters, two channels, white space and stop strings.

What comes out, put together, is what the whole would give at once:

- the bytes of a run of tokens in one channel are decoded as UTF-8, invalid parts as U+FFFD (one per maximal part); a
  marker that shows no text (`<think>`, `</think>`, end of sequence) and a change of channel end a run;
- reasoning is all reasoning runs, less the white space at its end;
- content is all content runs, less the newlines at its beginning, cut where the first stop string begins.

Raw mode has one channel, keeps all white space, and shows every marker but end of sequence as its text.

A llama-style tokenizer's dummy space in front of a text is taken away only with `at_start`: generated text follows a
prompt, so a space at its front is a space.
"""

import codecs
from collections.abc import Iterable
from typing import Literal, NamedTuple

from headrace.tokenizer.base import Tokenizer
from headrace.tokenizer.markers import CLOSE_THINK, OPEN_THINK
from headrace.tokenizer.stops import StopMatcher

Channel = Literal["reasoning", "content"]
REASONING: Channel = "reasoning"
CONTENT: Channel = "content"

# Where tokens begin in a text: (offset in characters, number of the token), ascending.
Starts = list[tuple[int, int]]


class Piece(NamedTuple):
    """Text to show. `tokens`: which pushed tokens (0-based) begin in it; a token is named once, with its first shown
    character, and not at all if none of its text is shown.
    """

    channel: Channel
    text: str
    tokens: tuple[int, ...]


class TextStream:
    """The text of one choice. Push every decided token in order, then call finish() once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: StopMatcher | None = None,
        raw: bool = False,
        eos_ids: Iterable[int] | None = None,
        at_start: bool = False,
    ) -> None:
        """`eos_ids`: the tokenizer's own where None."""
        self.stop_string: str | None = None
        self._text_of = tokenizer.token_text
        self._bytes_of = tokenizer.token_bytes
        self._raw = raw
        self._silent = set(tokenizer.eos_ids if eos_ids is None else eos_ids)
        if not raw:
            self._silent.update(i for i in map(tokenizer.markers.get, (OPEN_THINK, CLOSE_THINK)) if i is not None)
        self._strip_space = at_start and tokenizer.strips_leading_space
        self._count = 0  # tokens pushed
        self._run: Channel = CONTENT  # channel of the last token
        self._partial = b""  # the beginning of a character
        self._partial_tokens: list[int] = []  # whose bytes these are
        self._queue: list[tuple[Channel, str, Starts]] = []  # decoded, not yet shown
        self._reasoning = _Reasoning()
        self._content = _Content(stop, strip=not raw)

    def push(self, token_id: int, reasoning: bool) -> Piece | None:
        """Takes one token, decided in the reasoning channel or not; returns the text that can be shown now, if any."""
        number = self._count
        self._count = number + 1
        if self.stop_string is not None:
            return None
        text = self._text_of(token_id)
        channel = REASONING if reasoning and not self._raw else CONTENT
        if not text or self._partial or self._queue or self._strip_space or token_id in self._silent:
            self._take(token_id, channel, number)
            return self._next_piece()
        self._run = channel
        return self._show(channel, text, [(0, number)])

    def finish(self) -> list[Piece]:
        """The rest: an incomplete character as one U+FFFD, and what was held as a possible stop string."""
        pieces = []
        self._end_run()
        while piece := self._next_piece():
            pieces.append(piece)
        if self.stop_string is None and (piece := self._content.flush()):
            pieces.append(piece)
        return pieces

    def _show(self, channel: Channel, text: str, starts: Starts) -> Piece | None:
        if channel == REASONING:
            return self._reasoning.add(text, starts)
        piece = self._content.add(text, starts)
        self.stop_string = self._content.stop_string
        return piece

    def _next_piece(self) -> Piece | None:
        """Shows what is queued until a piece comes of it; a push that decodes to two channels leaves one queued."""
        while self._queue and self.stop_string is None:
            piece = self._show(*self._queue.pop(0))
            if piece is not None:
                return piece
        return None

    def _take(self, token_id: int, channel: Channel, number: int) -> None:
        """Queues a token's text: the way for any token that is not simply whole characters after whole characters."""
        silent = token_id in self._silent
        if silent or channel != self._run:
            self._end_run()
        self._run = channel
        if silent:
            return
        data = self._bytes_of(token_id)
        if self._strip_space and data:
            data, self._strip_space = data.removeprefix(b" "), False
        if data:
            self._decode(data, number)

    def _end_run(self) -> None:
        """Queues what was left incomplete, in its own channel: mostly one U+FFFD, but the incremental decoder also
        holds back the beginning of a UTF-16 surrogate, which never completes and is invalid byte by byte.
        """
        if self._partial:
            text = self._partial.decode("utf-8", "replace")
            self._queue.append((self._run, text, [(0, token) for token in self._partial_tokens]))
            self._partial, self._partial_tokens = b"", []

    def _decode(self, data: bytes, number: int) -> None:
        """Decodes what was left incomplete and `data`, queues the text, keeps what is incomplete now."""
        # Either the first byte goes on with the character, or that is broken off and this token begins behind it.
        offset = int(_breaks_off(self._partial, data[:1]))
        starts = [(0, token) for token in self._partial_tokens] + [(offset, number)]
        whole = self._partial + data
        text, used = codecs.utf_8_decode(whole, "replace", False)
        if text:
            self._queue.append((self._run, text, starts))
            self._partial_tokens = [number]
        else:
            self._partial_tokens.append(number)
        self._partial = whole[used:]


def _breaks_off(partial: bytes, byte: bytes) -> bool:
    """Whether `byte` cannot go on with the character begun in `partial`."""
    if not partial:
        return False
    text, used = codecs.utf_8_decode(partial + byte, "replace", False)
    return used > 0 and (used <= len(partial) or len(text) > 1)


class _Held:
    """Text of one channel that waits to be shown, and where tokens begin in it."""

    def __init__(self, channel: Channel) -> None:
        self.text = ""
        self._channel = channel
        self._starts: Starts = []
        self._named = -1  # the last token named in a piece

    def add(self, text: str, starts: Starts) -> None:
        length = len(self.text)
        self._starts += [(offset + length, token) for offset, token in starts] if length else starts
        self.text += text

    def release(self, end: int) -> Piece | None:
        """Shows the first `end` characters."""
        if not end:
            return None
        if len(self._starts) == 1 and end == len(self.text):  # by far the most common: one token, all of its text
            token, text = self._starts[0][1], self.text
            named, self._named = token > self._named, max(token, self._named)
            self._starts, self.text = [], ""
            return Piece(self._channel, text, (token,) if named else ())
        tokens = []
        while self._starts and self._starts[0][0] < end:
            token = self._starts.pop(0)[1]
            if token > self._named:  # one token may begin several queued texts: its first counts
                tokens.append(token)
                self._named = token
        self._starts = [(offset - end, token) for offset, token in self._starts]
        piece = Piece(self._channel, self.text[:end], tuple(tokens))
        self.text = self.text[end:]
        return piece


class _Reasoning:
    """The reasoning channel: white space waits until something follows it."""

    def __init__(self) -> None:
        self._held = _Held(REASONING)

    def add(self, text: str, starts: Starts) -> Piece | None:
        self._held.add(text, starts)
        return self._held.release(len(self._held.text.rstrip()))


class _Content:
    """The content channel: newlines at its beginning are dropped, a possible stop string waits."""

    def __init__(self, matcher: StopMatcher | None, strip: bool) -> None:
        self.stop_string: str | None = None
        self._matcher = matcher
        self._state = 0
        self._strip = strip
        self._held = _Held(CONTENT)

    def add(self, text: str, starts: Starts) -> Piece | None:
        if self._strip:
            stripped = text.lstrip("\n")
            if not stripped:
                return None
            if len(stripped) < len(text):
                # Newlines are whole characters of one token, so only that token begins in this text.
                starts = [(0, token) for _, token in starts]
            text, self._strip = stripped, False
        held = self._held
        held.add(text, starts)
        if self._matcher is None:
            return held.release(len(held.text))
        before = len(held.text) - len(text)
        self._state, self.stop_string, used = self._matcher.feed(self._state, text)
        if self.stop_string is not None:
            return held.release(before + used - len(self.stop_string))
        return held.release(len(held.text) - self._matcher.depth[self._state])

    def flush(self) -> Piece | None:
        """Shows what was held as a possible stop string."""
        return self._held.release(len(self._held.text))
