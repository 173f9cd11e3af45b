"""Finding markers (added, control and special tokens) in text: leftmost first, the longest at one place."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Marker:
    """One token that stands outside ordinary text. `lstrip` / `rstrip`: it swallows white space on that side."""

    text: str
    token_id: int
    lstrip: bool = False
    rstrip: bool = False


_Trie = dict[str, "_Trie"]  # by character; "" marks the end of a text


def is_ordinary(text: str, special: bool) -> bool:
    """Whether an added token is plain vocabulary rather than a marker.

    Some vocabularies add runs of white space or single characters (digits, a newline) as user-defined tokens:
    text has to be able to give those, and they carry no meaning outside text.
    """
    return not special and (len(text) == 1 or text.isspace())


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of `texts` at a position, built as a trie so that its cost does not grow with them."""
    trie: _Trie = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_trie_pattern(trie) if trie else r"(?!)")


def _trie_pattern(node: _Trie) -> str:
    branches = []
    for char in sorted(node):
        if char:
            # Chains are written flat: the depth of groups is the number of forks, not of characters.
            chain, below = char, node[char]
            while len(below) == 1 and "" not in below:
                ((step, below),) = below.items()
                chain += step
            branches.append(re.escape(chain) + _trie_pattern(below))
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")


class MarkerSplitter:
    """Cuts text at markers."""

    def __init__(self, markers: Iterable[Marker]) -> None:
        self._markers = {marker.text: marker for marker in markers}
        self.pattern = any_of(self._markers)

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text, None) for what lies between markers, never empty, and (marker text, id) for each marker, in order."""
        start = 0
        for match in self.pattern.finditer(text):
            if match.start() < start:  # swallowed white space of the marker before; a marker may itself be white space
                continue
            marker = self._markers[match.group()]
            between = text[start : match.start()]
            if marker.lstrip:
                between = between.rstrip()
            if between:
                yield between, None
            yield marker.text, marker.token_id
            start = match.end()
            if marker.rstrip:
                start += len(text) - start - len(text[start:].lstrip())
        if start < len(text):
            yield text[start:], None
