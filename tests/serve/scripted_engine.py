"""An engine that says what it is told to: what the HTTP server and the CLI are tested against.

It has the part of Engine's interface that they use. Tokens are characters' code points, so token bytes are known.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from headrace.engine import ChatOptions, Delta, EngineConfig, Finished, SamplingParams, TokenLogprob, Usage


class Hold:
    """An entry of a script at which the stream waits until it is released or aborted."""


HOLD = Hold()
Event = Delta | Finished | Hold
Script = Sequence[Event] | Callable[[Any], Sequence[Event]]  # or made from the prompt


class CodePoints:
    """A tokenizer whose token is a code point."""

    vocab_size = 0x110000

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def encode_with_markers(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def delta(
    channel: str, text: str, *, index: int = 0, logprobs: bool = False, tokens: Sequence[int] | None = None
) -> Delta:
    """A delta of one token per character; each token's logprob is -its id / 1000, its rival is the next code point."""
    ids = tuple(ord(c) for c in text) if tokens is None else tuple(tokens)
    entries = tuple(
        TokenLogprob(i, chr(i), chr(i).encode(), -i / 1000, ((i, -i / 1000), (i + 1, float("-inf")))) for i in ids
    )
    return Delta(index, channel, text, ids, entries if logprobs else None)


def finished(reason: str = "stop", *, index: int = 0, usage: Usage | None = None, **fields: Any) -> Finished:
    """The end of a choice. One that failed did so of its logits, unless the fields say otherwise."""
    if reason == "error":
        fields.setdefault("failure", "logits")
    return Finished(index, reason, usage or Usage(7, 5, 2, 0), **fields)


def answer(
    reasoning: Sequence[str] = ("Two and ", "two."), content: Sequence[str] = ("It is ", "4."), **fields: Any
) -> list[Event]:
    """The script of an ordinary answer."""
    return [*(delta("reasoning", t) for t in reasoning), *(delta("content", t) for t in content), finished(**fields)]


@dataclass(frozen=True)
class Call:
    """What the engine was asked."""

    prompt: Any
    params: SamplingParams
    options: ChatOptions | None


class ScriptedStream:
    """Plays a script to a thread or to a coroutine."""

    def __init__(self, script: Sequence[Event], on_end: Callable[[], None]) -> None:
        self._script = list(script)
        self._wake = threading.Event()
        self._on_end = on_end
        self._open = list(dict.fromkeys(event.index for event in script if isinstance(event, Finished))) or [0]
        self.aborted = threading.Event()

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._open and not self.aborted.is_set():
            self.aborted.set()
            self._wake.set()
            self._on_end()

    def release(self) -> None:
        """Let a held stream go on."""
        self._wake.set()

    def _next(self) -> Event | None:
        if self.aborted.is_set() and self._open:
            return self._ended(finished("abort", index=self._open[0]))
        if not self._open or not self._script:
            return None
        event = self._script.pop(0)
        return self._ended(event) if isinstance(event, Finished) else event

    def _ended(self, event: Finished) -> Finished:
        self._open.remove(event.index)
        if not self._open and not self.aborted.is_set():
            self._on_end()
        return event

    def __iter__(self) -> Iterator[Delta | Finished]:
        while (event := self._next()) is not None:
            if isinstance(event, Hold):
                self._wake.wait()
            else:
                yield event

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        while (event := self._next()) is not None:
            if isinstance(event, Hold):
                await asyncio.to_thread(self._wake.wait)
            else:
                yield event

    def __enter__(self) -> ScriptedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class ScriptedEngine:
    """Plays the next of its scripts (the last one for ever), or raises it if it is an exception."""

    model_name = "scripted/model"
    max_context = 4096
    accepting = True
    fault: str | None = None
    step_seconds = 0.0
    template_arguments: frozenset[str] = frozenset()

    def __init__(self, *scripts: Script | Exception) -> None:
        self._changed = threading.Condition()
        self.tokenizer = CodePoints()
        self.running = 0
        self.steps = 0
        self.config = EngineConfig(max_sequences=64, max_waiting=64)
        self.play(*scripts)

    def play(self, *scripts: Script | Exception) -> None:
        """What the next requests get; the last script is for all that follow."""
        self._scripts = list(scripts) or [answer()]
        self.calls: list[Call] = []
        self.streams: list[ScriptedStream] = []

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
    ) -> ScriptedStream:
        return self._start([*messages], params, options)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> Any:
        return SimpleNamespace(ids=[10, 11, 12], text="", thinking=True)

    def generate_stream(self, prompt: Any, params: SamplingParams | None = None) -> ScriptedStream:
        return self._start(prompt, params, None)

    def generate_streams(self, prompts: Sequence[Any], params: SamplingParams | None = None) -> list[ScriptedStream]:
        streams: list[ScriptedStream] = []
        try:
            for prompt in prompts:
                streams.append(self.generate_stream(prompt, params))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return streams

    def raw_prompt_ids(self, prompt: str) -> list[int]:
        return self.tokenizer.encode_with_markers(prompt)

    def _start(self, prompt: Any, params: SamplingParams | None, options: ChatOptions | None) -> ScriptedStream:
        with self._changed:
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        if isinstance(script, BaseException):
            raise script
        stream = ScriptedStream(script(prompt) if callable(script) else script, self._one_less)
        with self._changed:
            self.calls.append(Call(prompt, params or SamplingParams(), options))
            self.streams.append(stream)
            self.running += 1
            self._changed.notify_all()
            return stream

    def _one_less(self) -> None:
        with self._changed:
            self.running -= 1
            self._changed.notify_all()

    def wait_for(self, ready: Callable[[], bool], seconds: float = 20) -> None:
        """Block until a condition on the counters holds."""
        with self._changed:
            assert self._changed.wait_for(ready, seconds), "the server did not get there in time"

    def stats(self) -> dict[str, int]:
        """Those of an engine that decodes all the time, so that nobody asks it whether it lives."""
        self.steps += 1
        sizes = {"free_pages": 100 - self.running, "total_pages": 100, "free_slots": 64, "total_slots": 64}
        return {"running": self.running, "waiting": 0, "steps": self.steps, "preemptions": 0, **sizes}

    def close(self) -> None:
        for stream in self.streams:
            stream.abort()

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
