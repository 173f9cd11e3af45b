"""A sequence's bits through the whole model: whole or in chunks, alone or in company, on one thread or more."""

from collections.abc import Iterator

import pytest
import torch
from checkpoints import make_checkpoint
from driver import Driver, random_prompt
from torch import Tensor

from headrace.engine.cli.quantize import quantize_checkpoint
from headrace.engine.model import Caches, NemotronH, load_model

MODELS = {
    "latent MoE": ("MEM*EM-*E", {"moe_latent_size": 32}),
    "quantised": ("MEM*E-", {"moe_latent_size": 32, "moe_intermediate_size": 48}),
    "group-limited, one group of B and C": ("ME*M", {"n_group": 4, "topk_group": 2, "n_groups": 1}),
    "odd sizes": (
        "M*EM",
        {"hidden_size": 50, "mamba_num_heads": 6, "mamba_head_dim": 7, "n_groups": 3, "ssm_state_size": 5,
         "chunk_size": 13, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 11, "moe_latent_size": 19},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> NemotronH:
    pattern, settings = MODELS[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), pattern, **settings).folder
    if request.param == "quantised":
        quantize_checkpoint(folder, quantised := tmp_path_factory.mktemp("quantised"), "nvfp4")
        folder = quantised
    return load_model(folder)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any(), "garbage was read"
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"


def states(caches: Caches, slot: int) -> list[Tensor]:
    # A short sequence leaves entries of the convolution's ring unwritten: the driver's NaN.
    return [*(layer[slot].nan_to_num(nan=0.0) for layer in caches.conv), *(layer[slot].clone() for layer in caches.ssm)]


def continued(driver: Driver, slot: int, tokens: list[int]) -> Tensor:
    """Logits of feeding the tokens one by one."""
    return torch.cat([driver.step({slot: token}) for token in tokens])


def chunks_of(prompt: list[int], sizes: Iterator[int]) -> Iterator[list[int]]:
    start = 0
    while start < len(prompt):
        size = next(sizes)
        yield prompt[start : start + size]
        start += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunked_prefill_is_whole_prefill(model, dtype):
    """Cut at any multiples of the SSD chunk: logits, states and what follows."""
    unit, vocab = model.config.chunk_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    for length in (1, unit - 1, unit, unit + 1, 5 * unit, 277):
        prompt, after = random_prompt(length, vocab, length), random_prompt(5, vocab, 99)
        whole = Driver(model, 1, dtype=dtype)
        expected = whole.step(chunks={0: prompt})
        expected_states = states(whole.caches, 0)
        expected_after = continued(whole, 0, after)
        for fixed in (1, 2, 3, None):
            sizes = iter(lambda fixed=fixed: unit * (fixed or int(torch.randint(1, 5, (), generator=generator))), 0)
            cut = Driver(model, 1, dtype=dtype, seed=1)
            assert_same(torch.cat([cut.step(chunks={0: part}) for part in chunks_of(prompt, sizes)]), expected)
            for actual, wanted in zip(states(cut.caches, 0), expected_states, strict=True):
                assert_same(actual, wanted)
            assert_same(continued(cut, 0, after), expected_after)


def alone(model: NemotronH, prompt: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
    driver = Driver(model, 1)
    return driver.step(chunks={0: prompt}), continued(driver, 0, tokens)


def test_mixed_steps_are_each_sequence_alone(model):
    """Random steps of decodes and chunks over seven slots, in shuffled order; slots are handed on without cleaning."""
    unit, vocab = model.config.chunk_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    driver, running, done = Driver(model, 7, max_tokens=300), {}, 0
    while done < 20:
        for slot in range(7):
            if slot not in running and draw(0, 2):
                prompt, tokens = (
                    random_prompt(draw(1, 150), vocab, draw(0, 10**6)),
                    random_prompt(draw(1, 12), vocab, slot),
                )
                running[slot] = (prompt, tokens, [], [], alone(model, prompt, tokens))
                driver.lengths[slot] = 0
        decodes, chunks = {}, {}
        for slot in torch.randperm(7, generator=generator).tolist():
            if slot not in running or not draw(0, 4):
                continue
            prompt, tokens = running[slot][:2]
            at = driver.lengths[slot]
            if at < len(prompt):
                chunks[slot] = prompt[at : at + unit * draw(1, 4)]
            else:
                decodes[slot] = tokens[at - len(prompt)]
        if not decodes and not chunks:
            continue
        rows = driver.step(decodes, chunks)
        for index, slot in enumerate(decodes):
            running[slot][3].append(rows[index])
        for slot, part in zip(chunks, rows[len(decodes) :].split([len(c) for c in chunks.values()]), strict=True):
            running[slot][2].append(part)
        for slot in [s for s, (p, t, *_) in running.items() if driver.lengths[s] == len(p) + len(t)]:
            _, _, prompt_rows, token_rows, (expected_prompt, expected_tokens) = running.pop(slot)
            assert_same(torch.cat(prompt_rows), expected_prompt)
            assert_same(torch.stack(token_rows), expected_tokens)
            done += 1


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17, 33, 64])
def test_a_decode_row_is_the_same_in_any_batch(model, size):
    """Growing batches of sequences whose lengths reach over several key blocks."""
    vocab = model.config.vocab_size
    driver = Driver(model, size, max_tokens=300)
    prompts = [random_prompt((37 * slot) % 290 + 1, vocab, slot) for slot in range(size)]
    driver.step(chunks=dict(enumerate(prompts)))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    rows = driver.step({slot: slot % vocab for slot in order})
    for slot in {order[0], order[size // 2], order[-1]}:
        _, expected = alone(model, prompts[slot], [slot % vocab])
        assert_same(rows[order.index(slot)], expected[0])


def test_threads_do_not_matter(model):
    prompt, tokens = random_prompt(200, model.config.vocab_size, 5), [1, 2, 3]
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat(alone(model, prompt, tokens)))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_a_poisoned_sequence_fails_alone(model):
    """NaN in one slot's states reaches that slot's logits and nobody else's."""
    vocab = model.config.vocab_size
    prompts = [random_prompt(40, vocab, slot) for slot in range(3)]
    driver = Driver(model, 3)
    driver.step(chunks=dict(enumerate(prompts)))
    for layer in driver.caches.ssm:
        layer[1] = torch.nan
    rows = driver.step({0: 3, 1: 3, 2: 3})
    assert rows[1].isnan().all()
    for slot in (0, 2):
        assert_same(rows[slot], alone(model, prompts[slot], [3])[1][0])
