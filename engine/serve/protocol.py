"""From the bytes of a request to what the engine takes: parse, validate, name the field at fault (contract, section 1).

``null`` means absent everywhere. Types are strict: no bool for an integer, no float for a seed. Unknown fields are
tolerated; a known one that would change the output and is not implemented is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import from_json

from headrace.engine import ChatOptions, SamplingParams
from headrace.engine.request import (
    MAX_CHOICES,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKENS_LIMIT,
    MAX_TOP_LOGPROBS,
)
from headrace.engine.serve.errors import ApiError, invalid
from headrace.engine.serve.profiles import Profile
from headrace.tokenizer import ChatError, check_turns

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 16384
MAX_SHOWN = 60

_STRING, _ARRAY = "#string", "#array"
"""Tags of the two forms of a field that is a string or an array; they must not show in a field's path."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(_Body):
    """One part of a message's content."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


def _form(value: Any) -> str:
    return _ARRAY if isinstance(value, list) else _STRING


Content = Annotated[
    Annotated[str, Tag(_STRING)] | Annotated[list[TextPart], Field(min_length=1), Tag(_ARRAY)], Discriminator(_form)
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag(_STRING)] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag(_ARRAY)],
    Discriminator(_form),
]
Budget = Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)]


class Message(_Body):
    """One turn. ``reasoning`` is another name for ``reasoning_content``."""

    role: str
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(_Body):
    """What a stream carries besides the deltas."""

    include_usage: bool = False


class TemplateArguments(_Body):
    """``chat_template_kwargs``; these win over ``reasoning_effort`` and ``reasoning_budget``."""

    enable_thinking: bool | None = None
    low_effort: bool | None = None
    truncate_history_thinking: bool | None = None
    force_nonempty_content: bool | None = None
    reasoning_budget: Budget | None = None


class ChatRequest(_Body):
    """The body of ``POST /v1/chat/completions``, before the profile has had its say."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    temperature: float = Field(1.0, ge=0)  # the profile knows the upper end
    top_p: float = Field(0.95, ge=0, le=1)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    reasoning_effort: str = "high"
    reasoning_budget: Budget = 16384
    chat_template_kwargs: TemplateArguments = TemplateArguments()
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions = StreamOptions()
    stop: Stop | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    return_token_ids: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A validated request: what the engine gets, and how the answer is to be written."""

    messages: list[dict[str, Any]]
    params: SamplingParams
    options: ChatOptions
    stream: bool
    include_usage: bool
    return_token_ids: bool


UNIMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # "auto" among no tools; tools themselves are refused above
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "include_reasoning": (True,),
    "chat_template": (),
    "documents": ([],),
    "prompt_logprobs": (),
    "thinking_token_budget": (),
    "nvext": ({},),
}
"""Known fields that would change the output, with the values that ask for nothing. Others (``top_k`` and ``thinking``
among them, which gateways add to every request) count as unknown."""


def parse_chat(body: bytes, accept: str | None, profile: Profile, served: str) -> ChatCall:
    """Validate a request body. Raises ApiError: 400 not JSON, 404 unknown model, 422 naming the field."""
    data = parse_object(body)
    _refuse_unimplemented(data)
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _field_error(error) from None
    check_model(request.model, served)
    return ChatCall(
        messages=_messages(request.messages, profile),
        params=_params(request, profile),
        options=_options(request, profile),
        stream=profile.wants_stream(request.stream, accept),
        include_usage=request.stream_options.include_usage,
        return_token_ids=request.return_token_ids,
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. NaN, lone surrogates, wrong UTF-8 and deep nesting are not JSON here."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="malformed_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="malformed_json")
    return data


def check_model(model: str | None, served: str) -> None:
    """404 unless the name is absent or the served one."""
    if model is not None and model != served:
        message = f"the model {_shown(model)} does not exist; this server serves {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _refuse_unimplemented(data: Mapping[str, Any]) -> None:
    for name, neutral in UNIMPLEMENTED.items():
        if data.get(name) is not None and not _among(data[name], neutral):
            raise invalid(f"{name} is not implemented; leave it out", name, "unsupported_parameter")
    for index, message in enumerate(data["messages"]) if isinstance(data.get("messages"), list) else ():
        for name in ("tool_calls", "function_call"):
            if isinstance(message, dict) and message.get(name) not in (None, []):
                param = f"messages[{index}].{name}"
                raise invalid(f"{param} is not implemented; leave it out", param, "unsupported_parameter")


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equality that keeps booleans and numbers apart."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def _messages(messages: Sequence[Message], profile: Profile) -> list[dict[str, Any]]:
    turns = [_message(index, message, profile) for index, message in enumerate(messages)]
    if profile.alternating:
        try:
            check_turns(turns)
        except ChatError as error:
            raise invalid(str(error), error.param) from None
    return turns


def _message(index: int, message: Message, profile: Profile) -> dict[str, Any]:
    """A turn as the engine takes it; joining parts and moving inline reasoning is the chat template's business."""
    where = f"messages[{index}]"
    if message.role not in profile.roles:
        allowed = ", ".join(profile.roles)
        raise invalid(f"{where}.role must be one of {allowed}, got {_shown(message.role)}", f"{where}.role")
    role = profile.roles[message.role]
    content: Any = message.content
    if content is None:
        # An answer that was cut while thinking has no content, and not every client sends its reasoning back.
        if role != "assistant":
            raise invalid(f"{where}.content is required", f"{where}.content")
        content = ""
    if isinstance(content, list):
        content = [{"type": part.type, "text": part.text} for part in content]
    turn = {"role": role, "content": content}
    reasoning = _alias(message.reasoning_content, message.reasoning, f"{where}.reasoning_content", "reasoning")
    if role == "assistant" and reasoning is not None:
        turn["reasoning_content"] = reasoning
    return turn


def _alias(value: T | None, other: T | None, param: str, other_name: str) -> T | None:
    """The value of a field that has two names; both given and unequal is refused."""
    if value is not None and other is not None and value != other:
        raise invalid(f"{param} and {other_name} are two names of one field, but differ", param)
    return other if value is None else value


def _params(request: ChatRequest, profile: Profile) -> SamplingParams:
    if request.temperature > profile.max_temperature:
        raise invalid(
            f"temperature must be at most {profile.max_temperature:g}, got {request.temperature:g}", "temperature"
        )
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    limit = _alias(request.max_tokens, request.max_completion_tokens, "max_tokens", "max_completion_tokens")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
        seed=request.seed,
        stop=stop,
        n=request.n,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        ignore_eos=request.ignore_eos,
        reasoning_budget=request.reasoning_budget,
    )


def _options(request: ChatRequest, profile: Profile) -> ChatOptions:
    effort = profile.efforts.get(request.reasoning_effort)
    if effort is None:
        allowed = ", ".join(profile.efforts)
        raise invalid(
            f"reasoning_effort must be one of {allowed}, got {_shown(request.reasoning_effort)}", "reasoning_effort"
        )
    arguments = request.chat_template_kwargs.model_dump(exclude_none=True)
    return ChatOptions(reasoning_effort=effort, chat_template_kwargs=arguments)


_PHRASES = {
    "missing": "is required",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} item",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} character",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": 'must be "text"',
}


def _field_error(error: ValidationError) -> ApiError:
    """The first thing wrong with a body, in words, with the field's path."""
    detail = error.errors(include_url=False)[0]
    path = _path(detail["loc"])
    phrase = _PHRASES.get(detail["type"], detail["msg"]).format(**detail.get("ctx", {}))
    if detail["loc"][-1] == _STRING and detail["type"] == "string_type":
        phrase = "must be a string or an array"
    got = "" if detail["type"] == "missing" else f", got {_shown(detail['input'])}"
    return invalid(f"{path} {phrase}{got}", path)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in (_STRING, _ARRAY):
            path += f".{step}" if path else step
    return path


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
