"""What the commands share: opening an engine, and how text reaches the screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from headrace.engine import Engine, EngineConfig
    from headrace.engine.request import Channel


class UserError(Exception):
    """Something the user can put right. Printed as one line; the command ends with status 2."""


def engine_config(**settings: int | str | None) -> EngineConfig:
    """A configuration; what is None keeps its default. Raises UserError naming what is out of range."""
    from headrace.engine import EngineConfig

    try:
        return EngineConfig(**{name: value for name, value in settings.items() if value is not None})  # type: ignore
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def open_engine(model: str | None, config: EngineConfig | None = None) -> Iterator[Engine]:
    """An engine for a checkpoint folder, or for the embedded model. Raises UserError if it cannot be loaded."""
    engine = load_engine(model, config)
    try:
        yield engine
    finally:
        engine.close()


def load_engine(model: str | None, config: EngineConfig | None = None) -> Engine:
    """As ``open_engine``; the caller closes the engine."""
    from headrace.engine import Engine

    try:
        return Engine(model, config, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


class Printer:
    """Writes an answer as it comes: reasoning dimmed in a terminal, under a heading elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, reasoning: bool = True) -> None:
        self._stream = stream or sys.stdout
        self._reasoning = reasoning
        self._channel: Channel | None = None
        self.styled = can_style(self._stream)

    def write(self, channel: Channel, text: str) -> None:
        """More text of a channel."""
        if not text or (channel == "reasoning" and not self._reasoning):
            return
        if channel != self._channel:
            self._turn_to(channel)
        text = printable(text)
        self._out(f"\x1b[2m{text}\x1b[0m" if self.styled and channel == "reasoning" else text)

    def end(self, note: str = "") -> None:
        """The answer is over, for a reason worth telling if there is a note."""
        if self._channel is not None:
            self._out("\n")
        if note:
            self._out(f"\x1b[2m({note})\x1b[0m\n" if self.styled else f"({note})\n")
        self._channel = None

    def _turn_to(self, channel: Channel) -> None:
        if self._channel is not None:
            self._out("\n\n" if self.styled else "\n")
        if not self.styled and (channel == "reasoning" or self._channel is not None):
            self._out("[reasoning]\n" if channel == "reasoning" else "[answer]\n")
        self._channel = channel

    def _out(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)


def printable(text: str) -> str:
    """Text with its control characters made visible: an answer must not steer the terminal."""
    return text.translate(_CONTROLS)


def can_style(stream: TextIO) -> bool:
    """Whether escape codes make sense there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
