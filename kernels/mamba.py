"""Mamba-2: causal depthwise convolution and the selective state space, for prompts and for single tokens.

    x'_t = silu(bias + sum_j w_j x_{t-K+1+j})                             convolution, per channel
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;   y_t = h_t C_t + D x_t      per head, dt = softplus(raw + bias)

Source: Dao and Gu, Transformers are SSMs (2024), section 6 for the chunked form. Heads / groups consecutive heads
share one B and C. Prompts are scanned in chunks of ``chunk`` tokens that begin at absolute multiples of ``chunk``;
each chunk is a fixed set of GEMMs of a fixed shape (the last is padded with dt = 0, which changes nothing), and the
state crosses chunks in fp32. So a prompt cut at any multiple of ``chunk`` gives the bits of the whole.

Inputs of the convolution are kept in a ring: the input of position p lies in entry p % ring. A step of R tokens needs
``ring >= conv_kernel - 1 + R``; then it reads no entry that it writes, in whatever order its parts run, and rolling
back to an earlier position (within ring - conv_kernel + 1 tokens) moves a cursor. Positions below 0 are zeros. A
sequence that starts at 0 begins from zero states, whatever its slot's memory holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.activation import silu, softplus
from headrace.kernels.linear import bmm


@dataclass(frozen=True, slots=True)
class MambaWeights:
    """What a mixer keeps between its projections; all fp32."""

    conv_weight: Tensor  # [C, conv_kernel], C = heads * head_dim + 2 * groups * state_size: x, then B, then C
    conv_bias: Tensor | None  # [C]
    a: Tensor  # [heads], negative: -exp(A_log)
    d: Tensor  # [heads]
    dt_bias: Tensor  # [heads]
    head_dim: int
    groups: int  # divides heads
    state_size: int

    @property
    def inner(self) -> int:
        return self.a.shape[0] * self.head_dim

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """projected [T, inner + C + heads] -> gate [T, inner], input of the convolution [T, C], raw dt [T, heads]."""
        gate, xbc, dt = torch.split(projected, [self.inner, self.conv_weight.shape[0], self.a.shape[0]], 1)
        return gate, xbc, dt

    def heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xbc [T, C] -> x [T, heads, head_dim], B and C [T, groups, state_size]."""
        shared = self.groups * self.state_size
        x, b, c = torch.split(xbc, [self.inner, shared, shared], 1)
        shape = -1, self.groups, self.state_size
        return x.reshape(-1, self.a.shape[0], self.head_dim), b.reshape(shape), c.reshape(shape)


def mamba_update(
    projected: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor, positions: Tensor, weights: MambaWeights, rows: int = 1
) -> Tensor:
    """The next ``rows`` tokens of each sequence, one after the other; advances the slots' states in place.

    projected [B * rows, inner + C + heads] fp32 (a sequence's rows side by side, rows strided as they like), conv
    [num_slots, ring, C] of any float dtype (inputs are rounded to it before use), ssm [num_slots, heads, head_dim,
    state_size] fp32; slots, positions [B] int64, slots not repeated, positions those of the first rows -> y silu(gate)
    [B * rows, inner] fp32. B may be 0. Raises ValueError for a ring that is too short.
    """
    check_ring(conv, weights, rows)
    gate, xbc, dt = weights.split(projected)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for j in range(rows):
        x, b, c = weights.heads(_conv_update(xbc[j::rows], conv, slots, positions + j, weights))
        y[j::rows] = _ssm_update(x, dt[j::rows], b, c, ssm, slots, positions + j, weights).flatten(1)
    return y * silu(gate)


def mamba_prefill(
    projected: Tensor, conv: Tensor, ssm: Tensor, slot: int, start: int, weights: MambaWeights, chunk: int
) -> Tensor:
    """A run of L prompt tokens of one sequence; advances the slot's states in place.

    projected [L, inner + C + heads] fp32; ``start``, the first token's position, is a multiple of ``chunk``; the rest
    as in ``mamba_update`` -> y silu(gate) [L, inner] fp32. L of 0 changes nothing.
    """
    check_ring(conv, weights, 0)
    gate, xbc, dt = weights.split(projected)
    if not projected.shape[0]:
        return torch.empty_like(gate)
    x, b, c = weights.heads(_conv_prefill(xbc, conv, slot, start, weights))
    return _ssm_prefill(x, dt, b, c, ssm, slot, start == 0, weights, chunk).flatten(1) * silu(gate)


def check_ring(conv: Tensor, weights: MambaWeights, rows: int) -> None:
    """Raise ValueError unless the ring holds a convolution's past beside ``rows`` new inputs."""
    needed = weights.conv_weight.shape[1] - 1 + rows
    if conv.shape[1] < needed:
        raise ValueError(f"a ring of {conv.shape[1]} inputs is too short: {rows} rows need {needed}")


def _conv_update(x: Tensor, conv: Tensor, slots: Tensor, positions: Tensor, weights: MambaWeights) -> Tensor:
    ring, taps = conv.shape[1], weights.conv_weight.shape[1]
    conv[slots, positions % ring] = x.to(conv.dtype)
    at = positions[:, None] + torch.arange(1 - taps, 1, device=x.device)  # [B, taps]
    window = conv[slots[:, None], at % ring].float().masked_fill(at[..., None] < 0, 0.0)
    return silu(_taps(list(window.unbind(1)), weights))


def _conv_prefill(x: Tensor, conv: Tensor, slot: int, start: int, weights: MambaWeights) -> Tensor:
    length, ring, taps = x.shape[0], conv.shape[1], weights.conv_weight.shape[1]
    past = torch.arange(start + 1 - taps, start, device=x.device)
    before = conv[slot, past % ring].masked_fill(past[:, None] < 0, 0.0)
    window = torch.cat([before, x.to(conv.dtype)])  # [taps - 1 + L, C]
    kept = torch.arange(max(start, start + length - ring), start + length, device=x.device)
    conv[slot, kept % ring] = window[taps - 1 + kept - start]
    window = window.float()
    return silu(_taps([window[j : j + length] for j in range(taps)], weights))


def _taps(inputs: list[Tensor], weights: MambaWeights) -> Tensor:
    # Separate multiplies and adds in a fixed order: each is correctly rounded, so layout and position cannot matter.
    taps = weights.conv_weight.t().contiguous()
    total = inputs[0] * taps[0]
    for j in range(1, taps.shape[0]):
        total = total + inputs[j] * taps[j]
    return total if weights.conv_bias is None else total + weights.conv_bias


def _ssm_update(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, slots: Tensor, positions: Tensor, weights: MambaWeights
) -> Tensor:
    """x [B, heads, P], dt [B, heads] raw, b, c [B, groups, N] -> y [B, heads, P]; advances the slots' states."""
    shared = x.shape[1] // b.shape[1]
    dt = softplus(dt + weights.dt_bias)
    b, c = (t.repeat_interleave(shared, 1)[:, :, None, :] for t in (b, c))
    decay = torch.exp(dt * weights.a)[..., None, None]
    h = state.index_select(0, slots)
    if (positions == 0).any():
        h = h.masked_fill((positions == 0)[:, None, None, None], 0.0)
    h = h * decay + (x * dt[..., None])[..., None] * b
    state.index_copy_(0, slots, h)
    return (h * c).sum(-1) + x * weights.d[:, None]


def _ssm_prefill(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    slot: int,
    fresh: bool,
    weights: MambaWeights,
    chunk: int,
) -> Tensor:
    """x [L, heads, P], dt [L, heads] raw, b, c [L, groups, N] -> y [L, heads, P]; ``fresh``: begin from zeros."""
    length, heads, _ = x.shape
    shared = heads // b.shape[1]
    dt = softplus(dt + weights.dt_bias)
    steps, decay, xs, bs, cs = (
        _by_chunk(t, chunk) for t in ((x * dt[..., None]), (dt * weights.a)[..., None], x, b, c)
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
    y = y + _heads_bmm(cs, entering.transpose(2, 3)) * torch.exp(total)[..., None] + xs * weights.d[:, None, None]
    return y.transpose(1, 2).flatten(0, 1)[:length]


def _by_chunk(t: Tensor, chunk: int) -> Tensor:
    """[L, heads, width] -> [chunks, heads, chunk, width], zeros after L, contiguous for any number of chunks."""
    t = pad(t, (0, 0, 0, 0, 0, -t.shape[0] % chunk))
    return t.reshape(-1, chunk, *t.shape[1:]).transpose(1, 2).contiguous()


def _heads_bmm(left: Tensor, right: Tensor) -> Tensor:
    """[chunks, heads, M, K] @ [chunks, heads, K, N]."""
    return bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[3])
