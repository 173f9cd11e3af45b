"""A checkpoint's chat template: messages to the prompt's ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from headrace.tokenizer.base import Tokenizer
from headrace.tokenizer.errors import ChatError, TokenizerError
from headrace.tokenizer.guard import Guard, strings_in
from headrace.tokenizer.markers import CLOSE_THINK, OPEN_THINK
from headrace.tokenizer.messages import normalise, plain_data
from headrace.tokenizer.sandbox import Sandbox
from headrace.tokenizer.settings import read_json

EFFORTS: Mapping[str, Mapping[str, bool]] = {
    "none": {"enable_thinking": False},
    "low": {"enable_thinking": True, "low_effort": True},
    "high": {"enable_thinking": True},
}
# What the contract names; read by the template if it knows them, and no error if it does not.
_SWITCHES = ("enable_thinking", "low_effort", "truncate_history_thinking")
# Read by the engine, never by a template: one that knows the name would write the number into the prompt.
_ENGINE_OPTIONS = ("reasoning_budget", "force_nonempty_content")
# What filters and operators raise on data they were not made for.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def has_chat_template(folder: str | Path) -> bool:
    """Whether a checkpoint can chat; a base model only generates."""
    return _template_source(Path(folder)) is not None


def _template_source(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    return source if isinstance(source, str) and source else None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt. `thinking`: it ends inside an open think block."""

    ids: list[int]
    text: str
    thinking: bool


def template_options(effort: str = "high", kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The template's variables for an effort and chat_template_kwargs.

    Each keyword given wins over the effort. Where one contradicts the effort, what is left of the effort goes:
    enable_thinking false drops the effort's low_effort, and low_effort true turns thinking on.
    Raises ChatError for an unknown effort, a switch that is not a boolean, or a name that is not the caller's to set.
    """
    if effort not in EFFORTS:
        raise ChatError(f"must be one of {', '.join(EFFORTS)}, not {effort!r}", param="reasoning_effort")
    given = {name: value for name, value in (kwargs or {}).items() if name not in _ENGINE_OPTIONS and value is not None}
    for name, value in given.items():
        param = f"chat_template_kwargs.{name}"
        if name in _RESERVED:
            raise ChatError("is set by the server", param=param)
        if name in _SWITCHES and not isinstance(value, bool):
            raise ChatError(f"must be a boolean, not {value!r}", param=param)
    options = {**EFFORTS[effort], **given}
    if not options["enable_thinking"]:
        if given.get("low_effort") and "enable_thinking" not in given:
            options["enable_thinking"] = True
        elif "low_effort" not in given:
            options.pop("low_effort", None)
    return options


def _locals(tree: jinja2.nodes.Template) -> set[str]:
    """Names that a template sets for itself. Where it also asks whether a name is defined, it sets a default."""
    names = tree.find_all(jinja2.nodes.Name)
    asked = [test.node for test in tree.find_all(jinja2.nodes.Test) if test.name in ("defined", "undefined")]
    asked += [use.node for use in tree.find_all(jinja2.nodes.Filter) if use.name in ("default", "d") and use.node]
    defaults = {node.name for node in asked if isinstance(node, jinja2.nodes.Name)}
    return {name.name for name in names if name.ctx == "store"} - defaults


class ChatTemplate:
    """A compiled template and the tokenizer whose markers it writes. Safe to use from several threads."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises TokenizerError for a template that does not compile."""
        self.source = source
        self._tokenizer = tokenizer
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
            tree = self._sandbox.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(tree) - _locals(tree)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"chat template does not compile: {error}") from None
        self._guard = Guard(tuple(tokenizer.markers))

    @property
    def arguments(self) -> frozenset[str]:
        """The variables that a caller may set: those the template reads, less what the server sets itself."""
        ours = {*_RESERVED, *_ENGINE_OPTIONS, *self._tokenizer.special_tokens, *self._sandbox.globals}
        return frozenset(self._variables - ours)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """chat_template.jinja, else `chat_template` in tokenizer_config.json (a list of named ones: the one named
        "default"). Raises TokenizerError where there is none.
        """
        source = _template_source(Path(folder))
        if source is None:
            raise TokenizerError(f"{folder}: has no chat template (chat_template.jinja or tokenizer_config.json)")
        return cls(source, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        effort: str = "high",
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """The prompt for the assistant's next turn. No text in `messages`, `tools` or `kwargs` can become a marker.

        Raises ChatError for messages or options that cannot be used, also where the template itself refuses them.
        """
        options = plain_data(template_options(effort, kwargs), "chat_template_kwargs")
        for name in options:
            if name not in self._variables and name not in _SWITCHES:
                raise ChatError("this model's chat template has no such variable", param=f"chat_template_kwargs.{name}")
        turns = normalise(messages)
        schemas = plain_data(tools, "tools") if tools is not None else None
        return self._render(turns, schemas, options)

    def _render(self, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> Rendered:
        try:
            texts = self._guard.for_texts(strings_in([turns, tools, options]), self.source)
        except ValueError as error:
            raise ChatError(str(error), param="messages") from None
        roles = [turn["role"] for turn in turns]
        guarded = [{**texts.data(turn), "role": role} for turn, role in zip(turns, roles, strict=True)]
        variables = {
            **self._tokenizer.special_tokens,
            **texts.data(options, ends=False),
            "messages": guarded,
            "tools": texts.data(tools),
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            written = self._sandbox.render(self._template, variables)
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
            raise ChatError(f"the chat template refuses them: {error}", param="messages") from None
        parts: list[str] = []
        ids: list[int] = []
        for piece, marker in self._tokenizer.split(written):
            if marker is not None:
                parts.append(piece)
                ids.append(marker)
            else:
                plain = texts.restore(piece)
                ids += self._tokenizer.encode(plain, after_marker=bool(parts))
                parts.append(plain)
        return Rendered(ids, "".join(parts), self._ends_thinking(ids))

    def _ends_thinking(self, ids: list[int]) -> bool:
        """Whether the last think marker opens a block; text is no matter, only the template's own markers are ids."""
        markers = self._tokenizer.markers
        opening, closing = markers.get(OPEN_THINK), markers.get(CLOSE_THINK)
        return opening is not None and next((i == opening for i in reversed(ids) if i in (opening, closing)), False)
