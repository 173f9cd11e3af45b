"""What goes out: the JSON body of an answer and the chunks of a stream, made of the engine's events.

A form (chat_form.py, text_form.py) says how one path writes its choices; what both have in common is here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from headrace.engine import Delta, Finished, TokenLogprob, Usage
from headrace.engine.serve.errors import generation_failed, unavailable

if TYPE_CHECKING:
    from headrace.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for (the value OpenAI uses)."""

Json = dict[str, Any]

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_SLICE = 64
"""Items of a list that are dumped at once."""
_NESTING = 4
"""Levels down to the lists that can be long: body, choices, choice, logprobs."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of an answer repeats, and what was asked for beside the text."""

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]  # ids of each prompt; empty where token ids were not asked for
    n: int  # choices for each prompt; choice i belongs to prompt i // n
    logprobs: bool
    token_ids: bool
    include_usage: bool

    def body(self, kind: str, choices: list[Json]) -> Json:
        """The outer object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def prompt_ids(self, index: int) -> list[int]:
        """The ids of the prompt that a choice belongs to."""
        return list(self.prompts[index // self.n])


@dataclass(slots=True)
class Collected:
    """One choice of a JSON answer while its events come in."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    content_logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Delta | Finished) -> None:
        """Take in an event. Raises ApiError for an end that is not an answer."""
        self.token_ids.extend(event.token_ids)
        if isinstance(event, Finished):
            check_finished(event)
            self.finished = event
            return
        answer = event.channel == "content"
        (self.content if answer else self.reasoning).append(event.text)
        (self.content_logprobs if answer else self.reasoning_logprobs).extend(event.logprobs or ())


class Form(Protocol):
    """How one path writes choices. An instance serves one answer."""

    chunk_kind: str
    body_kind: str
    prompt_ids_at_top: bool
    """Whether a prompt's ids stand beside the choices or in each."""

    def opening(self) -> Json | None:
        """The choice's part of the chunk before a choice's first delta, if there is one."""

    def delta(self, event: Delta) -> Json:
        """The choice's part of a delta's chunk: text and log-probabilities."""

    def end(self) -> Json:
        """The choice's part of the last chunk."""

    def choice(self, collected: Collected) -> Json:
        """The choice's part of a JSON body: text and log-probabilities."""


class Tally:
    """Usage of an answer. A prompt counts once for all its choices."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._prompts: dict[int, Usage] = {}

    def add(self, index: int, usage: Usage) -> None:
        """Count a choice."""
        prompt = index // self._n
        self._prompts[prompt] = self._prompts.get(prompt, Usage()) + usage

    def total(self) -> Usage:
        """The sum over prompts."""
        parts = self._prompts.values()
        return Usage(
            sum(u.prompt_tokens for u in parts),
            sum(u.completion_tokens for u in parts),
            sum(u.reasoning_tokens for u in parts),
            sum(u.cached_tokens for u in parts),
        )


class Chunks:
    """The chunks of one stream, in order: opening, deltas and finish for each choice; then usage."""

    def __init__(self, envelope: Envelope, form: Form) -> None:
        self._envelope = envelope
        self._form = form
        self._opened: set[int] = set()
        self._tally = Tally(envelope.n)

    def of(self, event: Delta | Finished) -> list[Json]:
        """The chunks that an event stands for. Raises ApiError for an end that is not an answer."""
        index, token_ids = event.index, self._envelope.token_ids
        choices: list[Json] = []
        if index not in self._opened and (opening := self._form.opening()) is not None:
            choices.append(opening)
        if isinstance(event, Finished):
            self._tally.add(index, event.usage)
            check_finished(event)
            choices.append(self._form.end() | {"finish_reason": event.reason})
        elif event.text or event.logprobs or token_ids:
            choices.append(self._form.delta(event))
        if token_ids and choices:
            choices[-1]["token_ids"] = list(event.token_ids)
        return [self._chunk(index, choice) for choice in choices]

    def is_text_alone(self, event: Delta) -> bool:
        """Whether an event is one chunk that holds nothing of its own but text."""
        return bool(event.text) and not event.logprobs and not self._envelope.token_ids and event.index in self._opened

    def usage(self) -> Json | None:
        """The chunk after the last choice's end, if it was asked for."""
        if not self._envelope.include_usage:
            return None
        return self._envelope.body(self._form.chunk_kind, []) | {"usage": usage_body(self._tally.total())}

    def _chunk(self, index: int, part: Json) -> Json:
        choice = {"index": index, **part}
        choice.setdefault("logprobs", None)
        choice.setdefault("finish_reason", None)
        chunk = self._envelope.body(self._form.chunk_kind, [choice])
        if self._envelope.include_usage:
            chunk["usage"] = None
        if self._envelope.token_ids and index not in self._opened:
            if not self._form.prompt_ids_at_top:
                choice["prompt_token_ids"] = self._envelope.prompt_ids(index)
            elif not self._opened:
                chunk["prompt_token_ids"] = self._envelope.prompt_ids(index)
        self._opened.add(index)
        return chunk


class Answer:
    """The JSON body of a request, collected from the same events that a stream is made of."""

    def __init__(self, envelope: Envelope, form: Form, num_choices: int) -> None:
        self._envelope = envelope
        self._form = form
        self._choices = [Collected() for _ in range(num_choices)]

    def add(self, event: Delta | Finished) -> None:
        """Take in an event. Raises ApiError for an end that is not an answer."""
        self._choices[event.index].add(event)

    def dumped(self) -> bytes:
        """The whole body as it goes out; every choice must have finished."""
        return dumped(self.body())

    def body(self) -> Json:
        """The whole body; every choice must have finished."""
        envelope, form = self._envelope, self._form
        tally = Tally(envelope.n)
        choices = []
        for index, collected in enumerate(self._choices):
            assert collected.finished is not None
            tally.add(index, collected.finished.usage)
            choice = {"index": index, **form.choice(collected), "finish_reason": collected.finished.reason}
            if envelope.token_ids:
                choice["token_ids"] = collected.token_ids
                if not form.prompt_ids_at_top:
                    choice["prompt_token_ids"] = envelope.prompt_ids(index)
            choices.append(choice)
        body = envelope.body(form.body_kind, choices) | {"usage": usage_body(tally.total())}
        if envelope.token_ids and form.prompt_ids_at_top:
            body["prompt_token_ids"] = envelope.prompt_ids(0)
        return body


def dumped(body: Json) -> bytes:
    """A body as JSON, put together of small pieces: one call over a long answer would stop every other thread."""
    return "".join(_pieces(body, _NESTING)).encode()


def _pieces(value: Any, nesting: int) -> Iterator[str]:
    if isinstance(value, dict) and nesting:
        separator = "{"
        for key, item in value.items():
            yield f"{separator}{_encode(key)}:"
            yield from _pieces(item, nesting - 1)
            separator = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > (0 if nesting else _SLICE):
        separator = "["
        whole = nesting > 0 and isinstance(value[0], dict)
        for start in range(0, len(value), 1 if whole else _SLICE):
            yield separator
            if whole:
                yield from _pieces(value[start], nesting - 1)
            else:
                yield _encode(value[start : start + _SLICE])[1:-1]
            separator = ","
        yield "]"
    else:
        yield _encode(value)


def check_finished(event: Finished) -> None:
    """Raise ApiError if a choice ended without an answer."""
    if event.reason == "error":
        raise generation_failed(event.failure)
    if event.reason == "abort":
        raise unavailable("the request was aborted: the server is shutting down", "aborted")


def usage_body(usage: Usage) -> Json:
    """Token counts in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(logprob, LEAST_LOGPROB)
