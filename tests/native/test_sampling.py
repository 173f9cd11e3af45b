"""The sampler: the same bits on every path and any number of threads, whole rows or pieces of the vocabulary."""

from dataclasses import fields

import pytest
import torch
from kernel_checks import assert_same_bits, scattered, seeded
from sampling_cases import NO_CONTROL, copy_of, rows_of, state_of

from headrace.kernels import sampling as reference
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.native.library import Pool
from headrace.kernels.native.sampling import sample
from headrace.kernels.sampling import Sampled, SamplerState

KINDS = ["normal", "wide", "coarse", "equal", "nearly equal", "certain", "sparse"]
PIECES = 40_003  # a vocabulary that three threads cut into pieces where rows are few, the last block not full


def bits_of(out: Sampled, state: SamplerState) -> list[torch.Tensor]:
    """All that a call decides."""
    told = [out.integers, out.logprobs, out.top_ids, out.top_logprobs]
    return [x for x in told if x is not None] + [getattr(state, field.name) for field in fields(state)]


def same_everywhere(
    pools: list[Pool], logits: torch.Tensor, state: SamplerState, control: ControlIds = NO_CONTROL, **options: object
) -> Sampled:
    slots = torch.randperm(len(logits), generator=seeded(2))
    first: list[torch.Tensor] = []
    for pool in pools:
        own = copy_of(state)
        out = sample(logits, slots, own, control, pool=pool, **options)
        actual = bits_of(out, own)
        first = first or actual
        for tensor, wanted in zip(actual, first, strict=True):
            assert_same_bits(tensor, wanted)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 511, 1025, PIECES])
def test_every_kind_of_row(pools: list[Pool], kind: str, vocab: int) -> None:
    for rows in (1, 2, 5, 13):
        generator = seeded(rows)
        state = state_of(
            rows,
            temperature=torch.tensor([0.7, 1.0, 0.0, 1e-6, 30.0] * 3)[:rows],
            top_p=torch.rand(rows, generator=generator).double() * 1.1,
            seed=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        )
        logits = scattered(rows_of(kind, rows, vocab))
        same_everywhere(pools, logits, state)
        mask = torch.rand(rows, vocab, generator=generator) < 0.3
        same_everywhere(pools, logits, state, mask=mask, logprobs=True, top_logprobs=min(vocab, 20))


def test_pieces_of_a_vocabulary_decide_as_the_reference(pools: list[Pool]) -> None:
    """Usual rows, and few of them: without cuts, with a nucleus of few tokens and of most, masked and greedy."""
    rows, vocab = 4, 131_072
    for scale in (0.5, 3.0):
        logits = torch.randn(rows, vocab, generator=seeded(9)) * scale
        state = state_of(
            rows, top_p=torch.tensor([1.0, 0.6, 0.95, 1.0]), temperature=torch.tensor([1.0, 0.8, 1.0, 0.0]),
            seed=torch.arange(rows) * 7919,
        )  # fmt: skip
        mask = torch.rand(rows, vocab, generator=seeded(1)) < 0.5
        slots = torch.arange(rows)
        for options in ({}, {"mask": mask, "top_logprobs": 20}):
            expected = reference.sample(logits, slots, copy_of(state), NO_CONTROL, **options)
            for pool in pools:
                for count in (1, rows):
                    few = {**options, **({"mask": mask[:count]} if "mask" in options else {})}
                    out = sample(logits[:count], slots[:count], copy_of(state), NO_CONTROL, pool=pool, **few)
                    assert out.tokens.tolist() == expected.tokens[:count].tolist()
                    if options:
                        assert_same_bits(out.top_ids, expected.top_ids[:count])
                        torch.testing.assert_close(out.top_logprobs, expected.top_logprobs[:count])


@pytest.mark.parametrize("vocab", [6000, PIECES])
def test_more_threads_than_rows(pools: list[Pool], vocab: int) -> None:
    many = [pools[0], *(Pool(8, path) for path in {pool.path for pool in pools})]
    for rows in (1, 3, 7):
        logits = rows_of("normal", rows, vocab)
        for _ in range(20):
            same_everywhere(many, logits, state_of(rows, top_p=0.9, seed=torch.arange(rows)), top_logprobs=3)


@pytest.mark.parametrize("at", [0, 511, 512, PIECES - 1])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_broken_logit_is_found_wherever_it_is(pools: list[Pool], at: int, poison: float) -> None:
    logits = rows_of("normal", 2, PIECES)
    logits[1, at] = poison
    mask = torch.ones(2, PIECES, dtype=torch.bool)
    mask[1, at] = False  # forbidden, but the model's all the same
    for options in ({}, {"mask": mask}):
        out = same_everywhere(pools, logits[[1, 0]], state_of(2), logprobs=True, top_logprobs=2, **options)
        assert out.finish.tolist() == [Finish.ERROR, Finish.NONE]
        assert out.tokens[0] == -1


def test_ties_go_to_the_lowest_index_across_pieces(pools: list[Pool]) -> None:
    logits = torch.zeros(1, PIECES)
    logits[0, [20_000, 39_999, PIECES - 1]] = 5.0
    out = same_everywhere(pools, logits, state_of(1, temperature=0.0), top_logprobs=5)
    assert out.tokens.tolist() == [20_000]
    assert out.top_ids.tolist() == [[20_000, 39_999, PIECES - 1, 0, 1]]


def test_rows_that_decide_nothing_or_are_told_what(pools: list[Pool]) -> None:
    """Forced rows, finished ones and running ones beside each other, in pieces."""
    control = ControlIds(eos=(2,), think=4, end_think=3, tool_call=5, closing=(8, 2, 3))
    rows = 5
    state = state_of(
        rows,
        phase=torch.tensor([Phase.THINKING, Phase.CLOSING, Phase.ANSWERING, Phase.OFF, Phase.THINKING]),
        remaining=torch.tensor([0, 0, 0, 0, 3]),
        cursor=torch.tensor([0, 1, 0, 0, 0]),
        finish=torch.tensor([0, 0, 0, Finish.STOP, 0]),
    )
    logits = rows_of("normal", rows, PIECES)
    before = copy_of(state)
    out = same_everywhere(pools, logits, state, control, logprobs=True, top_logprobs=1)
    expected = reference.sample(logits, torch.randperm(rows, generator=seeded(2)), before, control)
    assert_same_bits(out.integers, expected.integers)
    assert 8 in out.tokens.tolist()
    assert -1 in out.tokens.tolist()


def test_masks_and_rows_that_are_not_contiguous(pools: list[Pool]) -> None:
    rows, vocab = 3, 700
    logits = rows_of("normal", rows, vocab)
    mask = torch.rand(rows, vocab, generator=seeded(1)) < 0.5
    state = state_of(rows, top_p=0.8, seed=torch.arange(rows))
    expected = sample(logits, torch.arange(rows), copy_of(state), NO_CONTROL, mask=mask, pool=pools[0])
    turned, spread = logits.t().contiguous().t(), mask.repeat_interleave(2, 1)[:, ::2]
    slots = torch.arange(rows).repeat_interleave(2)[::2]
    actual = sample(turned, slots, copy_of(state), NO_CONTROL, mask=spread, pool=pools[0])
    assert_same_bits(actual.integers, expected.integers)
