"""What goes out: the JSON body of an answer and the chunks of a stream, made of the engine's events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.engine import Delta, Finished, TokenLogprob, Usage
from headrace.engine.serve.errors import generation_failed, unavailable

if TYPE_CHECKING:
    from headrace.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for (the value OpenAI uses)."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of an answer repeats, and what was asked for beside the text."""

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    prompt_ids: Sequence[int] | None
    logprobs: bool
    include_usage: bool

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The outer object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    @property
    def token_ids(self) -> bool:
        """Whether the client wants to see token ids."""
        return self.prompt_ids is not None


class Chunks:
    """The chunks of one stream, in order: role, reasoning, content, finish for each choice; then usage."""

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope
        self._opened: dict[int, bool] = {}
        self._usage = Usage()

    def of(self, event: Delta | Finished) -> list[dict[str, Any]]:
        """The chunks that an event stands for. Raises ApiError for an end that is not an answer."""
        chunks = [] if event.index in self._opened else [self._open(event.index)]
        if isinstance(event, Finished):
            self._usage += event.usage
            check_finished(event)
            chunk = self._chunk(event.index, {}, finish_reason=event.reason)
            if self._envelope.token_ids:
                chunk["choices"][0]["token_ids"] = list(event.token_ids)
            chunks.append(chunk)
        elif event.text or event.logprobs or self._envelope.token_ids:
            chunks.append(self._delta(event))
        return chunks

    def usage(self) -> dict[str, Any] | None:
        """The chunk after the last choice's end, if it was asked for."""
        if not self._envelope.include_usage:
            return None
        return self._envelope.body("chat.completion.chunk", []) | {"usage": usage_body(self._usage)}

    def _open(self, index: int) -> dict[str, Any]:
        chunk = self._chunk(index, {"role": "assistant", "content": ""})
        if self._envelope.token_ids and not self._opened:
            chunk["prompt_token_ids"] = list(self._envelope.prompt_ids or ())
        self._opened[index] = True
        return chunk

    def _delta(self, event: Delta) -> dict[str, Any]:
        key = "content" if event.channel == "content" else "reasoning_content"
        chunk = self._chunk(event.index, {key: event.text} if event.text else {})
        choice = chunk["choices"][0]
        if self._envelope.logprobs and event.logprobs:
            entries = logprob_entries(event.logprobs, self._envelope.tokenizer)
            choice["logprobs"] = {"content": None, "reasoning_content": None, "refusal": None, key: entries}
        if self._envelope.token_ids:
            choice["token_ids"] = list(event.token_ids)
        return chunk

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._envelope.body("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self._envelope.include_usage else chunk


@dataclass(slots=True)
class _Choice:
    """One choice of a JSON answer while its events come in."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    content_logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Delta | Finished) -> None:
        self.token_ids.extend(event.token_ids)
        if isinstance(event, Finished):
            check_finished(event)
            self.finished = event
            return
        answer = event.channel == "content"
        (self.content if answer else self.reasoning).append(event.text)
        (self.content_logprobs if answer else self.reasoning_logprobs).extend(event.logprobs or ())

    def body(self, index: int, envelope: Envelope) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": "".join(self.content) or None,
            "reasoning_content": "".join(self.reasoning) or None,
            "refusal": None,
        }
        choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
        if envelope.logprobs:
            choice["logprobs"] = {
                "content": logprob_entries(self.content_logprobs, envelope.tokenizer),
                "reasoning_content": logprob_entries(self.reasoning_logprobs, envelope.tokenizer),
                "refusal": None,
            }
        choice["finish_reason"] = self.finished.reason if self.finished else None
        if envelope.token_ids:
            choice["token_ids"] = self.token_ids
        return choice


class Answer:
    """The JSON body of a request, collected from the same events that a stream is made of."""

    def __init__(self, envelope: Envelope, num_choices: int) -> None:
        self._envelope = envelope
        self._choices = [_Choice() for _ in range(num_choices)]

    def add(self, event: Delta | Finished) -> None:
        """Take in an event. Raises ApiError for an end that is not an answer."""
        self._choices[event.index].add(event)

    def body(self) -> dict[str, Any]:
        """The whole body; every choice must have finished."""
        usage = Usage()
        for choice in self._choices:
            assert choice.finished is not None
            usage += choice.finished.usage
        choices = [choice.body(index, self._envelope) for index, choice in enumerate(self._choices)]
        body = self._envelope.body("chat.completion", choices) | {"usage": usage_body(usage)}
        if self._envelope.token_ids:
            body["prompt_token_ids"] = list(self._envelope.prompt_ids or ())
        return body


def check_finished(event: Finished) -> None:
    """Raise ApiError if a choice ended without an answer."""
    if event.reason == "error":
        raise generation_failed(event.error)
    if event.reason == "abort":
        raise unavailable("the request was aborted: the server is shutting down", "aborted")


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def logprob_entries(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Entries of ``logprobs.content``. A token that is part of a character shows U+FFFD; its bytes are exact."""
    entries = []
    for item in logprobs:
        top = [_entry(tokenizer.token_bytes(token_id), logprob) for token_id, logprob in item.top]
        entries.append(_entry(item.bytes, item.logprob) | {"top_logprobs": top})
    return entries


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    text = token.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(token)}
