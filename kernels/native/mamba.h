// The causal convolution over a ring of inputs, shared by the prompt path and the decode path.
//
// Its results stand in pieces: x of every head, then B of every group, then C of every group, each padded with zeros to
// whole vectors, so that all that reads them reads whole vectors.
#pragma once

#include <algorithm>

#include "math.h"
#include "ops.h"
#include "tile.h"

namespace headrace {

HEADRACE_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Sixteen channels, or as many as are left of their piece.
struct Vector {
    int64_t piece, column;   // the first of them is piece's column-th
    int64_t channel, count;  // where they stand among the inputs
};

struct Pieces {
    const int64_t heads, groups, head_dim, state_size;
    const int64_t head_width, state_width;  // padded

    explicit Pieces(const MambaArgs& a)
        : heads(a.heads), groups(a.groups), head_dim(a.head_dim), state_size(a.state_size),
          head_width(padded(a.head_dim)), state_width(padded(a.state_size)) {}

    int64_t inner() const { return heads * head_dim; }
    int64_t channels() const { return inner() + 2 * groups * state_size; }
    int64_t width() const { return heads * head_width + 2 * groups * state_width; }
    int64_t b(int64_t head) const { return heads + head / (heads / groups); }
    int64_t c(int64_t head) const { return b(head) + groups; }
    int64_t width_of(int64_t piece) const { return piece < heads ? head_width : state_width; }
    // Columns before a piece.
    int64_t before(int64_t piece) const {
        return std::min(piece, heads) * head_width + std::max(piece - heads, int64_t(0)) * state_width;
    }
    Vector vector(int64_t i) const {
        const int64_t column = i * LANES, xs = heads * head_width;
        if (column < xs) {
            const int64_t piece = column / head_width, at = column % head_width;
            return {piece, at, piece * head_dim + at, std::min(LANES, head_dim - at)};
        }
        const int64_t piece = (column - xs) / state_width, at = (column - xs) % state_width;
        return {heads + piece, at, inner() + piece * state_size + at, std::min(LANES, state_size - at)};
    }
};

// How a ring keeps its inputs.
struct RingF32 {
    using Word = float;
    HEADRACE_INLINE static Float read(const Word* p) { return load(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store(p, x); }
};
struct RingBF16 {
    using Word = uint16_t;
    HEADRACE_INLINE static Float read(const Word* p) { return load_bf16(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store_bf16(p, x); }
};
struct RingF16 {
    using Word = uint16_t;
    HEADRACE_INLINE static Float read(const Word* p) { return load_f16(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store_f16(p, x); }
};

template <class Body>
HEADRACE_INLINE void with_ring(int64_t format, Body&& body) {
    switch (format) {
        case FP32: return body(RingF32{});
        case BF16: return body(RingBF16{});
        case FP16: return body(RingF16{});
    }
}

constexpr int64_t RANGE = 8;       // vectors of channels that are convolved together
constexpr int64_t CONVOLVED = 32;  // tokens at a time
constexpr int64_t AHEAD = 8;       // tokens whose inputs are on their way meanwhile

struct Range {
    Vector vectors[RANGE];
    int64_t first, count;

    Range(const Pieces& pieces, int64_t i) : first(i * RANGE), count(std::min(RANGE, pieces.width() / LANES - first)) {
        for (int64_t v = 0; v < count; ++v) vectors[v] = pieces.vector(first + v);
    }
    static int64_t number(const Pieces& pieces) { return (pieces.width() / LANES + RANGE - 1) / RANGE; }
};

// Floats that a thread needs to convolve: weights, then inputs.
inline int64_t taps_floats(const MambaArgs& a) { return RANGE * (a.taps + 1) * LANES; }
inline int64_t window_floats(const MambaArgs& a) { return RANGE * (CONVOLVED + a.taps) * LANES; }

// Each vector's weights, tap by tap, then its bias; zeros in the lanes that are no channel.
inline void transpose_taps(const MambaArgs& a, const Range& range, float* taps) {
    std::fill_n(taps, range.count * (a.taps + 1) * LANES, 0.0f);
    for (int64_t i = 0; i < range.count; ++i, taps += (a.taps + 1) * LANES) {
        const Vector& v = range.vectors[i];
        const float* weight = a.conv_weight + v.channel * a.taps;
        for (int64_t lane = 0; lane < v.count; ++lane)
            for (int64_t j = 0; j < a.taps; ++j) taps[j * LANES + lane] = weight[lane * a.taps + j];
        if (a.conv_bias) std::memcpy(taps + a.taps * LANES, a.conv_bias + v.channel, size_t(v.count) * sizeof(float));
    }
}

// A run of tokens of one sequence, the first at position ``start``.
template <class Ring>
struct Run {
    using Word = typename Ring::Word;
    const MambaArgs& a;
    const float* inputs;  // of the first token
    Word* ring;
    int64_t start, cursor;

    // row: the first token's among the projected ones
    Run(const MambaArgs& a_, int64_t row, int64_t slot, int64_t start_)
        : a(a_), inputs(a.projected + row * a.stride + a.heads * a.head_dim),
          ring(reinterpret_cast<Word*>(a.conv) + slot * a.conv_slot), start(start_), cursor(start_ % a.ring) {}

    HEADRACE_INLINE Word* entry(int64_t token) const {  // for -ring <= token
        const int64_t at = token < 0 ? cursor + token + a.ring : cursor + token;
        return ring + (at < a.ring ? at : at % a.ring) * a.conv_entry;
    }

    // A token's input as the ring keeps it.
    HEADRACE_INLINE Float input(int64_t token, const Vector& v) const {
        if (start + token < 0) return splat(0.0f);
        Word words[LANES];
        if (v.count < LANES) std::fill_n(words, LANES, Word(0));
        if (token < 0) {
            const Word* at = entry(token) + v.channel;
            if (v.count == LANES) return Ring::read(at);
            std::memcpy(words, at, size_t(v.count) * sizeof(Word));
        } else {
            const float* at = inputs + token * a.stride + v.channel;
            Ring::write(words, v.count == LANES ? load(at) : load_some(at, v.count));
        }
        return Ring::read(words);
    }

    HEADRACE_INLINE void keep(int64_t token, const Vector& v) const {
        const float* from = inputs + token * a.stride + v.channel;
        Word* at = entry(token) + v.channel;
        if (v.count == LANES) return Ring::write(at, load(from));
        Word words[LANES];
        Ring::write(words, load_some(from, v.count));
        std::memcpy(at, words, size_t(v.count) * sizeof(Word));
    }

    // silu(convolution) of tokens [begin, end) and some vectors: out(token, vector, value). taps: as transpose_taps
    // leaves them; window: memory of this thread.
    template <class Out>
    HEADRACE_INLINE void convolve(const Range& range, const float* taps, int64_t begin, int64_t end, float* window,
                                  Out&& out) const {
        const int64_t past = a.taps - 1, length = (CONVOLVED + a.taps) * LANES;
        for (; begin < end; begin += CONVOLVED) {
            const int64_t tokens = std::min(CONVOLVED, end - begin);
            // Token by token: what is read of one lies together in memory.
            for (int64_t t = 0; t < tokens + past; ++t)
                for (int64_t i = 0; i < range.count; ++i) {
                    const Vector& v = range.vectors[i];
                    __builtin_prefetch(inputs + (begin + t - past + AHEAD) * a.stride + v.channel);
                    store(window + i * length + t * LANES, input(begin + t - past, v));
                }
            for (int64_t i = 0; i < range.count; ++i) {
                const float* weights = taps + i * (a.taps + 1) * LANES;
                for (int64_t t = 0; t < tokens; ++t) {
                    Float total = load(weights + a.taps * LANES);
                    for (int64_t j = 0; j < a.taps; ++j)
                        total = fma(load(window + i * length + (t + j) * LANES), load(weights + j * LANES), total);
                    out(begin + t, i, silu(total));
                }
            }
        }
    }
};

// Sixteen heads' steps in time: softplus(raw + bias); beyond the last head something finite.
HEADRACE_INLINE Float time_step(const MambaArgs& a, const Pieces& pieces, int64_t row, int64_t head) {
    const int64_t some = std::min(LANES, a.heads - head);
    const float* raw = a.projected + row * a.stride + pieces.inner() + pieces.channels() + head;
    if (some == LANES) return softplus(load(raw) + load(a.dt_bias + head));
    return softplus(load_some(raw, some) + load_some(a.dt_bias + head, some));
}

// y silu(gate) of up to sixteen outputs of one head.
HEADRACE_INLINE void finish(const MambaArgs& a, int64_t row, int64_t column, int64_t count, Float y) {
    const float* gate = a.projected + row * a.stride + column;
    float* out = a.y + row * a.heads * a.head_dim + column;
    if (count == LANES) return store(out, y * silu(load(gate)));
    store_some(out, y * silu(load_some(gate, count)), count);
}

}  // namespace headrace
