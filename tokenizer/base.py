"""The tokenizer protocol, and the one implementation of everything that does not depend on the vocabulary's kind."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from headrace.tokenizer.errors import TokenizerError
from headrace.tokenizer.markers import Marker, MarkerSplitter
from headrace.tokenizer.settings import TextSettings


class Tokenizer(Protocol):
    """Text to ids and back. Ids of no token (padding rows of an embedding) decode to nothing."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def markers(self) -> Mapping[str, int]:
        """Every added, control and special token: its text and id."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence; empty where the checkpoint names none."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a sequence, if there is one."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts that chat templates read as `bos_token`, `eos_token` and so on."""

    @property
    def longest_token(self) -> int | None:
        """Bytes of the longest token, so that a text has at least its bytes divided by this tokens. None where a token
        can stand for more: the text is changed before it is encoded, or has characters that no token spells.
        """

    @property
    def strips_leading_space(self) -> bool:
        """Whether encoding a text puts a space in front of it, and decoding takes it away again."""

    def encode(self, text: str, *, after_marker: bool = False) -> list[int]:
        """Plain text, which never gives a marker's id. `after_marker`: the text goes on behind a marker, so it gets
        no dummy space in front. Raises TokenizerError for text that is not Unicode (a lone surrogate).
        """

    def encode_with_markers(self, text: str) -> list[int]:
        """Text in which the markers' spellings mean the markers: a raw prompt."""

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cuts text at markers: (marker's text, id), and (text between, None)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole id list, markers as their text, invalid UTF-8 as U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text (markers: their text in UTF-8)."""

    def token_text(self, token_id: int) -> str | None:
        """The same as text, or None where the bytes are not whole characters."""


class MarkedTokenizer:
    """A tokenizer made of a plain encoder, the bytes of every id, and markers.

    `plain(text, after_marker)` must never give a marker's id, but for the id of unknown characters in a
    vocabulary that cannot spell every text. `pieces[id]` are the bytes of a token, b"" where an id has none. `exact`:
    a text is spelt by its tokens byte for byte.
    """

    def __init__(
        self,
        plain: Callable[[str, bool], list[int]],
        pieces: list[bytes],
        markers: Iterable[Marker],
        settings: TextSettings,
        *,
        strips_leading_space: bool = False,
        exact: bool = False,
    ) -> None:
        found = tuple(markers)
        self._plain = plain
        self._pieces = pieces
        self._texts: dict[int, str | None] = {}
        self._splitter = MarkerSplitter(found)
        self._markers = {marker.text: marker.token_id for marker in found}
        self._settings = _resolved(settings, self._markers, len(pieces))
        self._strips_leading_space = strips_leading_space
        self._longest_token = max(map(len, pieces), default=0) if exact else None

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def markers(self) -> Mapping[str, int]:
        return self._markers

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._settings.eos_ids

    @property
    def bos_id(self) -> int | None:
        return self._settings.bos_id

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._settings.tokens

    @property
    def longest_token(self) -> int | None:
        return self._longest_token or None

    @property
    def strips_leading_space(self) -> bool:
        return self._strips_leading_space

    def encode(self, text: str, *, after_marker: bool = False) -> list[int]:
        if not text:
            return []
        check_unicode(text)
        return self._plain(text, after_marker)

    def encode_with_markers(self, text: str) -> list[int]:
        check_unicode(text)
        bos = self._settings.bos_id
        ids: list[int] = []
        after_marker = False
        for piece, marker in self.split(text):
            if marker is None:
                ids += self._plain(piece, after_marker)
            else:
                ids.append(marker)
                after_marker = True
        if self._settings.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        return self._splitter.split(text)

    def decode(self, ids: Sequence[int]) -> str:
        data = b"".join(map(self.token_bytes, ids))
        if self._strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 0:
            raise TokenizerError(f"token id {token_id} is negative")
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def token_text(self, token_id: int) -> str | None:
        try:
            return self._texts[token_id]
        except KeyError:
            pass
        try:
            text = self.token_bytes(token_id).decode("utf-8")
        except UnicodeDecodeError:
            text = None
        self._texts[token_id] = text
        return text


def check_unicode(text: str) -> None:
    """Raises TokenizerError for a lone surrogate, which no UTF-8 text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text is not Unicode: lone surrogate at character {error.start}") from None


def _resolved(settings: TextSettings, markers: Mapping[str, int], vocab_size: int) -> TextSettings:
    """Fills ids that only tokenizer_config.json names, by the markers' spellings."""
    names = settings.tokens
    named = {name: markers.get(names.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")}
    eos = settings.eos_ids or (() if named["eos_token"] is None else (named["eos_token"],))
    for token_id in eos:
        if token_id >= vocab_size:
            raise TokenizerError(f"eos_token_id {token_id} is outside the vocabulary of {vocab_size} tokens")
    return replace(
        settings,
        eos_ids=eos,
        bos_id=settings.bos_id if settings.bos_id is not None else named["bos_token"],
        pad_id=settings.pad_id if settings.pad_id is not None else named["pad_token"],
    )
