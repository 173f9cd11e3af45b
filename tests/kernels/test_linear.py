"""Projections with what is fused into them against float64, and rows that do not see what is around them."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_same_bits,
    exact_weight,
    same_for_all_threads,
    scattered,
    seeded,
    stored_as,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.kernels.formats import Format, Fp8, Nvfp4, Weight
from headrace.kernels.linear import bmm, linear, pack_linear
from headrace.kernels.norm import Norm


@dataclass(frozen=True)
class Case:
    rows: int
    inputs: int
    outputs: int
    second: int = 0  # columns of the second input
    bias: bool = False
    groups: int = 0  # of the norm; 0: no norm
    relu2: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32
    format: Format = "float"


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case(0, 16, 16),
    Case(0, 7, 5, second=3, bias=True, groups=1, residual=True),
    Case(1, 1, 1),
    Case(1, 176, 704),
    Case(2, 7, 5, bias=True, residual=True),
    Case(15, 64, 100, bias=True, dtype=FP16),
    Case(16, 160, 16, relu2=True),
    Case(17, 257, 33, groups=1, residual=True),
    Case(3, 33, 20, groups=3, bias=True),
    Case(5, 40, 70, second=24, relu2=True, residual=True),
    Case(4, 24, 10, second=24, groups=2),
    Case(4, 24, 10, second=12, groups=3),
    Case(9, 30, 12, second=34, groups=1, bias=True),
    Case(131, 40, 8, groups=5),
    Case(3, 13, 17, dtype=BF16),
    Case(1, 320, 40, groups=1, dtype=BF16),
    Case(9, 300, 40, groups=3, residual=True, dtype=BF16),
    Case(5, 130, 50, second=260, relu2=True, residual=True, dtype=BF16),
    Case(33, 48, 200, second=80, groups=1, bias=True, dtype=BF16),
    Case(70, 256, 33, groups=2, dtype=BF16),
    Case(0, 16, 16, format="fp8"),
    Case(1, 1, 1, format="fp8"),
    Case(3, 37, 50, bias=True, format="fp8"),
    Case(17, 96, 33, groups=3, bias=True, residual=True, format="fp8"),
    Case(5, 41, 70, second=24, relu2=True, residual=True, format="fp8"),
    Case(2, 16, 1, format="nvfp4"),
    Case(1, 176, 704, groups=1, format="nvfp4"),
    Case(33, 48, 100, second=80, groups=1, bias=True, format="nvfp4"),
    Case(5, 40, 70, second=24, relu2=True, residual=True, format="nvfp4"),
]
LARGE = [
    Case(31, 4096, 1),
    Case(64, 160, 640),
    Case(3, 2048, 1000, groups=8, residual=True),
    Case(18, 1040, 1100, format="fp8"),  # more than the reference expands at a time
    Case(18, 2048, 1030, relu2=True, format="nvfp4"),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL = CASES if INTERPRETED else CASES + LARGE
WITH_ROWS = [case for case in ALL if case.rows]
REFERENCE_ONLY = pytest.mark.skipif(INTERPRETED, reason="about the reference's own parts")


@dataclass
class Problem:
    x: Tensor | tuple[Tensor, Tensor]
    weight: Weight
    bias: Tensor | None
    norm: Norm | None
    residual: Tensor | None
    relu2: bool

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> "Problem":
        generator = seeded(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        width = case.inputs + case.second
        x = random(case.rows, case.inputs) * 3
        return cls(
            (x, random(case.rows, case.second)) if case.second else x,
            stored_as(case.format, random(case.outputs, width).to(case.dtype)),
            random(case.outputs) if case.bias else None,
            Norm(random(width), 1e-5, case.groups) if case.groups else None,
            random(case.rows, case.outputs) if case.residual else None,
            case.relu2,
        )

    def run(self, kernels) -> Tensor:
        packed = kernels.pack_linear([self.weight], self.bias)
        return kernels.linear(self.x, packed, norm=self.norm, relu2=self.relu2, residual=self.residual)

    def map(self, function) -> "Problem":
        """The same with another arrangement of the rows."""
        x = tuple(function(part) for part in self.x) if isinstance(self.x, tuple) else function(self.x)
        return replace(self, x=x, residual=None if self.residual is None else function(self.residual))

    def operands(self) -> Tensor:
        """What the weight is multiplied with, in float64."""
        parts = [part.double() for part in (self.x if isinstance(self.x, tuple) else (self.x,))]
        if self.norm is not None:
            widths = [part.shape[1] for part in parts]
            grouped = torch.cat(parts, 1).unflatten(1, (self.norm.groups, -1))
            factor = (grouped.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
            parts = list(torch.split((grouped * factor).flatten(1) * self.norm.weight.double(), widths, 1))
        if self.relu2:
            parts[-1] = parts[-1].clamp(min=0).square()
        return torch.cat(parts, 1)

    def exact(self) -> Tensor:
        y = self.operands() @ exact_weight(self.weight).t()
        y = y if self.bias is None else y + self.bias.double()
        return y if self.residual is None else y + self.residual.double()


def assert_right(actual: Tensor, problem: Problem, kernels) -> None:
    """Against float64. The reference multiplies fp32 operands; kernels may round them to bf16, unless weights are fp32
    or fp16.

    A bf16 operand is off by up to 2^-8 of itself, its error uniform: the errors of K products add up to a standard
    deviation of at most 2^-8 / sqrt(3) times the root of the sum of their squares. Six of those are never seen by
    chance; one term of K = 300 that is wrong weighs 25 of them.
    """
    exact = problem.exact()
    if problem.weight.dtype in (torch.float32, FP16) or kernels.backend == "reference":
        assert_close(actual, exact, problem.weight.shape[1])
        return
    assert actual.shape == exact.shape and actual.dtype == torch.float32
    deviation = (problem.operands().square() @ exact_weight(problem.weight).square().t()).sqrt() * 2**-8 / 3**0.5
    worst = ((actual.double() - exact).abs() / (6 * deviation + 1e-6)).max() if exact.numel() else 0
    assert worst <= 1, f"{float(worst):.2f} times the bound"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_values(kernels, case):
    problem = Problem.make(case)
    actual = problem.run(kernels)
    assert_right(actual, problem, kernels)
    assert_same_bits(problem.map(scattered).run(kernels), actual)


def test_bf16_operands_are_rounded_once(kernels):
    """Sums of products of bf16 values that fp32 holds exactly: nothing but the products may show."""
    x = torch.randint(-8, 9, (5, 200), generator=seeded()).float()
    weight = torch.randint(-8, 9, (9, 200), generator=seeded(1)).to(BF16)
    assert_same_bits(kernels.linear(x, kernels.pack_linear([weight])), (x.double() @ weight.double().t()).float())


def whole_numbers(form: Format, outputs: int, width: int, scale: float) -> tuple[Tensor, Weight]:
    """(unscaled [N, K], the weight): small whole numbers, stored with block scales 1 to 4."""
    generator = seeded(1)
    factor = torch.tensor(scale)
    if form == "fp8":
        unscaled = torch.randint(-8, 9, (outputs, width), generator=generator).float()
        return unscaled, Fp8(unscaled.to(torch.float8_e4m3fn), factor)
    codes = torch.randint(0, 256, (outputs, width // 2), generator=generator, dtype=torch.uint8)
    blocks = torch.randint(1, 3, (outputs, width // 16), generator=generator).float() * 2
    weight = Nvfp4(codes, blocks.to(torch.float8_e4m3fn), factor)
    return weight.unscaled().float(), weight


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_the_scale_multiplies_the_finished_sum(kernels, form):
    """Sums of whole numbers are exact in any order: what is left is one rounding, that of scale times sum."""
    x = torch.randint(-8, 9, (5, 208), generator=seeded()).float()
    unscaled, weight = whole_numbers(form, 39, 208, 0.0371)
    bias, residual = torch.randn(39, generator=seeded(2)), torch.randn(5, 39, generator=seeded(3))
    product = (x.double() @ unscaled.double().t()).float() * weight.scale
    assert_same_bits(kernels.linear(x, kernels.pack_linear([weight])), product)
    fused = kernels.linear(x, kernels.pack_linear([weight], bias), residual=residual)
    assert_same_bits(fused, residual + (product + bias))


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_several_quantised_weights_side_by_side(kernels, form):
    """Each output keeps its own weight's scale; sizes that are no whole tiles."""
    x = torch.randint(-8, 9, (4, 48), generator=seeded()).float()
    parts = [whole_numbers(form, outputs, 48, scale) for outputs, scale in ((7, 0.0371), (32, 1.7), (20, 1e-6))]
    expected = [(x.double() @ unscaled.double().t()).float() * weight.scale for unscaled, weight in parts]
    packed = kernels.pack_linear([weight for _, weight in parts])
    assert_same_bits(kernels.linear(x, packed), torch.cat(expected, 1))


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_quantised_weights_that_cannot_be_one(kernels, form):
    weight = stored_as(form, torch.randn(8, 16, generator=seeded()))
    with pytest.raises(ValueError, match=f"2 {form} weights with dim 1: each has a scale of its own"):
        kernels.pack_linear([weight, weight], dim=1)
    with pytest.raises(ValueError, match=f"one format, got float, {form}"):
        kernels.pack_linear([torch.ones(8, 16), weight])
    one = kernels.pack_linear([weight], dim=1)
    x = torch.randn(2, 16, generator=seeded(1))
    assert_same_bits(kernels.linear(x, one), kernels.linear(x, kernels.pack_linear([weight])))


@pytest.mark.parametrize("case", WITH_ROWS, ids=str)
def test_a_row_does_not_see_its_neighbours(kernels, case):
    """Alone, moved, beside NaN rows, in a larger batch, with other thread counts: the same bits."""
    problem = Problem.make(case, seed=1)
    expected = problem.run(kernels)
    if kernels.backend == "reference":
        same_for_all_threads(lambda: problem.run(kernels))
    order = torch.randperm(case.rows, generator=seeded())
    assert_same_bits(problem.map(lambda rows: rows[order]).run(kernels), expected[order])
    assert_same_bits(problem.map(lambda rows: rows.repeat(3, 1)).run(kernels), expected.repeat(3, 1))
    for row in {0, case.rows // 2, case.rows - 1}:
        alone = slice(row, row + 1)
        assert_same_bits(problem.map(lambda rows, alone=alone: rows[alone]).run(kernels), expected[alone])

        def poisoned(rows: Tensor, alone: slice = alone) -> Tensor:
            others = torch.full_like(rows, torch.nan)
            others[alone] = rows[alone]
            return others

        assert_same_bits(problem.map(poisoned).run(kernels)[alone], expected[alone])


def test_several_weights_are_one(kernels):
    """Outputs side by side; inputs side by side, products summed; the bits of the joined weight."""
    x, y = torch.randn(2, 5, 24, generator=seeded())
    parts = torch.randn(3, 7, 24, generator=seeded(1))
    bias = torch.randn(21, generator=seeded(2))
    beside = kernels.linear(x, kernels.pack_linear(list(parts), bias))
    assert_same_bits(beside, kernels.linear(x, kernels.pack_linear([torch.cat(list(parts))], bias)))
    summed = kernels.linear((x, y), kernels.pack_linear(list(parts[:2]), dim=1))
    assert_close(summed, x.double() @ parts[0].double().t() + y.double() @ parts[1].double().t(), 48)


def test_a_packed_weight_is_its_own(kernels):
    """Sizes that need no padding, and weights cut out of others."""
    whole = torch.randn(40, 50, generator=seeded())
    weight = whole[3:35, 1:33]
    x = torch.randn(4, 32, generator=seeded(1))
    packed = kernels.pack_linear([weight])
    assert_close(kernels.linear(x, packed), x.double() @ weight.double().t(), 32)


def test_a_nan_shows(kernels):
    """relu2 and norm keep it: a broken row must not look like a good one."""
    x = torch.randn(3, 16, generator=seeded())
    x[1, 5] = torch.nan
    packed = kernels.pack_linear([torch.randn(4, 16, generator=seeded(1))])
    for arguments in ({"relu2": True}, {"norm": Norm(torch.ones(16), 1e-5)}):
        y = kernels.linear(x, packed, **arguments)
        assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_refusals(kernels):
    x = torch.randn(2, 16, generator=seeded())
    packed = kernels.pack_linear([torch.randn(4, 32)])
    with pytest.raises(ValueError, match="norm and relu2"):
        kernels.linear((x, x), packed, norm=Norm(torch.ones(32), 1e-5), relu2=True)
    with pytest.raises(ValueError, match="both inputs"):
        kernels.linear((x[:, :8], torch.cat([x, x[:, 8:]], 1)), packed, norm=Norm(torch.ones(32), 1e-5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("width", [1, 13, 160, 1030])
def test_embed(kernels, dtype, width):
    weight = torch.randn(11, width, generator=seeded()).to(dtype)
    ids = torch.tensor([0, 10, 3, 3, 7])
    assert_same_bits(kernels.embed(weight, ids), weight[ids].float())
    assert_same_bits(kernels.embed(weight, ids.repeat_interleave(2)[::2]), weight[ids].float())
    assert kernels.embed(weight, ids[:0]).shape == (0, width)


SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 80, 129, 352)


@REFERENCE_ONLY
def test_bmm_does_not_see_batch_or_threads():
    """The primitive under every reference, over a grid of shapes. torch.mm fails this from its first rows."""
    generator = seeded(2)
    for inner in SIZES:
        for columns in SIZES:
            a = torch.randn(5, 16, inner, generator=generator)
            b = torch.randn(5, inner, columns, generator=generator)
            expected = same_for_all_threads(lambda a=a, b=b: bmm(a, b))
            for tile in range(5):
                assert_same_bits(bmm(a[tile : tile + 1], b[tile : tile + 1])[0], expected[tile])
            order = torch.randperm(16, generator=generator)
            assert_same_bits(bmm(a[:, order], b), expected[:, order])
            assert_close(expected, a.double() @ b.double(), inner)


@REFERENCE_ONLY
def test_stored_bytes_are_all_that_stays():
    """The reference keeps no full-precision copy of a quantised weight, nor makes one."""
    for form, share in (("fp8", 1), ("nvfp4", 0.5625)):
        packed = pack_linear([stored_as(form, torch.randn(1600, 1600, generator=seeded()))])
        assert packed.weight.nbytes == 1600 * 1600 * share + 4
        sizes = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, sizes=sizes):
                result = function(*args, **(kwargs or {}))
                sizes.extend(t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor))
                return result

        with Watch():
            linear(torch.randn(2, 1600), packed)
        assert max(sizes) <= max(4 << 20, packed.weight.nbytes)


@REFERENCE_ONLY
def test_zero_sizes():
    assert bmm(torch.ones(0, 16, 4), torch.ones(0, 4, 3)).shape == (0, 16, 3)
    assert bmm(torch.ones(2, 0, 4), torch.ones(2, 4, 3)).shape == (2, 0, 3)
    assert_same_bits(bmm(torch.ones(2, 5, 0), torch.ones(2, 0, 3)), torch.zeros(2, 5, 3))
