"""The sampler's kernels: at most three passes over the logits, by programs of (tile of the vocabulary, row).

1. ``extremes_kernel``: the row's largest logit, before and after the mask, and what the row needs at all;
2. ``masses_kernel``: the mass, in total and in buckets, and the bucket in which it reaches top_p;
3. ``decide_kernel``: the scores of the tokens above that bucket and a list of those in it; then the exact threshold
   among these, the decision, and the slot's next state.

What a row's programs tell each other are maxima of ranks and sums of integers. Whichever of them comes last concludes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton import budget
from headrace.kernels.triton.common import last_to_arrive
from headrace.kernels.triton.sampling_nucleus import (
    BUCKETS,
    add_to_histogram,
    append,
    best_listed,
    find_bucket,
    threshold_in,
)
from headrace.kernels.triton.sampling_tokens import (
    LOWEST_RANK,
    forbid,
    index_of,
    key_of,
    load_logits,
    log_of_total,
    mass_of,
    quads_of,
    rank,
    tile_noise,
    value_of,
)

# A row's record, int64 each.
RAW = tl.constexpr(0)  # rank of the largest raw logit; its index means nothing
BEST = tl.constexpr(1)  # rank of the largest allowed logit
DRAWS = tl.constexpr(2)  # whether a token is drawn: the slot runs, is not greedy, not forced, and the logits are sound
CUTS = tl.constexpr(3)  # whether it is drawn from a nucleus, top_p < 1
RAW_TOTAL = tl.constexpr(4)  # mass of the raw logits, if log-probabilities are wanted
TOTAL = tl.constexpr(5)  # mass of the scaled logits, if CUTS
LOWER = tl.constexpr(6)  # see find_bucket; 0 unless CUTS
UPPER = tl.constexpr(7)
NEEDED = tl.constexpr(8)
LISTED = tl.constexpr(9)  # length of the list: tokens with keys from LOWER up to UPPER
DRAWN = tl.constexpr(10)  # rank of the best score from UPPER on
RECORD = tl.constexpr(16)  # 128 bytes: rows do not share a cache line


@triton.jit
def extremes_kernel(
    logits,
    logits_strides,
    mask,
    mask_strides,
    slots,
    state,
    records,
    tile_raw,
    tile_best,
    histograms,
    arrived,
    vocab,
    closing_count,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The largest logits of (tile, row); the last program opens the row's record. TILES: power of 2 >= the grid's."""
    tile, tiles, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    _, index = quads_of(tile, TILE)
    x = load_logits(logits, logits_strides, row, index, vocab)
    x = tl.where(x == x, x, float("inf"))  # a NaN breaks the row as +inf does
    tl.store(tile_raw + row * tiles + tile, tl.max(x))
    x = forbid(x, mask, mask_strides, row, index, vocab)
    tl.store(tile_best + row * tiles + tile, tl.max(rank(x, index)))
    if last_to_arrive(arrived + row, tiles):
        each = tl.arange(0, TILES)
        raw = tl.max(tl.load(tile_raw + row * tiles + each, mask=each < tiles, other=-float("inf")))
        best = tl.max(tl.load(tile_best + row * tiles + each, mask=each < tiles, other=LOWEST_RANK))
        slot = tl.load(slots + row)
        _open(records + row * RECORD, histograms + row * BUCKETS, raw, best, state, slot, closing_count)


@triton.jit
def _open(record, histogram, raw, best, state, slot, closing_count):
    """Write down what the row needs, and clear what the next passes add to."""
    sound = (raw < float("inf")) & (value_of(best) > -float("inf"))
    runs = tl.load(state.finish + slot) == budget.RUNNING
    drawn = (tl.load(state.temperature + slot) != 0.0) & (budget.is_forced(state, slot, closing_count) == 0)
    draws = sound & runs & drawn
    cuts = draws & (tl.load(state.top_p + slot) < 1.0)
    zero = tl.zeros([], tl.int64)
    tl.store(record + RAW, rank(raw, zero.to(tl.int32)))
    tl.store(record + BEST, best)
    tl.store(record + DRAWS, draws.to(tl.int64))
    tl.store(record + CUTS, cuts.to(tl.int64))
    tl.store(record + RAW_TOTAL, zero)
    tl.store(record + TOTAL, zero)
    tl.store(record + LOWER, zero)
    tl.store(record + UPPER, zero)
    tl.store(record + LISTED, zero)
    tl.store(record + DRAWN, zero + LOWEST_RANK)
    if cuts:
        tl.store(histogram + tl.arange(0, BUCKETS), tl.zeros([BUCKETS], tl.int64))


@triton.jit
def masses_kernel(
    logits,
    logits_strides,
    mask,
    mask_strides,
    slots,
    state,
    records,
    histograms,
    arrived,
    vocab,
    TILE: tl.constexpr,
    LOGPROBS: tl.constexpr,
):
    """The masses of (tile, row): of the raw logits if LOGPROBS, of the scaled ones if the row is cut."""
    tile, tiles, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    record, histogram = records + row * RECORD, histograms + row * BUCKETS
    slot = tl.load(slots + row)
    cuts = tl.load(record + CUTS) != 0
    wanted = cuts
    if LOGPROBS:
        raw = value_of(tl.load(record + RAW))
        wanted = cuts | ((raw > -float("inf")) & (raw < float("inf")))
    if wanted:
        _, index = quads_of(tile, TILE)
        x = load_logits(logits, logits_strides, row, index, vocab)
        if LOGPROBS:
            tl.atomic_add(record + RAW_TOTAL, tl.sum(mass_of(x - raw).to(tl.int64)), sem="relaxed")
        if cuts:
            top_p = tl.load(state.top_p + slot)
            x = forbid(x, mask, mask_strides, row, index, vocab)
            best = value_of(tl.load(record + BEST))
            mass = mass_of(tl.div_rn(x - best, tl.load(state.temperature + slot)))
            tl.atomic_add(record + TOTAL, tl.sum(mass.to(tl.int64)), sem="relaxed")
            add_to_histogram(histogram, mass, top_p, vocab)
            if last_to_arrive(arrived + row, tiles):
                lower, upper, needed = find_bucket(histogram, tl.load(record + TOTAL), top_p)
                tl.store(record + LOWER, lower.to(tl.int64))
                tl.store(record + UPPER, upper.to(tl.int64))
                tl.store(record + NEEDED, needed)


@triton.jit
def decide_kernel(
    logits,
    logits_strides,
    mask,
    mask_strides,
    slots,
    state,
    control,
    records,
    tile_best,
    list_index,
    list_scaled,
    arrived,
    tokens,
    phases,
    finish,
    logprobs,
    vocab,
    eos_count,
    closing_count,
    TILE: tl.constexpr,
):
    """Score the kept tokens of (tile, row); the row's last program decides its token and advances its slot."""
    tile, tiles, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    record = records + row * RECORD
    slot = tl.load(slots + row)
    listed_index, listed_scaled = list_index + row * vocab, list_scaled + row * vocab
    draws = tl.load(record + DRAWS) != 0
    last = tile == 0
    if draws:
        best = value_of(tl.load(record + BEST))
        temperature = tl.load(state.temperature + slot)
        # A tile whose likeliest token is cut is not read. The margin covers an exp that is not quite monotonic.
        likeliest = tl.div_rn(value_of(tl.load(tile_best + row * tiles + tile)) - best, temperature)
        if key_of(mass_of(likeliest + 0.001)) >= tl.load(record + LOWER):
            quad, index = quads_of(tile, TILE)
            x = load_logits(logits, logits_strides, row, index, vocab)
            x = forbid(x, mask, mask_strides, row, index, vocab)
            _score(
                x, tl.div_rn(x - best, temperature), quad, index, record, listed_index, listed_scaled, state, slot, TILE
            )
        last = last_to_arrive(arrived + row, tiles)
    if last:
        token = index_of(tl.load(record + BEST))
        if draws:
            token = _drawn(record, listed_index, listed_scaled, state, slot)
        forced = budget.is_forced(state, slot, closing_count)
        if forced:
            token = budget.closing_id(state, slot, control, eos_count, closing_count)
        raw = value_of(tl.load(record + RAW))
        if logprobs is not None:
            x = tl.load(logits + row * logits_strides[0] + token * logits_strides[1])
            tl.store(logprobs + row, x - raw - log_of_total(tl.load(record + RAW_TOTAL)))
        sound = (raw > -float("inf")) & (raw < float("inf"))
        sound = sound & (forced | (value_of(tl.load(record + BEST)) > -float("inf")))
        tl.store(phases + row, tl.where(forced, budget.CLOSING, tl.load(state.phase + slot)))
        budget.conclude(tokens + row, finish + row, token, sound, state, slot, control, eos_count, closing_count)


@triton.jit
def _score(x, scaled, quad, index, record, list_index, list_scaled, state, slot, TILE: tl.constexpr):
    """Raise DRAWN to the best score of the tile's kept tokens, and list those that may be kept."""
    lower, upper = tl.load(record + LOWER), tl.load(record + UPPER)
    key = key_of(mass_of(scaled))
    kept = (key >= upper) & (x > -float("inf"))
    if tl.max(kept.to(tl.int32)) != 0:
        score = tl.where(kept, scaled + tile_noise(quad, state, slot, TILE), -float("inf"))
        tl.atomic_max(record + DRAWN, tl.max(rank(score, index)), sem="relaxed")
    undecided = (key >= lower) & (key < upper)
    if tl.max(undecided.to(tl.int32)) != 0:
        append(undecided, index, scaled, record + LISTED, list_index, list_scaled)


@triton.jit
def _drawn(record, list_index, list_scaled, state, slot):
    """The token with the best score of all kept ones."""
    best = tl.load(record + DRAWN)
    length = tl.load(record + LISTED).to(tl.int32)
    if length > 0:
        lower = tl.load(record + LOWER).to(tl.int32)
        threshold = threshold_in(list_scaled, length, lower, tl.load(record + NEEDED))
        best = best_listed(best, list_index, list_scaled, length, threshold, state, slot)
    return index_of(best)


@triton.jit
def top_kernel(
    logits,
    logits_strides,
    records,
    tile_ranks,
    arrived,
    top_ids,
    top_logprobs,
    vocab,
    k,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The k best of (tile, row) by log-probability; the row's last program merges them. RANKS >= k * tiles."""
    tile, tiles, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    record = records + row * RECORD
    raw, total = value_of(tl.load(record + RAW)), tl.load(record + RAW_TOTAL)
    _, index = quads_of(tile, TILE)
    x = load_logits(logits, logits_strides, row, index, vocab)
    ranks = rank(x - raw - log_of_total(total), index)
    best = tl.max(ranks)
    for place in range(k):
        tl.store(tile_ranks + (row * tiles + tile) * k + place, best)
        best = _next(ranks, best)
    if last_to_arrive(arrived + row, tiles):
        each = tl.arange(0, RANKS)
        merged = tl.load(tile_ranks + row * tiles * k + each, mask=each < tiles * k, other=LOWEST_RANK)
        best = tl.max(merged)
        for place in range(k):
            tl.store(top_ids + row * k + place, index_of(best))
            tl.store(top_logprobs + row * k + place, value_of(best))
            best = _next(merged, best)


@triton.jit
def _next(ranks, best):
    """The best rank below ``best``; ranks are distinct."""
    return tl.max(tl.where(ranks < best, ranks, LOWEST_RANK))
