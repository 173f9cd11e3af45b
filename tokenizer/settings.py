"""What a checkpoint's small JSON files say about its text: added tokens, end of sequence, names of special tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.tokenizer.errors import TokenizerError

# The names under which chat templates read special tokens.
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """An entry of tokenizer.json's `added_tokens` or of tokenizer_config.json's `added_tokens_decoder`."""

    token_id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False

    @classmethod
    def from_json(cls, token_id: Any, entry: Any, where: str) -> "AddedToken":
        """Reads one entry. Raises TokenizerError naming `where`."""
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise TokenizerError(f"{where}: needs a non-empty string `content`")
        try:
            number = int(token_id)
        except (TypeError, ValueError):
            raise TokenizerError(f"{where}: {token_id!r} is not a token id") from None
        if number < 0:
            raise TokenizerError(f"{where}: token id {number} is negative")
        if entry.get("single_word"):
            raise TokenizerError(f"{where}: single_word added tokens are not supported")
        flags = {name: bool(entry.get(name, False)) for name in ("special", "lstrip", "rstrip")}
        return cls(number, entry["content"], **flags)


@dataclass(frozen=True, slots=True)
class TextSettings:
    """`tokens`: bos_token and the like by name, as text. `eos_ids` is empty where no file names one."""

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    tokens: Mapping[str, str] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "TextSettings":
        """Reads generation_config.json, config.json and tokenizer_config.json, each optional; ids in that order."""
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        sources = [read_json(folder / "generation_config.json"), read_json(folder / "config.json")]
        eos = _first(sources, "eos_token_id", folder)
        added = tokenizer_config.get("added_tokens_decoder", {})
        if not isinstance(added, Mapping):
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be an object")
        where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        return cls(
            eos_ids=tuple(dict.fromkeys(eos)),
            bos_id=next(iter(_first(sources, "bos_token_id", folder)), None),
            pad_id=next(iter(_first(sources, "pad_token_id", folder)), None),
            add_bos=tokenizer_config.get("add_bos_token") is True,
            tokens=_token_names(tokenizer_config),
            added=tuple(AddedToken.from_json(key, entry, f"{where}[{key!r}]") for key, entry in added.items()),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file. Raises TokenizerError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return value


def _first(sources: list[dict[str, Any]], key: str, folder: Path) -> list[int]:
    """The ids under `key` in the first source that has any: an int or a list of ints."""
    for source in sources:
        value = source.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in ids):
            raise TokenizerError(f"{folder}: {key} must be a token id or a list of token ids, not {value!r}")
        return ids
    return []


def _token_names(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name in _TOKEN_NAMES:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            names[name] = text
    return names
