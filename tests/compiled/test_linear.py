"""Compiled projections, executed from their PTX, against float64; one numerics for every number of tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.kernels import norm as reference_norm
from headrace.kernels.formats import Format, Fp8, Nvfp4, Quantised
from headrace.kernels.inputs import step_inputs as reference_inputs
from headrace.kernels.lab.cases import ARCHITECTURES, Case
from headrace.kernels.lab.cases.linear import CASES, PROJECTIONS
from headrace.kernels.lab.compile import compile_launch
from headrace.kernels.lab.launches import Launch, capture, execute
from headrace.kernels.lab.numerics import same_numerics
from headrace.kernels.norm import Norm
from headrace.kernels.triton import inputs, linear, norm


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fusion:
    """What is around the product. Widths are no multiples of a step, and more than one step in all."""

    inputs: int
    second: int = 0
    groups: int = 0
    relu2: bool = False
    residual: bool = False


FUSIONS = [
    Fusion(160, residual=True),
    Fusion(304, groups=1),
    Fusion(320, groups=2, residual=True),
    Fusion(48, second=144, relu2=True, residual=True),
    Fusion(80, second=80, groups=2),
]
# All of them on one architecture, on the others those that between them have every part.
RUNS = [(arch, fusion) for arch in ARCHITECTURES for fusion in (FUSIONS if arch == 90 else FUSIONS[2:4])]
OUTPUTS = 40
TOKENS = 130  # a tile of 128 and two more


@dataclass
class Problem:
    fusion: Fusion
    x: Tensor
    weight: Tensor | Quantised
    residual: Tensor
    norm: Norm | None

    @classmethod
    def make(cls, fusion: Fusion) -> "Problem":
        width = fusion.inputs + fusion.second
        before = Norm(random(width, seed=3), 1e-5, fusion.groups) if fusion.groups else None
        weight = random(OUTPUTS, width, seed=1).bfloat16()
        return cls(fusion, random(TOKENS, width) * 3, weight, random(TOKENS, OUTPUTS, seed=2), before)

    def run(self, arch: int, rows: slice) -> Tensor:
        first, second = self.x[rows, : self.fusion.inputs], self.x[rows, self.fusion.inputs :]
        with execute(arch):
            return linear.linear(
                (first.contiguous(), second.contiguous()) if self.fusion.second else first,
                linear.pack_linear([self.weight]),
                norm=self.norm,
                relu2=self.fusion.relu2,
                residual=self.residual[rows] if self.fusion.residual else None,
            )

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and the root of the sum of the squares of its products."""
        x = self.x.double()
        weight = self.weight
        weight = weight.double() if isinstance(weight, Tensor) else weight.unscaled().double() * weight.scale.double()
        if self.norm is not None:
            grouped = x.unflatten(1, (self.norm.groups, -1))
            grouped = grouped * (grouped.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
            x = grouped.flatten(1) * self.norm.weight.double()
        if self.fusion.relu2:
            x[:, self.fusion.inputs :] = x[:, self.fusion.inputs :].clamp(min=0).square()
        y = x @ weight.t() + (self.residual.double() if self.fusion.residual else 0)
        return y, (x.square() @ weight.square().t()).sqrt()


@pytest.mark.parametrize(("arch", "fusion"), RUNS, ids=str)
def test_every_tile_is_right_and_the_same(arch, fusion):
    """1, 9, 20, 40 and 130 tokens: tiles of 8, 16, 32, 64 and 128. Rounding as in tests/kernels/test_linear.py."""
    problem = Problem.make(fusion)
    exact, products = problem.exact()
    whole = problem.run(arch, slice(None))
    assert ((whole - exact).abs() <= 6 * 2**-8 / 3**0.5 * products + 1e-5).all()
    for rows in (slice(129, 130), slice(100, 109), slice(0, 20), slice(60, 100)):
        assert torch.equal(problem.run(arch, rows), whole[rows]), f"the bits of rows {rows} follow the batch"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fp32_weights(arch):
    x, weight, bias = random(3, 45), random(33, 45, seed=1), random(33, seed=2)
    with execute(arch):
        y = linear.linear(x, linear.pack_linear([weight], bias))
        alone = linear.linear(x[1:2], linear.pack_linear([weight], bias))
    torch.testing.assert_close(y, (x.double() @ weight.double().t() + bias).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(alone[0], y[1])


def any_bits(form: Format, outputs: int, width: int, seed: int = 1) -> Quantised:
    """A weight of all codes there are but NaN: subnormal ones, both zeros, signed block scales."""
    generator = torch.Generator().manual_seed(seed)

    def stored(*shape: int) -> Tensor:
        bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.where(bits & 0x7F == 0x7F, 0, bits)

    scale = torch.tensor(0.0371 * seed)
    if form == "fp8":
        return Fp8(stored(outputs, width).view(torch.float8_e4m3fn), scale)
    codes = torch.randint(0, 256, (outputs, width // 2), generator=generator, dtype=torch.uint8)
    return Nvfp4(codes, stored(outputs, width // 16).view(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_every_stored_number_is_read_exactly(arch, form):
    """A row picks a column: the result is scale times the unscaled weight, whatever its bits, times nothing else."""
    width = 64
    weights = [any_bits(form, 24, width, seed) for seed in (1, 2)]
    with execute(arch):
        y = linear.linear(torch.eye(width), linear.pack_linear(weights))
    expected = torch.cat([weight.unscaled().float() * weight.scale for weight in weights]).t()
    assert torch.equal(y, expected)


QUANTISED = [
    ("fp8", Fusion(304, groups=1)),
    ("nvfp4", Fusion(320, groups=2, residual=True)),
    ("fp8", Fusion(48, second=144, relu2=True, residual=True)),
    ("nvfp4", Fusion(80, second=112, relu2=True)),  # the second begins within 64 columns
]
QUANTISED_RUNS = [(arch, *run) for arch in ARCHITECTURES for run in (QUANTISED if arch == 90 else QUANTISED[2:])]


@pytest.mark.parametrize(("arch", "form", "fusion"), QUANTISED_RUNS, ids=str)
def test_quantised_weights_are_right_and_the_same(arch, form, fusion):
    """Tiles of 8, 16, 32, 64 and, where there are, 128 tokens."""
    problem = Problem.make(fusion)
    problem.weight = any_bits(form, OUTPUTS, fusion.inputs + fusion.second)
    exact, products = problem.exact()
    whole = problem.run(arch, slice(None))
    assert ((whole - exact).abs() <= 6 * 2**-8 / 3**0.5 * products + 1e-5).all()
    for rows in (slice(129, 130), slice(100, 109), slice(0, 20), slice(60, 100)):
        assert torch.equal(problem.run(arch, rows), whole[rows]), f"the bits of rows {rows} follow the batch"


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_nan_is_refused(form):
    weight = any_bits(form, 8, 64)
    (weight.values if form == "fp8" else weight.block_scales).view(torch.uint8)[3, 2] = 0xFF
    with pytest.raises(ValueError, match=f"an {form} weight holds NaN"):
        linear.pack_linear([weight])


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_stored_bytes_are_all_that_stays(form):
    """No copy in another precision, and an FP8 weight alone is not copied at all."""
    weight = any_bits(form, 64, 256)
    packed = linear.pack_linear([weight])
    kept = [t for t in (packed.weight, packed.block_scales) if t is not None]
    assert sum(t.nbytes for t in kept) == weight.nbytes - weight.scale.nbytes
    assert form == "nvfp4" or packed.weight.data_ptr() == weight.values.data_ptr()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_embed_norm_and_inputs(arch):
    weight, ids = random(9, 130).bfloat16(), torch.tensor([8, 0, 3, 3])
    x, before = random(5, 144), Norm(random(144, seed=1), 1e-5, 3)
    last_token, length, slots = torch.arange(6) * 7, torch.arange(6) + 2**33, torch.tensor([5, 1])
    prompt, writes = torch.arange(140), torch.tensor([[0, 1, 9], [5, 3, 2**31 - 1]])
    tables = [torch.full((6, 4), -1, dtype=torch.int32) for _ in range(2)]
    with execute(arch):
        assert torch.equal(linear.embed(weight, ids), weight[ids].float())
        y = norm.rms_norm(x, before)
        assert torch.equal(norm.rms_norm(x[2:3], before)[0], y[2])
        made = inputs.step_inputs(last_token, length, slots, prompt, tables[0], writes)
    torch.testing.assert_close(y, reference_norm.rms_norm(x, before), rtol=1e-6, atol=1e-6)
    expected = reference_inputs(last_token, length, slots, prompt, tables[1], writes)
    for ours, theirs in zip((*made, tables[0]), (*expected, tables[1]), strict=True):
        assert torch.equal(ours, theirs)


def launches_of(make: Callable[[], Callable[[], object]], arch: int) -> list[Launch]:
    with capture(arch) as launches:
        make()()
    return launches


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_no_batch_has_another_numerics(arch, op):
    """Instruction, step and groups; and how K is dealt to the lanes of an operand, which is the compiler's choice."""
    cases: list[Case] = [case for case in CASES if case.op == op]
    launches = {case.name: launches_of(case.make, arch) for case in cases}
    same_numerics(launches, cases[0].steps)
    operands = {
        frozenset(re.findall(r"kWidth = \d+|instrShape = \[[\d, ]+\]", compile_launch(launch).kernel.asm["ttgir"]))
        for found in launches.values()
        for launch in found
    }
    assert len(operands) == 1, operands


@pytest.mark.parametrize("arch", (90, 100))
@pytest.mark.parametrize("batch", (1, 16, 128))
def test_no_warp_repeats_another(arch, batch):
    """Every product is in the code of one warp, but for 32 features x 8 tokens: two instructions for four warps."""
    for projection in PROJECTIONS:
        (launch,) = launches_of(lambda projection=projection: projection.make(batch), arch)
        report, tile = compile_launch(launch).report(), launch.constexprs
        instructions = tile["BLOCK_F"] // 16 * (tile["BLOCK_T"] // 8) * (tile["BLOCK_K"] // 16)
        sharing = min(launch.options.num_warps, tile["BLOCK_F"] // 16 * (tile["BLOCK_T"] // 8))
        assert report.mma == {"HMMA.16816.F32.BF16": instructions // sharing}
        assert not report.spills


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_follow_tokens_but_not_steps(arch):
    """The rule itself, over every number of tokens: what may differ is named, the rest is one."""
    for features, span, groups in [
        (18_560, 4096, 1),
        (4096, 1024, 8),
        (4096, 5376, 1),
        (40, 16, 1),
        (131_072, 4096, 1),
    ]:
        tiles = [linear.tiling(tokens, features, span, groups, torch.bfloat16, arch) for tokens in range(1, 400)]
        assert len({tile.columns for tile in tiles}) == 1
        assert {tile.tokens for tile in tiles} == {8, 16, 32, 64, 128}


def test_the_tests_see_a_step_that_follows_the_batch(monkeypatch):
    """Squares added in another order show in the bits of a normed row: the comparison above is not idle."""
    problem = Problem.make(FUSIONS[1])
    whole = problem.run(90, slice(None))
    honest = linear.tiling

    def crooked(tokens: int, *others: object) -> linear.Tiling:
        return replace(honest(tokens, *others), columns=32)

    monkeypatch.setattr(linear, "tiling", crooked)
    assert not torch.equal(problem.run(90, slice(0, 8)), whole[:8])
