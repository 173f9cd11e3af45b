"""``/openapi.json``: the API described from the models that validate it, as this server's profile has it.

The request schemas are pydantic's, so names, defaults and ranges are those that are checked. What a schema cannot say
(roles alternate, one of two fields) stands in descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from headrace.engine.serve import prompts, protocol
from headrace.engine.serve.bodies import Json
from headrace.engine.serve.history import HISTORY_LENGTH, MAX_PAGE, PAGE
from headrace.engine.serve.profiles import Profile
from headrace.engine.serve.schemas import RESPONSES, SCHEMAS, reference
from headrace.tokenizer import template_options

_ERRORS = {
    400: "The body is not JSON, or the prompt does not fit the context.",
    401: "The key is missing or wrong.",
    403: "A web page of another host asked a server without keys.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large, or has too many values.",
    422: "A field is out of range, of the wrong type, or not implemented; ``param`` names it.",
    429: "The queue is full; see Retry-After.",
    500: "It failed; where a retry cannot help, x-should-retry is false.",
    503: "The server is starting, shutting down, or has too many large bodies in hand; see Retry-After.",
}
_BODY = (400, 401, 403, 404, 408, 413, 422, 500, 503)
_READ = (401, 403, 500, 503)


def document(profile: Profile, model: str | None, *, keys: bool, max_context: int | None = None) -> Json:
    """The OpenAPI 3.1 document. ``model`` is the served name, ``max_context`` in tokens; None while it is loading."""
    _, generated = models_json_schema(
        [
            (body, "validation")
            for body in (
                protocol.ChatRequest, prompts.CompletionRequest, prompts.TokenizeRequest, prompts.DetokenizeRequest,
            )
        ],
        ref_template="#/components/schemas/{model}",
    )  # fmt: skip
    schemas = generated["$defs"]
    _specialise(schemas, profile, model)
    if max_context is not None:
        schemas["DetokenizeRequest"]["properties"]["tokens"]["maxItems"] = max_context
    components: Json = {"schemas": schemas | SCHEMAS}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": "1",
            "description": f"Chat completions with reasoning budgets. Profile: {profile.name}.",
        },
        "paths": {path: {method: _secured(item, keys)} for (path, method), item in _operations(model).items()},
        "components": components,
    }


def _specialise(schemas: Json, profile: Profile, model: str | None) -> None:
    """What the profile and the model decide, and the fields that are known and refused."""
    chat, completion = schemas["ChatRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    for body, unimplemented in (
        ("ChatRequest", protocol.UNIMPLEMENTED),
        ("CompletionRequest", prompts.UNIMPLEMENTED),
        ("TokenizeRequest", prompts.TOKENIZE_UNIMPLEMENTED),
    ):
        schemas[body]["properties"] |= _refused(unimplemented)
    for body in ("ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        if model is not None:
            schemas[body]["properties"]["model"] |= {"enum": [model, None], "default": model}
    for properties in (chat, completion):
        properties["temperature"]["maximum"] = profile.max_temperature
    for body in ("ChatRequest", "TokenizeRequest"):
        effort = schemas[body]["properties"]["reasoning_effort"]
        effort["enum"] = [*profile.efforts, None]
        # What each stands for in chat_template_kwargs, for forms that write it so.
        effort["x-template-arguments"] = {name: template_options(known) for name, known in profile.efforts.items()}
    chat["stream"]["default"] = profile.stream_default
    completion["stream"]["default"] = False
    chat["max_tokens"]["default"] = protocol.DEFAULT_MAX_TOKENS
    role = schemas["Message"]["properties"]["role"]
    role["enum"] = list(profile.roles)
    role["description"] = "Turns alternate between user and assistant; a system message may be the first."


def _refused(unimplemented: Mapping[str, tuple[Any, ...]]) -> Json:
    return {
        name: {"enum": [*neutral, None], "description": "Not implemented: only values that ask for nothing are taken."}
        for name, neutral in unimplemented.items()
    }


def _secured(operation: Json, keys: bool) -> Json:
    public = operation.pop("public", False)
    return operation | {"security": [{"key": []}]} if keys and not public else operation


def _operations(model: str | None) -> dict[tuple[str, str], Json]:
    """Every operation by path and method."""
    page: Json = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}}
    page["schema"] |= {"default": PAGE}
    after = {"name": "after", "in": "query", "schema": {"type": "string"}}
    after["description"] = f"The id of an entry: the page begins behind it. The last {HISTORY_LENGTH} are kept."
    name: Json = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    if model is not None:
        name["schema"] = {"type": "string", "enum": [model]}
    return {
        ("/v1/chat/completions", "post"): _posting("ChatRequest", "chat", (*_BODY, 429)),
        ("/v1/completions", "post"): _posting("CompletionRequest", "completion", (*_BODY, 429)),
        ("/tokenize", "post"): _posting("TokenizeRequest", "tokens", _BODY),
        ("/detokenize", "post"): _posting("DetokenizeRequest", "text", _BODY),
        ("/v1/models", "get"): _reading("models", _READ),
        ("/v1/models/{model}", "get"): _reading("model", (*_READ, 404), name),
        ("/v1/requests", "get"): _reading("requests", (*_READ, 422), page, after),
        ("/health/live", "get"): _reading("health", (500,)) | {"public": True},
        ("/health/ready", "get"): _reading("health", (500, 503)) | {"public": True},
        ("/metrics", "get"): _reading("metrics", _READ),
        ("/openapi.json", "get"): _reading("document", (500,)) | {"public": True},
    }


_EXAMPLES: dict[str, Json] = {
    "ChatRequest": {"messages": protocol.EXAMPLE, "reasoning_budget": 200, "stream": False},
    "CompletionRequest": {"prompt": "One, two,", "max_tokens": 8},
    "TokenizeRequest": {"messages": protocol.EXAMPLE},
    "DetokenizeRequest": {"tokens": [10, 11]},
}


def _posting(body: str, answer: str, errors: tuple[int, ...]) -> Json:
    content = {"application/json": {"schema": reference(body), "example": _EXAMPLES[body]}}
    return {"requestBody": {"required": True, "content": content}, **_reading(answer, errors)}


def _reading(answer: str, errors: tuple[int, ...], *parameters: Json) -> Json:
    responses: Json = {"200": RESPONSES[answer]}
    for status in sorted(errors):
        content = {"application/json": {"schema": reference("Error")}}
        responses[str(status)] = {"description": _ERRORS[status], "content": content}
    operation: Json = {"summary": RESPONSES[answer]["description"], "responses": responses}
    return operation | {"parameters": list(parameters)} if parameters else operation
