"""Convolution, state space and gate against the plain recurrence in float64; chunks, batches, slots and the ring of
inputs leave no trace."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded
from torch import Tensor

from headrace.kernels import mamba as reference
from headrace.kernels.mamba import MambaWeights

SLOTS, SLOT = 5, 2


@dataclass(frozen=True)
class Case:
    length: int
    heads: int = 4
    groups: int = 2
    width: int = 16
    state: int = 16
    chunk: int = 16
    taps: int = 4
    bias: bool = True
    ring: int = 11  # room for steps of 8 rows after 3 inputs
    dtype: torch.dtype = torch.float32  # of the ring

    @property
    def terms(self) -> int:
        # A chunk's exponents are differences of sums of up to ``chunk`` terms: their rounding enters as that of a sum.
        return self.state + self.chunk * 8 + self.taps


SMALL = [
    Case(0),
    Case(1),
    Case(2, heads=1, groups=1, width=1, state=1, chunk=1, taps=1, ring=2, bias=False),
    Case(4, heads=2, groups=1, width=8, taps=2, ring=3),
    Case(5, heads=2, groups=2, width=5, state=24, taps=7, chunk=3, bias=False),
    Case(7, heads=6, groups=3, width=7, state=5, chunk=13, ring=4),
    Case(6, heads=2, groups=1, state=40, dtype=torch.bfloat16),
    Case(5, heads=2, groups=1, dtype=torch.float16),
]
PROMPTS = [
    Case(15, heads=2),
    Case(16, heads=2),
    Case(17, heads=2, ring=3),
    Case(83, heads=2, groups=1),
    Case(50, heads=3, groups=3, width=7, state=5, chunk=13, ring=4),
    Case(45, heads=2, groups=1, width=33, state=20, chunk=20, ring=100),
    Case(200, heads=1, groups=1, width=16, state=40, chunk=128, dtype=torch.bfloat16),
    Case(95, heads=2, groups=1, width=17, state=19, chunk=40),
]
LARGE = [  # too slow for an interpreter
    Case(83),
    Case(300, heads=8, groups=2, width=32, state=32, chunk=64),
    Case(140, heads=8, groups=8, width=16, state=64, chunk=128),
    Case(700, heads=2, groups=1, width=7, state=33, chunk=72, dtype=torch.float16),
]


@pytest.fixture
def mamba(kernels, request):
    """The ops; large cases are skipped where Triton is interpreted."""
    case = getattr(getattr(request.node, "callspec", None), "params", {}).get("case")
    if os.environ.get("TRITON_INTERPRET") == "1" and case in LARGE:
        pytest.skip("too large for the interpreter")
    return kernels


def make_weights(case: Case, generator: torch.Generator) -> MambaWeights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels = case.heads * case.width + 2 * case.groups * case.state
    return MambaWeights(
        conv_weight=normal(channels, case.taps) / case.taps**0.5,
        conv_bias=normal(channels) / 2 if case.bias else None,
        a=-torch.exp(normal(case.heads)),
        d=normal(case.heads),
        dt_bias=normal(case.heads) - 1,
        head_dim=case.width,
        groups=case.groups,
        state_size=case.state,
    )


class Mixer:
    """Rows of one sequence that stand at ``start``, its past in slot 2, NaN wherever nothing may be read."""

    def __init__(self, case: Case, kernels, start: int = 0, seed: int = 0) -> None:
        generator = seeded(seed)
        self.case, self.kernels, self.start = case, kernels, start
        self.weights = make_weights(case, generator)
        channels = self.weights.conv_weight.shape[0]
        width = self.weights.inner + channels + case.heads
        self.projected = torch.randn(case.length, width, generator=generator)
        self.past = torch.randn(case.taps - 1, channels, generator=generator).to(case.dtype)
        self.past[: max(case.taps - 1 - start, 0)] = 0
        self.state = torch.randn(case.heads, case.width, case.state, generator=generator) * (start > 0)
        self.conv = torch.full((SLOTS, case.ring, channels), torch.nan, dtype=case.dtype)
        self.ssm = torch.full((SLOTS, *self.state.shape), torch.nan)
        for position in range(max(start + 1 - case.taps, 0), start):
            self.conv[SLOT, position % case.ring] = self.past[position - start]
        if start:
            self.ssm[SLOT] = self.state

    def prefill(self, first: int = 0, end: int | None = None) -> Tensor:
        case, rows = self.case, self.projected[first:end]
        start = self.start + first
        return self.kernels.mamba_prefill(rows, self.conv, self.ssm, SLOT, start, self.weights, case.chunk)

    def update(self, first: int, rows: int = 1) -> Tensor:
        slots, positions = torch.tensor([SLOT]), torch.tensor([self.start + first])
        tokens = self.projected[first : first + rows]
        return self.kernels.mamba_update(tokens, self.conv, self.ssm, slots, positions, self.weights, rows)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The recurrence in float64, token by token -> (y silu(gate), final state)."""
        case, weights = self.case, self.weights
        gate, xbc, dt = weights.split(self.projected)
        window = torch.cat([self.past, xbc.to(case.dtype)]).double()
        h, out = self.state.double(), []
        for t in range(case.length):
            mixed = (window[t : t + case.taps] * weights.conv_weight.t().double()).sum(0)
            if weights.conv_bias is not None:
                mixed = mixed + weights.conv_bias.double()
            x, b, c = (part[0] for part in weights.heads(double_silu(mixed)[None]))
            b, c = (part.repeat_interleave(case.heads // case.groups, 0) for part in (b, c))
            step = torch.logaddexp(dt[t].double() + weights.dt_bias.double(), torch.zeros((), dtype=torch.float64))
            h = torch.exp(step * weights.a.double())[:, None, None] * h + torch.einsum("h,hp,hn->hpn", step, x, b)
            y = torch.einsum("hpn,hn->hp", h, c) + weights.d.double()[:, None] * x
            out.append(y.flatten() * double_silu(gate[t].double()))
        return (torch.stack(out) if out else torch.zeros(gate.shape, dtype=torch.float64)), h

    @property
    def prompt_terms(self) -> int:
        # Triton multiplies prompts as pairs of bf16, each right within 2^-17: the bound becomes 4 times as wide, some
        # 6 of those units, since a result may be one product and its D x.
        return self.case.terms * (16 if self.kernels.backend == "triton" else 1)

    def assert_advanced(self, before: "Mixer", state: Tensor, terms: int) -> None:
        """The slot holds ``state`` and the newest inputs, each in its entry; all other memory is as it was."""
        case = self.case
        expected = before.conv.clone()
        inputs = self.weights.split(self.projected)[1].to(case.dtype)
        for token in range(case.length):
            expected[SLOT, (self.start + token) % case.ring] = inputs[token]
        assert_same_bits(self.conv, expected)
        others = [slot for slot in range(SLOTS) if slot != SLOT]
        assert_same_bits(self.ssm[others], before.ssm[others])
        if case.length:
            assert_close(self.ssm[SLOT], state, terms)


def double_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("case", SMALL + PROMPTS + LARGE, ids=str)
def test_prefill(mamba, case, chunks):
    """At the start of a sequence, with NaN in its slot, and after one and three chunks."""
    mixer, before = (Mixer(case, mamba, chunks * case.chunk) for _ in range(2))
    y, state = mixer.exact()
    assert_close(mixer.prefill(), y, mixer.prompt_terms)
    mixer.assert_advanced(before, state, mixer.prompt_terms)


@pytest.mark.parametrize("start", [0, 1, 2, 5, 1_000_003])
@pytest.mark.parametrize("case", SMALL + LARGE[:1], ids=str)
def test_update(mamba, case, start):
    """Token by token: from the very first, and wherever the position falls in the ring."""
    mixer, before = (Mixer(case, mamba, start) for _ in range(2))
    y, state = mixer.exact()
    for token in range(case.length):
        assert_close(mixer.update(token)[0], y[token], case.terms)
    mixer.assert_advanced(before, state, case.terms)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("spare", [0, 1, 6])
def test_rows_are_single_steps(mamba, rows, spare):
    """A step of so many rows, in a ring that just holds them and in larger ones: the bits of one row after another."""
    case = Case(rows, heads=2, groups=1, width=5, state=12, ring=3 + rows + spare, dtype=torch.bfloat16)
    together, single = (Mixer(case, mamba, 6, seed=rows) for _ in range(2))
    expected = torch.cat([single.update(token) for token in range(rows)])
    assert_same_bits(together.update(0, rows), expected)
    assert_same_bits(together.ssm, single.ssm)
    assert_same_bits(together.conv, single.conv)


def test_rows_at_the_start(mamba):
    case = Case(8, heads=2, groups=1, width=5, state=12)
    mixer = Mixer(case, mamba, 0)
    y, state = mixer.exact()
    assert_close(mixer.update(0, 8), y, case.terms)
    assert_close(mixer.ssm[SLOT], state, case.terms)


def test_a_larger_ring_changes_nothing(mamba):
    small, large = (Mixer(Case(9, heads=2, ring=ring), mamba, 16) for ring in (4, 97))
    assert_same_bits(small.prefill(0, 5), large.prefill(0, 5))
    for token in range(5, 9):
        assert_same_bits(small.update(token), large.update(token))
    assert_same_bits(small.ssm, large.ssm)


def test_a_ring_too_short_is_refused(mamba):
    mixer = Mixer(Case(4, heads=2, ring=5), mamba, 16)
    with pytest.raises(ValueError, match="ring of 5 .* 3 rows need 6"):
        mixer.update(0, 3)
    short = Mixer(Case(4, heads=2, taps=7, ring=5), mamba)
    with pytest.raises(ValueError, match="ring of 5"):
        short.prefill()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_rolling_back_moves_a_cursor(mamba, kept):
    """Of four rows some are taken back: the next ones, from the state before, see only those that were kept."""
    case = Case(8, heads=2, ring=10)
    mixer, straight = (Mixer(case, mamba, 7, seed=3) for _ in range(2))
    mixer.projected[kept:4] += 1
    mixer.update(0, 4)
    mixer.ssm[SLOT] = mixer.state
    mixer.projected[:] = straight.projected
    if kept:
        mixer.update(0, kept)
        straight.update(0, kept)
    assert_same_bits(mixer.update(kept, 4), straight.update(kept, 4))
    assert_same_bits(mixer.ssm, straight.ssm)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("case", [case for case in PROMPTS + LARGE if case.length > case.chunk], ids=str)
def test_a_prompt_does_not_see_its_cuts(mamba, case, chunks):
    """Cut at every multiple of so many chunks, states passing through the slot: the same bits."""
    whole, cut = (Mixer(case, mamba, seed=1) for _ in range(2))
    step = chunks * case.chunk
    parts = [cut.prefill(first, first + step) for first in range(0, case.length, step)]
    assert_same_bits(torch.cat(parts), whole.prefill())
    assert_same_bits(cut.ssm, whole.ssm)
    newest = [position % case.ring for position in range(max(case.length - case.taps + 1, 0), case.length)]
    assert_same_bits(cut.conv[SLOT, newest], whole.conv[SLOT, newest])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_sequence_does_not_see_the_batch(mamba, rows):
    """Four sequences in scattered slots, one of them NaN: each as if it were alone."""
    case = Case(4 * rows, heads=2, groups=1, width=7, state=24)
    mixer = Mixer(case, mamba, seed=2)
    generator = seeded(3)
    conv = torch.randn(mixer.conv.shape, generator=generator)
    ssm = torch.randn(mixer.ssm.shape, generator=generator)
    slots, positions = torch.tensor([4, 0, 3, 1]), torch.tensor([5, 0, 99, 11])
    mixer.projected[rows : 2 * rows] = torch.nan

    def step(sequences: slice) -> tuple[Tensor, Tensor, Tensor]:
        rings, states = conv.clone(), ssm.clone()
        tokens = mixer.projected[sequences.start * rows : sequences.stop * rows]
        args = rings, states, slots[sequences], positions[sequences], mixer.weights, rows
        return mamba.mamba_update(tokens, *args), rings, states

    together, rings, states = step(slice(0, 4))
    assert_same_bits(rings[2], conv[2])
    assert_same_bits(states[2], ssm[2])
    for i in range(4):
        alone, ring, state = step(slice(i, i + 1))
        assert_same_bits(alone, together[i * rows : (i + 1) * rows])
        assert_same_bits(ring[slots[i]], rings[slots[i]])
        assert_same_bits(state[slots[i]], states[slots[i]])
        assert bool(alone.isnan().any()) == (i == 1)


def test_threads_do_not_matter(mamba):
    case = Case(40, heads=2, chunk=13)
    same_for_all_threads(lambda: Mixer(case, mamba).prefill())
    same_for_all_threads(lambda: Mixer(case, mamba, 4).update(0, 8))


def test_no_sequences(mamba):
    mixer = Mixer(Case(4), mamba, 16)
    conv, ssm = mixer.conv.clone(), mixer.ssm.clone()
    none = torch.empty(0, dtype=torch.int64)
    assert mamba.mamba_update(mixer.projected[:0], mixer.conv, mixer.ssm, none, none, mixer.weights).shape == (0, 64)
    assert_same_bits(mixer.conv, conv)
    assert_same_bits(mixer.ssm, ssm)


def test_strided_memory(mamba):
    """Rows of a wider matrix, caches that are slices of larger ones: all that the contract leaves open."""
    case = Case(20, heads=3, groups=3, width=7, state=5, chunk=13)
    plain, strided = Mixer(case, mamba, 26), Mixer(case, mamba, 26)
    strided.projected = scattered(strided.projected)
    strided.conv, strided.ssm = (scattered(t) for t in (strided.conv, strided.ssm))
    assert_same_bits(strided.prefill(0, 13), plain.prefill(0, 13))
    assert_same_bits(strided.update(13, 4), plain.update(13, 4))
    assert_same_bits(strided.ssm, plain.ssm)
    assert_same_bits(strided.conv, plain.conv)


def test_strong_decay_does_not_overflow(mamba):
    """Sums of log decay reach hundreds inside a chunk; only differences that are not positive are exponentiated."""
    mixer = Mixer(Case(128, heads=2, chunk=64), mamba, 64, seed=5)
    mixer.weights = replace(mixer.weights, a=mixer.weights.a * 40, dt_bias=mixer.weights.dt_bias + 4)
    y, state = mixer.exact()
    assert_close(mixer.prefill(), y, 100 * mixer.case.terms)
    assert_close(mixer.ssm[SLOT], state, 100 * mixer.case.terms)


@pytest.mark.parametrize("dt", [-80.0, -20.0, -9.0, 30.0])
def test_tiny_and_large_steps(mamba, dt):
    """softplus where it is exp(x), so small that 1 + exp(x) is 1, and where it is x."""
    mixer = Mixer(Case(3, heads=2, state=8), mamba, 16)
    mixer.projected[:, -2:] = dt
    mixer.ssm[SLOT] = mixer.state = torch.zeros_like(mixer.state)
    mixer.weights = replace(mixer.weights, d=torch.zeros_like(mixer.weights.d))
    y, state = mixer.exact()
    for token in range(3):
        assert_close(mixer.update(token)[0], y[token], mixer.case.terms)
    assert_close(mixer.ssm[SLOT], state, mixer.case.terms)


def test_both_paths_of_the_reference_convolve_alike():
    """The references add the taps in one order, so there even the two paths agree to the bit."""
    case = Case(9, heads=3, groups=3, width=5, taps=5)
    by_token, by_chunk = (Mixer(case, None, 13, seed=4) for _ in range(2))
    inputs = by_token.weights.split(by_token.projected)[1]
    slots = torch.tensor([SLOT])
    expected = reference._conv_prefill(inputs, by_chunk.conv, SLOT, 13, by_chunk.weights)
    for token in range(case.length):
        at = torch.tensor([13 + token])
        actual = reference._conv_update(inputs[token : token + 1], by_token.conv, slots, at, by_token.weights)
        assert_same_bits(actual[0], expected[token])
    assert_same_bits(by_token.conv, by_chunk.conv)
