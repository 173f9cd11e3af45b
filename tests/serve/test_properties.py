"""Whatever is sent is taken or refused by name; whatever is generated arrives whole. Against openai's own decoder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from scripted_engine import CodePoints, ScriptedEngine, delta, finished

from headrace.engine import Delta, Finished, Usage
from headrace.engine.serve.bodies import Answer, Chunks, Envelope, Form
from headrace.engine.serve.chat_form import ChatForm
from headrace.engine.serve.errors import ApiError
from headrace.engine.serve.history import Record
from headrace.engine.serve.profiles import NIM, OPENAI
from headrace.engine.serve.prompts import CompletionRequest, detokenize, parse_completion, tokenize
from headrace.engine.serve.protocol import ChatRequest, parse_chat
from headrace.engine.serve.stream import events_of
from headrace.engine.serve.text_form import TextForm

NAME = "served/name"
ENGINE: Any = ScriptedEngine()

# --- requests -------------------------------------------------------------------------------------------------------

PARSERS: dict[str, Callable[[bytes], Any]] = {
    "chat": lambda body: parse_chat(body, None, NIM, NAME, 4096),
    "chat, openai": lambda body: parse_chat(body, "*/*", OPENAI, NAME, 4096),
    "completion": lambda body: parse_completion(body, None, NIM, NAME, ENGINE),
    "tokenize": lambda body: tokenize(body, NIM, NAME, ENGINE),
    "detokenize": lambda body: detokenize(body, NAME, ENGINE),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "context", "text", "high", "none", 0, 1, 2**64, -1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "reasoning_budget", "x"]), inner)
    ),
    max_leaves=8,
)
NAMES = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "tokens", "tools", "echo", "x"})
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "tokens": [5]}


def taken_or_refused(parse: Callable[[bytes], Any], body: bytes) -> None:
    """Nothing but a value or an ApiError that names something, short enough to read."""
    try:
        parse(body)
    except ApiError as error:
        assert error.status in (400, 404, 422)
        assert error.code == "malformed_json" or error.param
        assert 0 < len(error.message) < 400
        json.dumps(error.body()).encode()


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=150)
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), good=st.booleans())
def test_any_fields(parser: str, fields: dict[str, Any], good: bool) -> None:
    only = {"messages": 0} if parser == "tokenize" else {}  # a prompt or messages, not both
    base = {name: value for name, value in GOOD.items() if name not in only} if good else {}
    taken_or_refused(PARSERS[parser], json.dumps(base | fields).encode())


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=100)
@given(
    body=st.binary(max_size=40)
    | st.builds(
        lambda at, piece: json.dumps(GOOD).encode()[:at] + piece + json.dumps(GOOD).encode()[at:],
        st.integers(0, 80),
        st.binary(min_size=1, max_size=4),
    )
)
@example(body=b'{"messages": ' + b"[" * 5000)
@example(body=b'{"seed": ' + b"9" * 5000 + b"}")
@example(body=b'\xef\xbb\xbf{"prompt": "x"}')
def test_any_bytes(parser: str, body: bytes) -> None:
    taken_or_refused(PARSERS[parser], body)


# --- answers --------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=6) | st.sampled_from(["\n", "\r\n", "\r", "\n\ndata: [DONE]\n\n", "\x85", "\u2028", "\0", "🙂"])
PIECES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["reasoning", "content"]), TEXT), max_size=8)


def envelope(n: int, logprobs: bool, token_ids: bool, usage: bool) -> Envelope:
    return Envelope(
        id="id",
        created=1,
        model=NAME,
        fingerprint="f",
        tokenizer=CodePoints(),  # type: ignore[arg-type]
        prompts=[[1, 2]] if token_ids else [],
        n=n,
        logprobs=logprobs,
        token_ids=token_ids,
        include_usage=usage,
    )


def streamed(form: Form, wrapping: Envelope, events: list[Delta | Finished]) -> list[dict[str, Any]]:
    """The chunks as openai's decoder reads them, of bytes that come one by one."""

    async def rest() -> AsyncIterator[Delta | Finished]:
        for event in events[1:]:
            yield event

    async def collect() -> bytes:
        record = Record("req-1", "POST", "/", "", None)
        return b"".join([data async for data in events_of(Chunks(wrapping, form), events[0], rest(), record)])

    data = asyncio.run(collect())
    decoded = [sse.data for sse in SSEDecoder().iter_bytes(iter([data[i : i + 1] for i in range(len(data))]))]
    assert decoded.pop() == "[DONE]"
    assert data.count(b"\n") == 2 * (len(decoded) + 1)
    return [json.loads(item) for item in decoded]


@pytest.mark.parametrize("kind", [ChatForm, TextForm])
@settings(max_examples=150)
@given(PIECES, st.booleans(), st.booleans(), st.booleans())
def test_the_stream_put_together_is_the_body(
    kind: type, pieces: list[tuple[int, Any, str]], logprobs: bool, token_ids: bool, usage: bool
) -> None:
    if kind is TextForm:
        pieces = [(index, "content", text) for index, _, text in pieces]
    events: list[Delta | Finished] = [delta(c, text, index=i, logprobs=logprobs) for i, c, text in pieces]
    events += [finished("length", index=i, usage=Usage(3, 5, 2, 1), token_ids=(2,)) for i in range(3)]
    wrapping = envelope(3, logprobs, token_ids, usage)
    answer = Answer(wrapping, kind(wrapping), 3)
    for event in events:
        answer.add(event)
    body = answer.body()
    chunks = streamed(kind(wrapping), wrapping, events)
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], body["usage"])
    for choice in body["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        if kind is ChatForm:
            assert parts[0]["delta"] == {"role": "assistant", "content": ""}
            for key in ("content", "reasoning_content"):
                assert ("".join(part["delta"].get(key) or "" for part in parts) or None) == choice["message"][key]
        else:
            assert "".join(part["text"] for part in parts) == choice["text"]
        if token_ids:
            assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
        for key in (choice["logprobs"] or {}) if logprobs else ():
            if choice["logprobs"][key] is not None:
                entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][key] or ()]
                assert entries == choice["logprobs"][key]
