"""From users' messages to a template's: parts, context, reasoning, tool calls, and what is refused by name."""

from typing import Any

import pytest

from headrace.tokenizer import ChatError, check_turns
from headrace.tokenizer.messages import normalise, split_inline_reasoning, text_bytes


def user(content: Any = "q") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "a", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def test_parts_are_put_together() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": ""}, {"type": "text", "text": "<th"}]
    assert normalise([user([*parts, {"type": "text", "text": "ink>"}])]) == [user("one <think>")]
    assert normalise([user([])]) == [user("")]


def test_context_stands_at_the_head_of_the_users_turn() -> None:
    context = {"role": "context", "content": [{"type": "text", "text": "Facts."}]}
    assert normalise([context, user()]) == [user("Facts.\n\nq")]
    assert normalise([user("1"), assistant(), context, user()])[2] == user("Facts.\n\nq")


def test_unknown_fields_and_names_go_no_further() -> None:
    message = {"role": "user", "content": "q", "name": "Eve", "weight": 3}
    assert normalise([message]) == [user()]
    assert normalise([{"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}]) == [
        {"role": "tool", "content": "r", "tool_call_id": "1"}
    ]
    assert message["name"] == "Eve"


@pytest.mark.parametrize(
    "fields", [{"reasoning_content": "r"}, {"reasoning": "r"}, {"reasoning": "r", "reasoning_content": "r"}]
)
def test_reasoning_has_two_names(fields: dict[str, str]) -> None:
    assert normalise([assistant(**fields)]) == [assistant(reasoning_content="r")]


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nwork\n</think>\n\nresult", "work", "result"),
        ("<think>work</think>result\n", "work", "result\n"),
        ("\n <think>work</think>", "work", ""),
        ("<think></think>result", "", "result"),
        ("<think>\n\n</think>\n\nresult", "", "result"),
        ("<think>\n  indented\nline </think> result", "  indented\nline", " result"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        # Not a whole block at the head: text.
        ("<think>never closed", None, "<think>never closed"),
        ("I write <think>a</think>", None, "I write <think>a</think>"),
        ("a</think>b", None, "a</think>b"),
        ("<thinking>a</think>", None, "<thinking>a</think>"),
    ],
)
def test_inline_reasoning(content: str, reasoning: str | None, answer: str) -> None:
    assert split_inline_reasoning(content) == (reasoning, answer)
    expected = assistant(answer, reasoning_content=reasoning) if reasoning else assistant(answer)
    assert normalise([assistant(content)]) == [expected]
    assert normalise([user(content)]) == [user(content)]


def test_inline_reasoning_beside_the_field() -> None:
    same = assistant("<think>\nr\n</think>\na", reasoning_content="r")
    assert normalise([same]) == [assistant("a", reasoning_content="r")]
    empty = assistant("<think></think>a", reasoning_content="r")
    assert normalise([empty]) == [assistant("a", reasoning_content="r")]


def test_an_answer_may_be_absent_beside_reasoning_or_calls() -> None:
    assert normalise([assistant(None, reasoning_content="r")]) == [assistant("", reasoning_content="r")]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    plain = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert normalise([{"role": "assistant", "tool_calls": [call]}]) == [assistant("", tool_calls=[plain])]


CALLS = "messages[0].tool_calls"
REFUSED = [
    ("no", "messages", "list"),
    ([], "messages", "empty"),
    (["hi"], "messages[0]", "object"),
    ([user(), 7], "messages[1]", "object"),
    ([{"content": "x"}], "messages[0].role", "one of"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role", "one of"),
    ([{"role": "developer", "content": "x"}], "messages[0].role", "one of"),
    ([user(None)], "messages[0].content", "required"),
    ([{"role": "user"}], "messages[0].content", "required"),
    ([user(3)], "messages[0].content", "string or a list"),
    ([user({"type": "text"})], "messages[0].content", "string or a list"),
    ([user(["x"])], "messages[0].content[0]", "object"),
    ([user([{"type": "image_url"}])], "messages[0].content[0].type", "image_url"),
    ([user([{"text": "x"}])], "messages[0].content[0].type", "None"),
    ([user([{"type": "text", "text": None}])], "messages[0].content[0].text", "string"),
    ([user("a\ud800")], "messages[0].content", "lone surrogate"),
    ([user([{"type": "text", "text": "\udc00"}])], "messages[0].content[0].text", "lone surrogate"),
    ([assistant(None)], "messages[0].content", "required"),
    ([assistant(None, reasoning_content="")], "messages[0].content", "required"),
    ([assistant(reasoning_content=3)], "messages[0].reasoning_content", "string"),
    ([assistant(reasoning="a", reasoning_content="b")], "messages[0].reasoning", "differs"),
    ([user(), assistant("<think>x</think>a", reasoning="r")], "messages[1].content", "other reasoning"),
    ([assistant(tool_calls="x")], CALLS, "list"),
    ([assistant(tool_calls=["x"])], f"{CALLS}[0].function", "object"),
    ([assistant(tool_calls=[{"function": {"arguments": "{}"}}])], f"{CALLS}[0].function.name", "string"),
    ([assistant(tool_calls=[{"function": {"name": "f"}}])], f"{CALLS}[0].function.arguments", "JSON object"),
    ([assistant(tool_calls=[{"function": {"name": "f", "arguments": "["}}])], f"{CALLS}[0].function.arguments", "JSON"),
    (
        [assistant(tool_calls=[{"function": {"name": "f", "arguments": "[" * 99999}}])],
        f"{CALLS}[0].function.arguments",
        "",
    ),
    ([assistant(tool_calls=[{"id": 3, "function": {"name": "f", "arguments": "{}"}}])], f"{CALLS}[0].id", "string"),
    ([{"role": "tool", "content": "x", "tool_call_id": 3}], "messages[0].tool_call_id", "string"),
    ([{"role": "context", "content": "c"}], "messages[0]", "directly before a user"),
    ([{"role": "context", "content": "c"}, assistant()], "messages[0]", "directly before a user"),
    ([{"role": "context", "content": "c"}] * 2 + [user()], "messages[0]", "directly before a user"),
]


@pytest.mark.parametrize(("messages", "param", "problem"), REFUSED)
def test_refused_by_name(messages: Any, param: str, problem: str) -> None:
    with pytest.raises(ChatError) as caught:
        normalise(messages)
    assert caught.value.param == param
    assert problem in caught.value.problem
    assert str(caught.value) == f"{param}: {caught.value.problem}"
    index = int(param[len("messages[") :].split("]")[0]) if "[" in param else None
    assert caught.value.index == index


SYSTEM = {"role": "system", "content": "s"}
CONTEXT = {"role": "context", "content": "c"}


@pytest.mark.parametrize(
    "messages",
    [
        [user()],
        [SYSTEM, user()],
        [SYSTEM, CONTEXT, user(), assistant(), user()],
        [user(), assistant(), CONTEXT, user(), assistant(), user()],
    ],
)
def test_turns_in_order(messages: list[dict]) -> None:
    check_turns(messages)
    normalise(messages)


@pytest.mark.parametrize(
    ("messages", "param", "problem"),
    [
        ([], "messages", "empty"),
        ([SYSTEM], "messages[0].role", "last message"),
        ([user(), assistant()], "messages[1].role", "last message"),
        ([user(), user()], "messages[1].role", "expected 'assistant'"),
        ([assistant(), user()], "messages[0].role", "expected 'user'"),
        ([user(), SYSTEM, user()], "messages[1].role", "first message"),
        ([SYSTEM, SYSTEM, user()], "messages[1].role", "first message"),
        ([user(), {"role": "tool", "content": "r"}], "messages[1].role", "not 'tool'"),
        ([user(), CONTEXT], "messages[1].role", "last message"),
        ([user(), CONTEXT, assistant(), user()], "messages[1]", "directly before a user"),
        ([{"role": "king", "content": "x"}], "messages[0].role", "one of"),
    ],
)
def test_turns_out_of_order(messages: list[dict], param: str, problem: str) -> None:
    with pytest.raises(ChatError) as caught:
        check_turns(messages)
        normalise(messages)
    assert caught.value.param == param
    assert problem in caught.value.problem


@pytest.mark.parametrize(("messages", "size"), [
    ([{"role": "user", "content": "é1"}], 3),
    ([{"role": "system", "content": "ab"}, {"role": "user", "content": [{"text": "é"}, {"text": "1"}]}], 5),
    ([{"role": "assistant", "content": "<think>long thought</think>\n4"}], len("<think>long thought")),
    ([{"role": "assistant", "content": "46", "reasoning_content": "1"}, {"role": "user", "content": "abc"}], 5),
    ([{"role": "assistant", "content": "4", "reasoning": "thought"}] * 9, 9),
    ([{"role": "user", "content": "<think>a</think>b"}], 17),  # of a user's text nothing is reasoning
    ([{"role": "user"}, {"role": "user", "content": 3}, {"role": "user", "content": [4, {}]}, 5, None], 0),
    ("no list", 0), (None, 0), ([], 0), ([{"role": "user", "content": "\ud800"}], 1),
])  # fmt: skip
def test_how_much_text_there_is_at_least(messages: object, size: int) -> None:
    assert text_bytes(messages) == size


@pytest.mark.parametrize(("message", "size"), [
    ({"content": "4", "reasoning": "thought"}, 8),
    ({"content": "4", "reasoning": "ab", "reasoning_content": "ab"}, 3),  # two names of one field
    ({"content": "<think>thought</think>4", "reasoning_content": "thought"}, 15),
])  # fmt: skip
def test_reasoning_that_is_kept_counts_whole(message: dict, size: int) -> None:
    turns = [{"role": "assistant"} | message, {"role": "user", "content": "abc"}] * 9
    assert text_bytes(turns, reasoning_kept=True) == 9 * (size + 3)
