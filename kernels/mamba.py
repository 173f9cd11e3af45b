"""Mamba-2: causal depthwise convolution and the selective state space, for prompts and for single tokens.

    x'_t = silu(bias + sum_j w_j x_{t-K+1+j})                             convolution, per channel
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;   y_t = h_t C_t + D x_t      per head, dt = softplus(raw + bias)

Source: Dao and Gu, Transformers are SSMs (2024), section 6 for the chunked form. Heads / groups consecutive heads
share one B and C. Prompts are scanned in chunks of ``chunk`` tokens that begin at absolute multiples of ``chunk``;
each chunk is a fixed set of GEMMs of a fixed shape (the last is padded with dt = 0, which changes nothing), and the
state crosses chunks in fp32. So a prompt cut at any multiple of ``chunk`` gives the bits of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.activation import silu, softplus
from headrace.kernels.linear import bmm


def conv_update(x: Tensor, state: Tensor, slots: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One token per slot; advances the slots' states in place.

    x [B, C] fp32, state [num_slots, C, K - 1] (any float dtype; inputs are rounded to it before use), slots [B]
    int64, weight [C, K], bias [C] fp32 -> silu(conv) [B, C] fp32.
    """
    window = torch.cat([state.index_select(0, slots), x.to(state.dtype)[..., None]], -1)
    state.index_copy_(0, slots, window[..., 1:])
    return silu(_taps(window.float().permute(2, 0, 1).contiguous(), weight, bias))


def conv_prefill(x: Tensor, state: Tensor, slot: int, fresh: bool, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A chunk of one sequence; advances the slot's state in place. ``fresh``: begin from zeros, not from the slot.

    x [L, C] fp32 (any strides); state, weight, bias as above -> silu(conv) [L, C] fp32.
    """
    length, taps = x.shape[0], weight.shape[1]
    past = torch.zeros_like(state[slot]) if fresh else state[slot]
    window = torch.cat([past.t(), x.to(state.dtype)])  # [K - 1 + L, C]
    state[slot] = window[length:].t()
    window = window.float()
    return silu(_taps([window[j : j + length] for j in range(taps)], weight, bias))


def _taps(inputs: list[Tensor] | Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Separate multiplies and adds in a fixed order: each is correctly rounded, so layout and position cannot matter.
    taps = weight.t().contiguous()
    total = inputs[0] * taps[0]
    for j in range(1, taps.shape[0]):
        total = total + inputs[j] * taps[j]
    return total if bias is None else total + bias


def ssm_update(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, slots: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor
) -> Tensor:
    """One token per slot; advances the slots' states in place.

    x [B, heads, P], dt [B, heads] (raw), b, c [B, groups, N] fp32 (any strides), state [num_slots, heads, P, N]
    fp32, slots [B] int64, a (negative), d, dt_bias [heads] fp32 -> y [B, heads, P] fp32.
    """
    shared = x.shape[1] // b.shape[1]
    dt = softplus(dt + dt_bias)
    b, c = (t.repeat_interleave(shared, 1)[:, :, None, :] for t in (b, c))
    h = state.index_select(0, slots) * torch.exp(dt * a)[..., None, None] + (x * dt[..., None])[..., None] * b
    state.index_copy_(0, slots, h)
    return (h * c).sum(-1) + x * d[:, None]


def ssm_prefill(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    slot: int,
    fresh: bool,
    a: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    chunk: int,
) -> Tensor:
    """A run of L tokens of one sequence that starts at a multiple of ``chunk``; advances the slot's state in place.

    x [L, heads, P], dt [L, heads] (raw), b, c [L, groups, N] fp32 (any strides); the rest as in ``ssm_update``;
    ``fresh``: begin from zeros, not from the slot -> y [L, heads, P] fp32.
    """
    length, heads, _ = x.shape
    shared = heads // b.shape[1]
    dt = softplus(dt + dt_bias)
    steps, decay, xs, bs, cs = (
        _by_chunk(t, chunk) for t in ((x * dt[..., None]), (dt * a)[..., None], x, b, c)
    )  # each [chunks, heads or groups, chunk, width]
    total = decay[..., 0].cumsum(-1)  # [chunks, heads, chunk]: log decay since the chunk's start

    scores = bmm(cs.flatten(0, 1), bs.flatten(0, 1).transpose(1, 2)).view(*bs.shape[:2], chunk, chunk)
    bs, cs = bs.repeat_interleave(shared, 1), cs.repeat_interleave(shared, 1)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf))
    y = _heads_bmm(scores.repeat_interleave(shared, 1) * between, steps)

    added = _heads_bmm((steps * torch.exp(total[..., -1:] - total)[..., None]).transpose(2, 3), bs)
    whole = torch.exp(total[..., -1])[..., None, None]
    h = torch.zeros_like(state[slot]) if fresh else state[slot].clone()
    entering = torch.empty_like(added)
    for i in range(added.shape[0]):
        entering[i] = h
        h = h * whole[i] + added[i]
    state[slot] = h
    y = y + _heads_bmm(cs, entering.transpose(2, 3)) * torch.exp(total)[..., None] + xs * d[:, None, None]
    return y.transpose(1, 2).flatten(0, 1)[:length]


def _by_chunk(t: Tensor, chunk: int) -> Tensor:
    """[L, heads, width] -> [chunks, heads, chunk, width], zeros after L, contiguous for any number of chunks."""
    t = pad(t, (0, 0, 0, 0, 0, -t.shape[0] % chunk))
    return t.reshape(-1, chunk, *t.shape[1:]).transpose(1, 2).contiguous()


def _heads_bmm(left: Tensor, right: Tensor) -> Tensor:
    """[chunks, heads, M, K] @ [chunks, heads, K, N]."""
    return bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[3])
