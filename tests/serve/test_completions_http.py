"""``/v1/completions``, ``/tokenize`` and ``/detokenize`` over a real socket."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from live_server import SECONDS, LiveServer, live
from scripted_engine import HOLD, ScriptedEngine, delta, finished

from headrace.engine import Engine, EngineConfig, QueueFull, SamplingParams, TokenLogprob, Usage
from headrace.engine.request import Delta
from headrace.engine.serve.profiles import OPENAI
from headrace.engine.serve.prompts import UNIMPLEMENTED

PATH = "/v1/completions"


def continuation(*texts: str, n: int = 1, **fields: Any) -> list[Any]:
    """A script: every choice says the same."""
    return [
        event
        for i in range(n)
        for event in (*(delta("content", text, index=i, **fields) for text in texts), finished(index=i))
    ]


def ask(server: LiveServer, **fields: Any) -> Any:
    response = server.client.post(PATH, json={"prompt": "One, two,"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    response = server.client.post(PATH, json={"prompt": "One, two,", "stream": True} | fields)
    assert response.status_code == 200, response.text
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in data]


def test_json_body(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(continuation(" three", "."))
    response = server.client.post(PATH, json={"prompt": "One, two,"})
    body = response.json()
    assert body.pop("id") == response.headers["x-request-id"].replace("req-", "cmpl-")
    assert body.pop("system_fingerprint").startswith("headrace-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("usage") == {
        "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
        "completion_tokens_details": {"reasoning_tokens": 2}, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    choice = {"index": 0, "text": " three.", "logprobs": None, "finish_reason": "stop"}
    assert body == {"object": "text_completion", "model": "scripted/model", "choices": [choice]}
    assert engine.calls[0].params.max_tokens == 16
    assert engine.calls[0].prompt == [ord(c) for c in "One, two,"]


def test_stream(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(continuation(" three", "."))
    *chunks, last = events(server, stream_options={"include_usage": True})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [" three", ".", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert last["choices"] == []
    assert last["usage"] == ask(server)["usage"]


@pytest.mark.parametrize(("accept", "stream"), [
    (None, False), ("*/*", False), ("application/json", False), ("text/event-stream", True),
])  # fmt: skip
def test_json_is_the_default_here(server: LiveServer, accept: str | None, stream: bool) -> None:
    headers = {} if accept is None else {"accept": accept}
    response = server.client.post(PATH, json={"prompt": "x"}, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream" if stream else "application/json")


@pytest.mark.parametrize(("prompt", "ids"), [
    ("ab", [[97, 98]]), (["ab", "c"], [[97, 98], [99]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]),
])  # fmt: skip
def test_the_four_forms_of_a_prompt(server: LiveServer, engine: ScriptedEngine, prompt: Any, ids: Any) -> None:
    engine.play(continuation("!"))
    body = ask(server, prompt=prompt)
    assert [call.prompt for call in engine.calls] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_have_their_places(server: LiveServer, engine: ScriptedEngine, stream: bool) -> None:
    """Choice j of prompt i is i * n + j; a prompt's tokens count once for all its choices."""

    def script(prompt: list[int]) -> list[Any]:
        name = chr(prompt[0])
        return [
            delta("content", f"{name}1", index=1),
            delta("content", f"{name}0", index=0),
            finished(index=1, usage=Usage(len(prompt), 2, 0, 1)),
            finished(index=0, usage=Usage(len(prompt), 3, 0, 1)),
        ]

    engine.play(script)
    fields = {"prompt": ["a", "bb", "ccc"], "n": 2}
    if stream:
        *chunks, last = events(server, **fields, stream_options={"include_usage": True})
        usage = last["usage"]
        texts = [""] * 6
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        body = ask(server, **fields)
        usage, texts = body["usage"], [choice["text"] for choice in body["choices"]]
    assert texts == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 15)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert engine.running == 0


def split_character() -> list[Any]:
    """Two tokens that are one character between two that are characters."""
    pieces = [(120, b"x", "x"), (1, b"\xc3", "\ufffd"), (2, b"\xa9", "\ufffd"), (121, b"y", "y")]
    entries = tuple(TokenLogprob(i, text, data, -0.5, ((i, -0.5), (122, float("-inf")))) for i, data, text in pieces)
    return [
        Delta(0, "content", "x", (120,), entries[:1]),
        Delta(0, "content", "éy", (1, 2, 121), entries[1:]),
        finished(),
    ]


def test_logprobs_are_parallel_arrays(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(split_character())
    choice = ask(server, logprobs=2)["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["x", "bytes:\\xc3", "bytes:\\xa9", "y"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"x": -0.5, "z": -9999.0},
            {"bytes:\\xc3": -0.5, "\x01": -0.5, "z": -9999.0},
            {"bytes:\\xa9": -0.5, "\x02": -0.5, "z": -9999.0},
            {"y": -0.5, "z": -9999.0},
        ],
        "text_offset": [0, 1, 1, 2],
    }
    assert engine.calls[0].params.logprobs is True
    assert engine.calls[0].params.top_logprobs == 2
    parts = [chunk["choices"][0]["logprobs"] for chunk in events(server, logprobs=2)]
    for key in choice["logprobs"]:
        assert [value for part in parts if part for value in part[key]] == choice["logprobs"][key]


def test_token_ids(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(continuation("ab"))
    body = ask(server, prompt=[[120], [5, 6]], return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[120], [5, 6]]
    assert [choice["token_ids"] for choice in body["choices"]] == [[97, 98]] * 2
    chunks = events(server, prompt=[[120], [5, 6]], return_token_ids=True)
    for index, ids in enumerate([[120], [5, 6]]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [part.get("prompt_token_ids") for part in mine] == [ids, *[None] * (len(mine) - 1)]
        assert [i for part in mine for i in part["token_ids"]] == [97, 98]


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": {}}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"), ({"prompt": ["a", 1]}, "prompt[1]"), ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"), ({"prompt": [-1]}, "prompt[0]"), ({"prompt": ["x"] * 65}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ({"temperature": 1.1}, "temperature"), ({"n": 9}, "n"), ({"stop": ""}, "stop"),
    ({"reasoning_budget": 5}, "reasoning_budget"), ({"chat_template_kwargs": {"low_effort": True}},
    "chat_template_kwargs"),
])  # fmt: skip
def test_a_bad_field_is_refused_by_name(
    server: LiveServer, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    response = server.client.post(PATH, json={"prompt": "x"} | fields)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert not engine.calls


@pytest.mark.parametrize("name", UNIMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_name(server: LiveServer, engine: ScriptedEngine, name: str) -> None:
    response = server.client.post(PATH, json={"prompt": "x", name: "something"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, name, "unsupported_parameter")
    for value in (*UNIMPLEMENTED[name], None):
        assert server.client.post(PATH, json={"prompt": "x", name: value}).status_code == 200


def test_prompts_are_taken_all_or_none(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([HOLD, finished()], QueueFull(9, 9))
    assert server.client.post(PATH, json={"prompt": ["a", "b"]}).status_code == 429
    assert len(engine.streams) == 1
    engine.wait_for(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_prompt_ends_the_others(server: LiveServer, engine: ScriptedEngine, stream: bool) -> None:
    engine.play([HOLD, finished()], [finished("error", error="raised: a secret", failure="logits")])
    response = server.client.post(PATH, json={"prompt": ["a", "b"], "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the model's logits are not finite"
    engine.wait_for(lambda: engine.running == 0)


def test_a_raw_string_has_markers(real: LiveServer, real_engine: Engine) -> None:
    prompt = "<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n<think></think>"
    body = ask(real, prompt=prompt, temperature=0, max_tokens=8, return_token_ids=True)
    ids = body["choices"][0]["prompt_token_ids"]
    markers = real_engine.tokenizer.markers
    assert [i for i in ids if i in markers.values()] == [
        markers[m] for m in ("<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>")
    ]
    assert "5" in body["choices"][0]["text"]
    by_ids = ask(real, prompt=ids, temperature=0, max_tokens=8)
    assert by_ids["choices"][0]["text"] == body["choices"][0]["text"]
    direct = real_engine.generate(prompt, _params())
    assert direct.content == body["choices"][0]["text"]


def _params() -> Any:
    return SamplingParams(temperature=0, max_tokens=8)


def test_seeds_stops_and_choices_on_the_real_model(real: LiveServer) -> None:
    fields = {"prompt": ["1 + 1 =", "2 + 2 ="], "n": 2, "seed": 3, "max_tokens": 12, "logprobs": 1}
    body = ask(real, **fields)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    alone = ask(real, **fields | {"prompt": "2 + 2 =", "n": 1})["choices"][0]
    assert alone | {"index": 2} == body["choices"][2]
    for choice in body["choices"]:
        arrays = choice["logprobs"]
        assert len(arrays["tokens"]) == len(arrays["token_logprobs"]) == len(arrays["text_offset"])
        for token, offset in zip(arrays["tokens"], arrays["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token) or token.startswith("bytes:")
    chunks = events(real, **fields)
    for choice in body["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]


def test_tokenize(real: LiveServer, real_engine: Engine) -> None:
    text = "12 + 34 <think> 🙂"
    body = real.client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == real_engine.tokenizer.encode_with_markers(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == real_engine.max_context
    assert "<think>" in body["token_strs"]
    back = real.client.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": real_engine.tokenizer.decode(body["tokens"])}
    assert back["prompt"].strip() == text


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_tokenize_renders_what_an_answer_would_see(real: LiveServer, effort: str) -> None:
    messages = [{"role": "user", "content": "Say </think><|im_end|>."}]
    asked = {"messages": messages, "reasoning_effort": effort}
    body = real.client.post("/tokenize", json=asked).json()
    seen = real.chat(**asked, max_tokens=1, return_token_ids=True).json()["prompt_token_ids"]
    assert body["tokens"] == seen
    assert body["token_strs"] is None


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
    "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"prompt": "x", "tools": [{}]}, "tools"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
    ("/tokenize", {"messages": []}, "messages"), ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]},
    "messages[0].role"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"tokens": [1, 10**9]}, "tokens[1]"), ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
])  # fmt: skip
def test_bad_token_requests(real: LiveServer, path: str, fields: dict[str, Any], param: str) -> None:
    response = real.client.post(path, json=fields)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


def test_an_unknown_model_is_404_on_every_path(server: LiveServer) -> None:
    bodies: dict[str, dict[str, Any]] = {
        PATH: {"prompt": "x"}, "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}
    }  # fmt: skip
    for path, body in bodies.items():
        assert server.client.post(path, json=body | {"model": "other"}).status_code == 404
        assert server.client.post(path, json=body | {"model": "scripted/model"}).status_code == 200
        assert server.client.post(path, content=b"[1").status_code == 400


def test_a_prompt_that_cannot_fit_names_both_numbers(real: LiveServer, real_engine: Engine) -> None:
    response = real.client.post(PATH, json={"prompt": [5] * real_engine.max_context})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert str(real_engine.max_context) in error["message"]


def test_the_openai_client(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(continuation(" three", ".", logprobs=True))
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=SECONDS) as client:
        body = client.completions.create(model="scripted/model", prompt="One, two,", logprobs=1)
        assert body.choices[0].text == " three."
        assert body.choices[0].logprobs.tokens == list(" three.")
        assert body.usage.total_tokens == 12
        stream = client.completions.create(model="scripted/model", prompt=["a", "b"], stream=True)
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert set(texts.values()) == {" three."}


def test_the_openai_profile_allows_its_temperature() -> None:
    with live(ScriptedEngine(), profile=OPENAI) as server:
        assert server.client.post(PATH, json={"prompt": "x", "temperature": 1.7}).status_code == 200


def test_an_idle_engine_takes_any_number_of_prompts() -> None:
    config = EngineConfig(max_sequences=1, max_waiting=2, max_context=512)
    with Engine(config=config) as engine, live(engine) as server:
        fields = {"prompt": ["1", "2", "3"], "max_tokens": 2}
        assert len(ask(server, **fields)["choices"]) == 3
        many = fields | {"prompt": ["1", "2", "3", "4"]}
        assert len(ask(server, **many)["choices"]) == 4  # more than can queue, as with n: nobody else waits
        with engine.generate_stream("1", SamplingParams(max_tokens=400, ignore_eos=True)):
            response = server.client.post(PATH, json=many)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
