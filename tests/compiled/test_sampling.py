"""The sampler as compiled: its PTX, executed, decides as the reference does and reads the logits at most thrice."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from kernel_checks import assert_same_bits
from sampling_cases import copy_of, rows_of, state_of

from headrace.kernels import sampling as reference
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.lab.cases import ARCHITECTURES
from headrace.kernels.lab.compile import compile_launch
from headrace.kernels.lab.launches import capture, execute
from headrace.kernels.lab.numerics import same_numerics
from headrace.kernels.lab.ptx import SECTOR, load_widths
from headrace.kernels.triton.sampling import State, sample
from headrace.kernels.triton.sampling_tokens import gumbel_of, quads_of, tile_noise, token_noise

CONTROL = ControlIds(eos=(1,), think=2, end_think=3, closing=(4, 3))
OUTPUTS = ("tokens", "phases", "finish", "logprobs", "top_ids", "top_logprobs")
VOCAB = 1040  # two tiles, the second one short


def some_rows() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Greedy, a small and a large nucleus, none, a flat row whose nucleus ends in a long list, forced, broken."""
    logits = torch.cat([rows_of("normal", 4, VOCAB), rows_of("nearly equal", 1, VOCAB), rows_of("normal", 2, VOCAB)])
    logits[6, 1039] = torch.nan
    rows = len(logits)
    values = {
        "temperature": torch.tensor([0, 0.7, 1.2, 1, 2, 1, 1]),
        "top_p": torch.tensor([0.5, 0.6, 0.95, 1, 0.7, 0.9, 0.9], dtype=torch.float64),
        "remaining": torch.tensor([-1, 3, -1, -1, 1, 0, 2]),
        "phase": torch.tensor([int(Phase.THINKING)] * rows),
        "seed": torch.arange(rows) * 7919 - 3,
        "length": torch.arange(rows) + 2**33,
    }
    return logits, values


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_compiled_code_decides_as_the_reference_does(arch):
    logits, values = some_rows()
    rows = len(logits)
    state, slots = state_of(rows, **values), torch.arange(rows).flip(0)
    state = state_of(rows, **{name: value.flip(0) for name, value in values.items()})
    other = copy_of(state)
    expected = reference.sample(logits, slots, other, CONTROL, logprobs=True, top_logprobs=3)
    with execute(arch) as executions:
        actual = sample(logits, slots, state, CONTROL, logprobs=True, top_logprobs=3)
    assert len(executions) == 4
    assert actual.finish.tolist() == [Finish.NONE] * 6 + [Finish.ERROR]
    for name in ("tokens", "phases", "finish"):
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist()
    for field in fields(state):
        assert torch.equal(getattr(state, field.name), getattr(other, field.name)), field.name
    assert torch.equal(actual.top_ids[:6], expected.top_ids[:6])
    assert torch.allclose(actual.logprobs[:6], expected.logprobs[:6], atol=1e-6)  # of logits up to 13: 2 ulp
    assert torch.allclose(actual.top_logprobs[:6], expected.top_logprobs[:6], atol=1e-6)


def test_a_row_has_the_same_bits_in_every_batch():
    logits, values = some_rows()
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.7

    def run(rows: list[int]) -> dict[str, torch.Tensor]:
        state = state_of(len(rows), **{name: value[rows] for name, value in values.items()})
        with execute(90):
            out = sample(
                logits[rows], torch.arange(len(rows)), state, CONTROL, mask=mask[rows], logprobs=True, top_logprobs=2
            )
        return {name: getattr(out, name) for name in OUTPUTS}

    rows = [3, 6, 1, 4, 2]
    together = run(rows)
    for place in (0, 2, 3):
        for name, alone in run([rows[place]]).items():
            assert_same_bits(alone, together[name][place : place + 1])


def traffic(kind: str, vocab: int, **values: object) -> float:
    """Bytes of logits that leave memory for one row, over the row's size."""
    logits = rows_of(kind, 1, vocab)
    with execute(90) as executions:
        sample(logits, torch.tensor([0]), state_of(1, **values), CONTROL)
    return sum(each.statistics.loads["logits"].sectors for each in executions) * SECTOR / (4 * vocab)


def test_at_most_three_passes_over_the_logits():
    vocab = 8192
    assert traffic("normal", vocab, top_p=0.95) == 3
    assert traffic("nearly equal", vocab, top_p=0.5) == 3
    assert traffic("normal", vocab, top_p=1.0) == 2
    assert traffic("certain", vocab, top_p=0.95) == 2 + 1 / 16  # only the tile with a kept token
    assert traffic("normal", vocab, temperature=0.0, top_p=0.95) == 1


def test_nothing_depends_on_the_batch():
    def launches(rows: int) -> list:
        with capture(90) as found:
            sample(torch.empty(rows, 131072), torch.arange(rows), state_of(rows), CONTROL, top_logprobs=3)
        return found

    found = {rows: launches(rows) for rows in (1, 3, 8, 128)}
    same_numerics(found, steps=("TILE", "TILES", "RANKS"))
    for rows in (3, 8, 128):
        for one, other in zip(found[1], found[rows], strict=True):
            assert one.constants == other.constants
            assert one.attributes == other.attributes, f"{one.name} is compiled again for {rows} rows"
            assert one.options == other.options
            assert one.grid[0] == other.grid[0]


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_real_size_loads_wide_and_does_not_spill(arch, masked):
    logits, mask = torch.empty(2, 131072), torch.empty(2, 131072, dtype=torch.bool)
    with capture(arch) as launches:
        sample(logits, torch.arange(2), state_of(2), CONTROL, mask=mask if masked else None)
    assert len(launches) == 3
    for launch in launches:
        compiled = compile_launch(launch)
        assert not compiled.report().spills
        assert set(load_widths(compiled, launch)["logits"]) == {128}


@triton.jit
def gumbel_kernel(words, noise, BLOCK: tl.constexpr):
    each = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise + each, gumbel_of(tl.load(words + each).to(tl.uint32)))


@triton.jit
def noise_kernel(state, noise, TILE: tl.constexpr):
    quad, index = quads_of(tl.program_id(0), TILE)
    tl.store(noise + index, tile_noise(quad, state, 0, TILE))
    single = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(noise + tl.num_programs(0) * TILE + single, token_noise(single, state, 0))


def test_noise_is_accurate_at_every_size_of_a_word():
    """Within 3 * 2^-24 of 1 + |g| (torch's own functions: 1) of float64, taken from the fp32 v of the definition."""
    generator = torch.Generator().manual_seed(0)
    powers = 2 ** torch.arange(32)
    words = torch.cat([powers, powers - 1, 2**32 - powers, torch.randint(0, 2**32, (4000,), generator=generator)])
    words = torch.cat([words, torch.randint(0, 2**20, (4096 - len(words),), generator=generator)])
    noise = torch.empty(len(words), dtype=torch.float32)
    with execute(90):
        gumbel_kernel[(len(words) // 512,)](words, noise, BLOCK=512, enable_fp_fusion=False)
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24).double()
    exact = -torch.log(-torch.log1p(-v))
    assert ((noise - exact).abs() <= 3 * 2**-24 * (1 + exact.abs())).all()


def test_noise_is_that_of_the_documented_counter():
    """Tiles and single tokens; the words of seed, position and choice that do not fit 32 bits are cut alike."""
    values = {"seed": -0x0123456789ABCDEF, "length": 2**35 + 77, "choice": 2**32 + 3}
    vocab, state = 1024, state_of(1, **values)
    noise = torch.empty(2, vocab)
    with execute(90):
        pointers = State(*(getattr(state, name) for name in State._fields))
        noise_kernel[(2,)](pointers, noise, TILE=512, enable_fp_fusion=False)
    expected = reference.gumbel(*(torch.tensor([value]) for value in values.values()), vocab)
    assert torch.allclose(noise, expected.expand(2, -1), rtol=2**-22, atol=2**-23)
