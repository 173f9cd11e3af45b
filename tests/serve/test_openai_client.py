"""The openai Python client against the server, as a user would have it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from live_server import QUESTION, SECONDS, LiveServer, live
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import EngineClosed, QueueFull, Usage
from headrace.engine.serve.profiles import OPENAI

NAME = "scripted/model"


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=SECONDS) as client:
        yield client


def test_without_stream_it_gets_a_body(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    completion = client.chat.completions.create(model=NAME, messages=QUESTION, seed=2**64 - 1, max_completion_tokens=9)
    message = completion.choices[0].message
    assert message.content == "It is 4."
    assert message.role == "assistant"
    assert message.refusal is None
    assert message.reasoning_content == "Two and two."
    assert completion.usage.total_tokens == 18
    assert completion.usage.completion_tokens_details.reasoning_tokens == 3
    assert completion.usage.prompt_tokens_details.cached_tokens == 2
    assert completion._request_id.startswith("req-")
    assert (engine.calls[0].params.seed, engine.calls[0].params.max_tokens) == (2**64 - 1, 9)


def test_stream_false(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=NAME, messages=QUESTION, stream=False)
    assert completion.choices[0].message.content == "It is 4."


def test_stream_true(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is 4."
    assert "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks) == "Two and two."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.total_tokens == 12


def test_the_stream_helper(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play([delta("reasoning", "hm", logprobs=True), delta("content", "yes", logprobs=True), finished()])
    with client.chat.completions.stream(model=NAME, messages=QUESTION, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "yes"
    assert final.choices[0].message.reasoning_content == "hm"
    assert [entry.token for entry in final.choices[0].logprobs.content] == ["y", "e", "s"]


def test_extra_fields_go_in_the_body(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    extra = {"reasoning_budget": 5, "chat_template_kwargs": {"low_effort": True}, "top_k": 20, "return_token_ids": True}
    completion = client.chat.completions.create(model=NAME, messages=QUESTION, extra_body=extra)
    assert completion.choices[0].token_ids
    assert engine.calls[0].params.reasoning_budget == 5


def test_an_answer_goes_back_into_the_conversation(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play(answer(content=(), reason="length"), answer())
    first = client.chat.completions.create(model=NAME, messages=QUESTION)
    client.chat.completions.create(model=NAME, messages=[*QUESTION, first.choices[0].message, *QUESTION])
    assert engine.calls[1].prompt[1] == {"role": "assistant", "content": "", "reasoning_content": "Two and two."}


@pytest.mark.parametrize(("fields", "kind", "param"), [
    ({"temperature": 1.5}, openai.UnprocessableEntityError, "temperature"),
    ({"messages": []}, openai.UnprocessableEntityError, "messages"), ({"model": "x"}, openai.NotFoundError, "model"),
])  # fmt: skip
def test_errors_have_their_class(client: openai.OpenAI, fields: dict, kind: type, param: str) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": QUESTION} | fields)
    assert caught.value.param == param
    assert caught.value.request_id.startswith("req-")


def test_a_failing_request_is_not_sent_again(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play([finished("error", error="raised: a secret", failure="logits")])
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=NAME, messages=QUESTION)
    assert len(engine.calls) == 1


def test_a_full_queue_is_tried_again(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play(QueueFull(9, 9, retry_after=0.1), answer())
    raw = client.with_options(max_retries=0).chat.completions.with_raw_response
    with pytest.raises(openai.RateLimitError) as caught:
        raw.create(model=NAME, messages=QUESTION)
    assert caught.value.response.headers["retry-after"] == "1"
    assert raw.create(model=NAME, messages=QUESTION).parse().choices[0].message.content == "It is 4."


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play([delta("content", "It"), finished("error", error="raised: a secret", failure="logits")])
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model=NAME, messages=QUESTION, stream=True))


def test_closing_a_stream_aborts(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play([delta("content", "It"), HOLD, finished()])
    stream = client.chat.completions.create(model=NAME, messages=QUESTION, stream=True)
    next(iter(stream))
    stream.close()
    engine.wait_for(lambda: engine.running == 0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "headrace"


def test_the_openai_profile_answers_curl_with_json() -> None:
    with live(ScriptedEngine(), profile=OPENAI, served_name="gpt-4o", keys=["k"]) as server:
        server.client.headers["authorization"] = "Bearer k"
        response = server.client.post("/v1/chat/completions", json={"messages": QUESTION, "model": "gpt-4o"})
        assert response.json()["model"] == "gpt-4o"
        with openai.OpenAI(base_url=server.url + "/v1", api_key="k", timeout=SECONDS) as client:
            chosen = client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "developer", "content": "Be brief."}, *QUESTION], temperature=1.7,
                reasoning_effort="medium", stream=True,
            )  # fmt: skip
            assert len(list(chosen)) == 6


def test_the_async_client(server: LiveServer, engine: ScriptedEngine) -> None:
    async def talk() -> tuple[str | None, str, list[str | None]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=SECONDS) as client:
            create = client.chat.completions.create
            body = await create(model=NAME, messages=QUESTION)
            stream = await create(model=NAME, messages=QUESTION, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            many = await asyncio.gather(*[create(model=NAME, messages=QUESTION) for _ in range(8)])
            return body.choices[0].message.content, text, [one.choices[0].message.content for one in many]

    assert asyncio.run(talk()) == ("It is 4.", "It is 4.", ["It is 4."] * 8)


def test_cancelling_an_async_request_aborts(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([HOLD, finished()])

    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=SECONDS) as client:
            asking = asyncio.create_task(client.chat.completions.create(model=NAME, messages=QUESTION))
            await asyncio.to_thread(engine.wait_for, lambda: engine.running == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(cancel())
    engine.wait_for(lambda: engine.running == 0)


def test_several_choices_and_logprobs(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play(
        [event for i in (0, 1) for event in (delta("content", "ab", index=i, logprobs=True), finished(index=i))]
    )
    body = client.chat.completions.create(model=NAME, messages=QUESTION, n=2, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in body.choices] == [0, 1]
    assert [entry.token for entry in body.choices[1].logprobs.content] == ["a", "b"]
    assert len(body.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_draining_server_is_tried_again(client: openai.OpenAI, server: LiveServer, engine: ScriptedEngine) -> None:
    """503 and Retry-After: the client waits and asks again on its own."""
    engine.play(EngineClosed("closing"), answer())
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=QUESTION)
    assert raw.parse().choices[0].message.content == "It is 4."
    assert raw.headers["x-request-id"].startswith("req-")
    assert raw.retries_taken == 1


@pytest.mark.parametrize("field", ["tools", "response_format"])
def test_tools_and_schemas_are_refused_by_name(client: openai.OpenAI, field: str) -> None:
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    fields = {"tools": [function]} if field == "tools" else {"response_format": schema}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model=NAME, messages=QUESTION, **fields)
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")
