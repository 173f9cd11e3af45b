"""Prompts: against an oracle of Nemotron 3 Super's format, against transformers, and the efforts."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from headrace.tokenizer import (
    ChatError,
    ChatTemplate,
    MarkedTokenizer,
    Rendered,
    TokenizerError,
    has_chat_template,
    template_options,
)
from headrace.tokenizer import sandbox as sandbox_module

Messages = list[dict[str, Any]]
USER = {"role": "user", "content": "12 + 34?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "  Looks at the sky. ",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": " A city ", "minLength": 1},
                    "unit": {"type": ["string", "null"], "enum": ["°C", "°F"], "default": None, "x": {"y": [1]}},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln", "days": [1, 2]}'},
}
TOOLS_TEXT = """# Tools

You have access to the following functions:

<tools>
<function>
<name>weather</name>
<description>Looks at the sky.</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
<description>A city</description>
<minLength>1</minLength>
</parameter>
<parameter>
<name>unit</name>
<type>['string', 'null']</type>
<enum>["°C", "°F"]</enum>
<default>None</default>
<x>{"y": [1]}</x>
</parameter>
<additionalProperties>False</additionalProperties>
<required>["city"]</required>
</parameters>
<strict>True</strict>
</function>
<function>
<name>now</name>
<parameters>
</parameters>
</function>
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""


@pytest.fixture(scope="module")
def template(tokenizer: MarkedTokenizer, folders: Callable[[str], Path], kind: str) -> ChatTemplate:
    return ChatTemplate.load(folders(kind), tokenizer)


@pytest.fixture(scope="module")
def tekken(tokenizers: Callable[[str], MarkedTokenizer], folders: Callable[[str], Path]) -> ChatTemplate:
    return ChatTemplate.load(folders("tekken"), tokenizers("tekken"))


def oracle(messages: Messages, thinking: bool = True, low: bool = False, truncate: bool = True) -> str:
    """Nemotron 3 Super's text for system, user, assistant and tool turns without tool calls, from its description."""
    out = ""
    turns = list(messages)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    out += f"<|im_start|>system\n{system}<|im_end|>\n"
    last_user = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    for place, turn in enumerate(turns):
        content, role = turn["content"], turn["role"]
        if role == "user":
            hint = "\n\n{reasoning effort: low}" if low and place == last_user else ""
            out += f"<|im_start|>user\n{content}{hint}<|im_end|>\n"
        elif role == "tool":
            first = place == 0 or turns[place - 1]["role"] != "tool"
            last = place + 1 == len(turns) or turns[place + 1]["role"] != "tool"
            out += (
                "<|im_start|>user\n" * first + f"<tool_response>\n{content}\n</tool_response>\n" + "<|im_end|>\n" * last
            )
        else:
            reasoning = turn.get("reasoning_content", "")
            body = f"<think>\n{reasoning}\n</think>\n{content}" if reasoning.strip() else f"<think></think>{content}"
            if truncate and place < last_user:
                body = "<think></think>" + body.split("</think>", 1)[1]
            out += f"<|im_start|>assistant\n{body.strip()}<|im_end|>\n"
    return out + "<|im_start|>assistant\n" + ("<think>\n" if thinking else "<think></think>")


# Texts that spell no marker and no part of one.
plain_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<>[]|\u2581"), max_size=20)


def turn(role: str) -> st.SearchStrategy[dict[str, Any]]:
    fields = {"role": st.just(role), "content": plain_text}
    return st.fixed_dictionaries(fields, optional={"reasoning_content": plain_text} if role == "assistant" else {})


conversations = st.builds(
    lambda system, turns, last: [*system, *turns, last],
    st.lists(turn("system"), max_size=1),
    st.lists(st.one_of(turn("user"), turn("assistant"), turn("tool")), max_size=5),
    turn("user"),
)


@given(messages=conversations, thinking=st.booleans(), low=st.booleans(), truncate=st.booleans())
def test_writes_nemotrons_format(
    tekken: ChatTemplate, messages: Messages, thinking: bool, low: bool, truncate: bool
) -> None:
    kwargs = {"enable_thinking": thinking, "low_effort": low, "truncate_history_thinking": truncate}
    assert tekken.render(messages, kwargs=kwargs).text == oracle(messages, thinking, low, truncate)


def test_tools(template: ChatTemplate) -> None:
    head = "<|im_start|>system\n"
    with_system = template.render([{"role": "system", "content": "Be kind."}, USER], tools=TOOLS).text
    assert with_system.startswith(f"{head}Be kind.\n\n{TOOLS_TEXT}<|im_end|>\n<|im_start|>user\n")
    assert template.render([USER], tools=TOOLS).text.startswith(f"{head}{TOOLS_TEXT}<|im_end|>\n")
    assert template.render([USER], tools=[]).text.startswith(f"{head}<|im_end|>\n")


def test_tool_calls_and_results(template: ChatTemplate) -> None:
    call_text = (
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
        "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>\n"
    )
    loop = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
    ]
    kept = f"<|im_start|>assistant\n<think>\nhm\n</think>\n{call_text * 2}<|im_end|>\n"
    both = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>\n"
    results = f"<|im_start|>user\n{both}<|im_end|>\n"
    assert (kept + results) in template.render(loop).text
    dropped = f"<|im_start|>assistant\n<think></think>\n{call_text * 2}<|im_end|>\n"
    assert dropped in template.render([*loop, USER]).text
    assert kept in template.render([*loop, USER], kwargs={"truncate_history_thinking": False}).text
    spoken = [USER, {"role": "assistant", "content": " So: ", "tool_calls": [CALL]}, *loop[2:3]]
    assert f"<think></think> So:\n{call_text}" in template.render(spoken).text
    assert f"<think></think>So:\n{call_text}" in template.render([*spoken, USER]).text


# transformers, as the witness of what the template's plain application gives.


@pytest.fixture(scope="module")
def witness(folders: Callable[[str], Path]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(folders("tekken")))


OPTIONS = st.fixed_dictionaries(
    {},
    optional={name: st.booleans() for name in ("enable_thinking", "low_effort", "truncate_history_thinking")},
)


@given(messages=conversations, kwargs=OPTIONS, tools=st.sampled_from([None, TOOLS]))
def test_equals_apply_chat_template(
    tekken: ChatTemplate, witness: PreTrainedTokenizerFast, messages: Messages, kwargs: dict, tools: list | None
) -> None:
    rendered = tekken.render(messages, kwargs=kwargs, tools=tools)
    assert rendered.text == witness.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **{"enable_thinking": True, **kwargs}
    )
    if tools is None:
        assert rendered.ids == witness.encode(rendered.text, add_special_tokens=False)


@given(content=st.text(st.characters(exclude_categories=("Cs",)), max_size=12), tail=st.sampled_from("<>[|]/ t"))
def test_text_that_could_be_part_of_a_marker_is_written_as_it_is(
    tekken: ChatTemplate, witness: PreTrainedTokenizerFast, content: str, tail: str
) -> None:
    for text in (content + tail, tail + content, tail):
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        plain = witness.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tekken.render(messages).text == plain


OTHER_TEMPLATES = {
    "helpers": "{{ bos_token }}{% for m in messages %}{{ m | tojson(indent=2) }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{{ strftime_now('%Y') | length }}",
    "ascii": "{{ messages | map(attribute='content') | list | tojson(ensure_ascii=True) }}",
    "trim": "{%- for m in messages %}\n  {{- '[' + m.role + ']' + m['content'] | trim }}\n{% endfor %}\n",
    "documents": "{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}{{ low_effort is defined }}",
}


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
@pytest.mark.parametrize(
    "content", ["hi", "  한국어 \n", "<b>&amp;", '"quoted" \\ud800 \\u003c', "ends in <", "> quote"]
)
def test_other_templates_equal_transformers(tekken: ChatTemplate, name: str, content: str) -> None:
    source = OTHER_TEMPLATES[name]
    messages = [{"role": "user", "content": content}]
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>"}
    expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **tokens)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert [ChatTemplate(source, tekken._tokenizer).render(messages).text] == expected


# Efforts.

OPEN, CLOSED = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think></think>"
LOW = "\n\n{reasoning effort: low}<|im_end|>\n"
EFFORTS = [
    ("high", {}, OPEN, False),
    ("low", {}, OPEN, True),
    ("none", {}, CLOSED, False),
    # chat_template_kwargs win over the effort, name by name.
    ("high", {"enable_thinking": False}, CLOSED, False),
    ("none", {"enable_thinking": True}, OPEN, False),
    ("high", {"low_effort": True}, OPEN, True),
    ("low", {"low_effort": False}, OPEN, False),
    ("low", {"enable_thinking": True}, OPEN, True),
    # What is left of a contradicted effort goes too.
    ("low", {"enable_thinking": False}, CLOSED, False),
    ("none", {"low_effort": True}, OPEN, True),
    ("none", {"low_effort": False}, CLOSED, False),
    # Both given: as given.
    ("none", {"enable_thinking": False, "low_effort": True}, CLOSED, True),
    ("none", {"enable_thinking": True, "low_effort": True}, OPEN, True),
    ("high", {"enable_thinking": None, "low_effort": None}, OPEN, False),
    # The engine's own options never reach the template.
    ("high", {"reasoning_budget": 7, "force_nonempty_content": True}, OPEN, False),
]


@pytest.mark.parametrize(("effort", "kwargs", "tail", "low"), EFFORTS)
def test_efforts(template: ChatTemplate, effort: str, kwargs: dict, tail: str, low: bool) -> None:
    past = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "reply"}]
    rendered = template.render([*past, USER], effort=effort, kwargs=kwargs)
    assert rendered.text.endswith(tail)
    assert rendered.thinking == (tail == OPEN)
    assert rendered.text.count("{reasoning effort: low}") == int(low)
    assert (f"12 + 34?{LOW}" in rendered.text) == low


def test_the_engines_options_do_not_leak_into_a_template_that_knows_them(tekken: ChatTemplate) -> None:
    source = "{{ reasoning_budget is defined }}{{ force_nonempty_content is defined }}{{ low_effort is defined }}"
    template = ChatTemplate(source, tekken._tokenizer)
    kwargs = {"reasoning_budget": 7, "force_nonempty_content": True}
    assert template.render([USER], kwargs=kwargs).text == "FalseFalseFalse"


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ChatError) as caught:
        call()
    return caught.value.param, caught.value.problem


def test_options_that_are_refused(template: ChatTemplate) -> None:
    def render(**options: Any) -> Callable[[], Rendered]:
        return lambda: template.render([USER], **options)

    assert refusal(render(effort="medium"))[0] == "reasoning_effort"
    for name in ("enable_thinking", "low_effort", "truncate_history_thinking"):
        param, problem = refusal(render(kwargs={name: "yes"}))
        assert (param, "boolean" in problem) == (f"chat_template_kwargs.{name}", True)
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        assert refusal(render(kwargs={name: []})) == (f"chat_template_kwargs.{name}", "is set by the server")
    assert refusal(render(kwargs={"enable_thinkin": True}))[0] == "chat_template_kwargs.enable_thinkin"
    assert refusal(render(kwargs={"custom": {1, 2}}))[0] == "chat_template_kwargs.custom"
    assert refusal(render(tools=[{"function": object()}]))[0] == "tools[0].function"


def test_the_given_options_are_left_alone() -> None:
    kwargs = {"enable_thinking": False, "reasoning_budget": 3}
    assert template_options("low", kwargs) == {"enable_thinking": False}
    assert kwargs == {"enable_thinking": False, "reasoning_budget": 3}


# Where the template comes from, and how it can fail.


def test_sources(tmp_path: Path, tekken: ChatTemplate) -> None:
    tokenizer = tekken._tokenizer

    def config(value: object) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))

    def text() -> str:
        return ChatTemplate.load(tmp_path, tokenizer).render([USER]).text

    assert not has_chat_template(tmp_path)
    with pytest.raises(TokenizerError, match="no chat template"):
        text()
    config("one")
    assert text() == "one"
    config([{"name": "rag", "template": "other"}, {"name": "default", "template": "two"}])
    assert has_chat_template(tmp_path)
    assert text() == "two"
    config([{"name": "rag", "template": "other"}])
    assert not has_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("three")
    assert text() == "three"
    with pytest.raises(TokenizerError, match="does not compile"):
        ChatTemplate("{% if %}", tokenizer)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('only odd turns') }}", "only odd turns"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(1000000) }}", "range"),
        ("{{ missing.field }}", "undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_refuses(tekken: ChatTemplate, source: str, problem: str) -> None:
    param, said = refusal(lambda: ChatTemplate(source, tekken._tokenizer).render([USER]))
    assert param == "messages"
    assert problem in said


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}",
        "{% for a in messages * 100 %}{% for b in messages * 100 %}{% set c = a.content %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for a in range(1000) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_a_rendering_ends(tekken: ChatTemplate, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(sandbox_module, "MAX_OPERATIONS", 5000)
    monkeypatch.setattr(sandbox_module, "MAX_CHARACTERS", 100)
    template = ChatTemplate(source, tekken._tokenizer)
    _, problem = refusal(lambda: template.render([USER]))
    assert "template does more than" in problem or "template writes more than" in problem
    # The count begins anew with every rendering.
    assert ChatTemplate("{{ messages[0].content }}", tekken._tokenizer).render([USER]).text == USER["content"]


def test_a_rendering_ends_in_time(tekken: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(1000) %}{% endfor %}", tekken._tokenizer)
    template.render([USER])
    monkeypatch.setattr(sandbox_module, "MAX_SECONDS", -1.0)
    _, problem = refusal(lambda: template.render([USER]))
    assert "template takes more than" in problem


def test_a_rendering_of_few_but_long_operations_ends_in_time(
    tekken: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass sorts much and counts as little: the clock is looked at in each."""
    source = "{% for a in range(200) %}{% set b = ('ab' * 100000)|list|sort|length %}{% endfor %}"
    template = ChatTemplate(source, tekken._tokenizer)
    monkeypatch.setattr(sandbox_module, "MAX_SECONDS", 0.0)
    sorts: list[int] = []
    monkeypatch.setitem(template._sandbox.filters, "sort", lambda items: sorts.append(len(items)) or items)
    _, problem = refusal(lambda: template.render([USER]))
    assert "template takes more than" in problem
    assert len(sorts) <= 1


@pytest.mark.parametrize(
    "source",
    ["{{ 'x' * 99999999 }}", "{{ [1, 2] * 99999999 }}", "{{ 99999999 * 'x' }}", "{{ 9 ** 99999999 }}"],
)
def test_one_operation_makes_nothing_huge(tekken: ChatTemplate, source: str) -> None:
    _, problem = refusal(lambda: ChatTemplate(source, tekken._tokenizer).render([USER]))
    assert "of the template makes more than" in problem
    fits = ChatTemplate("{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 6 * 7 }}{{ 2 * 1.5 }}", tekken._tokenizer)
    assert fits.render([USER]).text == "abab1024423.0"


def test_threads_do_not_disturb_each_other(tekken: ChatTemplate) -> None:
    expected = {effort: tekken.render([USER], effort=effort) for effort in ("none", "low", "high")}
    wrong: list[str] = []

    def work(effort: str) -> None:
        for _ in range(30):
            if tekken.render([USER], effort=effort) != expected[effort]:
                wrong.append(effort)

    threads = [threading.Thread(target=work, args=(effort,)) for effort in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
