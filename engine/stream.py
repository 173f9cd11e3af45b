"""Streams: from the ids in the inboxes to typed events with text. Runs in the reader's thread or event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from headrace.engine.loop import End, Inbox, Token
from headrace.engine.reasoning import REASONING_PHASES, reasoning_markers
from headrace.engine.request import (
    Choice,
    Completion,
    Delta,
    Failure,
    Finished,
    FinishReason,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from headrace.engine.waiting import LoopWaiter, ThreadWaiter, Waiter
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.tokenizer import StopMatcher, Tokenizer
from headrace.tokenizer.stream import Piece, TextStream

_REASONS: dict[Finish, FinishReason] = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.ERROR: "error"}


class ChoiceReader:
    """Reads one sequence's inbox: ids become text, stop strings end it, and the one Finished closes it.

    ``advance`` takes items from the inbox and makes text of them. With stop strings the engine thread calls it at
    every arrival, so that a match ends the sequence before its next step; without, and after it has raised there, the
    reader's thread does, and the engine spends nothing on text. ``events`` is always the reader's.
    """

    def __init__(
        self,
        index: int,
        inbox: Inbox,
        text: TextStream,
        tokenizer: Tokenizer,
        control: ControlIds,
        prompt_tokens: int,
        abort: Callable[[], None],
        *,
        stop: StopMatcher | None = None,
        logprobs: bool = False,
        content_from_reasoning: bool = False,
    ) -> None:
        self.index = index
        self.inbox = inbox
        self.ids: list[int] = []
        self.finished = False  # the Finished event has been made
        self.abort = abort
        self._stop = stop
        if stop is not None:
            inbox.on_arrival = self.advance
        self._text = text
        self._tokenizer = tokenizer
        self._tool_call = control.tool_call
        self._markers = reasoning_markers(control)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self._pieces: deque[Piece] = deque()
        self._end: Finished | None = None
        self._content_from_reasoning = content_from_reasoning
        self._reasoning: list[str] = []  # kept only for content_from_reasoning
        self._answered = False
        self._reported = 0  # ids that an event has carried

    @property
    def ready(self) -> bool:
        """Whether ``events`` would return something."""
        return not self.finished and bool(
            self._pieces or self._end or (self.inbox.items and self.inbox.on_arrival is None)
        )

    def advance(self) -> None:
        """Make text of everything that has arrived. Called by one thread only, see above."""
        items, text = self.inbox.items, self._text
        while items and self._end is None:
            item = items.popleft()
            if isinstance(item, End):
                if item.failure != "text":  # what is held back may be what failed
                    self._pieces.extend(text.finish())
                self._close("abort" if item.aborted else _REASONS[item.finish], error=item.error, failure=item.failure)
                return
            piece = self._take(item)
            if piece is not None:
                self._pieces.append(piece)
            if text.stop_string is not None:
                self.abort()
                self._pieces.extend(text.finish())
                self._close("stop", stop_string=text.stop_string)

    def events(self) -> list[Delta | Finished]:
        """What there is to tell, neighbouring pieces of a channel as one delta."""
        if self.inbox.on_arrival is None:
            self.advance()
        end = self._end  # before the pieces: whatever came ahead of it is there by now
        pieces = [self._pieces.popleft() for _ in range(len(self._pieces))]
        events: list[Delta | Finished] = [*self._deltas(pieces)]
        if end is not None:
            events += self._reasoning_as_content(end)
            events.append(replace(end, token_ids=tuple(self.ids[self._reported :])))
            self.finished = True
        return events

    def _reasoning_as_content(self, end: Finished) -> list[Delta]:
        """The reasoning once more, as the answer, by the answer's rules: no newline in front, nothing from a stop on.

        Only where the model never began to answer. Its tokens and log-probabilities stay with the reasoning.
        """
        if not self._content_from_reasoning or self._answered or end.reason == "error" or end.reason == "abort":
            return []
        text = "".join(self._reasoning).lstrip("\n")
        if self._stop is not None:
            _, found, used = self._stop.feed(0, text)
            text = text[: used - len(found or "")]
        entries = None if self._logprobs is None else ()
        return [Delta(self.index, "content", text, (), entries)] if text and end.stop_string is None else []

    def _take(self, item: Token | tuple[int, int]) -> Piece | None:
        if isinstance(item, tuple):
            token, phase = item
        else:
            token, phase = item.token_id, item.phase
            if self._logprobs is not None:
                self._logprobs.append(self._entry(item))
        self.ids.append(token)
        self._completion_tokens += 1
        if phase == Phase.THINKING and token not in self._markers:
            self._reasoning_tokens += 1
        return self._text.push(token, phase in REASONING_PHASES and token != self._tool_call)

    def _entry(self, token: Token) -> TokenLogprob:
        data = self._tokenizer.token_bytes(token.token_id)
        assert token.logprob is not None, "a sequence that wants log-probabilities gets them with every token"
        return TokenLogprob(token.token_id, data.decode("utf-8", "replace"), data, token.logprob, token.top)

    def _deltas(self, pieces: list[Piece]) -> Iterator[Delta]:
        merged: list[Piece] = []
        for piece in pieces:
            if merged and merged[-1].channel == piece.channel:
                last = merged.pop()
                piece = Piece(piece.channel, last.text + piece.text, last.tokens + piece.tokens)
            merged.append(piece)
        for piece in merged:
            upto = max(piece.tokens, default=-1) + 1
            ids = tuple(self.ids[self._reported : upto])
            self._reported = max(self._reported, upto)
            entries = None if self._logprobs is None else tuple(self._logprobs[i] for i in piece.tokens)
            self._answered |= piece.channel == "content"
            if self._content_from_reasoning and piece.channel == "reasoning":
                self._reasoning.append(piece.text)
            yield Delta(self.index, piece.channel, piece.text, ids, entries)

    def _close(
        self,
        reason: FinishReason,
        stop_string: str | None = None,
        error: str | None = None,
        failure: Failure | None = None,
    ) -> None:
        usage = Usage(self._prompt_tokens, self._completion_tokens, self._reasoning_tokens)
        self._end = Finished(
            self.index, reason, usage, stop_string, error, failure, queue_seconds=self.inbox.queue_seconds
        )


class Stream:
    """Events of one request, in the order they come: iterate it, or ``async for`` over it, from one place at a time.

    Every choice yields Delta events and then exactly one Finished. Leaving the context manager, or dropping the
    stream, aborts what is still running; ``abort()`` does so at once, and the stream then ends with Finished "abort".
    """

    def __init__(
        self,
        readers: Sequence[ChoiceReader],
        waiter: ThreadWaiter,
        loop_waiter: Callable[[asyncio.AbstractEventLoop], LoopWaiter],
    ) -> None:
        self._readers = list(readers)
        self._open = self._readers  # those that have not finished
        self._waiter = waiter
        self._loop_waiter = loop_waiter
        self._events: deque[Delta | Finished] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # whose waiter hears of arrivals; None: the thread's

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """All tokens read so far, per choice."""
        return tuple(tuple(r.ids) for r in self._readers)

    def abort(self) -> None:
        """End every unfinished choice."""
        for reader in self._readers:
            if not reader.finished:
                reader.abort()

    close = abort

    def poll(self) -> list[Delta | Finished]:
        """The events that are there, without waiting."""
        self._gather()
        events = list(self._events)
        self._events.clear()
        return events

    @property
    def done(self) -> bool:
        """Whether every event has been handed out."""
        return not self._events and not self._open

    def ready(self) -> bool:
        """Whether ``poll`` would return something, or never will again."""
        return bool(self._events) or not self._open or any(reader.ready for reader in self._open)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta | Finished:
        if self._loop is not None:
            self._loop = None
            self._wake(self._waiter)
        while not self._events:
            if not self._open:
                raise StopIteration
            self._waiter.wait_until(self.ready)
            self._gather()
        return self._events.popleft()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta | Finished:
        if not self._events:
            loop = asyncio.get_running_loop()
            if self._loop is not loop:
                self._loop, self._async_waiter = loop, self._loop_waiter(loop)
                self._wake(self._async_waiter)
        while not self._events:
            if not self._open:
                raise StopAsyncIteration
            await self._async_waiter.wait_until(self.ready)
            self._gather()
        return self._events.popleft()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.abort()

    def __del__(self) -> None:
        self.abort()

    def _wake(self, waiter: Waiter) -> None:
        """From now on it is this waiter that hears of arrivals; the caller looks at what is there before it waits."""
        for reader in self._readers:
            reader.inbox.waiter = waiter

    def _gather(self) -> None:
        for reader in self._open:
            self._events.extend(reader.events())
        self._open = [reader for reader in self._open if not reader.finished]


class Collector:
    """Gathers a stream's events into a Completion."""

    def __init__(self, stream: Stream, params: SamplingParams) -> None:
        self._stream = stream
        self._deltas: list[list[Delta]] = [[] for _ in range(params.n)]
        self._ends: dict[int, Finished] = {}
        self._logprobs = params.logprobs or params.top_logprobs > 0

    def add(self, event: Delta | Finished) -> None:
        """Take in one event."""
        if isinstance(event, Finished):
            self._ends[event.index] = event
        else:
            self._deltas[event.index].append(event)

    def completion(self) -> Completion:
        """The result, once every choice has finished."""
        choices = tuple(self._choice(i) for i in range(len(self._deltas)))
        usage = Usage()
        for end in self._ends.values():
            usage = usage + end.usage
        return Completion(choices, usage)

    def _choice(self, index: int) -> Choice:
        def gather(channel: str) -> tuple[str | None, tuple[TokenLogprob, ...] | None]:
            deltas = [d for d in self._deltas[index] if d.channel == channel]
            entries = tuple(entry for d in deltas for entry in d.logprobs or ()) if self._logprobs else None
            return "".join(d.text for d in deltas) or None, entries

        content, content_logprobs = gather("content")
        reasoning, reasoning_logprobs = gather("reasoning")
        ids = self._stream.token_ids[index]
        end = self._ends[index]
        return Choice(
            index,
            content,
            reasoning,
            end.reason,
            ids,
            content_logprobs,
            reasoning_logprobs,
            stop_string=end.stop_string,
            error=end.error,
        )
