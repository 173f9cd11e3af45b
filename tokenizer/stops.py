"""Finding the first of several stop strings in text that arrives in pieces (an Aho-Corasick automaton).

The first match is the one that is complete first; of several complete at the same character, the longest. That does
not depend on how the text was cut into pieces, and never has to look beyond the match.
"""

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """The automaton of one set of stop strings, for all choices of a request. Raises ValueError for an empty one.

    It is immutable: its state is an int held by the caller (0 at the start).

    A state stands for the longest suffix of the text that is a proper prefix of some stop: `depth[state]` characters,
    which may not be shown yet.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.depth = [0]
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        if not stop:
            raise ValueError("stop: a stop string must not be empty")
        node = 0
        for char in stop:
            following = self._next[node].get(char)
            if following is None:
                following = len(self._next)
                self._next[node][char] = following
                self._next.append({})
                self._fail.append(0)
                self._match.append(None)
                self.depth.append(self.depth[node] + 1)
            node = following
        self._match[node] = stop

    def _link(self) -> None:
        """Sets where each node falls back to, breadth first, and the longest stop that ends in it."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    def feed(self, state: int, text: str) -> tuple[int, str | None, int]:
        """Takes `text` in: (state after it, None, len(text)), or (0, the stop, characters up to the match's end)."""
        if not state and self._next[0].keys().isdisjoint(text):
            return 0, None, len(text)
        for position, char in enumerate(text):
            state = self._step(state, char)
            match = self._match[state]
            if match is not None:
                return 0, match, position + 1
        return state, None, len(text)
