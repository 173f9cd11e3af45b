"""``POST /v1/chat/completions``: from the bytes of a request to what the engine takes (contract, section 1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag

from headrace.engine import ChatOptions, SamplingParams
from headrace.engine.request import MAX_TOP_LOGPROBS
from headrace.engine.serve import fields
from headrace.engine.serve.errors import invalid
from headrace.engine.serve.fields import ARRAY, STRING, Body, Budget, GenerationBody, TokenLimit
from headrace.engine.serve.profiles import Profile
from headrace.tokenizer import ChatError, check_turns

DEFAULT_MAX_TOKENS = 16384
MAX_MESSAGES = 4096
MAX_PARTS = 1024
EXAMPLE = [{"role": "user", "content": "What is 12 + 34?"}]


class TextPart(Body):
    """One part of a message's content."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


Content = Annotated[
    Annotated[str, Tag(STRING)]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag(ARRAY)],
    Discriminator(fields.form),
]


class Message(Body):
    """One turn. ``reasoning`` is another name for ``reasoning_content``."""

    role: str
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateArguments(Body):
    """``chat_template_kwargs``; these win over ``reasoning_effort`` and ``reasoning_budget``.

    Others go to the chat template if it reads them, and are unknown fields like any other if it does not.
    """

    model_config = ConfigDict(extra="allow")

    enable_thinking: bool | None = None
    low_effort: bool | None = None
    truncate_history_thinking: bool | None = None
    force_nonempty_content: bool | None = None
    reasoning_budget: Budget | None = None


class Rendering(Body):
    """How a conversation becomes a prompt."""

    reasoning_effort: str = Field("high", description="How much to reason.")
    chat_template_kwargs: TemplateArguments = TemplateArguments()


class ChatRequest(GenerationBody, Rendering):
    """The body, before the profile has had its say."""

    messages: Messages = Field(description="The conversation so far; the last turn is the user's.", examples=[EXAMPLE])
    max_tokens: TokenLimit | None = Field(None, description="Tokens to generate, reasoning included.")
    max_completion_tokens: TokenLimit | None = Field(None, description="Another name for max_tokens.")
    reasoning_budget: Budget = Field(16384, description="Tokens of reasoning before it is forced to end; -1: no limit.")
    logprobs: bool = Field(False, description="Log-probabilities of the tokens.")
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS, description="Alternatives per token; needs logprobs.")


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
    **fields.UNIMPLEMENTED,
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # "auto" among no tools; tools themselves are refused above
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "include_reasoning": (True,),
    "chat_template": (),
    "documents": ([],),
}


def parse_chat(
    body: bytes,
    accept: str | None,
    profile: Profile,
    served: str,
    max_context: int,
    arguments: Collection[str] = (),
) -> ChatCall:
    """Validate a request body. Raises ApiError: 400 not JSON, 404 unknown model, 413 too many values, 422 naming the
    field.

    ``max_context``: tokens of prompt and answer together. ``arguments``: the names that this model's chat template
    reads.
    """
    data = fields.parse_object(body, max_context)
    fields.refuse_unimplemented(data, UNIMPLEMENTED)
    _refuse_tool_calls(data)
    request = fields.validated(ChatRequest, data)
    fields.check_model(request.model, served)
    return ChatCall(
        messages=turns_of(request.messages, profile),
        params=_params(request, profile),
        options=options_of(request, profile, arguments),
        stream=profile.wants_stream(request.stream, accept),
        include_usage=request.stream_options.include_usage,
        return_token_ids=request.return_token_ids,
    )


def _refuse_tool_calls(data: Mapping[str, Any]) -> None:
    for index, message in enumerate(data["messages"]) if isinstance(data.get("messages"), list) else ():
        for name in ("tool_calls", "function_call"):
            if isinstance(message, dict) and message.get(name) not in (None, []):
                raise fields.not_implemented(f"messages[{index}].{name}")


def turns_of(messages: Sequence[Message], profile: Profile) -> list[dict[str, Any]]:
    """The turns as the engine takes them. Raises ApiError 422 for a role or an order that the profile refuses."""
    turns = [_turn(index, message, profile) for index, message in enumerate(messages)]
    if profile.alternating:
        try:
            check_turns(turns)
        except ChatError as error:
            raise invalid(str(error), error.param) from None
    return turns


def _turn(index: int, message: Message, profile: Profile) -> dict[str, Any]:
    """A turn as the engine takes it; joining parts and moving inline reasoning is the chat template's business."""
    where = f"messages[{index}]"
    if message.role not in profile.roles:
        allowed = ", ".join(profile.roles)
        raise invalid(f"{where}.role must be one of {allowed}, got {fields.shown(message.role)}", f"{where}.role")
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
    reasoning = fields.alias(message.reasoning_content, message.reasoning, f"{where}.reasoning_content", "reasoning")
    if role == "assistant" and reasoning is not None:
        turn["reasoning_content"] = reasoning
    return turn


def _params(request: ChatRequest, profile: Profile) -> SamplingParams:
    fields.check_temperature(request.temperature, profile.max_temperature)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    limit = fields.alias(request.max_tokens, request.max_completion_tokens, "max_tokens", "max_completion_tokens")
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
        seed=request.seed,
        stop=request.stops,
        n=request.n,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        ignore_eos=request.ignore_eos,
        reasoning_budget=request.reasoning_budget,
    )


def options_of(request: Rendering, profile: Profile, arguments: Collection[str]) -> ChatOptions:
    """How the conversation is rendered. Raises ApiError 422 for an effort that the profile does not know."""
    effort = profile.efforts.get(request.reasoning_effort)
    if effort is None:
        allowed = ", ".join(profile.efforts)
        given = fields.shown(request.reasoning_effort)
        raise invalid(f"reasoning_effort must be one of {allowed}, got {given}", "reasoning_effort")
    asked = request.chat_template_kwargs
    named = {name: getattr(asked, name) for name in TemplateArguments.model_fields}
    read = {name: value for name, value in (asked.model_extra or {}).items() if name in arguments}
    kwargs = {name: value for name, value in (named | read).items() if value is not None}
    return ChatOptions(reasoning_effort=effort, chat_template_kwargs=kwargs)
