"""Text and token ids: tokenizers, the chat template, and the incremental way back from ids to text.

Nothing here imports torch.
"""

from pathlib import Path

from headrace.tokenizer.base import MarkedTokenizer, Tokenizer
from headrace.tokenizer.bpe import load_bpe
from headrace.tokenizer.chat import ChatTemplate, Rendered, has_chat_template, template_options
from headrace.tokenizer.errors import ChatError, TokenizerError
from headrace.tokenizer.messages import check_turns, text_bytes
from headrace.tokenizer.sentencepiece import load_sentencepiece
from headrace.tokenizer.settings import TextSettings
from headrace.tokenizer.stops import StopMatcher
from headrace.tokenizer.stream import Piece, TextStream

__all__ = [
    "ChatError",
    "ChatTemplate",
    "MarkedTokenizer",
    "Piece",
    "Rendered",
    "StopMatcher",
    "TextSettings",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "check_turns",
    "has_chat_template",
    "load",
    "template_options",
    "text_bytes",
]


def load(path: str | Path) -> MarkedTokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.model where there is one, else tokenizer.json.

    Raises TokenizerError naming the file.
    """
    folder = Path(path)
    settings = TextSettings.load(folder)
    if (folder / "tokenizer.model").is_file():
        return load_sentencepiece(folder / "tokenizer.model", settings)
    if (folder / "tokenizer.json").is_file():
        return load_bpe(folder / "tokenizer.json", settings)
    raise TokenizerError(f"{folder}: has neither tokenizer.model nor tokenizer.json")
