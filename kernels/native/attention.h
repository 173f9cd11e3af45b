// Paged keys and values, and the loop under both kinds of attention: strips of queries over blocks of keys.
//
// The context is cut at absolute multiples of KEYS tokens, and a query goes through its blocks in order with an online
// softmax. Queries are lanes of the scores; of the results, the head's elements are. Every element is one chain: a
// score over the head's elements, a sum over the keys that the query sees, and no others. So a query's bits follow from
// its own context, whatever other queries, chunks or threads there are.
#pragma once

#include <algorithm>

#include "math.h"
#include "ops.h"
#include "tile.h"

namespace headrace {

constexpr int64_t KEYS = 128;     // of a block
constexpr int64_t QUERIES = 128;  // of a strip, at most: four panels
constexpr int64_t STEP = ROWS;  // keys whose scores are computed between two requests to memory
constexpr float LOWEST = -3.4028234664e38f;

// How pages keep an element; the numbers go on where the Format of panels ends.
struct PageF32 {
    using Word = float;
    HEADRACE_INLINE static Float read(const Word* p) { return load(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store(p, x); }
};
struct PageBF16 {
    using Word = uint16_t;
    HEADRACE_INLINE static Float read(const Word* p) { return load_bf16(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store_bf16(p, x); }
};
struct PageF16 {
    using Word = uint16_t;
    HEADRACE_INLINE static Float read(const Word* p) { return load_f16(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store_f16(p, x); }
};
struct PageE4M3 {
    using Word = uint8_t;
    HEADRACE_INLINE static Float read(const Word* p) { return load_e4m3(p); }
    HEADRACE_INLINE static void write(Word* p, Float x) { store_e4m3(p, x); }
};

template <class Body>
HEADRACE_INLINE void with_pages(int64_t format, Body&& body) {
    switch (format) {
        case 0: return body(PageF32{});
        case 1: return body(PageBF16{});
        case 2: return body(PageF16{});
        case 3: return body(PageE4M3{});
    }
}

// One sequence's tokens in the pages, and the queries that look at them.
struct Sequence {
    const float *q, *k, *v;  // of its first new token
    const int32_t* table;    // its pages
    int64_t start;           // position of that token
};

// Queries [first, first + count) of a sequence and a kv head, numbered token by token, a token's heads side by side.
struct Strip {
    Sequence sequence;
    int64_t head;  // of keys and values
    int64_t first, count;
    float *peak, *mass, *out;  // [count rounded up to 16] twice, [count][width rounded up to 16]
};

template <class Page>
class Attention {
public:
    using Word = typename Page::Word;

    explicit Attention(const AttentionArgs& args)
        : a(args), group(args.heads / args.kv_heads), wide((args.width + LANES - 1) / LANES * LANES),
          factor(float(args.scale * args.k_scale)) {}

    const AttentionArgs& a;
    const int64_t group, wide;

    Sequence sequence(int64_t row, int64_t slot, int64_t start) const {
        return {a.q + row * a.q_stride[0], a.k + row * a.k_stride[0], a.v + row * a.v_stride[0],
                a.table + slot * a.table_stride, start};
    }

    // Floats of a thread's memory; of which the last are a strip's results, for those who have no other place for them.
    int64_t scratch() const { return QUERIES * wide + unpacked() + KEYS * QUERIES + QUERIES + results(QUERIES); }
    int64_t results(int64_t queries) const { return padded(queries) * (wide + 2); }
    Strip strip(const Sequence& sequence, int64_t head, int64_t first, int64_t count, float* results) const {
        return {sequence, head, first, count, results, results + padded(count), results + 2 * padded(count)};
    }
    float* own_results(float* own) const { return own + scratch() - results(QUERIES); }

    // Writes new tokens [begin, end) of the sequence, a kv head's part.
    void append(const Sequence& s, int64_t head, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = s.start + i;
            write(s.k + i * a.k_stride[0] + head * a.k_stride[1], float(a.k_scale), place(a.keys, s, head, token));
            write(s.v + i * a.v_stride[0] + head * a.v_stride[1], float(a.v_scale), place(a.values, s, head, token));
        }
    }

    // Queries as the scores' panels: scaled, and queries are lanes. [count / 32][width][32]
    void prepare(const Strip& s, float* own) const {
        for (int64_t vector = 0; vector * LANES < s.count; ++vector) {
            const int64_t count = std::min(LANES, s.count - vector * LANES);
            const float* rows[LANES];
            for (int64_t i = 0; i < count; ++i) {
                const int64_t query = s.first + vector * LANES + i, head = s.head * group + query % group;
                rows[i] = s.sequence.q + query / group * a.q_stride[0] + head * a.q_stride[1];
            }
            float* out = own + vector / 2 * a.width * PANEL + vector % 2 * LANES;
            for (int64_t d = 0; d < a.width; d += LANES) {
                const int64_t some = std::min(LANES, a.width - d);
                Float x[LANES];
                for (int64_t i = 0; i < LANES; ++i)
                    x[i] = i >= count ? splat(0.0f) : some == LANES ? load(rows[i] + d) : load_some(rows[i] + d, some);
                transpose(x);
                for (int64_t i = 0; i < some; ++i) store(out + (d + i) * PANEL, x[i] * splat(factor));
            }
        }
    }

    void reset(const Strip& s) const {
        for (int64_t i = 0; i < s.count; i += LANES) store(s.peak + i, splat(LOWEST)), store(s.mass + i, splat(0.0f));
        for (int64_t i = 0; i < s.count * wide; i += LANES) store(s.out + i, splat(0.0f));
    }

    // One block of keys, from a multiple of KEYS on, for a prepared strip. While one product is computed, memory is
    // asked for what the next one reads: values, then the next block's keys.
    void block(const Strip& s, int64_t begin, float* own) const {
        float *keys = own + QUERIES * wide, *scores = keys + unpacked(), *shrink = scores + KEYS * QUERIES;
        const int64_t most = seen(s, s.count - 1, begin);
        read(a.keys, s, begin, begin + most, keys, wide, PANEL);
        for (int64_t i = 0; i < s.count; i += PANEL) {
            const int64_t some = std::min(PANEL, s.count - i), vectors = (some + LANES - 1) / LANES;
            const int64_t visible = seen(s, i + some - 1, begin);
            float* p = scores + i * KEYS;
            std::memset(p, 0, size_t(visible * PANEL) * sizeof(float));
            for (int64_t key = 0; key < visible; key += STEP) {
                const int64_t stop = std::min(key + STEP, visible);
                if (i == 0) ask(a.values, s, begin + key, begin + stop);
                multiply(own + i * a.width, PANEL, vectors, a.width, keys + key * wide, 1, wide, stop - key,
                         p + key * PANEL, PANEL);
            }
            for (int64_t v = 0; v < vectors; ++v) soften(s, i + v * LANES, begin, visible, p + v * LANES, shrink);
        }
        read(a.values, s, begin, begin + most, keys, PANEL, KEYS * PANEL);
        for (int64_t i = 0; i < s.count; i += PANEL)
            gather(s, i, std::min(PANEL, s.count - i), begin, scores + i * KEYS, keys, shrink);
    }

    // y [width] = out / mass, scaled.
    void finish(const float* out, float mass, float* y) const {
        const Float scale = splat(float(a.v_scale) / mass);
        int64_t d = 0;
        for (; d + LANES <= a.width; d += LANES) store(y + d, load(out + d) * scale);
        if (d < a.width) store_some(y + d, load(out + d) * scale, a.width - d);
    }

private:
    const float factor;

    int64_t unpacked() const { return KEYS * ((wide + PANEL - 1) / PANEL * PANEL); }  // a block of keys, then of values
    static int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

    // Keys of the block that a strip's i-th query sees.
    int64_t seen(const Strip& s, int64_t i, int64_t begin) const {
        const int64_t position = s.sequence.start + (s.first + i) / group;
        return std::clamp(position + 1 - begin, int64_t(0), KEYS);
    }

    std::byte* place(std::byte* memory, const Sequence& s, int64_t head, int64_t token) const {
        const int64_t row = s.table[token / a.page_size] * a.page_size + token % a.page_size;
        return memory + (row * a.kv_heads + head) * a.width * int64_t(sizeof(Word));
    }

    void write(const float* x, float scale, std::byte* at) const {
        auto* out = reinterpret_cast<Word*>(at);
        for (int64_t d = 0; d < a.width; d += LANES) {
            const int64_t some = std::min(LANES, a.width - d);
            Word words[LANES];
            Page::write(words, (some == LANES ? load(x + d) : load_some(x + d, some)) / splat(scale));
            std::memcpy(out + d, words, size_t(some) * sizeof(Word));
        }
    }

    // Tokens [begin, end) as fp32: ``step`` floats from token to token, ``panel`` floats from 32 elements to the next.
    void read(std::byte* memory, const Strip& s, int64_t begin, int64_t end, float* out, int64_t step,
              int64_t panel) const {
        for (int64_t token = begin; token < end;) {
            const int64_t stop = std::min(end, (token / a.page_size + 1) * a.page_size);
            const auto* row = reinterpret_cast<const Word*>(place(memory, s.sequence, s.head, token));
            for (; token < stop; ++token, row += a.kv_heads * a.width, out += step) {
                int64_t d = 0;
                for (; d + LANES <= a.width; d += LANES)
                    store(out + d / PANEL * panel + d % PANEL, Page::read(row + d));
                if (d < a.width) {
                    Word words[LANES] = {};
                    std::memcpy(words, row + d, size_t(a.width - d) * sizeof(Word));
                    store(out + d / PANEL * panel + d % PANEL, Page::read(words));
                }
            }
        }
    }

    // Asks memory for tokens [begin, end) of the sequence, as far as there are any.
    // Inlined: a call of a function that does nothing else is left out by GCC.
    HEADRACE_INLINE void ask(const std::byte* memory, const Strip& s, int64_t begin, int64_t end) const {
        const int64_t bytes = a.width * int64_t(sizeof(Word));
        end = std::min(end, s.sequence.start + (s.first + s.count - 1) / group + 1);
        for (int64_t token = begin; token < end;) {
            const int64_t stop = std::min(end, (token / a.page_size + 1) * a.page_size);
            const std::byte* row = place(const_cast<std::byte*>(memory), s.sequence, s.head, token);
            for (; token < stop; ++token, row += a.kv_heads * bytes)
                for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
        }
    }

    // Scores become weights, p [visible][32] for 16 queries from the i-th on: exp(score - peak), nothing beyond what a
    // query sees. shrink: what earlier blocks are multiplied with, since the peak has risen.
    void soften(const Strip& s, int64_t i, int64_t begin, int64_t visible, float* p, float* shrink) const {
        float counts[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane)
            counts[lane] = float(seen(s, std::min(i + lane, s.count - 1), begin));
        for (int64_t key = seen(s, i, begin); key < visible; ++key) {
            const Mask sees = splat(float(key)) < load(counts);
            store(p + key * PANEL, select(sees, load(p + key * PANEL), splat(-INFINITY)));
        }
        // A NaN may get lost here; it comes back with the weights.
        Float highs[4] = {load(s.peak + i), splat(LOWEST), splat(LOWEST), splat(LOWEST)};
        for (int64_t key = 0; key < visible; ++key) highs[key % 4] = max(highs[key % 4], load(p + key * PANEL));
        const Float peak = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
        Float mass = splat(0.0f);
        for (int64_t key = 0; key < visible; ++key) {
            const Float weight = exp(load(p + key * PANEL) - peak);
            store(p + key * PANEL, weight);
            mass = mass + weight;
        }
        const Float less = exp(load(s.peak + i) - peak);
        store(shrink + i, less);
        store(s.mass + i, fma(load(s.mass + i), less, mass));
        store(s.peak + i, peak);
    }

    // out = out * shrink + p values for one panel of queries: what all of them see, then token by token what is left.
    void gather(const Strip& s, int64_t i, int64_t count, int64_t begin, const float* p, const float* values,
                const float* shrink) const {
        for (int64_t query = i; query < i + count; ++query) {
            const float less = shrink[query];
            float* out = s.out + query * wide;
            if (less != 1.0f)
                for (int64_t d = 0; d < wide; d += LANES) store(out + d, load(out + d) * splat(less));
        }
        const int64_t all = seen(s, i, begin);
        for (int64_t d = 0; d < wide; d += PANEL) {
            if (i == 0) ask(a.keys, s, begin + KEYS + KEYS * d / wide, begin + KEYS + KEYS * (d + PANEL) / wide);
            if (all) add(values, 0, all, p, count, s.out + i * wide, d);
        }
        for (int64_t from = i; from < i + count;) {
            const int64_t token = (s.first + from) / group, to = std::min(i + count, (token + 1) * group - s.first);
            const int64_t more = seen(s, from, begin);
            for (int64_t d = 0; d < wide && all < more; d += PANEL)
                add(values, all, more, p + from - i, to - from, s.out + from * wide, d);
            from = to;
        }
    }

    // out [queries][wide] += p [from, to) values [from, to), for elements from d to the end of their panel.
    void add(const float* values, int64_t from, int64_t to, const float* p, int64_t queries, float* out,
             int64_t d) const {
        multiply(values + d * KEYS + from * PANEL, PANEL, std::min(wide - d, PANEL) / LANES, to - from,
                 p + from * PANEL, PANEL, 1, queries, out + d, wide);
    }
};

}  // namespace headrace
