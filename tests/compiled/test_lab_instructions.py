"""Single instructions of the PTX executor against what the PTX manual says, lane by lane."""

import math

import numpy as np
import pytest
import torch

from headrace.kernels.lab.ptx.device_memory import DeviceMemory
from headrace.kernels.lab.ptx.machine import Machine
from headrace.kernels.lab.ptx.parse import PtxError, parse
from headrace.kernels.lab.ptx.statistics import Statistics

LANES = 32
KINDS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
GENERATOR = np.random.default_rng(11)

KERNEL = """
.visible .entry probe(.param .u64 .ptr .global a, .param .u64 .ptr .global b, .param .u64 .ptr .global c,
                      .param .u64 .ptr .global d)
.reqntid 32
{{
  .reg .pred %p<4>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %rd<32>;
  .shared .align 16 .b8 memory[2048];
  mov.u32 %r0, %tid.x;
  {loads}
  {body}
  ld.param.b64 %rd20, [d]; mad.wide.u32 %rd20, %r0, {result_bytes}, %rd20;
  st.global.{result} [%rd20], %out;
  ret;
}}
"""


def evaluate(body: str, *inputs: np.ndarray, result: str = "b32") -> np.ndarray:
    """Run ``body`` on 32 lanes; it reads %a, %b, %c and leaves its result in %out."""
    loads = [f".reg .{result} %out;"]
    tensors = {}
    for name, values in zip("abc", inputs, strict=False):
        values = np.ascontiguousarray(np.broadcast_to(values, LANES))
        size = values.dtype.itemsize
        tensors[name] = torch.from_numpy(values.view(f"i{size}").copy())
        loads.append(f".reg .b{8 * size} %{name}; ld.param.b64 %rd21, [{name}];")
        loads.append(f"mad.wide.u32 %rd21, %r0, {size}, %rd21; ld.global.b{8 * size} %{name}, [%rd21];")
    kind = KINDS[result]
    tensors["d"] = torch.zeros(LANES, dtype=getattr(torch, f"int{8 * np.dtype(kind).itemsize}"))
    text = KERNEL.format(loads="\n".join(loads), body=body, result=result, result_bytes=np.dtype(kind).itemsize)
    memory = DeviceMemory(tensors, {}, Statistics())
    parameters = {name: tensors[name].data_ptr() if name in tensors else 0 for name in "abcd"}
    machine = Machine(parse(text), memory, parameters, {name: name for name in tensors}, (1, 1, 1), 0)
    machine.run_cta((0, 0, 0))
    return tensors["d"].numpy().view(kind)


def f32(values: object) -> np.ndarray:
    return np.broadcast_to(np.asarray(values, np.float32), LANES).copy()


def floats(count: int = LANES) -> np.ndarray:
    """Random patterns: all exponents, both signs, some subnormal, infinite, NaN."""
    patterns = GENERATOR.integers(0, 2**32, count, np.uint64).astype(np.uint32)
    patterns[:6] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1]
    return patterns.view(np.float32)


def words() -> np.ndarray:
    values = GENERATOR.integers(0, 2**32, LANES, np.uint64).astype(np.uint32)
    values[:4] = [0, 1, 0x80000000, 0xFFFFFFFF]
    return values


def same(found: np.ndarray, expected: object) -> None:
    """Equal bits, any NaN equal to any."""
    expected = np.asarray(expected)
    if expected.dtype.kind == "f":
        found = found.view(expected.dtype)
        both = np.isnan(found) & np.isnan(expected)
        assert np.array_equal(found[~both], expected[~both])
    else:
        assert np.array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.f32 %out, %a, %b;", lambda a, b: a + b),
        ("sub.ftz.f32 %out, %a, %b;", lambda a, b: flushed(flushed(a) - flushed(b))),
        ("mul.rn.f32 %out, %a, %b;", lambda a, b: a * b),
        ("div.full.f32 %out, %a, %b;", lambda a, b: a / b),
        ("min.f32 %out, %a, %b;", np.fmin),
        ("max.NaN.f32 %out, %a, %b;", np.maximum),
        ("copysign.f32 %out, %a, %b;", lambda a, b: np.copysign(b, a)),
        ("abs.f32 %out, %a;", lambda a, b: np.abs(a)),
        ("neg.f32 %out, %a;", lambda a, b: -a),
        ("sqrt.rn.f32 %out, %a;", lambda a, b: np.sqrt(a)),
        ("rcp.approx.f32 %out, %a;", lambda a, b: np.float32(1) / a),
        ("setp.lt.f32 %p1, %a, %b; selp.f32 %out, %a, %b, %p1;", lambda a, b: np.where(a < b, a, b)),
        ("setp.geu.f32 %p1, %a, %b; selp.f32 %out, %a, %b, %p1;", lambda a, b: np.where(a < b, b, a)),
        ("setp.ne.f32 %p1, %a, %a; selp.f32 %out, %a, %b, %p1;", lambda a, b: b),
        ("setp.neu.f32 %p1, %a, %a; selp.f32 %out, %a, %b, %p1;", lambda a, b: np.where(np.isnan(a), a, b)),
        ("setp.nan.f32 %p1, %a, %b; selp.f32 %out, 0f3F800000, 0f00000000, %p1;",
         lambda a, b: f32(np.isnan(a) | np.isnan(b))),
        ("testp.finite.f32 %p1, %a; selp.f32 %out, 0f3F800000, 0f00000000, %p1;", lambda a, b: f32(np.isfinite(a))),
        ("add.sat.f32 %out, %a, %b;", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1))),
        ("cvt.rzi.f32.f32 %out, %a;", lambda a, b: np.trunc(a)),
        ("cvt.rni.f32.f32 %out, %a;", lambda a, b: np.rint(a)),
    ],
)  # fmt: skip
def test_floats(body, expected):
    a, b = floats(), floats()[::-1].copy()
    with np.errstate(all="ignore"):
        same(evaluate(body, a, b), expected(a, b).astype(np.float32))


def flushed(value):
    return np.where(np.abs(value) < 2.0**-126, np.copysign(np.float32(0), value), value)


def test_fma_rounds_once():
    """1 + 2^-24 + 2^-60: in fp64 the last bit is lost, and what is left would tie to even."""
    a, b, c = f32(2.0**-30), f32(2.0**-30), f32(1.0)
    just_above_half = evaluate("fma.rn.f32 %out, %a, %b, %c;", a, b, c)
    same(just_above_half, f32(1.0))
    tie = np.float32(1 + 2.0**-12)  # squared: 1 + 2^-11 + 2^-24, half a unit in the last place
    with_tail = evaluate("fma.rn.f32 %out, %a, %b, %c;", f32(tie), f32(tie), f32(2.0**-80))
    without = evaluate("fma.rn.f32 %out, %a, %b, %c;", f32(tie), f32(tie), f32(0))
    below = evaluate("fma.rn.f32 %out, %a, %b, %c;", f32(tie), f32(tie), f32(-(2.0**-80)))
    same(without, f32(1 + 2.0**-11))
    same(below, f32(1 + 2.0**-11))
    same(with_tail, f32(1 + 2.0**-11 + 2.0**-23))


@pytest.mark.parametrize("name", ["ex2", "lg2", "sin", "cos", "tanh", "rsqrt"])
def test_approximations_are_rounded_correctly(name):
    function = {"ex2": math.exp2, "lg2": math.log2, "rsqrt": lambda x: 1 / math.sqrt(x)}.get(name) or getattr(
        math, name
    )
    a = GENERATOR.uniform(0.01, 20, LANES).astype(np.float32)
    same(evaluate(f"{name}.approx.f32 %out, %a;", a), np.array([function(float(x)) for x in a]).astype(np.float32))


def signed(x):
    return x.view(np.int32).astype(np.int64)


def unsigned(x):
    return x.astype(np.uint64).astype(object)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %out, %a, %b;", lambda a, b: a + b),
        ("mul.lo.s32 %out, %a, %b;", lambda a, b: a * b),
        ("mul.hi.u32 %out, %a, %b;", lambda a, b: (a.astype(np.uint64) * b) >> np.uint64(32)),
        ("mul.hi.s32 %out, %a, %b;", lambda a, b: ((signed(a) * signed(b)) >> 32).astype(np.int32).view(np.uint32)),
        ("mad.lo.s32 %out, %a, %b, %a;", lambda a, b: a * b + a),
        ("min.s32 %out, %a, %b;", lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)).view(np.uint32)),
        ("max.u32 %out, %a, %b;", np.maximum),
        ("div.s32 %out, %a, 7;", lambda a, b: np.trunc(signed(a) / 7).astype(np.int32).view(np.uint32)),
        ("rem.s32 %out, %a, -7;", lambda a, b: np.fmod(signed(a), 7).astype(np.int32).view(np.uint32)),
        ("div.u32 %out, %a, 7;", lambda a, b: a // 7),
        ("xor.b32 %out, %a, %b; not.b32 %out, %out;", lambda a, b: ~(a ^ b)),
        ("shl.b32 %out, %a, 5;", lambda a, b: a << np.uint32(5)),
        ("shr.s32 %out, %a, 40;", lambda a, b: (a.view(np.int32) >> 31).view(np.uint32)),
        ("shl.b32 %r1, %a, 32; and.b32 %r2, %b, 31; shr.u32 %out, %b, %r2; or.b32 %out, %out, %r1;",
         lambda a, b: b >> (b & np.uint32(31))),
        ("shf.l.wrap.b32 %out, %a, %b, 8;", lambda a, b: (b << np.uint32(8)) | (a >> np.uint32(24))),
        ("shf.r.clamp.b32 %out, %a, %b, 33;", lambda a, b: b),
        ("bfe.u32 %out, %a, 4, 12;", lambda a, b: (a >> np.uint32(4)) & np.uint32(0xFFF)),
        ("bfe.s32 %out, %a, 20, 20;", lambda a, b: (a.view(np.int32) >> 20).view(np.uint32)),
        ("bfi.b32 %out, %a, %b, 8, 4;", lambda a, b: (b & ~np.uint32(0xF00)) | ((a & np.uint32(15)) << np.uint32(8))),
        ("prmt.b32 %out, %a, %b, 0x7610;", lambda a, b: (b & np.uint32(0xFFFF0000)) | (a & np.uint32(0xFFFF))),
        ("prmt.b32 %out, %a, %b, 0xBBBB;", lambda a, b: np.where(a >> np.uint32(31), ~np.uint32(0), np.uint32(0))),
        ("lop3.b32 %out, %a, %b, 0xF0, 0xE8;", lambda a, b: (a & b) | (a & np.uint32(0xF0)) | (b & np.uint32(0xF0))),
        ("popc.b32 %out, %a;", lambda a, b: np.array([int(x).bit_count() for x in a])),
        ("clz.b32 %out, %a;", lambda a, b: np.array([32 - int(x).bit_length() for x in a])),
        ("brev.b32 %out, %a;", lambda a, b: np.array([int(f"{x:032b}"[::-1], 2) for x in a])),
        ("bfind.u32 %out, %a;", lambda a, b: np.array([int(x).bit_length() - 1 for x in a]).astype(np.uint32)),
        ("mov.b32 {%h1, %h2}, %a; mov.b32 %out, {%h2, %h1};", lambda a, b: (a >> np.uint32(16)) | (a << np.uint32(16))),
        ("cvt.u16.u32 %h1, %a; cvt.s32.s16 %out, %h1;",
         lambda a, b: a.astype(np.int16).astype(np.int32).view(np.uint32)),
        ("cvt.s32.s8 %out, %a;", lambda a, b: a.astype(np.int8).astype(np.int32).view(np.uint32)),
        ("cvt.sat.s8.s32 %out, %a;", lambda a, b: np.clip(signed(a), -128, 127).astype(np.int32).view(np.uint32)),
        ("slct.b32.s32 %out, %a, %b, %b;", lambda a, b: np.where(b.view(np.int32) >= 0, a, b)),
        ("setp.lt.u32 %p1, %a, 9; setp.eq.or.s32 %p2, %b, 1, !%p1; selp.b32 %out, 1, 0, %p2;",
         lambda a, b: (b == 1) | ~(a < 9)),
        ("{ .reg .b32 %r1; mov.u32 %r1, 3; } mov.u32 %r1, 4; { .reg .b32 %r1; mov.u32 %r1, 5; } mov.u32 %out, %r1;",
         lambda a, b: np.full(LANES, 4)),
    ],
)  # fmt: skip
def test_integers(body, expected):
    a, b = words(), words()[::-1].copy()
    with np.errstate(all="ignore"):
        same(evaluate(body, a, b), np.asarray(expected(a, b)).astype(np.uint32))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.wide.u32 %out, %a, %b;", lambda a, b: a * b),
        ("mul.wide.s32 %out, %a, %b;", lambda a, b: [(s(x) * s(y)) % 2**64 for x, y in zip(a, b, strict=True)]),
        ("mad.wide.u32 %out, %a, %b, 5;", lambda a, b: a * b + 5),
        ("cvt.u64.u32 %rd1, %a; cvt.u64.u32 %rd2, %b; shl.b64 %rd1, %rd1, 32; or.b64 %rd1, %rd1, %rd2;"
         "mul.hi.u64 %out, %rd1, %rd1;", lambda a, b: ((a << 32) | b) ** 2 >> 64),
        ("mov.b64 %rd1, {%a, %b}; mul.hi.s64 %out, %rd1, %rd1;",
         lambda a, b: [(s(x, 64) ** 2 >> 64) % 2**64 for x in (b << 32) | a]),
        ("mov.b64 %rd1, {%b, %a}; not.b64 %rd1, %rd1; shr.s64 %out, %rd1, 7;",
         lambda a, b: [(s(2**64 - 1 - x, 64) >> 7) % 2**64 for x in (a << 32) | b]),
    ],
)  # fmt: skip
def test_wide_integers(body, expected):
    a, b = words(), words()[::-1].copy()
    result = expected(unsigned(a), unsigned(b))
    assert [int(x) for x in evaluate(body, a, b, result="b64")] == [int(x) for x in result]


def s(x, bits=32):
    return int(x) - (int(x) >> (bits - 1) << bits)


def test_conversions_to_small_floats():
    a, b = floats(), floats()[::-1].copy()

    def pair(kind):
        both = torch.from_numpy(np.stack((b, a), 1))
        return both.to(kind).view(torch.int16).numpy().view(np.uint32)[:, 0]

    finite = np.isfinite(a) & np.isfinite(b)
    found = evaluate("cvt.rn.bf16x2.f32 %out, %a, %b;", a, b)
    assert np.array_equal(found[finite], pair(torch.bfloat16)[finite])
    found = evaluate("cvt.rn.f16x2.f32 %out, %a, %b;", a, b)
    assert np.array_equal(found[finite], pair(torch.float16)[finite])
    back = evaluate("cvt.rn.bf16.f32 %h1, %a; cvt.f32.bf16 %out, %h1;", a).view(np.float32)
    same(back, torch.from_numpy(a).bfloat16().float().numpy())


@pytest.mark.parametrize(("kind", "torch_kind"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8(kind, torch_kind):
    a = np.linspace(-500, 500, LANES).astype(np.float32)
    largest = torch.finfo(torch_kind).max
    expected = torch.from_numpy(a).clamp(-largest, largest).to(torch_kind).float().numpy()
    body = f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a, %b; cvt.rn.f16x2.{kind}x2 %r1, %h1; mov.b32 {{%h2, %h3}}, %r1;"
    same(evaluate(body + "cvt.f32.f16 %out, %h3;", a, a * 0), expected)
    same(evaluate(body + "cvt.f32.f16 %out, %h2;", a * 0, a), expected)


def test_fp4_ties_to_even():
    a = f32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.75, 0.2, 0.3, 2.6, np.nan, 1e9, -1e9, 0] * 2)
    body = (
        "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, %a, %a; cvt.rn.f16x2.e2m1x2 %r1, t; }"
        "mov.b32 {%h1, %h2}, %r1; cvt.f32.f16 %out, %h2;"
    )
    same(evaluate(body, a), f32([0, 1, 1, 2, 2, 4, 4, 6, -1, 0, 0.5, 3, 6, 6, -6, 0] * 2))


def test_floats_to_integers_saturate():
    a = f32([1e20, -1e20, np.nan, 2.5, -2.5, 3.5, 0.5, -0.5] * 4)
    same(
        evaluate("cvt.rni.s32.f32 %out, %a;", a),
        np.array([2**31 - 1, -(2**31), 0, 2, -2, 4, 0, 0] * 4, np.int32).view("u4"),
    )
    same(evaluate("cvt.rzi.u32.f32 %out, %a;", a), np.array([2**32 - 1, 0, 0, 2, 0, 3, 0, 0] * 4, np.uint32))


def test_packed_arithmetic():
    a, b = floats(), floats()[::-1].copy()
    body = "mov.b64 %rd1, {%a, %b}; mov.b64 %rd2, {%b, %a}; add.rn.f32x2 %rd3, %rd1, %rd2; mov.b64 {%r1, %r2}, %rd3;"
    with np.errstate(all="ignore"):
        same(evaluate(body + "mov.b32 %out, %r1;", a, b), a + b)
        same(evaluate(body + "mov.b32 %out, %r2;", a, b), b + a)
        body = "mov.b32 %out, %a; @!%p0 fma.rn.bf16x2 %out, %a, %b, %a;"
        pairs = [
            torch.from_numpy(x.view(np.int16).reshape(LANES, 2).copy()).view(torch.bfloat16).double() for x in (a, b)
        ]
        expected = (pairs[0] * pairs[1] + pairs[0]).bfloat16()
        found = torch.from_numpy(evaluate(body, a, b).view(np.int16).reshape(LANES, 2).copy()).view(torch.bfloat16)
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


LANE = np.arange(LANES)


@pytest.mark.parametrize(
    ("operands", "source"),
    [
        ("bfly.b32 %out|%p1, %a, 5, 31", LANE ^ 5),
        ("idx.b32 %out, %a, 7, 31", np.full(LANES, 7)),
        ("up.b32 %out, %a, 3, 0", np.where(LANE >= 3, LANE - 3, LANE)),
        ("down.b32 %out, %a, 3, 31", np.where(LANE + 3 <= 31, LANE + 3, LANE)),
        ("down.b32 %out, %a, 3, 0x1807", np.where(LANE % 8 + 3 <= 7, LANE + 3, LANE)),
        ("idx.b32 %out, %a, 2, 0x181F", LANE // 8 * 8 + 2),
    ],
)
def test_shuffles(operands, source):
    a = words()
    same(evaluate(f"shfl.sync.{operands}, -1;", a), a[source])


def test_votes_and_reductions():
    a = words()
    odd = a % 2 == 1
    ballot = sum(1 << i for i in range(LANES) if odd[i])
    decide = "and.b32 %r1, %a, 1; setp.eq.b32 %p1, %r1, 1;"
    same(evaluate(decide + "vote.sync.ballot.b32 %out, %p1, -1;", a), np.full(LANES, ballot))
    same(
        evaluate(decide + "vote.sync.any.pred %p2, !%p1, -1; selp.b32 %out, 1, 0, %p2;", a),
        np.full(LANES, not odd.all()),
    )
    same(evaluate("redux.sync.add.s32 %out, %a, -1;", a), np.full(LANES, a.astype(np.uint64).sum() % 2**32))
    same(evaluate("redux.sync.min.s32 %out, %a, -1;", a), np.full(LANES, a.view(np.int32).min()).view(np.uint32))
    values = floats()
    same(evaluate("redux.sync.max.NaN.f32 %out, %a, -1;", values), np.full(LANES, np.nan, np.float32))
    same(evaluate("redux.sync.max.f32 %out, %a, -1;", values), np.full(LANES, np.inf, np.float32))


def test_atomics_return_what_was_there():
    body = "ld.param.b64 %rd1, [a]; "
    found = evaluate(body + "atom.global.gpu.relaxed.add.u32 %out, [%rd1], 2;", np.full(LANES, 10, np.uint32))
    assert sorted(found) == [10 + 2 * i for i in range(LANES)]
    found = evaluate(body + "atom.global.acq_rel.gpu.cas.b32 %out, [%rd1], 10, 99;", np.full(LANES, 10, np.uint32))
    assert sorted(found) == [10] + [99] * 31
    found = evaluate(
        body + "atom.global.max.s32 %out, [%rd1], %r0; ld.global.u32 %out, [%rd1];", np.zeros(LANES, np.uint32)
    )
    assert set(found) == {31}


def test_divergence_and_loops():
    """Lane i adds its index i times; half the lanes leave early."""
    body = """
    mov.u32 %r1, 0; mov.u32 %out, 0;
    TOP: setp.ge.u32 %p1, %r1, %r0; @%p1 bra DONE;
    add.u32 %out, %out, %r0; add.u32 %r1, %r1, 1; bra TOP;
    DONE: setp.gt.u32 %p2, %r0, 15; @%p2 exit;
    """
    same(evaluate(body, words()), np.where(LANE < 16, LANE * LANE, 0))


def test_matrix_load_is_transposed_on_demand():
    """ldmatrix of what 8 lanes stored row by row; its transposed form; stmatrix back."""
    store = "mov.u32 %r1, memory; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; st.shared.b32 [%r3], %a;"
    rows = "and.b32 %r4, %r0, 7; shl.b32 %r4, %r4, 4; add.u32 %r4, %r4, %r1;"
    a = words()
    same(evaluate(store + rows + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%out}, [%r4];", a), a)
    matrix = a.view(np.uint16).reshape(8, 8)
    transposed = np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1)
    same(evaluate(store + rows + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%out}, [%r4];", a), transposed)
    back = rows + "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r4], {%a}; ld.shared.b32 %out, [%r3];"
    same(evaluate(store + back, a), transposed)


def test_local_memory_is_per_lane():
    declare = ".local .align 8 .b8 spill[16]; .reg .b64 at; mov.u64 at, spill;"
    body = f"{{ {declare} st.local.b32 [at+8], %a; ld.local.b32 %out, [at+8]; }}"
    a = words()
    same(evaluate(body, a), a)


def test_traps_and_unknown_registers():
    with pytest.raises(PtxError, match="trap"):
        evaluate("setp.eq.u32 %p1, %r0, 3; @%p1 trap; mov.u32 %out, 0;", words())
    with pytest.raises(PtxError, match="unknown register %nowhere"):
        evaluate("mov.b32 %out, %nowhere;", words())
    with pytest.raises(PtxError, match="rounding other than to nearest"):
        evaluate("add.rz.f32 %out, %a, %a;", floats())
