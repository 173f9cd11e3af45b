"""What request bodies have in common: strict JSON, shared fields, and refusals that name the field at fault.

``null`` means absent everywhere. Types are strict: no bool for an integer, no float for a seed. Unknown fields are
tolerated; a known one that would change the output and is not implemented is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import from_json

from headrace.engine.request import MAX_CHOICES, MAX_SEED, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOKENS_LIMIT
from headrace.engine.serve.errors import ApiError, invalid

T = TypeVar("T")
B = TypeVar("B", bound="Body")

MAX_SHOWN = 60
MIN_VALUES = 1 << 18
"""Values that any body may have; with a large context more (see ``max_values``). Sixty-four prompts of 4096 ids fit."""
_OF_VALUES = (b",", b"[", b"{")
_OUTSIDE_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)
"""A whole text, or one of the characters that values cannot do without."""

STRING, ARRAY = "#string", "#array"
"""Tags of the two forms of a field that is a string or an array. A tag begins with # and is not shown in a path."""


def _nullable(schema: dict[str, Any]) -> None:
    """``null`` is absent: the schema must say so too, for every field that may be left out."""
    for name, field in schema.get("properties", {}).items():
        field.pop("title", None)
        if name not in schema.get("required", ()):
            _allow_null(field)


def _allow_null(field: dict[str, Any]) -> None:
    forms = [form for form in field.pop("anyOf", [field]) if form != {"type": "null"}]
    if len(forms) == 1 and isinstance(forms[0].get("type"), str):
        field |= forms[0] | {"type": [forms[0]["type"], "null"]}
        return
    if forms == [field]:
        forms = field.pop("oneOf", None) or [{"$ref": field.pop("$ref")}]
    field["anyOf"] = [*forms, {"type": "null"}]


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, json_schema_extra=_nullable
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def form(value: Any) -> str:
    """Which form a field that is a string or an array has."""
    return ARRAY if isinstance(value, list) else STRING


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag(STRING)]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), Tag(ARRAY)],
    Discriminator(form),
]
Budget = Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)]


class StreamOptions(Body):
    """What a stream carries besides the deltas."""

    include_usage: bool = Field(default=False, description="One more chunk at the end, with the token counts.")


class GenerationBody(Body):
    """The fields of everything that generates, before the profile has had its say."""

    model: str | None = Field(None, description="The served model's name.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")  # the profile knows the upper end
    top_p: float = Field(
        0.95, ge=0, le=1, description="Nucleus: the most likely tokens that together reach this probability."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Same seed and parameters: same result. Random if absent."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    stop: Stop | None = Field(None, description="Generation ends before the first of these texts in the answer.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Answers to generate.")
    return_token_ids: bool = Field(False, description="Show the ids of the prompt's and the answer's tokens.")
    ignore_eos: bool = Field(False, description="Go on after the end of the text.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


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
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "echo": (False,),
    "prompt_logprobs": (),
    "thinking_token_budget": (),
    "nvext": ({},),
}
"""Known fields that would change the output of anything that generates, with the values that ask for nothing. Others
(``top_k`` and ``thinking`` among them, which gateways add to every request) count as unknown."""


def parse_object(body: bytes, max_context: int) -> dict[str, Any]:
    """The JSON object in a request body. NaN, lone surrogates, wrong UTF-8 and deep nesting are not JSON here.

    Raises ApiError: 413 for more values than a body for a context of ``max_context`` tokens needs, 400 for no object.
    """
    limit = max_values(max_context)
    if _has_more_values(body, limit):  # no other thread runs while a body is parsed
        message = f"the body has more than {limit} values (items of arrays, fields of objects)"
        raise ApiError(413, message, code="too_many_values")
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="malformed_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="malformed_json")
    return data


def max_values(max_context: int) -> int:
    """Values that a body may have: two for each token, or MIN_VALUES."""
    return max(2 * max_context, MIN_VALUES)


def _has_more_values(body: bytes, limit: int) -> bool:
    if sum(map(body.count, _OF_VALUES)) <= limit:
        return False
    # Commas and brackets of texts are no matter. This goes piece by piece: other threads have their turns.
    marks = (piece for piece in _OUTSIDE_TEXTS.finditer(body) if body[piece.start()] != ord('"'))
    return next(islice(marks, limit, None), None) is not None


def validated(model: type[B], data: Mapping[str, Any]) -> B:
    """The body as its model. Raises ApiError 422 naming the first field at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _field_error(error) from None


def check_model(model: str | None, served: str) -> None:
    """404 unless the name is absent or the served one."""
    if model is not None and model != served:
        message = f"the model {shown(model)} does not exist; this server serves {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def refuse_unimplemented(data: Mapping[str, Any], fields: Mapping[str, tuple[Any, ...]]) -> None:
    """422 for a known field that has another value than those that ask for nothing."""
    for name, neutral in fields.items():
        if data.get(name) is not None and not _among(data[name], neutral):
            raise not_implemented(name)


def not_implemented(param: str) -> ApiError:
    """The refusal of a field, by name."""
    return invalid(f"{param} is not implemented; leave it out", param, "unsupported_parameter")


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equality that keeps booleans and numbers apart."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def check_temperature(temperature: float, highest: float) -> None:
    """422 above the profile's limit."""
    if temperature > highest:
        raise invalid(f"temperature must be at most {highest:g}, got {temperature:g}", "temperature")


def alias(value: T | None, other: T | None, param: str, other_name: str) -> T | None:
    """The value of a field that has two names; both given and unequal is refused."""
    if value is not None and other is not None and value != other:
        raise invalid(f"{param} and {other_name} are two names of one field, but differ", param)
    return other if value is None else value


_encoder = json.JSONEncoder(ensure_ascii=False, default=str)
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
    if detail["loc"][-1] == STRING and detail["type"] == "string_type":
        phrase = "must be a string or an array"
    got = "" if detail["type"] == "missing" else f", got {shown(detail['input'])}"
    return invalid(f"{path} {phrase}{got}", path)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("#"):
            path += f".{step}" if path else step
    return path


def shown(value: Any) -> str:
    """A value as it may stand in a message: JSON, cut short."""
    text = ""
    for piece in _encoder.iterencode(value[: MAX_SHOWN + 1] if isinstance(value, str) else value):
        text += piece
        if len(text) > MAX_SHOWN:  # the rest may be long
            break
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
