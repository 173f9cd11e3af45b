"""Fused sampling: forced id, grammar mask, temperature, top-p, seeded draw, budget machine and counters.

Contract of the op (design sections 3.6, 3.8 and 4). For every row r, which decides one token of slot s = slots[r]:

1. the logits x [vocab] fp32 are the model's; a row with a NaN, a +inf or nothing finite fails alone (``Finish.ERROR``);
2. the budget machine may force an id, which then replaces everything below;
3. a grammar's mask sets x to -inf where it forbids;
4. temperature 0 is the lowest index of max(x); otherwise y = (x - max) / T, the kept set is every token at least
   as likely as the one at which the mass, from the top, reaches top_p (ties kept, never empty), and the token is
   argmax(y + g) over it, g Gumbel noise from Philox4x32-10 keyed by the seed and counted by
   (vocab >> 2, position, choice, 0), lane vocab & 3; ties to the lowest index;
5. the slot's state advances: last token, length, tokens left, phase, remaining budget, cursor, finish.

Masses are summed as integers (exp(x - max) in fixed point), so no order, split or shard can change a decision.
The log-probability is the log-softmax of the raw logits, before mask, temperature and top-p, also for forced ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from headrace.kernels.control import ControlIds, Finish, Phase

FIXED_POINT_BITS = 40
"""exp(x - max) <= 1 in units of 2^-40: 2^17 entries sum below 2^57, and fp32's 24 bits are exact down to 2^-16."""

_WORD = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Per-slot arrays beside the caches, each [num_slots]; the sampler reads and advances them in place."""

    last_token: Tensor  # int64, the next decode step's input
    length: Tensor  # int64, tokens of the sequence so far = absolute index of the token decided next
    tokens_left: Tensor  # int64, tokens that may still be decided
    phase: Tensor  # int64, Phase
    remaining: Tensor  # int64, free reasoning tokens left; negative: no limit
    cursor: Tensor  # int64, next index into ControlIds.closing while CLOSING
    finish: Tensor  # int64, Finish
    temperature: Tensor  # fp32, 0 is greedy
    top_p: Tensor  # fp64
    seed: Tensor  # int64, the 64 bits of the seed
    choice: Tensor  # int64, index among the request's n choices
    ignore_eos: Tensor  # bool

    @classmethod
    def allocate(cls, num_slots: int, device: torch.device | str) -> SamplerState:
        """Zeroed arrays for ``num_slots`` slots."""
        dtypes = {"temperature": torch.float32, "top_p": torch.float64, "ignore_eos": torch.bool}
        return cls(
            **{
                f.name: torch.zeros(num_slots, dtype=dtypes.get(f.name, torch.int64), device=device)
                for f in fields(cls)
            }
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step decided, each [rows]; the integers are rows of one tensor, so that one copy brings them all.

    A row whose slot had already finished, or whose logits are broken, decides nothing: its token is -1, and its
    log-probabilities and top ids mean nothing.
    """

    integers: Tensor  # int64 [3, >= rows]: tokens, phases, finish; what is beyond rows means nothing
    tokens: Tensor  # int64
    phases: Tensor  # int64, the Phase in which the token was decided
    finish: Tensor  # int64, Finish after the token
    logprobs: Tensor | None  # fp32
    top_ids: Tensor | None  # int64 [rows, k], most likely first, ties to the lowest index
    top_logprobs: Tensor | None  # fp32 [rows, k]


def sample(
    logits: Tensor,
    slots: Tensor,
    state: SamplerState,
    control: ControlIds,
    *,
    mask: Tensor | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
) -> Sampled:
    """Decide one token per row and advance the rows' slots.

    logits [rows, vocab] fp32 (not modified), slots [rows] int64 without repetition, mask [rows, vocab] bool (True =
    allowed) or None. ``logprobs`` asks for the chosen tokens' log-probabilities, ``top_logprobs`` for the k best.
    """
    live = state.finish[slots] == Finish.NONE
    broken = ~torch.isfinite(logits.amax(-1))  # amax hands a NaN on
    allowed = logits
    if mask is not None:
        allowed = logits.masked_fill(~mask, -torch.inf)
    forced, tokens = _force(_draw(allowed, slots, state), slots, state, control)
    if mask is not None:
        broken |= ~forced & (allowed.amax(-1) == -torch.inf)
    failed = live & broken
    decided = live & ~broken
    phases = torch.where(forced, int(Phase.CLOSING), state.phase[slots])
    logp = top_ids = top_logp = None
    if logprobs or top_logprobs:
        table = log_softmax(logits)
        logp = table.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
        if top_logprobs:
            top_ids, top_logp = _top(table, top_logprobs)
    finish = _advance(tokens, slots, state, control, decided, failed)
    integers = torch.stack([torch.where(decided, tokens, -1), phases, finish])
    tokens, phases, finish = integers.unbind()
    return Sampled(integers, tokens, phases, finish, logp, top_ids, top_logp)


def fixed_point_mass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(y = x - max, exp(y) in units of 2^-FIXED_POINT_BITS as int64), both [rows, vocab]."""
    y = logits - logits.amax(-1, keepdim=True)
    return y, (torch.exp(y).double() * 2.0**FIXED_POINT_BITS).long()


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax whose normaliser is an integer sum: the same bits whatever the batch. [rows, vocab] fp32."""
    y, mass = fixed_point_mass(logits)
    total = mass.sum(-1, keepdim=True).double() * 2.0**-FIXED_POINT_BITS
    return y - torch.log(total).float()


def top_p_kept(scaled: Tensor, top_p: Tensor) -> Tensor:
    """The nucleus as a bool mask [rows, vocab]; ``scaled`` is (x - max) / T, top_p [rows] fp64.

    Kept is every token with p >= the probability at which the mass, taken from the top, reaches top_p: ties are
    kept, the set is never empty, top_p 1 cuts nothing and top_p 0 keeps the most likely.
    """
    _, mass = fixed_point_mass(scaled)
    ordered, _ = mass.sort(-1, descending=True)
    reached = ordered.cumsum(-1)
    needed = torch.ceil(top_p * reached[:, -1].double()).long().clamp(min=1)
    # First index, from the top, at which the mass reaches what is needed.
    index = (reached < needed[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    return (mass >= ordered.gather(1, index)) | (top_p >= 1.0)[:, None]


def gumbel(seed: Tensor, position: Tensor, choice: Tensor, vocab: int) -> Tensor:
    """Noise [rows, vocab] fp32 for the tokens decided at ``position``; all arguments [rows] int64."""
    rows, quads = seed.shape[0], -(-vocab // 4)
    counter = (
        torch.arange(quads, device=seed.device).expand(rows, quads),
        position[:, None] & _WORD,
        choice[:, None] & _WORD,
        torch.zeros((), dtype=torch.int64, device=seed.device),
    )
    key = ((seed & _WORD)[:, None], ((seed >> 32) & _WORD)[:, None])
    words = [word.expand(rows, quads) for word in philox4x32(counter, key)]
    bits = torch.stack(words, -1).reshape(rows, 4 * quads)[:, :vocab]
    return gumbel_of_words(bits)


def gumbel_of_words(words: Tensor) -> Tensor:
    """Gumbel noise fp32 from random 32-bit words (int64); the clamp keeps the largest word below 1."""
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-v))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011, Random123) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _multiply_32(c0, _PHILOX_M[0])
        hi1, lo1 = _multiply_32(c2, _PHILOX_M[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _WORD, (k1 + _PHILOX_W[1]) & _WORD
    return c0, c1, c2, c3


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; in halves, because int64 would overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _WORD


def _draw(logits: Tensor, slots: Tensor, state: SamplerState) -> Tensor:
    """The token each row would take if nothing were forced, [rows] int64."""
    temperature = state.temperature[slots]
    greedy = temperature == 0
    token = _lowest_argmax(logits)
    rows = torch.nonzero(~greedy)[:, 0]
    if rows.numel() == 0:
        return token
    drawing = slots[rows]
    y = logits[rows] - logits[rows].amax(-1, keepdim=True)
    scaled = y / temperature[rows][:, None]
    noise = gumbel(state.seed[drawing], state.length[drawing], state.choice[drawing], logits.shape[-1])
    kept = top_p_kept(scaled, state.top_p[drawing]) & (y > -torch.inf)
    token[rows] = _lowest_argmax(torch.where(kept, scaled + noise, -torch.inf))
    return token


def _lowest_argmax(x: Tensor) -> Tensor:
    """Index of the row's maximum, the lowest among equals ([rows] int64); 0 for a row with a NaN."""
    index = torch.arange(x.shape[-1], device=x.device)
    hit = torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1]).amin(-1)
    return torch.where(hit < x.shape[-1], hit, 0)


def _top(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely ids and their log-probabilities; a stable sort keeps ties in index order."""
    values, ids = torch.sort(table, dim=-1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def _force(drawn: Tensor, slots: Tensor, state: SamplerState, control: ControlIds) -> tuple[Tensor, Tensor]:
    """(forced rows, tokens with the forced ids in); enters CLOSING where the budget is used up."""
    if not control.closing:
        return torch.zeros_like(drawn, dtype=torch.bool), drawn
    phase = state.phase[slots]
    exhausted = (phase == Phase.THINKING) & (state.remaining[slots] == 0)
    forced = exhausted | (phase == Phase.CLOSING)
    closing = torch.tensor(control.closing, device=drawn.device)
    cursor = torch.where(exhausted, 0, state.cursor[slots])
    return forced, torch.where(forced, closing[cursor.clamp(max=len(control.closing) - 1)], drawn)


def _advance(
    tokens: Tensor, slots: Tensor, state: SamplerState, control: ControlIds, decided: Tensor, failed: Tensor
) -> Tensor:
    """Move the machine and the counters of the decided rows; returns Finish per row."""
    phase, remaining, cursor = state.phase[slots], state.remaining[slots], state.cursor[slots]
    thinking = phase == Phase.THINKING
    free = thinking & (remaining != 0)
    closing = (phase == Phase.CLOSING) | (thinking & ~free)
    step = torch.where(thinking, 0, cursor) + 1  # ids of the closing that are out, if closing
    closed = closing & (step >= len(control.closing)) | free & (
        (tokens == control.end_think) | (tokens == control.tool_call)
    )
    reopened = (phase == Phase.ANSWERING) & (tokens == control.think)
    next_phase = torch.where(closing, int(Phase.CLOSING), phase)
    next_phase = torch.where(closed, int(Phase.ANSWERING), next_phase)
    next_phase = torch.where(reopened, int(Phase.THINKING), next_phase)
    spent = free & ~closed & (remaining > 0)
    left = state.tokens_left[slots] - 1
    eos = torch.zeros_like(decided)
    for token_id in control.eos:
        eos |= tokens == token_id
    # A forced id that happens to be an end-of-sequence id is part of the closing, not an end.
    stopped = eos & ~state.ignore_eos[slots] & ~closing
    finish = torch.where(left <= 0, int(Finish.LENGTH), int(Finish.NONE))
    finish = torch.where(stopped, int(Finish.STOP), finish)
    finish = torch.where(decided, finish, state.finish[slots])
    finish = torch.where(failed, int(Finish.ERROR), finish)

    def put(target: Tensor, value: Tensor) -> None:
        target[slots] = torch.where(decided, value, target[slots])

    put(state.phase, next_phase)
    put(state.remaining, remaining - spent.long())
    put(state.cursor, torch.where(closing & ~closed, step, 0))
    put(state.last_token, tokens)
    put(state.tokens_left, left)
    put(state.length, state.length[slots] + 1)
    state.finish[slots] = finish
    return finish
