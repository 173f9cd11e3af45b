"""Tokenizer safety, the prompt format, packing and reproducible batches."""

import random

import pytest
import torch

from benchmarks.tiny import data, problems
from benchmarks.tiny.tokenizer import ALWAYS_SINGLE, CONTROL, END_THINK, IM_END, THINK, encode, load, train

ARITHMETIC = [name for name in problems.CATEGORIES if name != "chat"]


def test_first_ids_are_those_of_nemotron_3():
    pieces = [load().id_to_piece(index) for index in range(18)]
    assert pieces == ["<unk>", "<s>", "</s>", *CONTROL]
    assert (pieces[IM_END], pieces[THINK], pieces[END_THINK]) == ("<|im_end|>", "<think>", "</think>")


@pytest.mark.parametrize("marker", ["<s>", "</s>", *CONTROL])
def test_text_never_encodes_to_a_marker(marker):
    for text in (marker, f"a{marker}b", f" {marker} ", f"{marker}{marker}"):
        assert min(encode(text)) > 17
        assert load().decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["12 + 34 =", " two  spaces ", "\n\n{reasoning effort: low}", "你好, ¿qué? 😀 \t|", "▁"]
)
def test_round_trip(text):
    assert load().decode(encode(text)).replace("▁", " ") == text.replace("▁", " ")


def test_operators_and_digits_are_single():
    for symbol in (*ALWAYS_SINGLE, *"0123456789"):
        assert len(encode(symbol)) == 1
        assert encode(f"a{symbol}{symbol}")[-2:] == encode(symbol) * 2


def test_traces_are_single_characters():
    rng = random.Random(5)
    for _ in range(5000):
        problem = problems.draw(rng, rng.choice(ARITHMETIC))
        for trace in (problem.trace_high, problem.trace_low):
            steps = trace.removeprefix("max").removeprefix("min")
            assert len(encode(steps)) == len(steps)


def test_tokenizer_training_repeats(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, seed=3, lines=3000)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def text_of(ids):
    pieces = [load().id_to_piece(token) if token < 18 else load().decode([token]) for token in ids]
    return "".join(pieces)


def test_prompt_format():
    user = {"role": "user", "content": "2+3"}
    head = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+3"
    tail = "<|im_end|>\n<|im_start|>assistant\n<think>"
    assert text_of(data.prompt_ids((user,), "high")) == f"{head}{tail}\n"
    assert text_of(data.prompt_ids((user,), "none")) == f"{head}{tail}</think>"
    assert text_of(data.prompt_ids((user,), "low")) == f"{head}\n\n{{reasoning effort: low}}{tail}\n"


def test_history_format():
    user, answer = {"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}
    system = {"role": "system", "content": "Be kind."}
    earlier = "<|im_start|>assistant\n<think></think>{}5<|im_end|>\n"
    for bare in (False, True):
        text = text_of(data.prompt_ids((system, user, answer, user), "low", (bare,)))
        assert earlier.format("" if bare else "\n") in text
        assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
        assert text.count("{reasoning effort: low}") == 1


def test_only_the_completion_is_learned():
    problem = problems.held_out("add", 1, seed=0)[0]
    made = data.example(problem, "high")
    assert made.ids[made.start - 2 : made.start] == [THINK, *encode("\n")]
    assert made.ids[-1] == IM_END
    assert all(made.weights[made.start :])


def test_words_in_answers_weigh_more():
    problem = next(each for each in problems.held_out("word", 400, seed=0) if each.answer.endswith(" cups"))
    made = data.example(problem, "none")
    heavy = [token for token, weight in zip(made.ids, made.weights, strict=True) if weight > 1]
    assert text_of(heavy).endswith("cups")
    assert not set(heavy) & data.digits()


def test_cut_short_learns_only_what_follows_the_forced_end():
    rng = random.Random(0)
    whole = data.example(problems.held_out("mul3x3", 1, seed=0)[0], "high")
    for _ in range(50):
        cut = data.cut_short(rng, whole)
        assert cut.ids[cut.start - 1] == END_THINK
        assert cut.ids[cut.start :] == whole.ids[whole.ids.index(END_THINK) + 1 :]


def test_batches_repeat_and_differ():
    one, again, other = (data.batch(3, step, 4, problems.CATEGORIES) for step in (10, 10, 11))
    for name in ("ids", "document", "targets", "weights"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert not torch.equal(one.ids, other.ids)


def test_targets_are_the_next_ids_of_the_same_example():
    batch = data.batch(0, 0, 8, problems.CATEGORIES)
    row, place = (batch.targets >= 0).nonzero(as_tuple=True)
    assert torch.equal(batch.targets[row, place], batch.ids[row, place + 1])
    assert torch.equal(batch.document[row, place], batch.document[row, place + 1])
    assert (batch.document >= 0).float().mean() > 0.85
