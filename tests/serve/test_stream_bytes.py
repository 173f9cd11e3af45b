"""The bytes of a stream: what is written for every token goes a short way, and must be what the long way gives."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from live_server import QUESTION, SECONDS, LiveServer
from scripted_engine import CodePoints, ScriptedEngine, answer, delta, finished

from headrace.engine.serve.bodies import Chunks, Envelope
from headrace.engine.serve.chat_form import ChatForm
from headrace.engine.serve.stream import EventWriter, event
from headrace.engine.serve.text_form import TextForm

TEXTS = [
    "plain",
    "",
    'quotes " and \\ back',
    "\u2028line\u2029ends\x85",
    "\x00\x1f\t\n\r",
    "ünï \U0001f600",
    "a" * 5000,
]


def chunks(form: type[ChatForm] | type[TextForm], **fields: Any) -> Chunks:
    envelope = Envelope(**{
        "id": "chatcmpl-1", "created": 1, "model": 'a "model"\u2028', "fingerprint": "f", "tokenizer": CodePoints(),
        "prompts": [], "n": 2, "logprobs": False, "token_ids": False, "include_usage": True,
    } | fields)  # fmt: skip
    return Chunks(envelope, form(envelope))


@pytest.mark.parametrize(
    "fields", [{}, {"include_usage": False}, {"token_ids": True, "prompts": [[1]]}, {"logprobs": True}]
)
@pytest.mark.parametrize("form", [ChatForm, TextForm])
def test_events_are_the_chunks_one_by_one(form: Any, fields: dict[str, Any]) -> None:
    logprobs = fields.get("logprobs", False)
    said = [
        delta(channel, text, index=index, logprobs=logprobs)
        for text in TEXTS * 2 for index in (0, 1) for channel in ("reasoning", "content")
    ]  # fmt: skip
    writer, plain = EventWriter(chunks(form, **fields)), chunks(form, **fields)
    for item in [*said, finished(index=1), finished(index=0)]:
        assert writer.of(item) == b"".join(event(chunk) for chunk in plain.of(item))


def test_no_event_holds_a_line_end_of_any_kind() -> None:
    writer = EventWriter(chunks(ChatForm))
    for text in TEXTS * 2:
        for line in writer.of(delta("content", text)).decode().removesuffix("\n\n").split("\n\n"):
            assert len(line.splitlines()) <= 1
            assert not line or json.loads(line.removeprefix("data: "))


def asked(server: LiveServer, version: str) -> tuple[bytes, bytes]:
    """The head and the body of a stream, as they come over the wire."""
    body = json.dumps({"messages": QUESTION, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    found, _, rest = received.partition(b"\r\n\r\n")
    return found.lower(), rest


def test_chunks_are_whole_events(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer(content=("é" * 300, "x")))
    head, rest = asked(server, "1.1")
    assert b"transfer-encoding: chunked" in head
    parts = []
    while rest != b"0\r\n\r\n":
        size, _, rest = rest.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    assert all(part.startswith(b"data: ") and part.endswith(b"\n\n") for part in parts)
    assert "é" * 300 in b"".join(parts).decode()
    assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_a_client_of_http_1_0_gets_no_chunks(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer())
    head, rest = asked(server, "1.0")
    assert b"chunked" not in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"\n\ndata: [DONE]\n\n")
