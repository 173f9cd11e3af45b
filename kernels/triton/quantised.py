"""Stored FP8 and NVFP4 weights become bf16 in registers: exact, the same on every architecture, a few bit operations.

An e4m3 or e2m1 number has the order of fields that bf16 has: sign, exponent, mantissa. Moved to where bf16 has them it
is the same number but for a power of two, subnormal ones included, and a multiplication makes up for that (bf16 has no
instruction that flushes). Four stored bytes lie in a register, so the moves work on two numbers at a time. NaN alone
would not survive; it is refused when weights are packed.

Of NVFP4 the power of two goes into the block scale, as far as bf16 holds it: a kernel multiplies with NVFP4_READ_AS of
the unscaled weight, and the packed scale of the whole makes up for the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.formats import BLOCK, Format, Weight, check_numbers, tensors_of

NVFP4_READ_AS = 2.0**-7
"""What the kernels read of an NVFP4 weight: 448 * 2^119 is the most that bf16 holds of a block scale."""

LEAST_COLUMNS = {"float": 16, "fp8": 32, "nvfp4": 64}
"""Of K that a dot takes: a thread reads 4 bytes beside each other, and an instruction has two runs of 4 threads."""

FP8_TO_BF16 = """{
    .reg .b32 low, high, sign, unit, zero;
    mov.b32 unit, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    shl.b32 sign, low, 8;
    shl.b32 low, low, 4;
    and.b32 low, low, 0x07F007F0;
    lop3.b32 low, sign, 0x80008000, low, 0xEA;
    fma.rn.bf16x2 $0, low, unit, zero;
    shl.b32 sign, high, 8;
    shl.b32 high, high, 4;
    and.b32 high, high, 0x07F007F0;
    lop3.b32 high, sign, 0x80008000, high, 0xEA;
    fma.rn.bf16x2 $1, high, unit, zero;
}"""
"""Four e4m3 -> four bf16. unit is 2^120; adding -0 keeps the sign of zero; 0xEA is (a and b) or c."""

_CODES_TO_BF16 = """{{
    .reg .b32 low, high, sign, zero;
    mov.b32 zero, 0x80008000;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    shl.b32 sign, low, {sign};
    shl.b32 low, low, {code};
    and.b32 low, low, 0x01C001C0;
    lop3.b32 low, sign, 0x80008000, low, 0xEA;
    fma.rn.bf16x2 $0, low, $3, zero;
    shl.b32 sign, high, {sign};
    shl.b32 high, high, {code};
    and.b32 high, high, 0x01C001C0;
    lop3.b32 high, sign, 0x80008000, high, 0xEA;
    fma.rn.bf16x2 $1, high, $4, zero;
}}"""
LOW_CODES_TO_BF16 = _CODES_TO_BF16.format(sign=12, code=6)
HIGH_CODES_TO_BF16 = _CODES_TO_BF16.format(sign=8, code=2)
"""Four bytes of two e2m1 codes, and the factors of their blocks, bf16 -> four bf16."""

_FP8_TO_BF16 = tl.constexpr(FP8_TO_BF16)
_LOW_CODES_TO_BF16 = tl.constexpr(LOW_CODES_TO_BF16)
_HIGH_CODES_TO_BF16 = tl.constexpr(HIGH_CODES_TO_BF16)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def fp8_values(stored):
    """uint8 -> bf16, any shape; at least four neighbours of the last axis belong to one thread."""
    return tl.inline_asm_elementwise(_FP8_TO_BF16, "=r,=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def nvfp4_values(codes, factors):
    """codes uint8, ``block_factors`` [A, B, K / 2] -> bf16 [A, B, K]: NVFP4_READ_AS of the weight."""
    both = tl.join(even_values(codes, factors), odd_values(codes, factors))
    return tl.reshape(both, (codes.shape[0], codes.shape[1], 2 * codes.shape[2]))


@triton.jit
def even_values(codes, factors):
    """codes uint8, ``block_factors``, any shape -> bf16: NVFP4_READ_AS of the columns 0, 2, ..., as ``fp8_values``."""
    return tl.inline_asm_elementwise(
        _LOW_CODES_TO_BF16, "=r,=r,r,r,r", [codes, factors], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def odd_values(codes, factors):
    """The same of the columns 1, 3, ..."""
    return tl.inline_asm_elementwise(
        _HIGH_CODES_TO_BF16, "=r,=r,r,r,r", [codes, factors], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def block_factors(scales):
    """Block scales uint8 [A, B, K / 16] -> bf16 [A, B, K / 2]: 2^119 times that of each byte of codes.

    Moved into fp32's fields an e4m3 number is 2^-120 of itself.
    """
    bits = scales.to(tl.int32)
    moved = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    factors = (moved * 1.329227995784916e36 * 6.64613997892458e35).to(tl.bfloat16)  # 2^120, 2^119
    factors = tl.broadcast_to(factors[:, :, :, None], (scales.shape[0], scales.shape[1], scales.shape[2], _BLOCK // 2))
    return tl.reshape(factors, (scales.shape[0], scales.shape[1], scales.shape[2] * (_BLOCK // 2)))


def bytes_of(weight: Weight) -> list[Tensor]:
    """What an ``Fp8`` or ``Nvfp4`` is stored as, but for its scale, as uint8 [N, ...].

    Raises NotANumber if it holds NaN.
    """
    check_numbers(weight)
    *parts, _ = tensors_of(weight)
    return [part.view(torch.uint8) for part in parts]


def packed_scale(form: Format, scale: Tensor) -> Tensor:
    """The factor of the kernels' products, fp32, of the weights' scales, any shape."""
    return scale / NVFP4_READ_AS if form == "nvfp4" else scale.clone()
