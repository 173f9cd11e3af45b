"""The few edits of a sentencepiece ModelProto that this package needs, on the protobuf wire format itself.

Source: sentencepiece_model.proto. ModelProto: pieces = 1 (repeated SentencePiece), trainer_spec = 2, normalizer_spec
= 3, denormalizer_spec = 5. SentencePiece: piece = 1, score = 2, type = 3. The sentencepiece wheel has no protobuf.
"""

from collections.abc import Iterator, Set

from headrace.tokenizer.errors import TokenizerError

# SentencePiece.Type
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message, in order. Raises TokenizerError where the data ends too early."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind in (_LENGTH, _FIXED64, _FIXED32):
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if size is None:
                size, at = _varint(data, at)
            value = data[at : at + size]
            at += size
            if len(value) < size:
                raise TokenizerError("sentencepiece model is truncated")
        else:
            raise TokenizerError(f"sentencepiece model has a field of unknown wire type {kind}")
        yield key >> 3, value


def message(data: bytes, number: int) -> dict[int, int | bytes]:
    """The last value of every field of the sub-message `number`, {} where it is absent."""
    merged: dict[int, int | bytes] = {}
    for field, value in fields(data):
        if field == number and isinstance(value, bytes):
            merged.update(fields(value))
    return merged


def as_control(data: bytes, ids: Set[int]) -> bytes:
    """The same model with the pieces `ids` turned into control symbols, which encoding never produces."""
    out = bytearray()
    piece = 0
    for field, value in fields(data):
        if field == 1 and isinstance(value, bytes):
            if piece in ids:
                value += bytes((3 << 3 | _VARINT, CONTROL))  # a repeated scalar field: the last one counts
            piece += 1
        if isinstance(value, bytes):
            # Every field of ModelProto is a message, hence length-delimited.
            out += _encode_varint(field << 3 | _LENGTH) + _encode_varint(len(value)) + value
    return bytes(out)


def without_dummy_prefix(data: bytes) -> bytes:
    """The same model, putting no space in front of a text: a second normalizer_spec merges into the first."""
    return data + bytes((3 << 3 | _LENGTH, 2, 3 << 3 | _VARINT, 0))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise TokenizerError("sentencepiece model is truncated")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
