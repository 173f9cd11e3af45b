"""The repaired interpreter against torch: bf16 and fp8 arithmetic, dots, reductions, and what kernels rely on."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice as any_libdevice
from triton.language.extra.cuda import libdevice

from headrace.kernels.lab import interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


def normal(*shape, dtype=FP32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_bits(actual, expected):
    """Equal values, zeros of one sign, NaN where NaN is."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    a, e = actual.double(), expected.double()
    same = ((a == e) & (a.signbit() == e.signbit())) | (a.isnan() & e.isnan())
    assert same.all(), f"{int((~same).sum())} differ, first {a[~same][:3].tolist()} for {e[~same][:3].tolist()}"


# casts


@triton.jit
def cast(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.load(x + i).to(o.dtype.element_ty))


def casted(x, dtype):
    o = torch.zeros(x.numel(), dtype=dtype)
    cast[(1,)](x, o, x.numel(), **LAUNCH)
    return o


def hostile(dtype):
    """All patterns of a byte, or 4096 values with ties of bf16, carries into the exponent, tiny and special ones."""
    if dtype.itemsize == 1:
        return torch.arange(4096).remainder(256).to(torch.uint8).view(dtype)
    special = [0.0, -0.0, 1.96, 1.99999, 240.0, 1e-7, -3e-3, float("inf"), -float("inf"), float("nan")]
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0xBF808000 - 2**32], dtype=torch.int32).view(
        FP32
    )
    spread = normal(4096, seed=1) * torch.exp2(torch.arange(4096).remainder(24) - 18.0)
    return torch.cat([torch.tensor(special), ties, spread])[:4096].to(dtype)


@pytest.mark.parametrize("target", [BF16, FP16, FP32, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("source", [BF16, FP16, FP32, E4M3, E5M2], ids=str)
def test_casts_round_to_nearest_even(source, target):
    x = hostile(source)
    expected = x.float()
    if target in (E4M3, E5M2) and source != target:
        largest = torch.finfo(target).max
        expected = expected.clamp(-largest, largest)
    assert_bits(casted(x, target), expected.to(target))


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)], ids=str)
def test_fp8_casts_saturate_and_keep_nan(dtype, largest):
    x = torch.tensor([largest * 1.01, largest * 2, -1e30, float("inf"), -float("inf"), float("nan"), largest, 0.0])
    result = casted(x, dtype).float()
    assert result[:5].tolist() == [largest, largest, -largest, largest, -largest]
    assert result[5].isnan() and result[6:].tolist() == [largest, 0.0]


def test_fp8_casts_carry_into_the_exponent():
    assert casted(torch.tensor([1.96, 3.9, 0.499, 15.9]), E4M3).float().tolist() == [2.0, 4.0, 0.5, 16.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_and_bf16(dtype):
    x = torch.tensor([-100, -3, 0, 1, 7, 64, 100, 127], dtype=dtype)
    assert_bits(casted(x, BF16), x.to(BF16))
    assert casted(x.to(BF16), dtype).tolist() == x.tolist()


# elementwise


@triton.jit
def elementwise(x, y, o, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        r = a + b
    elif OP == "multiply":
        r = a * b
    elif OP == "negate":
        r = -a
    elif OP == "absolute":
        r = tl.abs(a)
    elif OP == "larger":
        r = tl.where(a > b, a, b)
    elif OP == "maximum":
        r = tl.maximum(a, b)
    elif OP == "constant":
        r = a * 2.0 + 1.0
    elif OP == "rsqrt":
        r = tl.rsqrt(tl.abs(a.to(tl.float32)))
    elif OP == "sigmoid":
        r = tl.sigmoid(a.to(tl.float32))
    elif OP == "fma":
        r = tl.fma(a, b, a)
    tl.store(o + i, r.to(o.dtype.element_ty))


TORCH = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "negate": lambda a, b: -a,
    "absolute": lambda a, b: a.abs(),
    "larger": torch.maximum,
    "maximum": torch.maximum,
    "constant": lambda a, b: a * 2.0 + 1.0,
    "rsqrt": lambda a, b: (1 / a.float().abs().sqrt()).to(BF16),
    "sigmoid": lambda a, b: a.float().sigmoid().to(BF16),
    "fma": lambda a, b: (a.double() * b.double() + a.double()).to(BF16),
}


@pytest.mark.parametrize("op", TORCH)
def test_bf16_elementwise(op):
    x, y = normal(256, dtype=BF16), normal(256, dtype=BF16, seed=1)
    o = torch.zeros(256, dtype=BF16)
    elementwise[(1,)](x, y, o, op, 256, **LAUNCH)
    assert_bits(o, TORCH[op](x, y))


# dots


@triton.jit
def dot(a, b, o, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BATCHED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    if BATCHED:
        acc = tl.zeros((1, M, N), o.dtype.element_ty)
        acc = tl.dot(x[None], y[None], acc, input_precision=PRECISION, out_dtype=o.dtype.element_ty).reshape(M, N)
    else:
        acc = tl.dot(x, y, input_precision=PRECISION, out_dtype=o.dtype.element_ty)
    tl.store(o + m[:, None] * N + n[None, :], acc)


def dotted(a, b, precision="tf32", batched=False, dtype=FP32):
    o = torch.zeros(a.shape[0], b.shape[1], dtype=dtype)
    dot[(1,)](a, b, o, a.shape[0], b.shape[1], a.shape[1], precision, batched, **LAUNCH)
    return o


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("columns", [8, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3, E5M2], ids=str)
def test_dots_multiply_values_not_bits(dtype, columns, batched):
    a, b = normal(16, 64, dtype=dtype), normal(64, columns, dtype=dtype, seed=1)
    expected = (a.double() @ b.double()).float()
    assert torch.equal(dotted(a, b, batched=batched), expected)


def test_mixed_fp8_dot():
    a, b = normal(16, 32, dtype=E5M2), normal(32, 16, dtype=E4M3, seed=1)
    assert torch.equal(dotted(a, b), (a.double() @ b.double()).float())


def test_integer_dot_is_exact():
    a = torch.randint(-128, 128, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dotted(a, a.T.contiguous(), dtype=torch.int32), a.int() @ a.T.int())


def test_tf32_shows_its_error_and_ieee_does_not():
    a, b = normal(16, 64), normal(64, 16, seed=1)
    exact = a.double() @ b.double()
    assert 1e-3 < (dotted(a, b, "tf32") - exact).abs().max() < 5e-2
    assert (dotted(a, b, "ieee") - exact).abs().max() < 2e-6
    coarse = a.to(BF16).float()  # 8 bits survive tf32
    assert torch.equal(dotted(coarse, coarse.T.contiguous(), "tf32"), (coarse.double() @ coarse.T.double()).float())


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_row_does_not_see_the_tile(dtype):
    a, b = normal(64, 128, dtype=dtype), normal(128, 64, dtype=dtype, seed=1)
    whole = dotted(a, b, "ieee")
    for rows, columns in ((1, 64), (16, 8), (2, 1), (64, 16)):
        part = dotted(a[:rows].contiguous(), b[:, :columns].contiguous(), "ieee")
        assert torch.equal(part, whole[:rows, :columns])


def test_dots_that_the_compiler_refuses_are_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="K >= 16"):
        dotted(normal(16, 8, dtype=BF16), normal(8, 16, dtype=BF16))


@triton.jit
def scaled_dot(a, sa, b, sb, o, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, PACK: tl.constexpr):
    m, k, g = tl.arange(0, 16), tl.arange(0, K // PACK), tl.arange(0, K // GROUP)
    x = tl.load(a + m[:, None] * (K // PACK) + k[None, :])
    y = tl.load(b + m[None, :] * (K // PACK) + k[:, None])
    scale_x = tl.load(sa + m[:, None] * (K // GROUP) + g[None, :])
    scale_y = tl.load(sb + m[:, None] * (K // GROUP) + g[None, :])
    r = tl.dot_scaled(x, scale_x, FORMAT, y, scale_y, FORMAT)
    tl.store(o + m[:, None] * 16 + m[None, :], r)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="Triton 3.6 cannot interpret tl.dot_scaled")
@pytest.mark.parametrize(("element", "group"), [("e2m1", 16), ("e2m1", 32), ("e4m3", 32)])
def test_block_scaled_dots(element, group):
    """NVFP4 has e4m3 scales of 16 elements, MX formats have powers of two for 32."""
    draw, width = torch.Generator().manual_seed(0), 64
    data = [
        torch.randint(0, 120, (16, width // (2 if element == "e2m1" else 1)), dtype=torch.uint8, generator=draw)
    ] * 2
    scales = [torch.randint(100, 126, (16, width // group), dtype=torch.uint8, generator=draw) for _ in range(2)]
    values = []
    for bits, scale in zip(data, scales, strict=True):
        if element == "e2m1":
            value = torch.stack([E2M1[(bits & 15).long()], E2M1[(bits >> 4).long()]], -1).reshape(16, width)
        else:
            value = bits.view(E4M3).float()
        factor = scale.view(E4M3).float() if group == 16 else torch.exp2(scale.float() - 127)
        values.append(value.double() * factor.double().repeat_interleave(group, 1))
    if element == "e4m3":
        data = [bits.view(E4M3) for bits in data]
    if group == 16:
        scales = [scale.view(E4M3) for scale in scales]
    o = torch.zeros(16, 16)
    scaled_dot[(1,)](
        data[0], scales[0], data[1], scales[1], o, width, group, element, 2 if element == "e2m1" else 1, **LAUNCH
    )
    torch.testing.assert_close(o, (values[0] @ values[1].T).float(), rtol=1e-6, atol=0)


# reductions and scans


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def affine(a0, b0, a1, b1):
    return a0 * a1, a1 * b0 + b1


@triton.jit
def reduce(x, o, ROWS: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    r, i = tl.arange(0, ROWS), tl.arange(0, N)
    v = tl.load(x + r[:, None] * N + i[None, :])
    if OP == "sum":
        s = tl.sum(v, 1)
    elif OP == "bf16 sum":
        s = tl.reduce(v, 1, tl.standard._sum_combine)
    elif OP == "max":
        s = tl.max(v, 1)
    elif OP == "min":
        s = tl.min(v, 1)
    elif OP == "argmax":
        s = tl.argmax(v, 1)
    elif OP == "first":
        s = tl.reduce(v, 1, first_of)
    elif OP == "xor":
        s = tl.xor_sum(v, 1)
    tl.store(o + r, s.to(o.dtype.element_ty))


def reduced(x, op, dtype):
    o = torch.zeros(x.shape[0], dtype=dtype)
    reduce[(1,)](x, o, *x.shape, op, **LAUNCH)
    return o


@pytest.mark.parametrize("op", ["sum", "bf16 sum"])
def test_bf16_sums_round_once(op):
    x = normal(4, 128, dtype=BF16)
    assert_bits(reduced(x, op, BF16), x.double().sum(1).to(BF16))


def test_extremes_ignore_nan_and_take_the_leftmost():
    x = normal(4, 16, dtype=BF16)
    x[:, 3] = float("nan")
    x[1, 5] = x[1, 11] = 9.0
    x[2] = float("nan")
    x[3] = -float("inf")
    expected = [x[r][~x[r].isnan()].max().item() for r in (0, 1, 3)]
    assert reduced(x, "max", BF16)[[0, 1, 3]].tolist() == expected and reduced(x, "max", BF16)[2].isnan()
    assert reduced(x[:2], "min", BF16).tolist() == [x[r][~x[r].isnan()].min().item() for r in (0, 1)]
    assert reduced(x[1:2], "argmax", torch.int32).item() == 5


def test_custom_reductions_keep_the_order_of_operands():
    x = normal(4, 64)
    assert torch.equal(reduced(x, "first", FP32), x[:, 0])


def test_integer_reductions():
    x = torch.randint(-(2**40), 2**40, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(reduced(x, "sum", torch.int64), x.sum(1))
    assert reduced(x, "xor", torch.int64)[0].item() == np.bitwise_xor.reduce(x[0].numpy())


def test_a_sum_does_not_see_the_rows_around_it():
    x = normal(32, 128)
    whole = reduced(x, "sum", FP32)
    assert torch.equal(reduced(x[:1], "sum", FP32), whole[:1])
    assert torch.equal(reduced(x[:2], "sum", FP32), whole[:2])
    torch.testing.assert_close(whole, x.sum(1))


@triton.jit
def scan(x, y, o, N: tl.constexpr, OP: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    if OP == "sum":
        s = tl.cumsum(v, 0, reverse=REVERSE)
    elif OP == "product":
        s = tl.cumprod(v, 0, reverse=REVERSE)
    elif OP == "affine":
        _, s = tl.associative_scan((v, tl.load(y + i)), 0, affine, reverse=REVERSE)
    tl.store(o + i, s.to(o.dtype.element_ty))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.int32, torch.int64], ids=str)
def test_cumulative_sums(dtype, reverse):
    x = normal(128, scale=9.0).to(dtype)
    o = torch.zeros(128, dtype=dtype)
    scan[(1,)](x, x, o, 128, "sum", reverse, **LAUNCH)
    exact = x.flip(0).double().cumsum(0).flip(0) if reverse else x.double().cumsum(0)
    rtol = {BF16: 2**-8, FP32: 1e-5}.get(dtype, 0.0)
    torch.testing.assert_close(o.double(), exact, rtol=rtol, atol=rtol)


def test_custom_scans_are_the_recurrence():
    a, b = normal(64).sigmoid(), normal(64, seed=1)
    o = torch.zeros(64)
    scan[(1,)](a, b, o, 64, "affine", False, **LAUNCH)
    h, expected = 0.0, []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        h = x * h + y
        expected.append(h)
    torch.testing.assert_close(o, torch.tensor(expected), rtol=1e-5, atol=1e-6)


# what kernels rely on


@triton.jit
def shapes(x, o, G, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.arange(0, 2)[:, None] * B + i[None, :])
    low, high = tl.split(tl.permute(v, (1, 0)))
    pairs = tl.join(low + 1, high).reshape(2 * B)
    swapped = tl.gather(pairs, tl.arange(0, 2 * B) ^ 1, 0)
    tl.store(o + tl.arange(0, 2 * B), swapped + G)


def test_join_split_permute_reshape_gather():
    x, o = normal(2, 16), torch.zeros(32)
    shapes[(1,)](x, o, 3, 16, **LAUNCH)
    assert torch.equal(o, torch.stack([x[1] + 3, x[0] + 1 + 3], 1).reshape(-1))


STAGES = tl.constexpr(3)


@triton.jit
def constants(o):
    for j in tl.static_range(8):
        tl.store(o + j, (j % STAGES) * 1000 + (j & STAGES) * 100 + (j << STAGES))


def test_counters_of_static_loops_meet_constants():
    o = torch.zeros(8, dtype=torch.int32)
    constants[(1,)](o, **LAUNCH)
    assert o.tolist() == [j % 3 * 1000 + (j & 3) * 100 + (j << 3) for j in range(8)]


@triton.jit
def counters(x, bins, high, programs, done, total, tables, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    tl.atomic_add(bins + tl.arange(0, 8), tl.histogram(v, 8), sem="relaxed")
    tl.store(high + i, tl.umulhi(v.to(tl.uint32) * 0x9E3779B9, 0xD2511F53).to(tl.uint32))
    wide = 0
    for j in tl.static_range(2):
        wide += tl.sum(v.to(tl.int64) << 33) * tl.load(tables[j])
    tl.store(total + tl.program_id(0), wide)
    tl.debug_barrier()
    arrived = tl.atomic_add(done, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(programs, tl.num_programs(0))


def test_counters_of_programs_and_wide_integers():
    x = torch.randint(0, 8, (4 * 32,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bins, high, total = torch.zeros(8, dtype=torch.int32), torch.zeros(128, dtype=torch.int64), torch.zeros(4).long()
    programs, done = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    tables = (torch.tensor([3]), torch.tensor([4]))
    counters[(4,)](x, bins, high, programs, done, total, tables, 32, **LAUNCH)
    assert torch.equal(bins, x.bincount(minlength=8).int())
    assert high.tolist() == [((v * 0x9E3779B9 % 2**32) * 0xD2511F53) >> 32 for v in x.tolist()]
    assert torch.equal(total, (x.long().reshape(4, 32).sum(1) << 33) * 7)
    assert (programs.item(), done.item()) == (4, 4)


@triton.jit
def bf16_atomics(x, o, before, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(before + i, tl.atomic_add(o + i % 2, tl.load(x + i), mask=i < B - 1, sem="relaxed"), mask=i < B - 1)


def test_bf16_atomics_add_one_after_the_other():
    x, o, before = normal(8, dtype=BF16), torch.ones(2, dtype=BF16), torch.zeros(8, dtype=BF16)
    bf16_atomics[(1,)](x, o, before, 8, **LAUNCH)
    expected = torch.ones(2, dtype=BF16)
    for lane in range(7):
        assert before[lane] == expected[lane % 2]
        expected[lane % 2] += x[lane]
    assert torch.equal(o, expected)


@triton.jit
def foreign(x, o, N: tl.constexpr, WHICH: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    if WHICH == "cuda":
        r = libdevice.tanh(v)
    elif WHICH == "any":
        r = any_libdevice.log1p(v)
    elif WHICH == "unknown":
        r = libdevice.erfcx(v)
    else:
        r = tl.inline_asm_elementwise(WHICH, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(o + i, r)


def test_foreign_code_has_twins(monkeypatch):
    x, o = normal(32).abs(), torch.zeros(32)
    for which, twin in (("cuda", np.tanh), ("any", np.log1p)):
        foreign[(1,)](x, o, 32, which, **LAUNCH)
        assert torch.equal(o, torch.from_numpy(twin(x.numpy())))
    monkeypatch.setitem(interpreter.ASSEMBLY, "ex2.approx.f32 $0, $1;", np.exp2)
    foreign[(1,)](x, o, 32, "ex2.approx.f32 $0, $1;", **LAUNCH)
    assert torch.equal(o, torch.from_numpy(np.exp2(x.numpy())))


@pytest.mark.parametrize(("which", "message"), [("unknown", "__nv_erfcxf"), ("mul.f32 $0, $1, $1;", "mul.f32")])
def test_foreign_code_without_a_twin_says_so(which, message):
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        foreign[(1,)](normal(32), torch.zeros(32), 32, which, **LAUNCH)


# the repair itself


def test_install_twice_changes_nothing():
    before = {
        name: getattr(interpreter.stock, name) for name in ("ReduceOps", "ScanOps", "GridExecutor", "_patch_lang")
    }
    builder = interpreter.stock.interpreter_builder.__class__
    interpreter.install()
    assert all(getattr(interpreter.stock, name) is value for name, value in before.items())
    assert interpreter.stock.interpreter_builder.__class__ is builder


def test_an_unchecked_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    with pytest.raises(RuntimeError, match=r"3\.9\.0.*not on the installed 3\.10\.1"):
        interpreter.install()


def test_a_process_that_compiles_is_refused():
    """Setting the variable after the import is too late."""
    program = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; from headrace.kernels.lab import interpreter"
    program += "; interpreter.install()"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode and "must be set before triton is imported" in result.stderr
