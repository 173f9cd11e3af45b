"""Dense projections for decode and prompts alike: y = residual + f(norm(x)) W^T + b, and the embedding.

Features are the M dimension of the MMA and tokens its N, so that one instruction (mma.sync m16n8k16) serves any number
of tokens and a tile of 128 reads each weight once. An element's bits are made by its row, its column, the instruction
and the order of K. That order follows from the weight's shape and the architecture, never from the number of tokens;
tile sizes, warps and stages may follow it, since no sum is split among programs or left to a layout.

The warps of a program cut its tile into one part each, and are the batch of a dot of rank 3. Such a dot is by mma.sync
on every architecture; one of rank 2 becomes wgmma or tcgen05, an instruction that follows the tile. And Triton 3.6
gives a batch to the warps, so that every warp would compute the whole of a tile that is not cut.

The norm costs no pass of its own. With r the norm's factor of a row, (x r w) W = r (x w) W: the MMA runs on x w, the
squares of the same tiles are summed beside it in fp32, and r multiplies the sum at the end of the row, or of each
group. So operands are rounded to the weights' dtype before r and not after it; rounding is relative and bf16 has the
range of fp32: nothing is lost.

FP8 and NVFP4 weights stay as they are stored until they are in registers (quantised.py); their scale multiplies the
finished sum. A thread reads 4 neighbouring bytes of them and not 2 columns, so each format has a K grouping of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.formats import Format, Weight, common_format
from headrace.kernels.linear import check_prologue
from headrace.kernels.norm import Norm
from headrace.kernels.triton.common import cdiv, next_power_of_2
from headrace.kernels.triton.linear_operands import input_operand, load_input, weight_operand
from headrace.kernels.triton.quantised import LEAST_COLUMNS, bytes_of, packed_scale
from headrace.kernels.triton.target import architecture


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the kernel wants it; what is multiplied is rounded to bf16, or to fp32 where the weight is fp32."""

    weight: Tensor  # [N, K] bf16 or fp32, [N, K] uint8 for FP8, [N, K / 2] uint8 for NVFP4; contiguous
    bias: Tensor | None  # [N] fp32
    scale: Tensor | None = None  # [N] fp32, of quantised weights
    block_scales: Tensor | None = None  # [ceil(K / 64), N, 4] uint8: NVFP4's, in the order in which they are read

    @property
    def format(self) -> Format:
        return "float" if self.scale is None else "fp8" if self.block_scales is None else "nvfp4"

    @property
    def width(self) -> int:
        """K."""
        return self.weight.shape[1] * (1 if self.block_scales is None else 2)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one projection is cut into programs, and a program's K into steps."""

    features: int  # rows of the weight a program
    tokens: int
    columns: int  # of K a step: part of the numerics
    warps: int
    stages: int
    registers: int | None  # at most, per thread; None: as the compiler likes

    @property
    def token_parts(self) -> int:
        """Warps beside each other along tokens; the instruction takes 8.

        The more there are, the fewer activations each of them rounds, but the more often the weights are read from
        shared memory: with 128 features that would be the limit, so at most 4 there.
        """
        return min(self.warps, self.tokens // 8, 512 // self.features)

    @property
    def feature_parts(self) -> int:
        """Warps beside each other along features; the instruction takes 16. Warps that are left over repeat others."""
        return min(self.warps // self.token_parts, self.features // 16)


SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
"""Bytes of shared memory a CTA may have, by architecture; elsewhere they are 101,376."""


@cache
def tiling(
    tokens: int, features: int, span: int, groups: int, dtype: torch.dtype, arch: int, form: Format = "float"
) -> Tiling:
    """For [tokens, K] x [features, K]^T; ``span``: the longest run of columns that is walked from a fresh step.

    dtype: of the weight's tensor. ``columns`` must not follow ``tokens``, nor may anything else that an element's bits
    are made by.
    """
    shared = SHARED.get(arch, 101_376)
    if dtype == torch.float32:
        columns = 32  # multiplied without tensor cores: a step's operands lie in registers
    elif form == "nvfp4":
        columns = 128  # of less, a feature's bytes are no whole sectors
    else:
        columns = 128 if shared > 200_000 else 64  # two steps of 128 tokens (fp32) must fit
    columns = min(columns, max(LEAST_COLUMNS[form], next_power_of_2(span)))
    block_tokens = min(64 if form == "nvfp4" else 128, max(8, next_power_of_2(tokens)))
    # Every program reads all its tokens through L2, 4 bytes a token and column, against 2 a feature and column: wide
    # tiles for many tokens. But with few tokens, where memory is all that counts, every SM must draw on it.
    widest = 128 if groups == 1 else 64  # a norm by groups holds two accumulators
    block_features = min(widest, max(64, 2 * block_tokens))
    enough = 256 if block_tokens <= 16 else 96 if block_tokens <= 32 else 64
    while block_features > 32 and cdiv(tokens, block_tokens) * cdiv(features, block_features) < enough:
        block_features //= 2
    # 48 KB of weights under way hide 0.8 us of latency at 8 TB/s over 148 SMs, even with one program on each.
    # 12 KB stay for the layout conversions at the end of a group or of the whole.
    weight_bytes = block_features * (columns * 9 // 16 if form == "nvfp4" else columns * dtype.itemsize)
    step_bytes = weight_bytes + 4 * (block_tokens + 1) * columns
    buffers = max(2, min(10 if form == "nvfp4" else 7, cdiv(49_152, weight_bytes), (shared - 12_288) // step_bytes))
    warps = _warps(block_features, block_tokens, form)
    # Left alone, the compiler spills registers to fit in more small programs than shared memory has room for; of those
    # with 168 registers a thread there fit 3. Where one program fills an SM, any bound makes it spill, even 255.
    registers = 168 if block_tokens <= 32 else None
    if form == "nvfp4" and block_tokens == 32:
        registers = 255  # of these one fills an SM, and the compiler does not see it
    return Tiling(block_features, block_tokens, columns, warps, stages=1 + buffers, registers=registers)


def _warps(features: int, tokens: int, form: Format) -> int:
    """Warps of a tile; never more than 64 sums a thread."""
    if form == "nvfp4":
        return features // 16  # a step's block scales are 4 bytes a thread: fewer would not be copied asynchronously
    if form == "fp8":
        return min(8 if tokens >= 64 else 4, features // 16 * (tokens // 8))  # none repeats another's conversions
    # Two warps would do for 32 features x 8 tokens, but the others help to load.
    return 8 if tokens >= 64 else 4


def pack_linear(weights: Sequence[Weight], bias: Tensor | None = None, *, dim: int = 0) -> PackedLinear:
    """The contract is ``headrace.kernels.linear.pack_linear``. bf16 weights stay bf16, others of floats become fp32.

    fp16 becomes fp32 because activations are rounded to the weights' dtype, and they would overflow fp16. Raises
    NotANumber for a quantised weight that holds NaN.
    """
    bias = None if bias is None else bias.float().contiguous()
    form = common_format(weights)
    if form == "float":
        floats = [weight for weight in weights if isinstance(weight, Tensor)]
        weight = _joined(floats, dim)
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        return PackedLinear(weight.contiguous(), bias)
    if dim == 1 and len(weights) > 1:
        raise ValueError(f"{len(weights)} {form} weights with dim 1: each has a scale of its own")
    scale = torch.cat([packed_scale(form, w.scale).expand(w.shape[0]) for w in weights if not isinstance(w, Tensor)])
    parts = [_joined(part) for part in zip(*map(bytes_of, weights), strict=True)]
    return PackedLinear(parts[0], bias, scale, *map(_read_order, parts[1:]))


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One of several, without a copy of a single one."""
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.cat(list(parts), dim)


def _read_order(block_scales: Tensor) -> Tensor:
    """[N, K / 16] -> [ceil(K / 64), N, 4]; zero past K. A step's scales lie beside each other."""
    fours: Tensor = pad(block_scales, (0, -block_scales.shape[1] % 4)).unflatten(1, (-1, 4))
    return fours.transpose(0, 1).contiguous()


def linear(
    x: Tensor | tuple[Tensor, Tensor],
    packed: PackedLinear,
    *,
    norm: Norm | None = None,
    relu2: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The contract is ``headrace.kernels.linear.linear``."""
    x1, x2 = x if isinstance(x, tuple) else (x, None)
    tokens, features, width = x1.shape[0], packed.weight.shape[0], packed.width
    check_prologue(x1.shape[1], width, norm, relu2)
    out = torch.empty((tokens, features), dtype=torch.float32, device=x1.device)
    if not tokens:
        return out
    groups = 1 if norm is None else norm.groups
    span = width // groups if groups > 1 else max(x1.shape[1], width - x1.shape[1])
    tile = tiling(tokens, features, span, groups, packed.weight.dtype, architecture(x1.device), packed.format)
    _linear[(cdiv(tokens, tile.tokens) * cdiv(features, tile.features),)](
        out,
        x1,
        x2,
        packed.weight,
        packed.block_scales,
        None if norm is None else norm.weight,
        packed.scale,
        packed.bias,
        residual,
        tokens,
        features,
        x1.stride(0),
        0 if x2 is None else x2.stride(0),
        0 if residual is None else residual.stride(0),
        0.0 if norm is None else norm.eps,
        K1=x1.shape[1],
        K=width,
        GROUPS=groups,
        RELU2=relu2,
        FORMAT=packed.format,
        PARTS_F=tile.feature_parts,
        PARTS_T=tile.token_parts,
        BLOCK_F=tile.features,
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        enable_fp_fusion=False,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    out,
    x1,
    x2,
    weight,
    block_scales,
    norm_weight,
    scale,
    bias,
    residual,
    tokens,
    features,
    x1_stride,
    x2_stride,
    residual_stride,
    eps,
    K1: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    RELU2: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS_F: tl.constexpr,
    PARTS_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SPAN: tl.constexpr = K // GROUPS if GROUPS > 1 else K1  # columns that are walked from a fresh step
    ALIGN: tl.constexpr = 64 if FORMAT == "nvfp4" and SPAN % 64 and SPAN < K else 1  # where a step may begin
    PER_SPAN: tl.constexpr = (SPAN + ALIGN - 1 + BLOCK_K - 1) // BLOCK_K
    LAST: tl.constexpr = (K - K1 + ALIGN - 1 + BLOCK_K - 1) // BLOCK_K if K1 < K else 0
    STEPS: tl.constexpr = GROUPS * PER_SPAN if GROUPS > 1 else PER_SPAN + LAST

    token, feature = _first_of_tile(tokens, features, BLOCK_T, BLOCK_F)
    acc = tl.zeros((PARTS_F * PARTS_T, BLOCK_F // PARTS_F, BLOCK_T // PARTS_T), tl.float32)
    total = tl.zeros_like(acc)
    squares = tl.zeros((BLOCK_K // 8 * BLOCK_T, 2), tl.float32)
    for step in range(STEPS):
        column, begin, end = _columns_of_step(step, K1, GROUPS, SPAN, PER_SPAN, K, ALIGN, BLOCK_K)
        w = weight_operand(weight, block_scales, feature, features, column, end, K, FORMAT, PARTS_F, BLOCK_F, BLOCK_K)
        x = load_input(
            x1, x1_stride, x2, x2_stride, token, tokens, column, begin, end, K1, K, RELU2, ALIGN, BLOCK_T, BLOCK_K
        )
        if norm_weight is not None:
            squares += _pairs(_pairs(x * x))
        x = input_operand(x, norm_weight, column, end, w.dtype, PARTS_T, BLOCK_T, BLOCK_K)
        acc = tl.dot(_share(w, PARTS_F, PARTS_T), _share(x, PARTS_F, PARTS_T), acc, input_precision="ieee")
        if GROUPS > 1:  # noqa: SIM102 (one condition is known to the compiler)
            if step % PER_SPAN == PER_SPAN - 1:
                total += acc * _share(_factor(squares, SPAN, eps, PARTS_T, BLOCK_T), PARTS_F, PARTS_T)
                acc = tl.zeros_like(acc)
                squares = tl.zeros_like(squares)
    if GROUPS > 1:
        acc = total
    elif norm_weight is not None:
        acc *= _share(_factor(squares, K, eps, PARTS_T, BLOCK_T), PARTS_F, PARTS_T)
    y = tl.reshape(acc, (PARTS_F, PARTS_T, BLOCK_F // PARTS_F, BLOCK_T // PARTS_T))
    y = tl.reshape(tl.permute(y, (1, 3, 0, 2)), (BLOCK_T, BLOCK_F))
    _finish(out, y, scale, bias, residual, residual_stride, token, tokens, feature, features)


@triton.jit
def _first_of_tile(tokens, features, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """First token and first feature of this program.

    Token tiles of one weight tile run side by side, so that L2 serves the weight to all but one of them; but no more
    than 8, so that L2 still has a long prompt's activations when the next weight tile asks for them.
    """
    token_tiles, feature_tiles = tl.cdiv(tokens, BLOCK_T), tl.cdiv(features, BLOCK_F)
    strip = tl.program_id(0) // (8 * feature_tiles) * 8
    within = tl.program_id(0) % (8 * feature_tiles)
    beside = tl.minimum(token_tiles - strip, 8)
    return (strip + within % beside) * BLOCK_T, within // beside * BLOCK_F


@triton.jit
def _columns_of_step(
    step,
    K1: tl.constexpr,
    GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    PER_SPAN: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First column of a step, and the first and the end of what it belongs to: a group, or one of the inputs.

    Where ALIGN moves the first step forward, into what is not its own, its inputs are zero there. Elsewhere nothing
    is, and the first column of the step stands for the first of all.
    """
    if GROUPS > 1:
        begin = step // PER_SPAN * SPAN
        column = begin // ALIGN * ALIGN + step % PER_SPAN * BLOCK_K
        end = begin + SPAN
    else:
        begin = tl.where(step < PER_SPAN, 0, K1)
        column = step * BLOCK_K - tl.where(step < PER_SPAN, 0, PER_SPAN * BLOCK_K - K1 // ALIGN * ALIGN)
        end = tl.where(step < PER_SPAN, K1, K)
    if ALIGN == 1:
        begin = column
    return column, begin, end


@triton.jit
def _share(x, PARTS_F: tl.constexpr, PARTS_T: tl.constexpr):
    """[PARTS_F or 1, PARTS_T or 1, M, N] -> [PARTS_F * PARTS_T, M, N], a part for every warp; 1: all share it."""
    x = tl.broadcast_to(x, (PARTS_F, PARTS_T, x.shape[2], x.shape[3]))
    return tl.reshape(x, (PARTS_F * PARTS_T, x.shape[2], x.shape[3]))


@triton.jit
def _pairs(x):
    """[R, C] -> [R, C / 2]: the sums of two neighbours."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return even + odd


@triton.jit
def _factor(squares, COUNT: tl.constexpr, eps, PARTS_T: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sums of the squares of COUNT channels, as ``_load_tokens`` lays them out -> 1 / sqrt(mean + eps), [1, PARTS_T, 1,
    BLOCK_T / PARTS_T].

    Neighbours are added level by level. A reduction's order would follow the layout, and that the number of tokens.
    """
    EIGHTS: tl.constexpr = squares.shape[0] // BLOCK_T
    squares = tl.permute(tl.reshape(squares, (EIGHTS, BLOCK_T, 2)), (1, 0, 2))
    squares = tl.reshape(squares, (BLOCK_T, 2 * EIGHTS))
    for _ in tl.static_range(_log2(2 * EIGHTS)):
        squares = _pairs(squares)
    return tl.rsqrt(tl.reshape(squares, (1, PARTS_T, 1, BLOCK_T // PARTS_T)) / COUNT + eps)


@triton.constexpr_function
def _log2(n: int) -> int:
    return n.bit_length() - 1


@triton.jit
def _finish(out, y, scale, bias, residual, residual_stride, token, tokens, feature, features):
    """Store y [T, F] at (token, feature), times scale, with bias and residual added."""
    rows, columns = tl.arange(0, y.shape[0])[:, None], tl.arange(0, y.shape[1])[None, :]
    there = (rows < tokens - token) & (columns < features - feature)
    if scale is not None:
        y *= tl.load(scale + feature + columns, mask=columns < features - feature, other=0.0)
    if bias is not None:
        y += tl.load(bias + feature + columns, mask=columns < features - feature, other=0.0)
    if residual is not None:
        residual += token.to(tl.int64) * residual_stride + feature
        y = tl.load(residual + (rows * residual_stride + columns), mask=there, other=0.0) + y
    out += token.to(tl.int64) * features + feature
    tl.store(out + (rows * features + columns), y, mask=there)


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """The contract is ``headrace.kernels.linear.embed``."""
    tokens, width = token_ids.shape[0], weight.shape[1]
    out = torch.empty((tokens, width), dtype=torch.float32, device=weight.device)
    if not tokens:
        return out
    block = min(1024, next_power_of_2(width))
    _embed[(tokens, cdiv(width, block))](
        out,
        weight,
        token_ids,
        weight.stride(0),
        token_ids.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _embed(out, weight, token_ids, weight_stride, id_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token * id_stride).to(tl.int64)
    values = tl.load(weight + row * weight_stride + channels, mask=channels < WIDTH)
    tl.store(out + token * WIDTH + channels, values.to(tl.float32), mask=channels < WIDTH)
