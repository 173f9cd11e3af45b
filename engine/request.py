"""What a user asks for and what comes back: validated, immutable, no tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from headrace.engine.errors import RequestError

Channel = Literal["reasoning", "content"]
FinishReason = Literal["stop", "length", "abort", "error"]
Effort = Literal["none", "low", "high"]
Failure = Literal["logits", "mask", "text", "step", "neighbours", "engine"]
"""What a choice failed of: its logits, its mask, its text, a step that computed nothing else, a step that computed
others too (trying again may help), or the engine as a whole."""

MAX_TOKENS_LIMIT = 32768
MAX_SEED = 2**64 - 1
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
MAX_TEMPERATURE = 2.0
EFFORTS: tuple[Effort, ...] = ("none", "low", "high")

Mask = Callable[[Sequence[int], Channel], "np.ndarray | None"]
"""A grammar: (ids decided so far, channel of the next token) -> bool [vocab], True = allowed; None = everything.

It is called on the engine thread before each token; a mask that raises, or allows nothing, fails its request alone.
A forced id goes before the mask.
"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end (contract, section 1).

    Raises RequestError naming the field and its range. ``temperature`` 0 is greedy. ``seed`` None draws 64 bits from
    the system. ``reasoning_budget`` -1 sets no limit; it acts only where the prompt ends in an open think block.
    ``stop`` strings act on the answer only. ``top_logprobs`` > 0 implies ``logprobs``.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 16384
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    reasoning_budget: int = 16384
    mask: Mask | None = None

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0),
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT),
            "n": _integer("n", self.n, 1, MAX_CHOICES),
            "top_logprobs": _integer("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS),
            "reasoning_budget": _integer("reasoning_budget", self.reasoning_budget, -1, MAX_TOKENS_LIMIT),
            "stop": _stops(self.stop),
        }
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0, MAX_SEED)
        for name in ("logprobs", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}", param=name)
        if self.mask is not None and not callable(self.mask):
            raise RequestError("mask must be callable", param="mask")
        for name, value in checked.items():  # numpy's numbers become Python's, a single stop string a tuple
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered. ``chat_template_kwargs`` win over ``reasoning_effort`` (contract, section 2)."""

    reasoning_effort: Effort = "high"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reasoning_effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {self.reasoning_effort!r}",
                param="reasoning_effort",
            )
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise RequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
        if (budget := self.budget) is not None:
            _integer("chat_template_kwargs.reasoning_budget", budget, -1, MAX_TOKENS_LIMIT)
        for name in ("enable_thinking", "low_effort", "truncate_history_thinking", "force_nonempty_content"):
            value = self.chat_template_kwargs.get(name)
            if value is not None and not isinstance(value, bool):
                param = f"chat_template_kwargs.{name}"
                raise RequestError(f"{param} must be true or false, got {value!r}", param=param)

    @property
    def budget(self) -> int | None:
        """The budget given with the template's arguments; it wins over SamplingParams.reasoning_budget."""
        budget: int | None = self.chat_template_kwargs.get("reasoning_budget")
        return budget

    @property
    def force_nonempty_content(self) -> bool:
        """Whether reasoning that never became an answer is returned as the answer."""
        return bool(self.chat_template_kwargs.get("force_nonempty_content"))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A decided token with its log-probability under the raw logits, and the most likely alternatives."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one choice. Several tokens may come as one delta, and text may lag behind its tokens."""

    index: int
    channel: Channel
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. completion_tokens is every decided token; reasoning_tokens those freely decided while thinking."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Usage of two choices of one request: the prompt counts once."""
        return Usage(
            max(self.prompt_tokens, other.prompt_tokens),
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            max(self.cached_tokens, other.cached_tokens),
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of a choice. ``token_ids`` are those that no delta carried, such as end-of-sequence.

    ``error`` says in words what failed, and may quote what was raised; ``failure`` is the kind.
    ``queue_seconds`` is how long the choice waited for a slot, None if it never had one.
    """

    index: int
    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    error: str | None = None
    failure: Failure | None = None
    token_ids: tuple[int, ...] = ()
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice. ``token_ids`` are all decided tokens, markers and end-of-sequence included."""

    index: int
    content: str | None
    reasoning_content: str | None
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    content_logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning_logprobs: tuple[TokenLogprob, ...] | None = None
    stop_string: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All choices of a request and what they cost together."""

    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def content(self) -> str | None:
        """The first choice's answer."""
        return self.choices[0].content

    @property
    def reasoning_content(self) -> str | None:
        """The first choice's reasoning."""
        return self.choices[0].reasoning_content


def _number(name: str, value: object, low: float, high: float) -> float:
    """A number in range, numpy's included, as a float."""
    number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}", param=name)
    return float(value)  # type: ignore[arg-type]


def _integer(name: str, value: object, low: int, high: int) -> int:
    """An integer in range, numpy's included, as an int."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if not integer or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be an integer from {low} to {high}, got {value!r}", param=name)
    return int(value)  # type: ignore[call-overload, no-any-return]


def _stops(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        raise RequestError("stop must be a string or an array of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
    for s in stops:
        if not 1 <= len(s) <= MAX_STOP_LENGTH:
            raise RequestError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters, got {len(s)}", param="stop")
    return tuple(stops)
