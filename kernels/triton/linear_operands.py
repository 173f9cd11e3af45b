"""What one step of a projection multiplies: weights as they are stored and activations, loaded and made operands."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.quantised import block_factors, fp8_values, nvfp4_values


@triton.jit
def weight_operand(
    weight,
    block_scales,
    feature,
    features,
    column,
    end,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS_F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """An operand [PARTS_F, 1, BLOCK_F / PARTS_F, BLOCK_K] at (feature, column) of a weight [features, K]."""
    if FORMAT == "nvfp4":
        codes = _load_weight(weight, feature, features, column // 2, K // 2, K // 2, PARTS_F, BLOCK_F, BLOCK_K // 2)
        blocks = _load_blocks(block_scales, feature, features, column, K, PARTS_F, BLOCK_F, BLOCK_K)
        w = nvfp4_values(codes, block_factors(blocks))[:, None]
    else:
        w = _load_weight(weight, feature, features, column, end, K, PARTS_F, BLOCK_F, BLOCK_K)[:, None]
        if FORMAT == "fp8":
            w = fp8_values(w)
    return w


@triton.jit
def _load_weight(
    weight,
    feature,
    features,
    column,
    end,
    K: tl.constexpr,
    PARTS_F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is stored, [PARTS_F, BLOCK_F / PARTS_F, BLOCK_K], at (feature, column) of a weight [features, K]; 0 outside.

    It is loaded in rank 3: a tile that gains an axis after the load would be laid out anew, and not be pipelined.
    """
    PART: tl.constexpr = BLOCK_F // PARTS_F
    rows = PART * tl.arange(0, PARTS_F)[:, None, None] + tl.arange(0, PART)[None, :, None]
    columns = column + tl.arange(0, BLOCK_K)[None, None, :]
    pointers = weight + feature.to(tl.int64) * K + (rows * K + columns)
    return tl.load(pointers, mask=(rows < features - feature) & (columns < end), other=0)


@triton.jit
def _load_blocks(
    block_scales,
    feature,
    features,
    column,
    K: tl.constexpr,
    PARTS_F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The block scales of what ``_load_weight`` gives: uint8 [PARTS_F, BLOCK_F / PARTS_F, BLOCK_K / 16]; 0 outside."""
    FOURS: tl.constexpr = BLOCK_K // 64
    four, within = tl.arange(0, FOURS)[:, None], tl.arange(0, 4 * BLOCK_F)[None, :]
    first = block_scales + (column // 64).to(tl.int64) * (4 * features) + 4 * feature
    there = (within < 4 * (features - feature)) & (column + 64 * four < K)
    blocks = tl.load(first + (four * (4 * features) + within), mask=there, other=0)
    blocks = tl.permute(tl.reshape(blocks, (FOURS, PARTS_F, BLOCK_F // PARTS_F, 4)), (1, 2, 0, 3))
    return tl.reshape(blocks, (PARTS_F, BLOCK_F // PARTS_F, 4 * FOURS))


@triton.jit
def load_input(
    x1,
    x1_stride,
    x2,
    x2_stride,
    token,
    tokens,
    column,
    begin,
    end,
    K1: tl.constexpr,
    K: tl.constexpr,
    RELU2: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What ``_load_tokens`` gives of the input that the step belongs to; the last one's with relu2, if there is."""
    if K > K1:
        source, stride = tl.where(begin < K1, x1, x2 - K1), tl.where(begin < K1, x1_stride, x2_stride)
    else:
        source, stride = x1, x1_stride
    x = _load_tokens(source, stride, token, tokens, column, begin, end, ALIGN, BLOCK_T, BLOCK_K)
    if RELU2:
        positive = tl.where(x < 0, 0.0, x)  # NaN stays
        squared = positive * positive
        if K > K1:
            x = x if begin < K1 else squared  # tl.where would make a tensor of the condition: x would be laid out anew
        else:
            x = squared
    return x


@triton.jit
def _load_tokens(
    source,
    stride,
    token,
    tokens,
    column,
    begin,
    end,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Activations at (token, column), 0 outside: [BLOCK_K / 8 * BLOCK_T, 8], 8 columns of all tokens after the other.

    So they lie in shared memory, and when a warp reads an operand of 8 tokens by 8 columns, it finds each row of 32
    bytes in other banks. Token by token the rows would be 4 * BLOCK_K bytes apart, all in the same banks.
    """
    line, within = tl.arange(0, BLOCK_K // 8 * BLOCK_T)[:, None], tl.arange(0, 8)[None, :]
    rows, columns = line % BLOCK_T, column + line // BLOCK_T * 8 + within
    pointers = source + token.to(tl.int64) * stride + (rows * stride + columns)
    there = (rows < tokens - token) & (columns < end)
    if ALIGN > 1:
        there &= columns >= begin
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def input_operand(
    x,
    norm_weight,
    column,
    end,
    dtype: tl.constexpr,
    PARTS_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What ``_load_tokens`` gives, times the norm's weight, rounded -> [1, PARTS_T, BLOCK_K, BLOCK_T / PARTS_T]."""
    if norm_weight is not None:
        x = tl.reshape(x, (BLOCK_K // 8, BLOCK_T, 8))
        columns = column + 8 * tl.arange(0, BLOCK_K // 8)[:, None, None] + tl.arange(0, 8)[None, None, :]
        x *= tl.load(norm_weight + columns, mask=columns < end, other=0.0)
    x = tl.reshape(x, (BLOCK_K // 8, PARTS_T, BLOCK_T // PARTS_T, 8))
    return tl.reshape(tl.permute(x.to(dtype), (1, 0, 3, 2)), (1, PARTS_T, BLOCK_K, BLOCK_T // PARTS_T))
