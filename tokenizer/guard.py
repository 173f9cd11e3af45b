"""Keeps user text from spelling a marker in a rendered prompt.

A guard is a character that occurs in none of the texts. It is put inside every marker spelt in a text, and at an end
of a text that could make up a marker together with the template's own characters around it ("<" + "think" + ">").
The template then writes the prompt; its own markers are found, and guards are taken out of what lies between. Guards
stand only beside characters that are not white space, so trimming in the template works as on the plain text.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from headrace.tokenizer.markers import any_of

# Noncharacters first: legal in UTF-8, but never given a meaning; then the private-use areas.
_CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))

# Names that templates look up in tool definitions and calls; guarding these would hide them.
_STRUCTURE = frozenset(
    ("arguments", "content", "default", "description", "enum", "function", "id", "items", "name", "parameters",
     "properties", "reasoning_content", "required", "role", "tool_call_id", "tool_calls", "type")
)  # fmt: skip


class Guard:
    """The guards for one set of markers."""

    def __init__(self, markers: Collection[str]) -> None:
        self._pattern = any_of(markers)
        self._singles = [marker for marker in markers if len(marker) == 1]
        self._heads = {marker[:size] for marker in markers for size in range(1, len(marker))}
        self._tails = {marker[size:] for marker in markers for size in range(1, len(marker))}
        self._longest = max(map(len, markers), default=0)
        self._all = "\0".join(markers)

    def for_texts(self, texts: Iterable[str], template: str) -> "GuardedTexts":
        """Picks guard characters that occur neither in `texts` nor in `template`. Raises ValueError if none is left."""
        seen = list(texts)
        used = set(template).union(*seen)
        escapes = "\0".join(text for text in seen if "\\u" in text)
        needed = 1 + len(self._singles)
        free: list[str] = []
        for code in chain(*_CANDIDATES):
            char = chr(code)
            if char not in used and json.dumps(char)[1:-1] not in escapes:
                free.append(char)
                if len(free) == needed:
                    return GuardedTexts(self, free[0], dict(zip(self._singles, free[1:], strict=True)))
        raise ValueError("uses every private-use character of Unicode")

    def inside(self, text: str, char: str, singles: Mapping[str, str]) -> str:
        """Breaks up every marker spelt in `text`, overlapping ones too."""
        match = self._pattern.search(text)
        if match is None:
            return text
        out = []
        start = 0
        while match is not None:
            cut = match.start() + 1
            out.append(text[start:cut] + char)
            start = cut
            match = self._pattern.search(text, cut)
        out.append(text[start:])
        broken = "".join(out)
        for single, stand_in in singles.items():
            broken = broken.replace(single, stand_in)
        return broken

    def open_ends(self, core: str) -> tuple[bool, bool]:
        """Whether a marker could be made up of `core` with characters before it, and with characters after it."""
        sizes = range(1, min(self._longest, len(core) + 1))
        before = any(core[:size] in self._tails for size in sizes)
        after = any(core[-size:] in self._heads for size in sizes)
        if len(core) < self._longest and core in self._all:
            before = True
        return before, after


class GuardedTexts:
    """One rendering's guard characters."""

    def __init__(self, guard: Guard, char: str, singles: dict[str, str]) -> None:
        self._guard = guard
        self._char = char
        self._singles = singles
        # A template may write text as JSON with escapes.
        chars = [char, *singles.values()]
        self._escapes = {json.dumps(each)[1:-1]: each for each in chars}
        self._back = str.maketrans({char: "", **{stand_in: single for single, stand_in in singles.items()}})

    def text(self, text: str, ends: bool = True) -> str:
        """`text` with guards in it. `ends`: also where the template's characters could complete a marker."""
        guarded = self._guard.inside(text, self._char, self._singles)
        core = text.strip()
        if not ends or not core:
            return guarded
        before, after = self._guard.open_ends(core)
        if not before and not after:
            return guarded
        head, tail = len(guarded) - len(guarded.lstrip()), len(guarded.rstrip())
        return guarded[:head] + self._char * before + guarded[head:tail] + self._char * after + guarded[tail:]

    def data(self, value: Any, ends: bool = True) -> Any:
        """JSON data with guards in every string and in every key that is not part of the structure."""
        if isinstance(value, str):
            return self.text(value, ends)
        if isinstance(value, dict):
            return {
                key if key in _STRUCTURE or not isinstance(key, str) else self.text(key, ends): self.data(item, ends)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.data(item, ends) for item in value]
        return value

    def restore(self, text: str) -> str:
        """`text` without its guards."""
        if "\\u" in text:
            for escape, char in self._escapes.items():
                text = text.replace(escape, char)
        return text.translate(self._back) if not text.isascii() else text


def strings_in(value: Any) -> Iterator[str]:
    """Every string and key of JSON data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
