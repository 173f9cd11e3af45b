"""Request bodies to engine arguments: every row of the contract's table, and every way to get one wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine import ChatOptions, SamplingParams
from headrace.engine.serve.errors import ApiError
from headrace.engine.serve.profiles import NIM, OPENAI, Profile
from headrace.engine.serve.protocol import MAX_MESSAGES, MAX_PARTS, UNIMPLEMENTED, ChatCall, parse_chat

NAME = "served/name"
USER = {"role": "user", "content": "hi"}


def parse(profile: Profile = NIM, accept: str | None = None, **fields: Any) -> ChatCall:
    return parse_chat(json.dumps({"messages": [USER]} | fields).encode(), accept, profile, NAME, 4096)


def refused(profile: Profile = NIM, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(profile, **fields)
    return caught.value


def test_defaults_are_the_contracts() -> None:
    call = parse()
    assert call.params == SamplingParams(
        temperature=1.0, top_p=0.95, max_tokens=16384, seed=None, stop=(), n=1, reasoning_budget=16384
    )
    assert call.options == ChatOptions(reasoning_effort="high", chat_template_kwargs={})
    assert (call.stream, call.include_usage, call.return_token_ids) == (True, False, False)
    assert call.messages == [USER]


@pytest.mark.parametrize("fields", [
    {"temperature": 0}, {"temperature": 1}, {"temperature": 0.25}, {"top_p": 0}, {"top_p": 1},
    {"max_tokens": 1}, {"max_tokens": 32768}, {"reasoning_budget": -1}, {"reasoning_budget": 0},
    {"reasoning_budget": 32768}, {"seed": 0}, {"seed": 2**64 - 1}, {"n": 1}, {"n": 8}, {"ignore_eos": True},
    {"logprobs": True}, {"logprobs": True, "top_logprobs": 20},
])  # fmt: skip
def test_sampling_fields_reach_the_engine_exactly(fields: dict[str, Any]) -> None:
    params = parse(**fields).params
    for name, value in fields.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(("given", "expected"), [
    ("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (["x" * 256], ("x" * 256,)), (["s"] * 16, ("s",) * 16),
])  # fmt: skip
def test_stop_is_a_string_or_an_array(given: Any, expected: tuple[str, ...]) -> None:
    assert parse(stop=given).params.stop == expected


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_effort_reaches_the_engine(effort: str) -> None:
    assert parse(reasoning_effort=effort).options.reasoning_effort == effort


def test_template_arguments_reach_the_engine() -> None:
    arguments = {
        "enable_thinking": False, "low_effort": True, "truncate_history_thinking": False,
        "force_nonempty_content": True, "reasoning_budget": 7,
    }  # fmt: skip
    options = parse(chat_template_kwargs=arguments | {"unheard_of": 1}, reasoning_budget=9).options
    assert options.chat_template_kwargs == arguments
    assert options.budget == 7


@pytest.mark.parametrize("names", [["max_tokens"], ["max_completion_tokens"], ["max_tokens", "max_completion_tokens"]])
def test_max_tokens_has_two_names(names: list[str]) -> None:
    assert parse(**dict.fromkeys(names, 12)).params.max_tokens == 12


def test_null_means_absent_everywhere() -> None:
    fields = dict.fromkeys([
        "model", "temperature", "top_p", "max_tokens", "max_completion_tokens", "reasoning_effort", "reasoning_budget",
        "chat_template_kwargs", "seed", "stream", "stop", "stream_options", "n", "logprobs", "top_logprobs",
        "return_token_ids", "ignore_eos", *UNIMPLEMENTED,
    ])  # fmt: skip
    message = USER | {"name": None, "reasoning_content": None, "tool_calls": None}
    assert parse(messages=[message], **fields) == parse()
    assert parse(chat_template_kwargs={"enable_thinking": None, "reasoning_budget": None}) == parse()
    assert parse(stream_options={"include_usage": None}) == parse()


def test_unknown_fields_are_tolerated() -> None:
    extra = {"user": "u", "metadata": {}, "store": True, "top_k": 50, "thinking": {"type": "enabled"}, "x": [{}]}
    assert parse(messages=[USER | {"name": "Ann", "id": 3}], **extra) == parse()


@pytest.mark.parametrize(("fields", "param"), [
    ({"temperature": 1.01}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"temperature": True},
    "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": 10**400}, "temperature"), ({"top_p": 1.5}, "top_p"),
    ({"top_p": -1}, "top_p"), ({"top_p": []}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 32769}, "max_tokens"), ({"max_tokens": 5.0}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**4000}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"reasoning_effort": "medium"}, "reasoning_effort"),
    ({"reasoning_effort": 1}, "reasoning_effort"), ({"reasoning_budget": -2}, "reasoning_budget"),
    ({"reasoning_budget": 32769}, "reasoning_budget"), ({"reasoning_budget": 1.5}, "reasoning_budget"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"low_effort": 1}}, "chat_template_kwargs.low_effort"),
    ({"chat_template_kwargs": {"reasoning_budget": 40000}}, "chat_template_kwargs.reasoning_budget"),
    ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"), ({"seed": 1.0}, "seed"), ({"seed": False}, "seed"),
    ({"seed": "7"}, "seed"), ({"stream": "true"}, "stream"), ({"stream": 1}, "stream"), ({"stop": 3}, "stop"),
    ({"stop": ""}, "stop"), ({"stop": "x" * 257}, "stop"), ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": ["a", 1]}, "stop[1]"), ({"stop": {}}, "stop"), ({"n": 0}, "n"),
    ({"n": 9}, "n"), ({"n": True}, "n"), ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
    ({"stream_options": True}, "stream_options"), ({"stream_options": {"include_usage": 1}},
    "stream_options.include_usage"),
    ({"return_token_ids": 1}, "return_token_ids"), ({"ignore_eos": 0}, "ignore_eos"), ({"model": 5}, "model"),
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages[0]"), ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}, USER]}, "messages[1].tool_calls"),
    ({"messages": [USER, {"role": "assistant", "content": 5}, USER]}, "messages[1].content"),
    ({"messages": [USER, {"role": "assistant", "content": "a", "reasoning": "x", "reasoning_content": "y"}, USER]},
     "messages[1].reasoning_content"),
])  # fmt: skip
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (422, param)
    assert error.message.startswith(param)
    assert len(error.message) < 300


@pytest.mark.parametrize(("fields", "param", "limit"), [
    ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", MAX_MESSAGES),
    ({"messages": [USER | {"content": [{"type": "text", "text": "x"}] * (MAX_PARTS + 1)}]}, "messages[0].content",
     MAX_PARTS),
])  # fmt: skip
def test_conversations_are_bounded(fields: dict[str, Any], param: str, limit: int) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (422, param)
    assert f"at most {limit}" in error.message
    assert len(error.message) < 300


OTHER_VALUES = {
    "frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1, "tools": [{"type": "function"}],
    "tool_choice": "required", "response_format": {"type": "json_object"}, "logit_bias": {"5": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNIMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    error = refused(**{name: OTHER_VALUES.get(name, "something")})
    assert (error.status, error.param, error.code) == (422, name, "unsupported_parameter")


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in UNIMPLEMENTED.items() for v in values])
def test_a_value_that_asks_for_nothing_is_accepted(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize(("name", "value"), [("presence_penalty", False), ("echo", 0), ("repetition_penalty", True)])
def test_a_boolean_is_no_number_and_a_number_no_boolean(name: str, value: Any) -> None:
    assert refused(**{name: value}).param == name


def test_model_is_the_served_one() -> None:
    assert parse(model=NAME) == parse()
    error = refused(model="other")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def roles(*names: str) -> list[dict[str, str]]:
    return [{"role": name, "content": name} for name in names]


@pytest.mark.parametrize("names", [
    ["user"], ["system", "user"], ["context", "user"], ["system", "context", "user"], ["user", "assistant", "user"],
    ["system", "user", "assistant", "context", "user"],
])  # fmt: skip
def test_role_orders_that_are_right(names: list[str]) -> None:
    assert [turn["role"] for turn in parse(messages=roles(*names)).messages] == names


@pytest.mark.parametrize(("names", "index"), [
    (["system"], 0), (["user", "user"], 1), (["user", "assistant"], 1), (["user", "system", "user"], 1),
    (["system", "system", "user"], 1), (["user", "assistant", "assistant", "user"], 2), (["assistant", "user"], 0),
    (["user", "tool"], 1), (["developer", "user"], 0), (["User"], 0), (["context", "context"], 1),
])  # fmt: skip
def test_a_wrong_role_order_names_the_message(names: list[str], index: int) -> None:
    error = refused(messages=roles(*names))
    assert error.status == 422
    assert error.param == f"messages[{index}].role"
    assert f"messages[{index}]" in error.message


def test_assistant_turns_keep_their_reasoning_and_may_be_empty() -> None:
    history = [
        USER, {"role": "assistant", "content": None, "refusal": None, "reasoning": "so far"},
        USER, {"role": "assistant", "content": None}, USER,
    ]  # fmt: skip
    turns = parse(messages=history).messages
    assert turns[1] == {"role": "assistant", "content": "", "reasoning_content": "so far"}
    assert turns[3] == {"role": "assistant", "content": ""}


def test_the_openai_profile() -> None:
    assert parse(OPENAI).stream is False
    assert parse(OPENAI, temperature=2).params.temperature == 2
    assert refused(OPENAI, temperature=2.1).param == "temperature"
    efforts = {"none": "none", "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high",
               "max": "high"}  # fmt: skip
    for given_effort, effort in efforts.items():
        assert parse(OPENAI, reasoning_effort=given_effort).options.reasoning_effort == effort
    assert refused(OPENAI, reasoning_effort="huge").param == "reasoning_effort"
    turns = parse(OPENAI, messages=roles("developer", "user", "user", "assistant", "assistant")).messages
    assert [turn["role"] for turn in turns] == ["system", "user", "user", "assistant", "assistant"]
    assert refused(OPENAI, messages=roles("user", "tool")).param == "messages[1].role"


@pytest.mark.parametrize(("explicit", "accept", "nim", "openai"), [
    (True, "application/json", True, True), (False, "text/event-stream", False, False),
    (None, None, True, False), (None, "", True, False), (None, "*/*", True, False),
    (None, "application/json", False, False), (None, "Application/JSON; charset=utf-8", False, False),
    (None, "text/event-stream", True, True), (None, "application/json, text/plain, */*", False, False),
    (None, "application/json, text/event-stream", True, False), (None, "application/*", False, False),
    (None, "application/json;q=0.5, text/event-stream", True, True), (None, "application/json;q=0, */*", True, False),
    (None, "text/event-stream;q=0.1, application/json;q=0.9", False, False), (None, ";;q=x,,", True, False),
    (None, "application/json;q=x", True, False), (None, "text/html", True, False),
])  # fmt: skip
def test_who_decides_about_the_stream(explicit: bool | None, accept: str | None, nim: bool, openai: bool) -> None:
    assert NIM.wants_stream(explicit, accept) is nim
    assert OPENAI.wants_stream(explicit, accept) is openai


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff", b'{"messages": "\xff"}', b"[" * 100_000, b'{"a":' * 200_000, b"{}x", b"nul", b"NaN", b"[]",
    b"3",
    b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}', b'{"user": "\\ud800"}',
    b'{"user": "\\udc00\\ud800"}', b'{"user": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b'{"a": 01}', b"{'a': 1}",
    b"1" * 100_000,
])  # fmt: skip
def test_what_is_not_a_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(body, None, NIM, NAME, 4096)
    assert (caught.value.status, caught.value.code) == (400, "malformed_json")


def test_a_number_too_large_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}', None, NIM, NAME, 4096)
    assert (caught.value.status, caught.value.param) == (422, "top_p")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "context", "text", "high"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "reasoning_budget", "x"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from(
        ["messages", "temperature", "stop", "seed", "chat_template_kwargs", "stream_options", "n", "tools"]
    ),
    JSON,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(FIELDS, st.sampled_from([NIM, OPENAI]))
def test_any_json_is_either_taken_or_refused(fields: dict[str, Any], profile: Profile) -> None:
    try:
        call = parse_chat(json.dumps(fields).encode(), None, profile, NAME, 4096)
    except ApiError as error:
        assert error.status in (404, 422)
        assert error.param
    else:
        assert call.messages
