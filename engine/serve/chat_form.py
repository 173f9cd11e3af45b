"""How ``/v1/chat/completions`` writes choices: messages and deltas with reasoning apart from the answer."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.engine import Delta, TokenLogprob
from headrace.engine.serve.bodies import Collected, Envelope, Json, finite
from headrace.tokenizer import Tokenizer


class ChatForm:
    """See bodies.Form."""

    chunk_kind = "chat.completion.chunk"
    body_kind = "chat.completion"
    prompt_ids_at_top = True

    def __init__(self, envelope: Envelope) -> None:
        self._logprobs = envelope.logprobs
        self._tokenizer = envelope.tokenizer

    def opening(self) -> Json:
        """The role comes first, alone."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, event: Delta) -> Json:
        """Text of one channel."""
        key = "content" if event.channel == "content" else "reasoning_content"
        part: Json = {"delta": {key: event.text} if event.text else {}}
        if self._logprobs and event.logprobs:
            entries = logprob_entries(event.logprobs, self._tokenizer)
            part["logprobs"] = {"content": None, "reasoning_content": None, "refusal": None, key: entries}
        return part

    def end(self) -> Json:
        """An empty delta."""
        return {"delta": {}}

    def choice(self, collected: Collected) -> Json:
        """The whole message; what is empty is null."""
        message = {
            "role": "assistant",
            "content": "".join(collected.content) or None,
            "reasoning_content": "".join(collected.reasoning) or None,
            "refusal": None,
        }
        if not self._logprobs:
            return {"message": message, "logprobs": None}
        logprobs = {
            "content": logprob_entries(collected.content_logprobs, self._tokenizer),
            "reasoning_content": logprob_entries(collected.reasoning_logprobs, self._tokenizer),
            "refusal": None,
        }
        return {"message": message, "logprobs": logprobs}


def logprob_entries(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer) -> list[Json]:
    """Entries of ``logprobs.content``. A token that is part of a character shows U+FFFD; its bytes are exact."""
    entries = []
    for item in logprobs:
        top = [_entry(tokenizer.token_bytes(token_id), logprob) for token_id, logprob in item.top]
        entries.append(_entry(item.bytes, item.logprob) | {"top_logprobs": top})
    return entries


def _entry(token: bytes, logprob: float) -> Json:
    return {"token": token.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(token)}
