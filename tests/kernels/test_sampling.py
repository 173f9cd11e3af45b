"""The sampler against exact probabilities, Random123's known answers, and the host's budget machine.

How another backend decides, against the reference and in detail, is in test_sampling_backends.py.
"""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import threads
from sampling_cases import NO_CONTROL, state_of

from headrace.engine.reasoning import BudgetMachine
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.sampling import (
    gumbel,
    gumbel_of_words,
    log_softmax,
    philox4x32,
    top_p_kept,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
long = pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter, or about the reference alone")


@pytest.fixture
def sample(kernels):
    return kernels.sample


@long
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == expected


@long
def test_noise_is_laid_out_as_documented():
    """Lane vocab & 3 of counter (vocab >> 2, position, choice, 0), key the seed's low and high word."""
    seed, position, choice, vocab = 0x0123456789ABCDEF, 77, 3, 11
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.tensor([choice]), vocab)[0]
    for v in range(vocab):
        counter = [torch.tensor(x) for x in (v >> 2, position, choice, 0)]
        word = int(philox4x32(tuple(counter), (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)))[v & 3])
        u = min(np.float32((np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)), np.float32(1 - 2**-24))
        assert noise[v].item() == pytest.approx(-math.log(-math.log1p(-float(u))), rel=1e-5, abs=1e-6)


def test_the_draw_is_fed_seed_position_and_choice_as_documented(kernels):
    """argmax(x + g) computed from scratch, word by word, for the position of the token being decided."""
    vocab, length, seed, choice = 37, 19, 0xFEDCBA9876543210, 2
    torch.manual_seed(4)
    logits = torch.randn(vocab)
    scores = []
    for v in range(vocab):
        counter = tuple(map(torch.tensor, (v >> 2, length, choice, 0)))
        word = int(philox4x32(counter, (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)))[v & 3])
        scores.append(float(logits[v]) - math.log(-math.log1p(-min((word + 0.5) * 2.0**-32, 1 - 2**-24))))
    state = state_of(1, seed=seed - (1 << 64), choice=choice, length=length)
    token = kernels.sample(logits[None], torch.tensor([0]), state, NO_CONTROL).tokens.item()
    assert token == int(np.argmax(scores))
    shifts = torch.arange(4) * 7
    for other in ({"length": length + 1}, {"seed": 5}, {"choice": 3}):
        values = {"seed": seed - (1 << 64), "choice": choice, "length": length, **other}
        values["length"] += shifts
        drawn = kernels.sample(logits.expand(4, -1), torch.arange(4), state_of(4, **values), NO_CONTROL).tokens
        assert set(drawn.tolist()) != {token}


@long
def test_noise_is_finite_at_both_ends_of_the_words():
    ends = gumbel_of_words(torch.tensor([0, 2**32 - 1]))
    assert torch.isfinite(ends).all()
    assert ends[0] == pytest.approx(-math.log(-math.log1p(-(0.5 * 2.0**-32))), rel=1e-5)
    assert ends[1] == pytest.approx(-math.log(-math.log1p(-(1 - 2.0**-24))), rel=1e-5)


@long
def test_noise_never_ties_at_the_top_of_a_large_vocabulary():
    """With 24-bit uniforms the largest of 2^17 draws ties every few rows; with 32 bits it practically does not."""
    rows = 64
    noise = gumbel(torch.arange(rows), torch.full((rows,), 9), torch.zeros(rows, dtype=torch.int64), 1 << 17)
    best = noise.topk(2, -1).values
    assert torch.isfinite(noise).all()
    assert (best[:, 0] > best[:, 1]).all()


@long
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.5, 0.95), (1.5, 0.5)])
def test_draws_follow_the_exact_probabilities(kernels, temperature, top_p):
    """Chi-square with fixed seeds; the bound is the 99.99 % quantile for 9 degrees of freedom (33.7)."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -6.0])
    p = np.exp((logits.double().cpu().numpy() - 2.0) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    last = np.searchsorted(np.cumsum(p[order]), top_p * (1 - 1e-12))
    p[p < p[order[min(last, 9)]]] = 0
    p /= p.sum()
    rows = 20000
    state = state_of(rows, temperature=temperature, top_p=top_p, seed=torch.arange(rows))
    tokens = kernels.sample(logits.expand(rows, -1), torch.arange(rows), state, NO_CONTROL).tokens.cpu().numpy()
    observed = np.bincount(tokens, minlength=10)
    assert (observed[p == 0] == 0).all()
    keep = p > 0
    chi2 = ((observed[keep] - rows * p[keep]) ** 2 / (rows * p[keep])).sum()
    assert chi2 < 33.7


@long
def test_positions_and_choices_draw_independently(kernels):
    """The draw of one seed over positions, and over choices, follows the distribution too."""
    logits = torch.zeros(4)
    rows = 8000
    for field in ("length", "choice"):
        state = state_of(rows, seed=12345, **{field: torch.arange(rows)})
        tokens = kernels.sample(logits.expand(rows, -1), torch.arange(rows), state, NO_CONTROL).tokens
        counts = np.bincount(tokens.cpu(), minlength=4)
        assert ((counts - rows / 4) ** 2 / (rows / 4)).sum() < 21.1  # 99.99 % quantile, 3 degrees of freedom


@long
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_nucleus_equals_its_definition_in_exact_arithmetic(data):
    """Kept: p >= the probability at which the mass, from the top, reaches top_p. Integers make this exact."""
    vocab = data.draw(st.integers(1, 40))
    quarters = data.draw(st.lists(st.integers(-40, 0), min_size=vocab, max_size=vocab))
    top_p = data.draw(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999999, 1.0]))
    logits = torch.tensor(quarters, dtype=torch.float32) / 4
    logits -= logits.max()
    kept = top_p_kept(logits[None], torch.tensor([top_p], dtype=torch.float64))[0]
    mass = [int(m) for m in (torch.exp(logits).double() * 2**40).long()]
    if top_p == 1.0:
        assert kept.all()
        return
    needed, reached = max(1, math.ceil(top_p * sum(mass))), 0
    for threshold in sorted(mass, reverse=True):
        reached += threshold
        if reached >= needed:
            break
    assert kept.tolist() == [m >= threshold for m in mass]
    assert kept.any()


def test_edges_of_temperature_and_top_p(kernels):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert kernels.sample(logits, torch.tensor([0]), state_of(1, temperature=0.0), NO_CONTROL).tokens.item() == 1
    rows = 20
    for values in ({"temperature": 1e-6}, {"top_p": 0.0}, {"top_p": 1e-9}):
        state = state_of(rows, seed=torch.arange(rows), **values)
        tokens = kernels.sample(logits.expand(rows, -1), torch.arange(rows), state, NO_CONTROL).tokens
        assert set(tokens.tolist()) == {1, 2}
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -torch.inf]])
    assert kernels.sample(zeros, torch.tensor([0]), state_of(1, temperature=0.0), NO_CONTROL).tokens.item() == 1
    lonely = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf]])
    assert kernels.sample(lonely, torch.tensor([0]), state_of(1), NO_CONTROL).tokens.item() == 2


def test_a_row_is_a_function_of_itself(kernels):
    """Tokens, log-probabilities and states do not depend on batch, order, slot or the number of threads."""
    torch.manual_seed(0)
    rows, vocab = (9 if INTERPRETED else 37), 1003
    logits = torch.randn(rows, vocab) * 3
    params = {
        "temperature": torch.linspace(0, 1.5, rows),
        "top_p": torch.linspace(0, 1, rows, dtype=torch.float64),
        "seed": torch.arange(rows) * 7919,
        "length": torch.arange(rows) + 3,
    }
    control = ControlIds(eos=(1,), think=2, end_think=3, closing=(3,))
    whole = kernels.sample(logits, torch.arange(rows), state_of(rows, **params), control, logprobs=True, top_logprobs=5)
    permutation = torch.randperm(rows)
    for count in (1, 2):
        state = state_of(rows, **{k: v[permutation] for k, v in params.items()})
        moved = logits[permutation]
        with threads(count):
            part = kernels.sample(moved, torch.arange(rows), state, control, logprobs=True, top_logprobs=5)
        for name in ("tokens", "logprobs", "top_ids", "top_logprobs", "finish"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[permutation]), name
    for row in range(rows):
        alone = kernels.sample(
            logits[row : row + 1],
            torch.tensor([1]),
            state_of(2, **{k: v[row] for k, v in params.items()}),
            control,
            logprobs=True,
        )
        assert alone.tokens[0] == whole.tokens[row]
        assert alone.logprobs[0] == whole.logprobs[row]


def test_logprobs_are_those_of_the_raw_logits(kernels):
    torch.manual_seed(1)
    logits = torch.randn(5, 400) * 4
    expected = torch.log_softmax(logits.double(), -1)
    assert torch.allclose(log_softmax(logits).double(), expected, atol=2e-6)
    state = state_of(5, temperature=0.3, top_p=0.5, phase=int(Phase.THINKING), remaining=torch.tensor([0, 1, 2, 3, 4]))
    control = ControlIds(eos=(), end_think=7, closing=(7,))
    mask = torch.ones(5, 400, dtype=torch.bool)
    mask[:, ::2] = False
    out = kernels.sample(logits, torch.arange(5), state, control, mask=mask, logprobs=True, top_logprobs=3)
    assert out.tokens[0] == 7
    assert (out.tokens[1:] % 2 == 1).all()
    assert torch.allclose(out.logprobs.double(), expected.gather(1, out.tokens[:, None])[:, 0], atol=2e-6)
    assert torch.equal(out.top_ids, expected.topk(3, -1).indices)


def test_broken_rows_fail_alone(kernels):
    torch.manual_seed(2)
    logits = torch.randn(5, 50)
    clean = kernels.sample(logits, torch.arange(5), state_of(5, seed=torch.arange(5)), NO_CONTROL)
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    state = state_of(5, seed=torch.arange(5))
    out = kernels.sample(logits, torch.arange(5), state, NO_CONTROL)
    assert out.finish.tolist() == [Finish.NONE, Finish.ERROR, Finish.ERROR, Finish.ERROR, Finish.NONE]
    assert out.tokens.tolist() == [clean.tokens[0], -1, -1, -1, clean.tokens[4]]
    assert state.length.tolist() == [6, 5, 5, 5, 6]
    again = kernels.sample(torch.zeros(5, 50), torch.arange(5), state, NO_CONTROL)  # a finished slot stays as it is
    assert again.tokens[1:4].tolist() == [-1, -1, -1]
    assert again.finish[1:4].tolist() == [Finish.ERROR] * 3


def test_a_mask_that_allows_nothing_fails_unless_the_token_is_forced(kernels):
    control = ControlIds(eos=(), end_think=3, closing=(3,))
    state = state_of(2, phase=torch.tensor([Phase.THINKING, Phase.ANSWERING]), remaining=0)
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    out = kernels.sample(torch.zeros(2, 8), torch.arange(2), state, control, mask=nothing)
    assert out.tokens.tolist() == [3, -1]
    assert out.finish.tolist() == [Finish.NONE, Finish.ERROR]


def test_lengths_and_ends(kernels):
    control = ControlIds(eos=(2, 5))
    logits = torch.full((4, 8), -9.0)
    logits[0, 5] = logits[1, 5] = logits[2, 1] = logits[3, 2] = 9.0
    state = state_of(4, temperature=0.0, ignore_eos=torch.tensor([False, True, False, False]))
    state.tokens_left[:] = torch.tensor([5, 5, 1, 1])
    out = kernels.sample(logits, torch.arange(4), state, control)
    assert out.finish.tolist() == [Finish.STOP, Finish.NONE, Finish.LENGTH, Finish.STOP]


@given(st.data())
@settings(
    max_examples=12 if INTERPRETED else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it has no state
)
def test_the_kernel_is_the_machine_of_the_specification(sample, data):
    """Random token streams over random starts: phases, forced ids and counters agree at every token."""
    closing = data.draw(st.sampled_from([(3,), (8, 9, 3), (8, 8, 3), (2, 3)]))  # 2 is end-of-sequence too
    control = ControlIds(eos=(2,), think=4, end_think=3, tool_call=5, closing=closing)
    rows = data.draw(st.integers(1, 3 if INTERPRETED else 5))
    budgets = data.draw(st.lists(st.sampled_from([-1, 0, 1, 2, 7]), min_size=rows, max_size=rows))
    thinking = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    steps = data.draw(
        st.lists(st.lists(st.integers(3, 9), min_size=rows, max_size=rows), max_size=12 if INTERPRETED else 25)
    )
    machines = [BudgetMachine.start(control, t, b) for t, b in zip(thinking, budgets, strict=True)]
    state = state_of(rows, temperature=0.0, remaining=torch.tensor(budgets), ignore_eos=True)
    state.phase[:] = torch.tensor([int(m.phase) for m in machines])
    for wanted in steps:
        logits = torch.zeros(rows, 10)
        logits[torch.arange(rows), torch.tensor(wanted)] = 1.0
        expected_phase = [m.phase if m.forced() is None else Phase.CLOSING for m in machines]
        expected = [m.forced() if m.forced() is not None else w for m, w in zip(machines, wanted, strict=True)]
        out = sample(logits, torch.arange(rows), state, control)
        assert out.tokens.tolist() == expected
        assert out.phases.tolist() == expected_phase
        for machine, token in zip(machines, expected, strict=True):
            machine.advance(token)
        assert state.phase.tolist() == [m.phase for m in machines]
        assert state.remaining.tolist() == [m.remaining for m in machines]
        assert state.cursor.tolist() == [m.cursor for m in machines]


def test_no_rows(kernels):
    out = kernels.sample(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), state_of(3), NO_CONTROL, logprobs=True)
    assert out.tokens.shape == out.logprobs.shape == (0,)
