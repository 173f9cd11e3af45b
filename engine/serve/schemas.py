"""JSON schemas of what the server answers, for its description and for the tests that hold it to them."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from headrace.engine.serve.profiles import EVENTS, JSON

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": ["number", "null"], "minimum": 0}
OBJECT: Schema = {"type": "object"}
TEXT: Schema = {"type": ["string", "null"]}
IDS: Schema = {"type": "array", "items": COUNT}


def reference(name: str) -> Schema:
    """A schema of the components by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def shape(optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object of which everything but ``optional`` is there, and nothing else."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def constant(value: str) -> Schema:
    """Exactly this string."""
    return {"type": "string", "const": value}


_ENVELOPE = {"id": STRING, "created": INTEGER, "model": STRING, "system_fingerprint": STRING}
_REASON: Schema = {"enum": ["stop", "length"]}
_NO_REASON_YET: Schema = {"enum": ["stop", "length", None]}
_ENTRIES = nullable(array(reference("Logprob")))
_CANDIDATE = {"token": STRING, "logprob": {"type": "number", "maximum": 0}, "bytes": array({**COUNT, "maximum": 255})}

_CHAT_LOGPROBS = nullable(shape(content=_ENTRIES, reasoning_content=_ENTRIES, refusal={"type": "null"}))
_TEXT = {**_ENVELOPE, "object": constant("text_completion")}


def _text_choice(reason: Schema) -> Schema:
    logprobs = shape(
        tokens=array(STRING), token_logprobs=array({"type": "number"}), top_logprobs=array(OBJECT),
        text_offset=array(COUNT),
    )  # fmt: skip
    return shape(
        ("token_ids", "prompt_token_ids"),
        index=COUNT,
        text=STRING,
        logprobs=nullable(logprobs),
        finish_reason=reason,
        token_ids=IDS,
        prompt_token_ids=IDS,
    )


SCHEMAS: dict[str, Schema] = {
    "Error": shape(error=shape(message=STRING, type=STRING, param=TEXT, code=TEXT)),
    "Usage": shape(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        completion_tokens_details=shape(reasoning_tokens=COUNT),
        prompt_tokens_details=shape(cached_tokens=COUNT),
    ),
    "Logprob": shape(**_CANDIDATE, top_logprobs=array(shape(**_CANDIDATE))),
    "ChatAnswer": shape(
        ("prompt_token_ids",),
        **_ENVELOPE,
        object=constant("chat.completion"),
        choices=array(
            shape(
                ("token_ids",),
                index=COUNT,
                message=shape(
                    role=constant("assistant"), content=TEXT, reasoning_content=TEXT, refusal={"type": "null"}
                ),
                logprobs=_CHAT_LOGPROBS,
                finish_reason=_REASON,
                token_ids=IDS,
            )
        ),
        usage=reference("Usage"),
        prompt_token_ids=IDS,
    ),
    "ChatChunk": shape(
        ("usage", "prompt_token_ids"),
        **_ENVELOPE,
        object=constant("chat.completion.chunk"),
        choices=array(
            shape(
                ("token_ids",),
                index=COUNT,
                delta=shape(
                    ("role", "content", "reasoning_content"),
                    role=constant("assistant"),
                    content=STRING,
                    reasoning_content=STRING,
                ),
                logprobs=_CHAT_LOGPROBS,
                finish_reason=_NO_REASON_YET,
                token_ids=IDS,
            )
        ),
        usage=nullable(reference("Usage")),
        prompt_token_ids=IDS,
    ),
    "CompletionAnswer": shape(**_TEXT, choices=array(_text_choice(_REASON)), usage=reference("Usage")),
    "CompletionChunk": shape(
        ("usage",), **_TEXT, choices=array(_text_choice(_NO_REASON_YET)), usage=nullable(reference("Usage"))
    ),
    "Tokens": shape(count=COUNT, max_model_len=COUNT, tokens=IDS, token_strs=nullable(array(STRING))),
    "Model": shape(id=STRING, object=constant("model"), created=INTEGER, owned_by=STRING, max_model_len=COUNT),
    "RequestEntry": shape(
        id=STRING,
        object=constant("request"),
        created=INTEGER,
        path=STRING,
        status=INTEGER,
        error=TEXT,
        user_agent=STRING,
        stream={"type": ["boolean", "null"]},
        n=COUNT,
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        reasoning_tokens=COUNT,
        time_to_first_token_seconds=SECONDS,
        latency_seconds=SECONDS,
    ),
}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _answer(description: str, body: str, chunk: str) -> Schema:
    """``data:`` of each event is a chunk or, last, an error; or after the last chunk ``[DONE]``."""
    payload = {"contentMediaType": JSON, "contentSchema": {"anyOf": [reference(chunk), reference("Error")]}}
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [constant("[DONE]"), {"type": "string", **payload}]}},
        "required": ["data"],
    }
    return {"description": description, "content": {JSON: {"schema": reference(body)}, EVENTS: {"schema": event}}}


RESPONSES: dict[str, Schema] = {
    "chat": _answer("The answer to a conversation, whole or as it comes.", "ChatAnswer", "ChatChunk"),
    "completion": _answer("The continuation of prompts, whole or as it comes.", "CompletionAnswer", "CompletionChunk"),
    "tokens": _json("The token ids of a prompt or of a conversation.", reference("Tokens")),
    "text": _json("The text of token ids.", shape(prompt=STRING)),
    "models": _json("The served model.", shape(object=constant("list"), data=array(reference("Model")))),
    "model": _json("The served model by its name.", reference("Model")),
    "requests": _json(
        "The calling key's last requests, newest first; never their text.",
        shape(
            object=constant("list"),
            data=array(reference("RequestEntry")),
            first_id=TEXT,
            last_id=TEXT,
            has_more={"type": "boolean"},
        ),
    ),
    "health": _json("It is so.", shape(("model",), status=STRING, model=STRING)),
    "metrics": {
        "description": "Prometheus metrics.",
        "content": {CONTENT_TYPE_LATEST.split(";")[0]: {"schema": {"type": "string"}}},
    },
    "document": _json("This document.", OBJECT),
}
