"""Clients that nobody here wrote, unmodified: curl, openai for Node, LangChain's chat model."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from live_server import SECONDS, LiveServer, live
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import Usage

NAME = "scripted/model"
BODY = '{"messages": [{"role": "user", "content": "What is 2 + 2?"}]}'


# --- curl -----------------------------------------------------------------------------------------------------------


def curl(*arguments: str) -> str:
    """What curl prints."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    command = [program, "--silent", "--show-error", "--max-time", str(SECONDS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_gets_a_stream(server: LiveServer) -> None:
    output = curl("--no-buffer", f"{server.url}/v1/chat/completions", "-d", BODY)
    *events, done, rest = output.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(d.get("content") or "" for d in deltas) == "It is 4."


def test_curl_gets_json_when_it_asks_for_it(server: LiveServer) -> None:
    url = f"{server.url}/v1/chat/completions"
    for arguments in (["-d", BODY[:-1] + ', "stream": false}'], ["-d", BODY, "-H", "accept: application/json"]):
        assert json.loads(curl(url, *arguments))["choices"][0]["message"]["content"] == "It is 4."


def test_curl_sends_a_long_body_after_100_continue(server: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    file.write_text(json.dumps({**json.loads(BODY), "user": "x" * 3_000_000, "stream": False}))
    output = curl(
        f"{server.url}/v1/chat/completions", "--data-binary", f"@{file}", "-H", "expect: 100-continue", "--include"
    )
    assert "HTTP/1.1 100 Continue" in output
    assert "It is 4." in output


def test_curl_with_a_key() -> None:
    with live(ScriptedEngine(), keys=["secret"]) as server:
        status = ("--output", "/dev/null", "--write-out", "%{http_code}", f"{server.url}/v1/models")
        assert curl(*status) == "401"
        assert curl(*status, "-H", "Authorization: Bearer secret") == "200"
        assert curl(*status, "--oauth2-bearer", "secret") == "200"


# --- Node -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """client.mjs in a folder in which the openai package is installed."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai@^7"]
    result = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"npm cannot install openai here: {result.stderr.strip()[-300:]}")
    return Path(shutil.copy(Path(__file__).with_name("client.mjs"), folder))


@pytest.mark.npm
def test_openai_for_node(server: LiveServer, engine: ScriptedEngine, node_client: Path) -> None:
    def script(prompt: Sequence[dict[str, Any]]) -> list[Any]:
        question = prompt[-1]["content"]
        if question == "break":
            return [delta("content", "It"), finished("error", error="not finite")]
        return [delta("content", "It"), HOLD] if question == "wait" else answer(usage=Usage(11, 7, 3, 2))

    engine.play(script)
    command = ["node", node_client.name, f"{server.url}/v1"]
    result = subprocess.run(command, cwd=node_client.parent, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert out.pop("body") == {
        "role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two.", "refusal": None
    }  # fmt: skip
    assert out.pop("id").startswith("req-")
    assert "not finite" in out.pop("cut")
    assert out == {
        "total": 18, "content": "It is 4.", "reasoning": "Two and two.", "streamed": 18, "helped": "It is 4.",
        "error": ["UnprocessableEntityError", 422, "temperature"], "models": [NAME],
    }  # fmt: skip
    engine.wait_for(lambda: engine.running == 0)  # it left one stream in the middle


# --- LangChain ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    langchain = pytest.importorskip("langchain_openai")
    return langchain.ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model=NAME, timeout=SECONDS, max_retries=2, stream_usage=True
    )


def test_langchain_invokes(chat: Any, engine: ScriptedEngine) -> None:
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    reply = chat.invoke([("system", "Be brief."), ("human", "What is 2 + 2?")])
    assert reply.content == "It is 4."
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["total_tokens"] == 18
    assert reply.usage_metadata["output_token_details"]["reasoning"] == 3
    assert [turn["role"] for turn in engine.calls[0].prompt] == ["system", "user"]


def test_langchain_streams(chat: Any) -> None:
    whole = None
    for chunk in chat.stream("What is 2 + 2?"):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == "It is 4."
    assert whole.usage_metadata["total_tokens"] == 12


def test_langchain_goes_on_with_a_conversation(chat: Any, engine: ScriptedEngine) -> None:
    first = chat.invoke("What is 2 + 2?")
    assert chat.invoke([("human", "What is 2 + 2?"), first, ("human", "And 3 + 3?")], stop=["7"]).content == "It is 4."
    assert [turn["role"] for turn in engine.calls[1].prompt] == ["user", "assistant", "user"]
    assert engine.calls[1].params.stop == ("7",)


def test_langchain_in_a_batch_and_async(chat: Any) -> None:
    import asyncio

    assert [reply.content for reply in chat.batch(["a", "b", "c"])] == ["It is 4."] * 3
    assert asyncio.run(chat.ainvoke("a")).content == "It is 4."


def test_langchain_is_told_what_is_not_there(chat: Any) -> None:
    import openai

    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(openai.UnprocessableEntityError, match="tools is not implemented"):
        chat.bind_tools([tool]).invoke("What is 2 + 2?")
