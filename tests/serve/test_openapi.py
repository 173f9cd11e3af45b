"""The API's own description, and schemathesis, which nobody here wrote, holding the server to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_api import AUTHORIZATION, KEY, Obliging
from jsonschema_rs import Draft202012Validator
from live_server import QUESTION, LiveServer, live

from headrace.engine.serve import prompts, protocol
from headrace.engine.serve.openapi import document
from headrace.engine.serve.profiles import NIM, OPENAI


@pytest.fixture(scope="module", params=[NIM, OPENAI], ids=["nim", "openai"])
def described(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with live(Obliging(), keys=[KEY], profile=request.param) as server:
        yield server


def spec(server: LiveServer) -> dict[str, Any]:
    response = server.client.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def validator(server: LiveServer, name: str) -> Draft202012Validator:
    schemas = spec(server)["components"]["schemas"]
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


def test_the_form_can_be_made_from_it(described: LiveServer) -> None:
    """Names, defaults and ranges of contract section 1, as a console reads them."""
    nim = described.service.profile is NIM
    fields = spec(described)["components"]["schemas"]["ChatRequest"]["properties"]
    expected: dict[str, tuple[Any, Any, Any]] = {
        "temperature": (1.0, 0, 1.0 if nim else 2.0), "top_p": (0.95, 0, 1), "max_tokens": (16384, 1, 32768),
        "reasoning_budget": (16384, -1, 32768), "seed": (None, 0, 2**64 - 1), "n": (1, 1, 8),
        "top_logprobs": (0, 0, 20),
    }  # fmt: skip
    for name, (default, low, high) in expected.items():
        assert (fields[name]["default"], fields[name]["minimum"], fields[name]["maximum"]) == (default, low, high)
        assert fields[name]["description"]
    assert fields["stream"]["default"] is nim
    assert fields["model"]["default"] == "scripted/model"
    efforts = fields["reasoning_effort"]["enum"]
    assert efforts[:3] == ["none", "low", "high"]
    assert ("medium" in efforts) is not nim


@pytest.mark.parametrize("fields", [
    {}, {"temperature": 1}, {"stop": "x"}, {"stop": ["x"]}, {"seed": 2**64 - 1}, {"n": None}, {"tools": []},
    {"chat_template_kwargs": {"enable_thinking": None}}, {"messages": [{"role": "user", "content": [{"type": "text",
    "text": "x"}]}]}, {"unknown": 1},
    {"temperature": -1}, {"stop": 5}, {"stop": ["x"] * 17}, {"seed": 2**64}, {"n": 9}, {"tools": [{}]},
    {"messages": []}, {"chat_template_kwargs": {"reasoning_budget": -2}},
    {"messages": [{"role": "user", "content": []}]}, {"messages": None},
    {"messages": [{"role": "wizard", "content": "x"}]}, {"reasoning_effort": "huge"},
])  # fmt: skip
def test_the_schema_says_what_the_server_does(described: LiveServer, fields: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "stream": False} | fields
    response = described.client.post("/v1/chat/completions", json=body, headers=AUTHORIZATION)
    assert validator(described, "ChatRequest").is_valid(body) is (response.status_code == 200), response.text


@pytest.mark.parametrize("fields", [
    {}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"return_token_ids": True}, {"temperature": 9}
])  # fmt: skip
def test_answers_are_as_described(described: LiveServer, fields: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "stream": False} | fields
    response = described.client.post("/v1/chat/completions", json=body, headers=AUTHORIZATION)
    name = "ChatAnswer" if response.status_code == 200 else "Error"
    validator(described, name).validate(response.json())
    if name == "Error":
        return
    streamed = described.client.post("/v1/chat/completions", json=body | {"stream": True}, headers=AUTHORIZATION)
    chunk = validator(described, "ChatChunk")
    for line in streamed.text.split("\n\n")[:-2]:
        chunk.validate(json.loads(line.removeprefix("data: ")))
    assert not chunk.is_valid(response.json())


def test_every_path_is_described_and_every_description_is_a_path(described: LiveServer) -> None:
    from headrace.engine.serve.endpoints import Endpoints

    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in Endpoints(described.service).routes()
        for method in route.methods or ("POST",)
        if method != "HEAD"
    }
    assert routes == {(path, method) for path, item in spec(described)["paths"].items() for method in item}


def test_what_is_refused_is_described() -> None:
    schemas = document(NIM, "m", keys=False)["components"]["schemas"]
    for name, unimplemented in (
        ("ChatRequest", protocol.UNIMPLEMENTED), ("CompletionRequest", prompts.UNIMPLEMENTED),
    ):  # fmt: skip
        for field, neutral in unimplemented.items():
            assert schemas[name]["properties"][field]["enum"] == [*neutral, None]


def fuzz(profile: str) -> subprocess.CompletedProcess[str]:
    """A run of schemathesis and its output."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_api.py")), profile]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.early(job=fuzz)
@pytest.mark.parametrize("profile", ["nim", "openai"])
def test_schemathesis(early: dict[str, Any], request: pytest.FixtureRequest, profile: str) -> None:
    """All its checks hold, every operation was answered and refused, and nothing was the server's fault."""
    result = early[request.node.nodeid].result()
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert counts[path]["200"] > 0
        assert counts[path]["422"] > 0
    statuses = {status for path in counts.values() for status in path}
    assert not [status for status in statuses if status.startswith("5")]
