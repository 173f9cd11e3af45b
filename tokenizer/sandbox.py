"""The Jinja environment chat templates run in: transformers' helpers, a sandbox, and an end to every rendering.

Templates come with checkpoints, so they are code of unknown origin. The sandbox keeps them from Python's internals, and
no messages can make a rendering go on for ever: Jinja loops over finite sequences only, one rendering does at most
MAX_OPERATIONS loop passes, attribute look-ups and calls, takes at most MAX_SECONDS, and writes at most MAX_CHARACTERS
beyond 8 times what it was given. `*` and `**` make nothing larger than MAX_CHARACTERS. A template written to waste
memory still can (`~` doubles a string); messages cannot make one.
"""

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_OPERATIONS = 10_000_000
MAX_CHARACTERS = 16_000_000
MAX_SECONDS = 10.0


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts what a template does, per thread: renderings in several threads do not disturb each other."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._left = threading.local()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Puts a count at the head of every loop's body."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            count = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("loop_pass"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(count).set_lineno(loop.lineno))
        return tree

    def loop_pass(self) -> None:
        """Called by compiled templates; the call itself is what counts."""

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Renders. Raises jinja2.TemplateError, also where the limits are passed."""
        self._left.operations = MAX_OPERATIONS
        self._left.deadline = time.monotonic() + MAX_SECONDS
        parts = []
        room = MAX_CHARACTERS + _characters(variables)
        for part in template.generate(variables):
            room -= len(part)
            if room < 0:
                raise jinja2.TemplateRuntimeError(f"template writes more than {MAX_CHARACTERS} characters of its own")
            parts.append(part)
        return "".join(parts)

    def _count(self) -> None:
        left = getattr(self._left, "operations", MAX_OPERATIONS) - 1
        self._left.operations = left
        if left < 0:
            raise jinja2.TemplateRuntimeError(f"template does more than {MAX_OPERATIONS} operations")
        # At every operation: between two of them a filter may work on MAX_CHARACTERS, which can take a second.
        if time.monotonic() > getattr(self._left, "deadline", float("inf")):
            raise jinja2.TemplateRuntimeError(f"template takes more than {MAX_SECONDS:g} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._count()
        size = _size_of_product(left, right) if operator == "*" else _bits_of_power(left, right)
        if size > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"one {operator} of the template makes more than {MAX_CHARACTERS} of it")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._count()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._count()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().call(context, obj, *args, **kwargs)


def _size_of_product(left: Any, right: Any) -> int:
    """Items of a repeated sequence, bits of a product of integers; 0 for everything that does not grow."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * count if isinstance(count, int) and hasattr(sequence, "__len__") else 0


def _bits_of_power(base: Any, exponent: Any) -> int:
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


def _characters(value: Any) -> int:
    """Characters in all strings of plain data; each may be written several times, so this counts as room for 8."""
    if isinstance(value, str):
        return 8 * len(value)
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML; checkpoints expect transformers' plain one."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
