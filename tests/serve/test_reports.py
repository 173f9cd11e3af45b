"""What is told of requests that never reach the application, or are left; the API's description, template arguments."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import QUESTION, SECONDS, LiveServer, connect, live, receive
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import HOLD, ScriptedEngine, delta, finished

from headrace.engine import Engine, EngineConfig, Usage
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model.load import load_model
from headrace.engine.serve import connection, endpoints
from headrace.engine.serve.access import SAFE_HEADERS
from headrace.tokenizer import ChatError, ChatTemplate
from headrace.tokenizer import load as load_tokenizer


@pytest.fixture
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[tuple[LiveServer, ScriptedEngine]]:
    """A server of its own, whose access log is captured."""
    engine = ScriptedEngine()
    logger = logging.getLogger("headrace.access")
    with live(engine) as server:
        before = logger.level
        logger.addHandler(caplog.handler)
        logger.setLevel(logging.INFO)
        yield server, engine
        logger.removeHandler(caplog.handler)
        logger.setLevel(before)


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + SECONDS
    while len(found := [r for r in caplog.records if r.name == "headrace.access"]) < count:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.005)
    return [json.loads(record.getMessage()) for record in found]


def answered(server: LiveServer, status: int) -> float:
    """Requests answered so, by /metrics."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == "headrace:http_requests_total"]
    return sum(s.value for s in samples if s.labels["status"] == str(status) and s.labels["path"] == "other")


# --- requests that are none -----------------------------------------------------------------------------------------


def refusal(server: LiveServer, data: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """What a connection is told that is refused: status, headers, body."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    client.sendall(data)
    head, _, body = receive(client, b"}}").partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    client.close()
    return int(status.split()[1]), dict(line.split(": ", 1) for line in headers), json.loads(body)


def test_what_is_not_http_is_answered_like_everything_else(
    fresh: tuple[LiveServer, ScriptedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    server, _ = fresh
    status, headers, body = refusal(server, b"NOT HTTP\r\n\r\n")
    assert (status, body["error"]["code"]) == (400, "malformed_http")
    assert headers.items() >= SAFE_HEADERS.items()
    [line] = lines(caplog, 1)
    assert (line["id"], line["status"], line["error"]) == (headers["x-request-id"], 400, "malformed_http")
    assert (line["client"], line["path"]) == ("127.0.0.1", "")
    assert answered(server, 400) == 1


def test_a_refused_connection_is_answered_like_everything_else(
    fresh: tuple[LiveServer, ScriptedEngine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = fresh
    assert server.client.get("/health/live").status_code == 200  # our own connection is one
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 1)
    status, headers, body = refusal(server, b"")
    assert (status, body["error"]["code"]) == (503, "too_many_connections")
    assert headers.items() >= SAFE_HEADERS.items()
    assert lines(caplog, 2)[-1]["error"] == "too_many_connections"
    assert answered(server, 503) == 1


# --- requests that are left -----------------------------------------------------------------------------------------


def test_a_request_that_is_left_counts_all_its_choices(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, engine = fresh
    script = [
        delta("reasoning", "Hmm", index=2), delta("content", "ab", index=1), delta("content", "c", index=2),
        finished(index=1, usage=Usage(7, 4, 1)), HOLD, finished(index=0), finished(index=2),
    ]  # fmt: skip
    engine.play(script)
    client = connect(server, stream=True, n=3)
    receive(client, b'"finish_reason":"stop"')
    client.close()
    engine.wait_for(lambda: engine.running == 0)
    while not (entries := server.client.get("/v1/requests").json()["data"]):
        time.sleep(0.005)
    [entry] = entries
    # 4 of the choice that ended, 5 of the one that the abort ended first, 4 seen of the one whose end was not.
    assert (entry["prompt_tokens"], entry["completion_tokens"], entry["reasoning_tokens"]) == (7, 13, 6)


# --- the API's description ------------------------------------------------------------------------------------------


def test_the_description_is_made_once_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    document = endpoints.document

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return document(*args, **kwargs)

    monkeypatch.setattr(endpoints, "document", counted)
    with live(None) as server:
        loading = [server.client.get("/openapi.json").json() for _ in range(3)]
        server.service.attach(ScriptedEngine())  # type: ignore[arg-type]
        loaded = [server.client.get("/openapi.json").json() for _ in range(3)]
    assert len(made) == 2
    assert loading[0] == loading[2] != loaded[0] == loaded[2]
    assert "scripted/model" in json.dumps(loaded[0])


# --- arguments of the chat template ---------------------------------------------------------------------------------


def test_what_the_template_reads_is_passed_on_and_the_rest_tolerated(
    server: LiveServer, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "template_arguments", frozenset({"medium_effort", "persona"}))
    given = {"medium_effort": True, "persona": None, "unheard_of": 3, "low_effort": True, "reasoning_budget": 5}
    assert server.chat(chat_template_kwargs=given).status_code == 200
    options = engine.calls[0].options
    assert options is not None
    assert dict(options.chat_template_kwargs) == {"medium_effort": True, "low_effort": True, "reasoning_budget": 5}


TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if medium_effort is defined and medium_effort %}{{ 'effort: medium' }}{% endif %}
{%- if reasoning_budget is defined %}{{ reasoning_budget }}{% endif %}
{{- '<|im_start|>assistant\\n' }}"""


@pytest.mark.parametrize(("source", "names"), [
    ("{% if messages %}{% set head = 'x' %}{% endif %}{{ head }}", set()),  # its own, and not always set
    ("{% set loud = loud if loud is defined else true %}{{ loud }}", {"loud"}),  # an argument and its default
    ("{% if tone is not defined %}{% set tone = 'dry' %}{% endif %}{{ tone }}", {"tone"}),
    ("{% set tone = tone | default('dry') %}{{ tone }}", {"tone"}),
])  # fmt: skip
def test_what_a_template_sets_for_itself_is_no_argument(source: str, names: set[str]) -> None:
    template = ChatTemplate(source, load_tokenizer(EMBEDDED_MODEL))
    assert template.arguments == names
    if not names:
        with pytest.raises(ChatError, match="no such variable"):
            template.render(QUESTION, kwargs={"head": "y"})


def test_a_template_with_an_argument_of_its_own() -> None:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    template = ChatTemplate(TEMPLATE, tokenizer)
    assert template.arguments == {"medium_effort"}
    network = load_model(EMBEDDED_MODEL)
    config = EngineConfig(max_sequences=1, max_context=256)
    with (
        Engine.from_parts(network, network.config, tokenizer, template=template, config=config) as engine,
        live(engine) as server,
    ):

        def prompt(**kwargs: Any) -> str:
            asked = {"messages": QUESTION, "chat_template_kwargs": kwargs}
            tokens = server.client.post("/tokenize", json=asked).json()["tokens"]
            answer = server.chat(max_tokens=1, return_token_ids=True, chat_template_kwargs=kwargs).json()
            assert answer["prompt_token_ids"] == tokens
            return tokenizer.decode(tokens)

        plain = prompt()
        assert "effort: medium" in prompt(medium_effort=True)
        assert prompt(medium_effort=False) == prompt(other=True) == prompt(reasoning_budget=77) == plain
        assert prompt(messages=[], raise_exception="x", bos_token="y") == plain  # these are not the caller's to set
