"""The tiny model's tokenizer: a seeded sentencepiece BPE with Nemotron 3's first 18 ids, and text-to-ids helpers.

Run `python -m benchmarks.tiny.tokenizer` to train it into engine/tiny/tokenizer.model.
"""

import argparse
import io
import random
from functools import cache
from pathlib import Path

import sentencepiece

from benchmarks.tiny import phrases, problems

MODEL_DIR = Path(__file__).resolve().parents[2] / "engine" / "tiny"
TOKENIZER = MODEL_DIR / "tokenizer.model"
VOCAB_SIZE = 640
CONTROL = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]",
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>",
)  # fmt: skip
"""Ids 3 to 17. Control symbols are never produced by encoding text, so a user cannot write a turn marker."""
ALWAYS_SINGLE = ("\n", "+", "-", "*", "=", ";", ":", "<", ">", ",", "?")
IM_START, IM_END, THINK, END_THINK = 10, 11, 12, 13


def corpus(seed: int, lines: int) -> list[str]:
    """Prompts, answers and chat: what BPE may merge. Traces stay out, for they must remain single characters."""
    rng = random.Random(f"tokenizer/{seed}")
    names, weights = list(problems.CATEGORIES), [1, 1, 1, 1, 1, 1, 2, 6, 6]
    text = [*phrases.SYSTEMS, *phrases.REPLIES.values(), *phrases.REPLIES] * 20
    text += ["system", "user", "assistant", "{reasoning effort: low}", "max", "min", "They are equal."] * 200
    text += ["abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", " 0 1 2 3 4 5 6 7 8 9 . ! ' ( ) / × ÷ { } %"]
    while len(text) < lines:
        problem = problems.draw(rng, rng.choices(names, weights)[0])
        if problem.trace_high != "not clear":
            text += [problem.messages[-1]["content"], problem.answer]
    return text


def train(path: Path, seed: int = 0, lines: int = 20000) -> None:
    """Train and write the model; the same seed gives the same file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed, lines)), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        control_symbols=list(CONTROL), user_defined_symbols=list(ALWAYS_SINGLE), num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


@cache
def load(path: Path = TOKENIZER) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode(text: str) -> list[int]:
    """Ids of plain text; markers are added as ids by the caller, never as text."""
    return load().encode(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TOKENIZER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, args.seed)
    print(f"{args.out}: {load(args.out).vocab_size()} pieces")


if __name__ == "__main__":
    main()
