"""Byte-level BPE vocabularies (tokenizer.json), through the tokenizers library.

The library finds added tokens in any text, special or not (`<think>` is added but not special), and BPE itself can
reach an entry that has a marker's spelling. Plain encoding therefore runs on a copy of the vocabulary without added
tokens, in which no entry and no merge spells a marker. The post-processor is not used: a prompt begins with the
begin-of-sequence token only where tokenizer_config.json says add_bos_token.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as library

from headrace.tokenizer.base import MarkedTokenizer
from headrace.tokenizer.errors import TokenizerError
from headrace.tokenizer.markers import Marker, is_ordinary
from headrace.tokenizer.settings import AddedToken, TextSettings, read_json


def load_bpe(path: Path, settings: TextSettings) -> MarkedTokenizer:
    """Loads a tokenizer.json. Raises TokenizerError naming the file and the key."""
    spec = read_json(path)
    vocab = _vocabulary(spec, path)
    added = _added_tokens(spec, settings, path)
    pieces = [b""] * (max([*vocab.values(), *added, -1]) + 1)
    alphabet = _byte_alphabet()
    missing = [byte for char, byte in alphabet.items() if char not in vocab]
    if missing:
        raise TokenizerError(f"{path}: model.vocab has no entry for {len(missing)} of the 256 bytes")
    for text, token_id in vocab.items():
        pieces[token_id] = _token_bytes(text, alphabet)
    for token in added.values():
        pieces[token.token_id] = token.text.encode()
    markers = [
        Marker(token.text, token.token_id, token.lstrip, token.rstrip)
        for token in added.values()
        if not is_ordinary(token.text, token.special)
    ]
    encoder = _plain_encoder(spec, {marker.token_id for marker in markers}, path)

    def plain(text: str, after_marker: bool) -> list[int]:
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids

    # A normaliser may shorten a text, and so may a splitter that removes what it splits at.
    exact = spec.get("normalizer") is None and '"Removed"' not in json.dumps(spec.get("pre_tokenizer"))
    return MarkedTokenizer(plain, pieces, markers, settings, exact=exact)


def _vocabulary(spec: Mapping[str, Any], path: Path) -> dict[str, int]:
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path}: model must be a BPE with a vocab")
    decoder = spec.get("decoder")
    if not isinstance(decoder, Mapping) or decoder.get("type") != "ByteLevel":
        kind = decoder.get("type") if isinstance(decoder, Mapping) else decoder
        raise TokenizerError(f"{path}: decoder must be ByteLevel, not {kind!r}")
    vocab: dict[str, int] = model["vocab"]
    if not all(type(token_id) is int and 0 <= token_id < 1 << 31 for token_id in vocab.values()):
        raise TokenizerError(f"{path}: model.vocab must map every token to its id")
    return vocab


def _added_tokens(spec: Mapping[str, Any], settings: TextSettings, path: Path) -> dict[int, AddedToken]:
    """By id: tokenizer.json's own, then what tokenizer_config.json says, which must agree in the spelling."""
    entries = spec.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise TokenizerError(f"{path}: added_tokens must be a list of objects")
    found: dict[int, AddedToken] = {}
    for number, entry in enumerate(entries):
        token = AddedToken.from_json(entry.get("id"), entry, f"{path}: added_tokens[{number}]")
        found[token.token_id] = token
    for token in settings.added:
        known = found.setdefault(token.token_id, token)
        if known.text != token.text:
            raise TokenizerError(
                f"{path}: added token {token.token_id} is {known.text!r}, but {token.text!r} in tokenizer_config.json"
            )
    return found


def _plain_encoder(spec: Mapping[str, Any], marker_ids: set[int], path: Path) -> library.Tokenizer:
    """The same vocabulary without markers. An entry that spells one is renamed to what no text can reach."""
    model = spec["model"]
    # Byte-level text has no raw space in it, so a name that begins with one never matches.
    hidden = {text for text, token_id in model["vocab"].items() if token_id in marker_ids}
    vocab = {f" {text}" if text in hidden else text: token_id for text, token_id in model["vocab"].items()}
    try:
        merges = [merge for merge in model.get("merges") or [] if hidden.isdisjoint(_merge_parts(merge))]
    except (AttributeError, TypeError, ValueError):
        raise TokenizerError(f"{path}: model.merges must be a list of pairs of tokens") from None
    kept = [entry for entry in spec.get("added_tokens") or [] if entry["id"] not in marker_ids]
    # Every byte has its own entry, so an unknown token is never needed; its entry may be a hidden one.
    plain_model = {**model, "vocab": vocab, "merges": merges, "unk_token": None}
    plain = {**spec, "model": plain_model, "added_tokens": kept, "post_processor": None}
    plain |= {"truncation": None, "padding": None}
    try:
        return library.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: the tokenizers library refuses it: {error}") from None


def _merge_parts(merge: str | list[str]) -> tuple[str, str, str]:
    """Both tokens and what they merge to; older files write a merge as one string."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _token_bytes(text: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes(alphabet[char] for char in text)
    except KeyError:  # not spelt in the byte alphabet: the library's decoder takes it as it stands
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of bytes: printable Latin-1 as itself, the others from U+0100 up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in sorted(printable)}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + order): byte for order, byte in enumerate(others)}
