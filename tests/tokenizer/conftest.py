"""Tokenizers in checkpoint folders with the embedded model's chat template: mistral-common's sentencepiece models, its
Tekken vocabulary written as a tokenizer.json with Nemotron 3's special tokens at Nemotron 3's ids, and a small
sentencepiece model of the embedded model's kind.
"""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest
import sentencepiece

from headrace import engine
from headrace.tokenizer import MarkedTokenizer, load

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")
# The family of Nemotron's markers, some of them added but not special.
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
           "</tool_response>")  # fmt: skip
TEMPLATE = (Path(next(iter(engine.__path__))) / "tiny" / "chat_template.jinja").read_text()


def _write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_sentencepiece(folder: Path, model: str) -> Path:
    """A llama-style model with ChatML markers added behind its vocabulary."""
    shutil.copy(DATA / model, folder / "tokenizer.model")
    first = 32000 if model.endswith(".v1") else 32768
    added = {
        str(first + place): {"content": text, "special": place < 2, "lstrip": False, "rstrip": False}
        for place, text in enumerate(MARKERS)
    }
    _write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>", "added_tokens_decoder": added})
    _write(folder, "generation_config.json", {"eos_token_id": [2, first + 1], "bos_token_id": 1})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_small_sentencepiece(folder: Path) -> Path:
    """Markers as control symbols, single characters as user-defined ones, no dummy space, byte fallback."""
    model = io.BytesIO()
    sentences = ["12 + 34 = 46", "hello there, what is 5 times 6?", "think of <x> and [y] | or not", "system user"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=360, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, normalization_rule_name="identity", add_dummy_prefix=False, byte_fallback=True,
        remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False, character_coverage=1.0,
        control_symbols=list(MARKERS), user_defined_symbols=["\n", "+", "<", ">"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    _write(folder, "generation_config.json", {"eos_token_id": [2, 4], "bos_token_id": 1})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def byte_alphabet() -> list[str]:
    """Byte-level BPE's spelling of each byte, by another formula than the package's."""
    spelt, extra = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            spelt.append(chr(byte))
        else:
            spelt.append(chr(256 + extra))
            extra += 1
    return spelt


def tekken_tokenizer_json() -> dict:
    """mistral-common's Tekken as a tokenizer.json: ids = rank + 1000, all merges that the ranks allow."""
    source = json.loads((DATA / "tekken_240911.json").read_text())
    size = source["config"]["default_vocab_size"] - source["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in source["vocab"][:size]}
    alphabet = byte_alphabet()

    def spell(data: bytes) -> str:
        return "".join(alphabet[byte] for byte in data)

    merges = []
    for token, rank in ranks.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted(
            (ranks[left], ranks[right], left, right) for left, right in pairs if left in ranks and right in ranks
        )
        merges += [(rank, order, spell(left), spell(right)) for order, (_, _, left, right) in enumerate(known)]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
               "[/TOOL_RESULTS]", "[TOOL_CALLS]", *MARKERS]  # fmt: skip
    special += [f"<SPECIAL_{number}>" for number in range(len(special), 1000)]
    vocab = {text: place for place, text in enumerate(special)}
    vocab |= {spell(token): rank + 1000 for token, rank in ranks.items()}
    split = {
        "type": "Split",
        "pattern": {"Regex": source["config"]["pattern"]},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": text, "special": not 12 <= place <= 17, **flags}
            for place, text in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": [[left, right] for _, _, left, right in sorted(merges)],
        },
    }  # fmt: skip


def write_tekken(folder: Path) -> Path:
    _write(folder, "tokenizer.json", tekken_tokenizer_json())
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "add_bos_token": False}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder, "tokenizer_config.json", config)
    _write(folder, "generation_config.json", {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of a kind: "tekken", "small" or one of SENTENCEPIECE. Written once per session."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            empty = tmp_path_factory.mktemp("checkpoint")
            if kind == "tekken":
                made[kind] = write_tekken(empty)
            else:
                made[kind] = write_small_sentencepiece(empty) if kind == "small" else write_sentencepiece(empty, kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tokenizers(folders: Callable[[str], Path]) -> Callable[[str], MarkedTokenizer]:
    made: dict[str, MarkedTokenizer] = {}

    def tokenizer(kind: str) -> MarkedTokenizer:
        if kind not in made:
            made[kind] = load(folders(kind))
        return made[kind]

    return tokenizer


@pytest.fixture(scope="session", params=("tekken", "small", *SENTENCEPIECE))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tokenizer(kind: str, tokenizers: Callable[[str], MarkedTokenizer]) -> MarkedTokenizer:
    return tokenizers(kind)
