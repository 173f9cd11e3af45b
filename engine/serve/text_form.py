"""How ``/v1/completions`` writes choices: plain text, and log-probabilities as parallel arrays."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence

from headrace.engine import Delta, TokenLogprob
from headrace.engine.serve.bodies import Collected, Envelope, Json, finite


class TextForm:
    """See bodies.Form."""

    chunk_kind = body_kind = "text_completion"
    prompt_ids_at_top = False

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope
        self._offsets: dict[int, Offsets] = {}

    def opening(self) -> None:
        """There is no role to tell."""

    def delta(self, event: Delta) -> Json:
        """More text."""
        part: Json = {"text": event.text}
        if self._envelope.logprobs and event.logprobs:
            part["logprobs"] = self._arrays(event.logprobs, self._offsets.setdefault(event.index, Offsets()))
        return part

    def end(self) -> Json:
        """No more text."""
        return {"text": ""}

    def choice(self, collected: Collected) -> Json:
        """The whole text."""
        logprobs = self._arrays(collected.content_logprobs, Offsets()) if self._envelope.logprobs else None
        return {"text": "".join(collected.content), "logprobs": logprobs}

    def _arrays(self, items: Sequence[TokenLogprob], offsets: Offsets) -> Json:
        """OpenAI's form: the token itself is always among ``top_logprobs``, so these may be one more than asked for."""
        return {
            "tokens": [token_name(item.bytes) for item in items],
            "token_logprobs": [finite(item.logprob) for item in items],
            "top_logprobs": [
                {token_name(item.bytes): finite(item.logprob)}
                | {token_name(self._envelope.tokenizer.token_bytes(i)): finite(value) for i, value in item.top}
                for item in items
            ],
            "text_offset": [offsets.of(item.bytes) for item in items],
        }


class Offsets:
    """Where tokens begin in a choice's text, in characters."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def of(self, token: bytes) -> int:
        """The offset of the next token; one that goes on with a character begins where the character does."""
        offset = self._characters
        self._characters += len(self._decoder.decode(token))
        return offset


def token_name(token: bytes) -> str:
    """A token as a key: its text, or its bytes spelt out where they are not whole characters (OpenAI's way)."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
