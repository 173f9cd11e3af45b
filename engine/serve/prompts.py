"""``/v1/completions``, ``/tokenize`` and ``/detokenize``: requests about raw prompts, in which markers are markers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from headrace.engine import SamplingParams
from headrace.engine.errors import ContextExceeded
from headrace.engine.request import MAX_TOP_LOGPROBS
from headrace.engine.serve import fields, protocol
from headrace.engine.serve.errors import invalid
from headrace.engine.serve.fields import ARRAY, STRING, Body, GenerationBody, TokenLimit
from headrace.engine.serve.profiles import Profile

if TYPE_CHECKING:
    from headrace.engine import Engine

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16
"""What this path's clients expect (OpenAI, vLLM); they always say more if they want more."""

_LIST_OF_IDS, _LIST_OF_LISTS = "#ids", "#lists"

TokenId = Annotated[int, Field(ge=0)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return STRING
    first = value[0] if value else ""
    if isinstance(first, list):
        return _LIST_OF_LISTS
    return _LIST_OF_IDS if isinstance(first, int) and not isinstance(first, bool) else ARRAY


Prompts = Annotated[
    Annotated[str, Tag(STRING)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(ARRAY)]
    | Annotated[Ids, Tag(_LIST_OF_IDS)]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(_LIST_OF_LISTS)],
    Discriminator(_prompt_form),
]


class CompletionRequest(GenerationBody):
    """The body of ``POST /v1/completions``."""

    prompt: Prompts = Field(description="Text in which markers are markers, token ids, or several of either.")
    max_tokens: TokenLimit = Field(DEFAULT_MAX_TOKENS, description="Tokens to generate for each choice.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Log-probabilities of the tokens, with this many alternatives."
    )


UNIMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    **fields.UNIMPLEMENTED,
    "suffix": ("",),
    "add_special_tokens": (True,),
    # A raw prompt has no reasoning of ours to bound: everything generated is text.
    "reasoning_budget": (-1,),
    "reasoning_effort": (),
    "chat_template_kwargs": ({},),
}


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A validated request: the prompts as ids, and how the answer is to be written."""

    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    include_usage: bool
    return_token_ids: bool


def parse_completion(body: bytes, accept: str | None, profile: Profile, served: str, engine: Engine) -> CompletionCall:
    """Validate a request body.

    Raises ApiError: 400 not JSON, 404 unknown model, 413 too many values, 422 naming the field; and ContextExceeded.
    """
    data = fields.parse_object(body, engine.max_context)
    fields.refuse_unimplemented(data, UNIMPLEMENTED)
    _check_lengths(data.get("prompt"), engine.max_context)
    request = fields.validated(CompletionRequest, data)
    fields.check_model(request.model, served)
    fields.check_temperature(request.temperature, profile.max_temperature)
    params = SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop=request.stops,
        n=request.n,
        logprobs=request.logprobs is not None,
        top_logprobs=request.logprobs or 0,
        ignore_eos=request.ignore_eos,
    )
    return CompletionCall(
        prompts=[_ids(engine, prompt) for prompt in _each(request.prompt)],
        params=params,
        # The contract's default of a stream is the chat path's; clients of this one never had it.
        stream=profile.wants_stream(request.stream, accept, default=False),
        include_usage=request.stream_options.include_usage,
        return_token_ids=request.return_token_ids,
    )


def _check_lengths(prompt: Any, max_context: int) -> None:
    """Raise ContextExceeded for ids that cannot fit, before each of them is looked at."""
    several = prompt[:MAX_PROMPTS] if _prompt_form(prompt) == _LIST_OF_LISTS else [prompt]
    for one in several:
        if _prompt_form(one) == _LIST_OF_IDS and len(one) >= max_context:
            raise ContextExceeded(len(one), max_context, "prompt")


def _each(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, one or several."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _ids(engine: Engine, prompt: str | list[int]) -> list[int]:
    return prompt if isinstance(prompt, list) else engine.raw_prompt_ids(prompt)


class TokenizeRequest(protocol.Rendering):
    """The body of ``POST /tokenize``: a raw prompt, or a conversation and how to render it."""

    model: str | None = None
    prompt: str | None = Field(None, description="Text in which markers are markers.")
    messages: protocol.Messages | None = Field(None, description="A conversation, rendered as for an answer.")
    return_token_strs: bool = Field(False, description="Show each token's text as well.")


TOKENIZE_UNIMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    **{name: protocol.UNIMPLEMENTED[name] for name in ("tools", "add_generation_prompt", "continue_final_message")},
    **{name: protocol.UNIMPLEMENTED[name] for name in ("chat_template", "documents")},
}


def tokenize(body: bytes, profile: Profile, served: str, engine: Engine) -> dict[str, Any]:
    """The ids of a prompt or of a conversation. Raises ApiError, or what rendering raises."""
    data = fields.parse_object(body, engine.max_context)
    fields.refuse_unimplemented(data, TOKENIZE_UNIMPLEMENTED)
    request = fields.validated(TokenizeRequest, data)
    fields.check_model(request.model, served)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt or messages is required, and not both", "prompt")
    if request.messages is None:
        assert request.prompt is not None
        ids = _ids(engine, request.prompt)
    else:
        turns = protocol.turns_of(request.messages, profile)
        ids = engine.prompt_ids(turns, protocol.options_of(request, profile, engine.template_arguments)).ids
    texts = [engine.tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
    return {
        "count": len(ids),
        "max_model_len": engine.max_context,
        "tokens": ids,
        "token_strs": texts if request.return_token_strs else None,
    }


class DetokenizeRequest(Body):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId] = Field(
        description="Token ids, at most as many as the context has; markers become their text.", fail_fast=True
    )


def detokenize(body: bytes, served: str, engine: Engine) -> dict[str, Any]:
    """The text of ids. Raises ApiError."""
    data = fields.parse_object(body, engine.max_context)
    tokens = data.get("tokens")
    if isinstance(tokens, list) and len(tokens) > engine.max_context:
        message = f"tokens must have at most {engine.max_context} items (the context), got {len(tokens)}"
        raise invalid(message, "tokens")
    request = fields.validated(DetokenizeRequest, data)
    fields.check_model(request.model, served)
    size = engine.tokenizer.vocab_size
    for index, token in enumerate(request.tokens):
        if token >= size:
            raise invalid(f"tokens[{index}] must be less than {size}, got {fields.shown(token)}", f"tokens[{index}]")
    return {"prompt": engine.tokenizer.decode(request.tokens)}
