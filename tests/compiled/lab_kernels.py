"""Kernels that the laboratory is tested with, right and wrong ones."""

import triton
import triton.language as tl


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def scale_unmasked(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * factor, mask=at < n)


@triton.jit
def gather(x, out, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * stride))


@triton.jit
def multiply(x, weight, out, columns, rows, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [TOKENS, rows] = x [TOKENS, columns] @ weight [rows, columns].T with weights as the left operand."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, TOKENS)
    acc = tl.zeros([1, BLOCK_N, TOKENS], tl.float32)
    for start in tl.range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + n[:, None].to(tl.int64) * columns + k[None, :])
        t = tl.load(x + m[None, :] * columns + k[:, None])
        acc = tl.dot(w[None], t[None], acc, input_precision="ieee")
    tile = tl.reshape(acc, [BLOCK_N, TOKENS]).to(out.dtype.element_ty)
    tl.store(out + m[None, :] * rows + n[:, None], tile)


@triton.jit
def row_sums(x, out, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reduces over warps, so through shared memory."""
    at = tl.arange(0, ROWS)[:, None] * columns + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + tl.arange(0, ROWS), tl.sum(tl.load(x + at).to(tl.float32), 1))


@triton.jit
def sum_of_parts(x, parts, out, counter, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """The last program to arrive adds the parts in order."""
    split = tl.program_id(0)
    tl.store(parts + split, tl.sum(tl.load(x + split * BLOCK + tl.arange(0, BLOCK)), 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
        total = 0.0
        for each in range(SPLITS):
            total += tl.load(parts + each, volatile=True)
        tl.store(out, total)
        tl.store(counter, 0)


@triton.jit
def hungry(x, out, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Holds more values per thread than there are registers."""
    at = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    first = tl.load(x + at)
    second = tl.load(x + at + ROWS * stride)
    tl.debug_barrier()
    ratio = first / tl.sum(second * second, 1)[:, None] + second / tl.sum(first * first, 1)[:, None]
    tl.store(out + at, ratio + tl.sum(ratio, 0)[None, :] * first + second)


@triton.jit
def with_tuple(pair, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(pair[1] + at, tl.load(pair[0] + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def optional_bias(x, bias, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if bias is not None:
        value += tl.load(bias + at)
    tl.store(out + at, value)
