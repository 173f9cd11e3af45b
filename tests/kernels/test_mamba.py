"""Convolution and state space against the plain recurrence in float64; chunks, batches and slots leave no trace."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded
from torch import Tensor

from headrace.kernels import Kernels

SLOTS = 5


@dataclass(frozen=True)
class ConvCase:
    length: int
    channels: int
    taps: int = 4
    bias: bool = True
    dtype: torch.dtype = torch.float32


CONV_CASES = [
    ConvCase(0, 5), ConvCase(1, 1), ConvCase(2, 7, bias=False), ConvCase(3, 384), ConvCase(4, 13, taps=2),
    ConvCase(5, 13, taps=7), ConvCase(100, 33), ConvCase(37, 64, dtype=torch.bfloat16),
]  # fmt: skip


def conv_inputs(case: ConvCase) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = seeded()
    x = torch.randn(case.length, case.channels, generator=generator)
    state = torch.randn(SLOTS, case.channels, case.taps - 1, generator=generator).to(case.dtype)
    weight = torch.randn(case.channels, case.taps, generator=generator)
    return x, state, weight, torch.randn(case.channels, generator=generator) if case.bias else None


def exact_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    window = torch.cat([past.t(), x.to(dtype)]).double()
    rows = [(window[t : t + weight.shape[1]] * weight.t().double()).sum(0) for t in range(x.shape[0])]
    out = torch.stack(rows) if rows else torch.zeros(x.shape, dtype=torch.float64)
    out = out if bias is None else out + bias.double()
    return out * torch.sigmoid(out)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_prefill(kernels, case, fresh):
    x, state, weight, bias = conv_inputs(case)
    before = state.clone()
    past = torch.zeros_like(state[3]) if fresh else before[3]
    if fresh:
        state[3] = torch.nan
    actual = kernels.conv_prefill(scattered(x), state, 3, fresh, weight, bias)
    assert_close(actual, exact_conv(x, past, weight, bias, case.dtype), case.taps)
    assert_same_bits(state[3], torch.cat([past, x.t().to(case.dtype)], 1)[:, case.length :])
    others = [0, 1, 2, 4]
    assert_same_bits(state[others], before[others])


@pytest.mark.parametrize("case", [case for case in CONV_CASES if case.length], ids=str)
def test_conv_update_is_conv_prefill_of_one(kernels, case):
    """Both add the taps in one order, so here even the two paths agree to the bit."""
    x, state, weight, bias = conv_inputs(case)
    by_chunk = state.clone()
    expected = kernels.conv_prefill(x, by_chunk, 2, False, weight, bias)
    slots = torch.tensor([4, 2])
    for token in range(case.length):
        rows = torch.stack([torch.full_like(x[token], torch.nan), x[token]])
        assert_same_bits(kernels.conv_update(rows, state, slots, weight, bias)[1], expected[token])
    assert_same_bits(state[2], by_chunk[2])
    assert_same_bits(state[[0, 1, 3]], by_chunk[[0, 1, 3]])


@dataclass(frozen=True)
class Case:
    length: int
    heads: int = 4
    groups: int = 2
    width: int = 16
    state: int = 16
    chunk: int = 16


CASES = [
    Case(0),
    Case(1),
    Case(15),
    Case(16),
    Case(17),
    Case(83),
    Case(5, heads=1, groups=1, width=1, state=1, chunk=1),
    Case(50, heads=6, groups=3, width=7, state=5, chunk=13),
    Case(300, heads=8, groups=2, width=32, state=32, chunk=64),
    Case(140, heads=8, groups=8, width=16, state=64, chunk=128),
]


class Scan:
    """Inputs of one sequence and a state in slot 2, NaN in the other slots."""

    def __init__(self, case: Case, kernels: Kernels, seed: int = 0) -> None:
        generator = seeded(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.case, self.kernels = case, kernels
        self.x = normal(case.length, case.heads, case.width)
        self.dt = normal(case.length, case.heads) - 1
        self.b, self.c = normal(2, case.length, case.groups, case.state)
        self.initial = normal(case.heads, case.width, case.state)
        self.a = -torch.exp(normal(case.heads))
        self.d, self.dt_bias = normal(2, case.heads)

    def memory(self) -> Tensor:
        state = torch.full((SLOTS, *self.initial.shape), torch.nan)
        state[2] = self.initial
        return state

    def prefill(self, state: Tensor, start: int, end: int, fresh: bool = False) -> Tensor:
        x, dt, b, c = (t[start:end] for t in (self.x, self.dt, self.b, self.c))
        return self.kernels.ssm_prefill(x, dt, b, c, state, 2, fresh, self.a, self.d, self.dt_bias, self.case.chunk)

    def update(self, state: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        x, dt, b, c = (t[rows] for t in (self.x, self.dt, self.b, self.c))
        return self.kernels.ssm_update(x, dt, b, c, state, slots, self.a, self.d, self.dt_bias)

    def exact(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence, token by token -> (y, final state)."""
        shared = self.case.heads // self.case.groups
        h, y = initial.double(), []
        dt = torch.logaddexp(self.dt.double() + self.dt_bias.double(), torch.zeros((), dtype=torch.float64))
        for t in range(self.case.length):
            b, c = (m[t].double().repeat_interleave(shared, 0) for m in (self.b, self.c))
            decay = torch.exp(dt[t] * self.a.double())[:, None, None]
            h = decay * h + torch.einsum("h,hp,hn->hpn", dt[t], self.x[t].double(), b)
            y.append(torch.einsum("hpn,hn->hp", h, c) + self.d.double()[:, None] * self.x[t].double())
        return (torch.stack(y) if y else torch.zeros(self.x.shape, dtype=torch.float64)), h


def terms(case: Case) -> int:
    # A chunk's exponents are differences of sums of up to ``chunk`` terms: their rounding enters as that of a sum.
    return case.state + case.chunk * 8


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ssm_prefill(kernels, case, fresh):
    scan = Scan(case, kernels)
    state = scan.memory()
    y, final = scan.exact(torch.zeros_like(scan.initial) if fresh else scan.initial)
    if fresh:
        state[2] = torch.nan
    assert_close(scan.prefill(state, 0, case.length, fresh), y, terms(case))
    assert_close(state[2], final, terms(case))
    assert state[[0, 1, 3, 4]].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ssm_update(kernels, case):
    scan = Scan(case, kernels)
    state = scan.memory()
    y, final = scan.exact(scan.initial)
    for token in range(case.length):
        actual = scan.update(state, torch.tensor([token]), torch.tensor([2]))
        assert_close(actual[0], y[token], terms(case))
    assert_close(state[2], final, terms(case))


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("case", [case for case in CASES if case.length > case.chunk], ids=str)
def test_a_prompt_does_not_see_its_cuts(kernels, case, chunks):
    """Cut at every multiple of so many chunks, the state passing through the slot: the same bits."""
    scan = Scan(case, kernels, 1)
    whole, cut = scan.memory(), scan.memory()
    expected = same_for_all_threads(lambda: scan.prefill(whole.clone(), 0, case.length))
    scan.prefill(whole, 0, case.length)
    step = chunks * case.chunk
    parts = [scan.prefill(cut, start, min(start + step, case.length)) for start in range(0, case.length, step)]
    assert_same_bits(torch.cat(parts), expected)
    assert_same_bits(cut[2], whole[2])


@pytest.mark.parametrize("case", [case for case in CASES if case.length >= 4], ids=str)
def test_a_decode_row_does_not_see_the_batch(kernels, case):
    scan = Scan(case, kernels, 2)
    memory = torch.randn(SLOTS, *scan.initial.shape, generator=seeded(3))
    rows, slots = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 3, 1])
    together = memory.clone()
    expected = same_for_all_threads(lambda: scan.update(memory.clone(), rows, slots))
    scan.update(together, rows, slots)
    for row in range(4):
        alone = memory.clone()
        part = slice(row, row + 1)
        assert_same_bits(scan.update(alone, rows[part], slots[part])[0], expected[row])
        assert_same_bits(alone[slots[row]], together[slots[row]])
    assert_same_bits(together[2], memory[2])


def test_no_rows(kernels):
    scan = Scan(Case(4), kernels)
    state = scan.memory()
    none = torch.empty(0, dtype=torch.int64)
    assert scan.update(state, none, none).shape == (0, 4, 16)
    assert_same_bits(state, scan.memory())
    assert kernels.conv_update(torch.ones(0, 3), torch.ones(2, 3, 3), none, torch.ones(3, 4), None).shape == (0, 3)


def test_strided_inputs(kernels):
    case = Case(50, heads=6, groups=3, width=7, state=5, chunk=13)
    scan = Scan(case, kernels, 4)
    expected = scan.prefill(scan.memory(), 0, 50)
    step = scan.update(scan.memory(), torch.tensor([7]), torch.tensor([2]))
    scan.x, scan.dt, scan.b, scan.c = (scattered(t) for t in (scan.x, scan.dt, scan.b, scan.c))
    assert_same_bits(scan.prefill(scan.memory(), 0, 50), expected)
    assert_same_bits(scan.update(scan.memory(), torch.tensor([7]), torch.tensor([2])), step)


def test_strong_decay_does_not_overflow(kernels):
    """Sums of log decay reach hundreds inside a chunk; only differences that are not positive are exponentiated."""
    case = Case(128, chunk=64)
    scan = Scan(case, kernels, 5)
    scan.a *= 40
    scan.dt += 4
    state = scan.memory()
    y, final = scan.exact(scan.initial)
    assert_close(scan.prefill(state, 0, 128), y, 100 * terms(case))
    assert_close(state[2], final, 100 * terms(case))
