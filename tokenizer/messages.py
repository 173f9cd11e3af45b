"""Messages as users send them to messages as chat templates read them.

Only the fields that mean something here go on: role, content, reasoning_content, tool_calls, tool_call_id.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.tokenizer.base import check_unicode
from headrace.tokenizer.errors import ChatError, TokenizerError
from headrace.tokenizer.markers import CLOSE_THINK, OPEN_THINK

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool", "context")


def normalise(messages: Any) -> list[Message]:
    """Plain messages for a template: content as one string, `context` put at the head of the following user turn,
    `reasoning` and inline <think>...</think> as reasoning_content, tool arguments as objects.

    Says nothing of the order of roles (`check_turns` does), but for `context`, which has to stand before a user
    message. Raises ChatError naming the message and field.
    """
    out: list[Message] = []
    context: str | None = None
    for index, message in enumerate(_message_list(messages)):
        role = _role(message, index)
        if context is not None and role != "user":
            raise _stray_context(index - 1)
        if role == "context":
            context = _content(message, index)
            continue
        if role == "assistant":
            out.append(_assistant(message, index))
            continue
        content = _content(message, index)
        if context is not None:
            content, context = f"{context}\n\n{content}", None
        plain = {"role": role, "content": content}
        if role == "tool" and message.get("tool_call_id") is not None:
            plain["tool_call_id"] = _string(message["tool_call_id"], f"messages[{index}].tool_call_id", index)
        out.append(plain)
    if context is not None:
        raise _stray_context(len(messages) - 1)
    return out


def check_turns(messages: Any) -> None:
    """The strict order: an optional system message first, then user and assistant in turn, the last one a user's;
    `context` directly before a user message. Raises ChatError naming the first message out of order.
    """
    expected = "user"
    last_role = None
    for index, message in enumerate(_message_list(messages)):
        role = _role(message, index)
        last_role = role
        if role == "context" or (role == "system" and index == 0):
            continue
        if role != expected:
            problem = "must be the first message" if role == "system" else f"expected {expected!r}, not {role!r}"
            raise ChatError(problem, param=f"messages[{index}].role", index=index)
        expected = "assistant" if role == "user" else "user"
    if last_role != "user":
        last = len(messages) - 1
        problem = f"the last message must be a user's, not {last_role!r}"
        raise ChatError(problem, param=f"messages[{last}].role", index=last)


def text_bytes(messages: Any, *, reasoning_kept: bool = False) -> int:
    """UTF-8 bytes of the text that `messages` put into a prompt at the least, white space that a template trims apart.

    Earlier reasoning may be dropped, so it counts as much as its longest piece, which was once written in one context;
    with `reasoning_kept` all of it counts. Never raises: what is no message at all counts nothing.
    """
    kept = longest = 0
    for message in messages if isinstance(messages, Sequence) else ():
        if not isinstance(message, Mapping):
            continue
        content = message.get("content")
        inline = 0
        parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
        for text in (part.get("text") for part in parts if isinstance(part, Mapping)):
            answer = text
            if isinstance(text, str) and message.get("role") == "assistant":
                reasoning, _, answer = text.rpartition(CLOSE_THINK)
                inline += _size(reasoning)
            kept += _size(answer)
        thought = max(inline, _size(message.get("reasoning_content")), _size(message.get("reasoning")))
        longest = max(longest, thought)
        kept += thought if reasoning_kept else 0
    return max(kept, longest)


def _size(text: Any) -> int:
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0


def _stray_context(index: int) -> ChatError:
    return ChatError("must stand directly before a user message", param=f"messages[{index}]", index=index)


def _message_list(messages: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ChatError("must be a list of messages", param="messages")
    if not messages:
        raise ChatError("must not be empty", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError("must be an object", param=f"messages[{index}]", index=index)
    return messages


def _role(message: Mapping[str, Any], index: int) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        problem = f"must be one of {', '.join(ROLES)}, not {role!r}"
        raise ChatError(problem, param=f"messages[{index}].role", index=index)
    return role


def _string(value: Any, param: str, index: int) -> str:
    if not isinstance(value, str):
        raise ChatError(f"must be a string, not {type(value).__name__}", param=param, index=index)
    try:
        check_unicode(value)
    except TokenizerError as error:
        raise ChatError(str(error), param=param, index=index) from None
    return str.__str__(value)


def _content(message: Mapping[str, Any], index: int) -> str:
    """A string, or a list of text parts put together without separators."""
    param = f"messages[{index}].content"
    content = message.get("content")
    if isinstance(content, str):
        return _string(content, param, index)
    if content is None:
        raise ChatError("is required", param=param, index=index)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ChatError("must be a string or a list of text parts", param=param, index=index)
    texts = []
    for number, part in enumerate(content):
        where = f"{param}[{number}]"
        if not isinstance(part, Mapping):
            raise ChatError("must be an object with type and text", param=where, index=index)
        if part.get("type") != "text":
            problem = f"only text parts are supported, not {part.get('type')!r}"
            raise ChatError(problem, param=f"{where}.type", index=index)
        texts.append(_string(part.get("text"), f"{where}.text", index))
    return "".join(texts)


def _assistant(message: Mapping[str, Any], index: int) -> Message:
    """An assistant's turn. Content may be absent beside reasoning or a tool call: an answer that was cut off."""
    reasoning = _reasoning(message, index)
    calls = _tool_calls(message, index)
    absent = message.get("content") is None and (reasoning or calls)
    content = "" if absent else _content(message, index)
    inline, rest = split_inline_reasoning(content)
    if inline is not None:
        if reasoning and inline and reasoning.strip() != inline.strip():
            raise ChatError(
                f"begins with {OPEN_THINK}, but reasoning_content gives other reasoning",
                param=f"messages[{index}].content",
                index=index,
            )
        reasoning, content = reasoning or inline, rest
    out: Message = {"role": "assistant", "content": content}
    if reasoning:
        out["reasoning_content"] = reasoning
    if calls:
        out["tool_calls"] = calls
    return out


def split_inline_reasoning(content: str) -> tuple[str | None, str]:
    """(reasoning, answer) of content that begins with <think>...</think>, else (None, content). White space is treated
    as in what the server itself returns: none at the end of reasoning, no newlines at the beginning of the answer.
    """
    head = content.lstrip()
    if not head.startswith(OPEN_THINK):
        return None, content
    inner, close, rest = head[len(OPEN_THINK) :].partition(CLOSE_THINK)
    if not close:
        return None, content
    return inner.removeprefix("\n").rstrip(), rest.lstrip("\n")


def _reasoning(message: Mapping[str, Any], index: int) -> str:
    """`reasoning_content`, or `reasoning`, its other name."""
    given = {}
    for name in ("reasoning_content", "reasoning"):
        if message.get(name) is not None:
            given[name] = _string(message[name], f"messages[{index}].{name}", index)
    if len(set(given.values())) > 1:
        param = f"messages[{index}].reasoning"
        raise ChatError("differs from reasoning_content, which is the same field", param=param, index=index)
    return next(iter(given.values()), "")


def _tool_calls(message: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    param = f"messages[{index}].tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ChatError("must be a list", param=param, index=index)
    out = []
    for number, call in enumerate(calls):
        where = f"{param}[{number}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ChatError("must be an object with name and arguments", param=where, index=index)
        name = _string(function.get("name"), f"{where}.name", index)
        arguments = _arguments(function.get("arguments"), f"{where}.arguments", index)
        plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            plain["id"] = _string(call["id"], f"{param}[{number}].id", index)
        out.append(plain)
    return out


def _arguments(value: Any, param: str, index: int) -> dict[str, Any]:
    """Templates iterate over arguments; the wire form is a string of JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ChatError("must be a JSON object", param=param, index=index) from None
    if not isinstance(value, Mapping):
        raise ChatError("must be a JSON object", param=param, index=index)
    plain: dict[str, Any] = plain_data(value, param, index)
    return plain


def plain_data(value: Any, param: str, index: int | None = None, depth: int = 0) -> Any:
    """A copy made of JSON's own types, so that a template sees no object with methods. Raises ChatError otherwise."""
    if depth > 64:
        raise ChatError("is nested deeper than 64 levels", param=param, index=index)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        try:
            check_unicode(value)
        except TokenizerError as error:
            raise ChatError(str(error), param=param, index=index) from None
        return str.__str__(value)
    if isinstance(value, Mapping):
        items = ((plain_data(key, param, index, depth + 1), item) for key, item in value.items())
        return {key: plain_data(item, f"{param}.{key}", index, depth + 1) for key, item in items}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain_data(item, f"{param}[{number}]", index, depth + 1) for number, item in enumerate(value)]
    raise ChatError(f"must be JSON data, not {type(value).__name__}", param=param, index=index)
