"""Sentencepiece models (tokenizer.model), through the sentencepiece library.

Markers are the control symbols, the unknown symbol, the user-defined symbols (except white space and single
characters, see `markers.is_ordinary`) and the added tokens of tokenizer_config.json. The library matches user-defined
symbols inside any text; plain encoding therefore runs on a copy of the model in which markers are control symbols.

A llama-style model puts a dummy space in front of a text. Here it stands in front of a whole text only, not in front
of every piece between markers; decoding a whole id list takes it away again.

Where decoding differs from the library's own: markers appear as their text (the library drops control symbols and
writes " ⁇ " for the unknown symbol), and invalid UTF-8 gives one U+FFFD per maximal invalid part, not per byte.
"""

from pathlib import Path

import sentencepiece as library

from headrace.tokenizer import proto
from headrace.tokenizer.base import MarkedTokenizer
from headrace.tokenizer.errors import TokenizerError
from headrace.tokenizer.markers import Marker, is_ordinary
from headrace.tokenizer.settings import TextSettings

_SPACE = "\u2581"  # how pieces spell a space


def load_sentencepiece(path: Path, settings: TextSettings) -> MarkedTokenizer:
    """Loads a ModelProto file. Raises TokenizerError naming the file."""
    data = path.read_bytes()
    try:
        model = library.SentencePieceProcessor(model_proto=data)
        _check_supported(data)
    except (RuntimeError, TokenizerError) as error:
        raise TokenizerError(f"{path}: not a usable sentencepiece model: {error}") from None
    markers = _markers(model, settings, path)
    marker_ids = {marker.token_id for marker in markers}
    unknown = model.unk_id()
    plain_data = proto.as_control(data, {i for i in marker_ids if i < len(model) and i != unknown})
    first = library.SentencePieceProcessor(model_proto=plain_data)
    later = library.SentencePieceProcessor(model_proto=proto.without_dummy_prefix(plain_data))

    def plain(text: str, after_marker: bool) -> list[int]:
        ids: list[int] = (later if after_marker else first).encode(text)
        return ids

    return MarkedTokenizer(
        plain,
        _pieces(model, markers),
        markers,
        settings,
        strips_leading_space=_adds_dummy_prefix(data),
        exact=_spells_exactly(data),
    )


def _check_supported(data: bytes) -> None:
    if proto.message(data, 2).get(24):
        raise TokenizerError("trainer_spec.treat_whitespace_as_suffix is not supported")
    if proto.message(data, 5).get(2):
        raise TokenizerError("denormalizer_spec is not supported")


def _spells_exactly(data: bytes) -> bool:
    """Whether no character map and no trimming changes a text first, and bytes spell what no piece does."""
    normaliser = proto.message(data, 3)
    return not normaliser.get(2) and not normaliser.get(4, 1) and bool(proto.message(data, 2).get(35, 0))


def _adds_dummy_prefix(data: bytes) -> bool:
    return bool(proto.message(data, 3).get(3, 1))


def _markers(model: library.SentencePieceProcessor, settings: TextSettings, path: Path) -> list[Marker]:
    found: dict[int, Marker] = {}
    ordinary = set()
    for token_id in range(len(model)):
        if model.is_control(token_id) or model.is_unknown(token_id):
            found[token_id] = Marker(model.id_to_piece(token_id), token_id)
    for token_id in _user_defined(model):
        text = model.id_to_piece(token_id).replace(_SPACE, " ")
        if is_ordinary(text, special=False):
            ordinary.add(token_id)
        else:
            found[token_id] = Marker(text, token_id)
    for added in settings.added:
        piece = model.id_to_piece(added.token_id) if added.token_id < len(model) else added.text
        if piece.replace(_SPACE, " ") != added.text.replace(_SPACE, " "):
            raise TokenizerError(
                f"{path}: token {added.token_id} is {piece!r}, but {added.text!r} in tokenizer_config.json"
            )
        if added.token_id not in ordinary and not is_ordinary(added.text, added.special):
            found[added.token_id] = Marker(added.text, added.token_id, added.lstrip, added.rstrip)
    return [found[token_id] for token_id in sorted(found)]


def _user_defined(model: library.SentencePieceProcessor) -> list[int]:
    kinds = [
        dict(proto.fields(value)).get(3)
        for number, value in proto.fields(model.serialized_model_proto())
        if number == 1 and isinstance(value, bytes)
    ]
    return [token_id for token_id, kind in enumerate(kinds) if kind == proto.USER_DEFINED]


def _pieces(model: library.SentencePieceProcessor, markers: list[Marker]) -> list[bytes]:
    """The bytes of every id: byte pieces are named <0x41>, other pieces are text with U+2581 for a space."""
    size = max([len(model)] + [marker.token_id + 1 for marker in markers])
    pieces = [b""] * size
    for token_id in range(len(model)):
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            pieces[token_id] = bytes((int(piece[1:-1], 16),))
        else:
            pieces[token_id] = piece.replace(_SPACE, " ").encode()
    for marker in markers:
        pieces[marker.token_id] = marker.text.encode()
    return pieces
