"""What the small JSON files of a checkpoint say about its text, and which of them wins."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.tokenizer import MarkedTokenizer, TextSettings, TokenizerError
from headrace.tokenizer.markers import Marker


def settings(folder: Path, **files: Any) -> TextSettings:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return TextSettings.load(folder)


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    assert settings(tmp_path) == TextSettings()


def test_generation_config_wins_over_config(tmp_path: Path) -> None:
    config = {"eos_token_id": 5, "bos_token_id": 6, "pad_token_id": 7}
    found = settings(tmp_path, config=config)
    assert (found.eos_ids, found.bos_id, found.pad_id) == ((5,), 6, 7)
    found = settings(tmp_path, config=config, generation_config={"eos_token_id": [2, 11, 2], "bos_token_id": None})
    assert (found.eos_ids, found.bos_id, found.pad_id) == ((2, 11), 6, 7)


def test_names_of_special_tokens(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "<e>", "lstrip": False},
        "unk_token": None,
        "add_bos_token": True,
    }
    found = settings(tmp_path, tokenizer_config=config)
    assert found.tokens == {"bos_token": "<s>", "eos_token": "<e>"}
    assert found.add_bos
    assert not settings(tmp_path, tokenizer_config=config | {"add_bos_token": None}).add_bos


def test_ids_from_names_where_no_file_has_ids(tmp_path: Path) -> None:
    found = settings(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "<e>", "pad_token": "<other>"})
    tokenizer = MarkedTokenizer(lambda *_: [], [b"<s>", b"<e>"], [Marker("<s>", 0), Marker("<e>", 1)], found)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    found = settings(tmp_path, generation_config={"eos_token_id": 0})
    tokenizer = MarkedTokenizer(lambda *_: [], [b"<s>", b"<e>"], [Marker("<s>", 0), Marker("<e>", 1)], found)
    assert tokenizer.eos_ids == (0,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id must be a token id"),
        ({"generation_config": {"eos_token_id": [2, True]}}, "eos_token_id must be a token id"),
        ({"config": {"bos_token_id": -1}}, "bos_token_id must be a token id"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "'x' is not a token id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "a"}}}}, "token id -1 is negative"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": ""}}}}, r"added_tokens_decoder\['1'\]"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": None}}}, "needs a non-empty string"),
    ],
)
def test_refused_by_name(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        settings(tmp_path, **files)
