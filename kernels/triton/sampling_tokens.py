"""What the sampler computes per token, on the device: ranks, masses and noise.

Everything that tokens contribute to is a maximum of ranks or a sum of integers, so no order or split of the vocabulary
can change a bit of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_RANK = tl.constexpr(-(2**63))


@triton.jit
def rank(value, index):
    """An int64 that orders (fp32 value, int32 index) by value, the lower index above: its maximum is an argmax."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: the two zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative values the largest magnitude comes last
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)  # the lowest index is the largest word


@triton.jit
def value_of(ranked):
    """The fp32 value in a rank."""
    ordered = (ranked >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(ranked):
    """The int64 index in a rank."""
    return (ranked & 0x7FFFFFFF) ^ 0x7FFFFFFF


@triton.jit
def load_logits(logits, strides, row, index, vocab):
    """Logits of the row at ``index``; -inf past the vocabulary. strides: (row, token)."""
    return tl.load(logits + row * strides[0] + index * strides[1], mask=index < vocab, other=-float("inf"))


@triton.jit
def forbid(x, mask, strides, row, index, vocab):
    """``x`` with -inf where the mask, if there is one, forbids a token."""
    if mask is not None:
        allowed = tl.load(mask + row * strides[0] + index * strides[1], mask=index < vocab, other=0)
        x = tl.where(allowed, x, -float("inf"))
    return x


@triton.jit
def mass_of(scaled):
    """exp(scaled), scaled <= 0, in units of 2^-40 rounded down: an integer, which fp32 holds exactly."""
    return tl.floor(tl.exp(scaled) * 1099511627776.0)


@triton.jit
def key_of(mass):
    """The bits of a mass: int32 that orders like it, 0 for none. Twice the mass is 2^23 further."""
    return mass.to(tl.int32, bitcast=True)


@triton.jit
def log_of_total(total):
    """log of a sum of masses, fp32: the normaliser of a log-softmax. Computed in fp64, once a row."""
    return tl.log(tl.maximum(total, 1).to(tl.float64) * 9.094947017729282e-13).to(tl.float32)


@triton.jit
def words_of(quad, state, slot):
    """Four blocks of 32-bit words, Philox4x32-10 for tokens 4 * quad .. 4 * quad + 3 of what the slot decides next."""
    zero = tl.zeros_like(quad)
    position = tl.load(state.length + slot).to(tl.int32) + zero  # the low 32 bits
    choice = tl.load(state.choice + slot).to(tl.int32) + zero
    return tl.philox(tl.load(state.seed + slot), quad, position, choice, zero)


@triton.jit
def gumbel_of(words):
    """Gumbel noise -log(-log1p(-v)) with v = min((word + 0.5) * 2^-32, 1 - 2^-24).

    The largest noise, which decides, comes from the smallest v, where log(1 - v) would cancel. Up to 1/4 log1p(-v) is
    therefore -2 artanh(s), s = v / (2 - v) <= 1/7, as five terms of its series (the sixth is 3e-10 of the sum).
    The noise g is then within 3 * 2^-24 of 1 + |g|, where torch's log and log1p are within 1.
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    s = v / (2.0 - v)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))
    return -tl.log(tl.where(v <= 0.25, series, -tl.log(1.0 - v)))


@triton.jit
def quads_of(tile, TILE: tl.constexpr):
    """(quads [TILE / 4], tokens [TILE / 4, 4]) of a tile, int32: a thread's 4 neighbours share a Philox counter."""
    quad = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    return quad, quad[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def tile_noise(quad, state, slot, TILE: tl.constexpr):
    """Noise [TILE / 4, 4] of the tile's tokens."""
    w0, w1, w2, w3 = words_of(quad, state, slot)
    return gumbel_of(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE // 4, 4]))


@triton.jit
def token_noise(index, state, slot):
    """Noise of single tokens, shaped like ``index`` (int32)."""
    w0, w1, w2, w3 = words_of(index >> 2, state, slot)
    lane = index & 3
    return gumbel_of(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))
