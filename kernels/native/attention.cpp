// Attention over pages: one more token of many sequences, or a chunk of one sequence's prompt.

#include "attention.h"

#include <vector>

namespace headrace {

namespace {

constexpr int64_t SEGMENT = 2 * KEYS;            // tokens of an item of decoding
constexpr size_t MOST_BYTES = size_t(64) << 20;  // of segments' results, before they are combined

// The next tokens of sequences [first, last): segments of their contexts side by side, then combined in order.
template <class Page>
class Decode {
public:
    Decode(Pool& pool, const Attention<Page>& attention_, const DecodeAttentionArgs& args, int64_t first, int64_t last)
        : attention(attention_), a(args), queries(args.each * attention_.group), base(first), starts{0} {
        for (int64_t i = first; i < last; ++i) starts.push_back(starts.back() + segments_of(a, i) * heads());
        const int64_t scratch = attention.scratch() * pool.threads();
        own = reinterpret_cast<float*>(
            pool.shared(size_t(scratch + starts.back() * attention.results(queries)) * sizeof(float)));
        parts = own + scratch;
        pool.items(0, starts.back());
        pool.items(1, (last - first) * a.each * a.attention.heads);
        pool.run([&](int thread) {
            float* mine = own + thread * attention.scratch();
            pool.each(thread, 0, 1, [&](int64_t item, int64_t) { segment(item, mine); });
            pool.each(thread, 1, 1, [&](int64_t item, int64_t) { combine(item, mine); });
        });
    }

    static int64_t segments_of(const DecodeAttentionArgs& a, int64_t i) {
        return (a.positions[i] + a.each - 1) / SEGMENT + 1;
    }

private:
    const Attention<Page>& attention;
    const DecodeAttentionArgs& a;
    const int64_t queries;  // of a sequence and a kv head
    const int64_t base;
    std::vector<int64_t> starts;  // each sequence's first item; items: (segment, kv head), the memory's order
    float *own, *parts;

    int64_t heads() const { return a.attention.kv_heads; }
    Sequence sequence(int64_t i) const {
        return attention.sequence((base + i) * a.each, a.slots[base + i], a.positions[base + i]);
    }
    float* part(int64_t item) const { return parts + item * attention.results(queries); }

    void segment(int64_t item, float* mine) const {
        const int64_t i = std::upper_bound(starts.begin(), starts.end(), item) - starts.begin() - 1;
        const int64_t head = (item - starts[size_t(i)]) % heads();
        const int64_t begin = (item - starts[size_t(i)]) / heads() * SEGMENT;
        const Sequence s = sequence(i);
        // New tokens are written by the item that reads them.
        const int64_t end = std::min(begin + SEGMENT, s.start + a.each);
        attention.append(s, head, std::max(begin - s.start, int64_t(0)), end - s.start);
        for (int64_t first = 0; first < queries; first += QUERIES) {
            const int64_t count = std::min(QUERIES, queries - first);
            const Strip strip = attention.strip(s, head, first, count, part(item) + first * (attention.wide + 2));
            attention.prepare(strip, mine);
            attention.reset(strip);
            for (int64_t at = begin; at < end; at += KEYS) attention.block(strip, at, mine);
        }
    }

    // One query: its segments in order.
    void combine(int64_t item, float* mine) const {
        const int64_t row = item / a.attention.heads, head = item % a.attention.heads, i = row / a.each;
        const int64_t query = row % a.each * attention.group + head % attention.group;
        const int64_t first = query / QUERIES * QUERIES;
        const int64_t seen = (a.positions[base + i] + row % a.each) / SEGMENT + 1;
        const int64_t item0 = starts[size_t(i)] + head / attention.group;
        auto strip = [&](int64_t segment) {
            float* results = part(item0 + segment * heads()) + first * (attention.wide + 2);
            return attention.strip({}, 0, first, std::min(QUERIES, queries - first), results);
        };
        float peak = LOWEST, mass = 0.0f;
        for (int64_t n = 0; n < seen; ++n) peak = std::max(peak, strip(n).peak[query - first]);
        for (int64_t d = 0; d < attention.wide; d += LANES) store(mine + d, splat(0.0f));
        for (int64_t n = 0; n < seen; n += LANES) {
            const int64_t some = std::min(LANES, seen - n);
            float weights[LANES] = {};
            for (int64_t j = 0; j < some; ++j) weights[j] = strip(n + j).peak[query - first];
            store(weights, exp(load(weights) - splat(peak)));
            for (int64_t j = 0; j < some; ++j) {
                const Strip s = strip(n + j);
                mass = __builtin_fmaf(s.mass[query - first], weights[j], mass);
                const float* out = s.out + (query - first) * attention.wide;
                for (int64_t d = 0; d < attention.wide; d += LANES)
                    store(mine + d, fma(load(out + d), splat(weights[j]), load(mine + d)));
            }
        }
        const int64_t at = (base * a.each + row) * a.attention.heads + head;
        attention.finish(mine, mass, a.attention.out + at * a.attention.width);
    }
};

}  // namespace

void decode_attention(Pool& pool, const DecodeAttentionArgs& a) {
    with_pages(a.attention.format, [&](auto page) {
        const Attention<decltype(page)> attention(a.attention);
        const size_t bytes = size_t(attention.results(a.each * attention.group) * a.attention.kv_heads) * sizeof(float);
        for (int64_t first = 0; first < a.sequences;) {
            int64_t last = first;
            size_t segments = 0;
            do
                segments += size_t(Decode<decltype(page)>::segments_of(a, last++));
            while (last < a.sequences &&
                   (segments + size_t(Decode<decltype(page)>::segments_of(a, last))) * bytes <= MOST_BYTES);
            Decode<decltype(page)>(pool, attention, a, first, last);
            first = last;
        }
    });
}

void prefill_attention(Pool& pool, const PrefillAttentionArgs& a) {
    with_pages(a.attention.format, [&](auto page) {
        const Attention<decltype(page)> attention(a.attention);
        const Sequence sequence = attention.sequence(0, a.slot, a.start);
        const int64_t group = attention.group, queries = a.attention.rows * group;
        const int64_t strips = (queries + QUERIES - 1) / QUERIES;
        auto* own = reinterpret_cast<float*>(pool.shared(size_t(attention.scratch() * pool.threads()) * sizeof(float)));
        pool.items(0, a.attention.rows);
        pool.items(1, strips * a.attention.kv_heads);
        pool.run([&](int thread) {
            float* mine = own + thread * attention.scratch();
            pool.each(thread, 0, 16, [&](int64_t begin, int64_t end) {
                for (int64_t head = 0; head < a.attention.kv_heads; ++head)
                    attention.append(sequence, head, begin, end);
            });
            // The longest contexts first: what is left at the end is small.
            pool.each(thread, 1, 1, [&](int64_t item, int64_t) {
                const int64_t head = item / strips, first = (strips - 1 - item % strips) * QUERIES;
                const int64_t count = std::min(QUERIES, queries - first);
                const Strip strip = attention.strip(sequence, head, first, count, attention.own_results(mine));
                attention.prepare(strip, mine);
                attention.reset(strip);
                const int64_t last = a.start + (first + count - 1) / group;
                for (int64_t begin = 0; begin <= last; begin += KEYS) attention.block(strip, begin, mine);
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = (first + i) / group, h = head * group + (first + i) % group;
                    attention.finish(strip.out + i * attention.wide, strip.mass[i],
                                     a.attention.out + (row * a.attention.heads + h) * a.attention.width);
                }
            });
        });
    });
}

}  // namespace headrace
