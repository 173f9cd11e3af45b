// Fused sampling; kernels/sampling.py states the contract.
//
// A row goes through three stages: extremes of its logits, masses, scores. A stage's work on a piece of the vocabulary
// leaves maxima and sums of integers, and whoever does a row's last piece concludes the stage. So neither the pieces nor
// who does them when can change a decision. There is no sort: masses, as integers in fp32, are ordered like their bits,
// and a histogram of them and a search among one bucket's give the mass at which top_p is reached.

#include <atomic>
#include <new>

#include "budget.h"
#include "noise.h"

namespace headrace {

namespace {

constexpr int64_t BLOCK = 512;         // tokens that are passed over together where none of them can matter
constexpr int64_t GROUP = 4 * LANES;   // tokens of one call for noise
constexpr int64_t LEAST_BLOCKS = 8;    // of a piece

// A mass is floor(exp(x - max) 2^40) in fp32, which holds it exactly. Its key is its bits.
constexpr int KEY_SHIFT = 21;                    // of the 23 bits of an octave: 4 buckets to each
constexpr uint32_t BOTTOM = 127u << 2;           // key >> KEY_SHIFT of the least mass, 1
constexpr int64_t BUCKETS = 41 << 2;             // 40 octaves, and the likeliest token's mass of 2^40
constexpr int64_t BANKS = 4;                     // histograms side by side, so that additions need not wait for others
constexpr int DIGIT = 7;                         // bits of the rest of a key that the search settles at a time

HEADRACE_INLINE uint32_t key_of(float mass) {
    uint32_t key;
    std::memcpy(&key, &mass, 4);
    return key;
}

HEADRACE_INLINE float mass_of(uint32_t key) {
    float mass;
    std::memcpy(&mass, &key, 4);
    return mass;
}

HEADRACE_INLINE Float masses_of(Float scaled) { return floor(exp(scaled) * splat(0x1p40f)); }

// A sum of at most 2047 times 16 masses, in halves of 20 bits, for which int32 lanes are enough.
class MassSum {
public:
    HEADRACE_INLINE void add(Float mass) {
        const Float upper = round_even(mass * splat(0x1p-20f));
        high = high + to_int(upper);
        low = low + to_int(fma(upper, splat(-0x1p20f), mass));
    }
    // The sum, from which the next one starts at 0.
    int64_t take() {
        int32_t upper[LANES], lower[LANES];
        store(upper, high), store(lower, low);
        int64_t sum = 0;
        for (int i = 0; i < LANES; ++i) sum += int64_t(upper[i]) * (1 << 20) + lower[i];
        high = low = splat(int32_t(0));
        return sum;
    }

private:
    Int high = splat(int32_t(0)), low = splat(int32_t(0));
};

// log(total 2^-40) of a sum of masses, to 1 ulp of fp64, as fixed operations: twice the artanh of (m - 1) / (m + 1).
float log_of_total(int64_t total) {
    const double value = double(std::max<int64_t>(total, 1));
    int64_t word;
    std::memcpy(&word, &value, 8);
    const int64_t shifted = word + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd);  // 1 and the root of 1/2
    const int64_t exponent = (shifted >> 52) - 1023;
    word -= exponent << 52;
    double m, series = 0.0;
    std::memcpy(&m, &word, 8);
    const double s = (m - 1.0) / (m + 1.0), square = s * s;
    for (int n = 23; n >= 1; n -= 2) series = series * square + 1.0 / n;
    return float(double(exponent - 40) * 0.6931471805599453 + 2.0 * s * series);
}

// The bucket, from the top, at which the mass reaches ``needed``, of which the buckets above are then taken off.
int64_t reach(const int64_t* histogram, int64_t buckets, int64_t& needed) {
    for (int64_t bucket = buckets; bucket-- > 0;) {
        if (histogram[bucket] >= needed) return bucket;
        needed -= histogram[bucket];
    }
    return -1;
}

struct Best {
    float value = -INFINITY;
    int64_t index = 0;

    // In the order of the index: an equal one that comes later changes nothing.
    HEADRACE_INLINE void offer(Float values, uint32_t lanes, int64_t first) {
        lanes &= bits(splat(value) < values);
        if (!lanes) return;
        float each[LANES];
        store(each, values);
        for (; lanes; lanes &= lanes - 1) {
            const int i = __builtin_ctz(lanes);
            if (value < each[i]) value = each[i], index = first + i;
        }
    }
};

// The k best of what is offered in the order of the index, best first.
struct Top {
    Best* best;
    int64_t k, count = 0;

    bool full() const { return count == k; }
    float least() const { return best[k - 1].value; }
    void offer(float value, int64_t index) {
        if (full() && !(least() < value)) return;
        int64_t place = count < k ? count++ : k - 1;
        for (; place && best[place - 1].value < value; --place) best[place] = best[place - 1];
        best[place] = {value, index};
    }
};

struct alignas(64) Piece {
    int64_t begin, end;  // blocks
    float raw;           // the largest logit, infinite where one is a NaN
    int64_t raw_total, total;
    Best drawn;
    int64_t top_count;
    int64_t histogram[BANKS][BUCKETS];  // of the scaled logits' masses; their sum counts
};

struct Row {
    // What it works on, given once.
    const SampleArgs& a;
    int64_t pieces, blocks;
    Piece* piece;
    float *peaks, *heaviest;  // of each block: the largest allowed logit, the largest mass
    float* listed;            // [vocab + LANES] masses of one bucket
    Best* top;                // [pieces][top_k]
    std::atomic<int64_t> arrived{0};  // pieces that are through a stage
    // The row at hand, and what the stages find out about it.
    int64_t row = 0, slot = 0;
    const float* x = nullptr;
    const uint8_t* mask = nullptr;
    bool live = false, forced = false;
    bool runs = false;    // a token will be decided
    bool draws = false;   // and drawn,
    bool cuts = false;    // from a nucleus
    bool weighs = false;  // and its log-probability told
    float raw = 0.0f, temperature = 0.0f, threshold = 0.0f, least_scaled = 0.0f, log_total = 0.0f;
    Best best{};  // of the allowed logits; the index only if it is the token

    void begin(int64_t at) {
        row = at, slot = a.slots[at];
        x = a.logits + at * a.stride;
        mask = a.mask ? a.mask + at * a.mask_stride : nullptr;
        live = a.finish[slot] == RUNNING, forced = Budget{a, slot}.forces();
    }

    HEADRACE_INLINE Float logits_at(int64_t i) const {
        if (i + LANES <= a.vocab) return load(x + i);
        float lanes[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = i + lane < a.vocab ? x[i + lane] : -INFINITY;
        return load(lanes);
    }

    HEADRACE_INLINE Float allow(Float logits, int64_t i) const {
        if (!mask) return logits;
        uint8_t lanes[LANES] = {};
        if (i < a.vocab) std::memcpy(lanes, mask + i, size_t(std::min(LANES, a.vocab - i)));
        return select(to_float(load_u8(lanes)) == splat(0.0f), splat(-INFINITY), logits);
    }

    HEADRACE_INLINE Float allowed_at(int64_t i) const { return allow(logits_at(i), i); }
    HEADRACE_INLINE Float scaled_at(int64_t i) const {
        return (allowed_at(i) - splat(best.value)) / splat(temperature);
    }

    void extremes(Piece& p) const {
        if (!live) return;
        Float raw = splat(-INFINITY);
        for (int64_t block = p.begin; block < p.end; ++block) {
            Float peak = splat(-INFINITY);
            for (int64_t i = block * BLOCK, end = std::min(i + BLOCK, a.vocab); i < end; i += LANES) {
                Float logits = logits_at(i);
                logits = select(logits < splat(INFINITY), logits, splat(INFINITY));
                raw = max(raw, logits);
                peak = max(peak, allow(logits, i));
            }
            peaks[block] = largest(peak);
        }
        p.raw = largest(raw);
    }

    void open() {
        runs = draws = cuts = weighs = false;
        if (!live) return;
        raw = -INFINITY;
        for (int64_t i = 0; i < pieces; ++i) raw = std::max(raw, piece[i].raw);
        int64_t block = 0;
        for (int64_t i = 1; i < blocks; ++i)
            if (peaks[block] < peaks[i]) block = i;
        best = {peaks[block], 0};
        runs = -INFINITY < raw && raw < INFINITY && (forced || -INFINITY < best.value);
        temperature = a.temperature[slot];
        draws = runs && !forced && temperature != 0.0f;
        cuts = draws && a.top_p[slot] < 1.0;
        weighs = runs && a.logprobs;
        if (!runs || forced || draws) return;
        uint32_t found = 0;
        for (int64_t i = block * BLOCK; !found; i += LANES) {
            found = bits(allowed_at(i) == splat(best.value));
            if (found) best.index = i + __builtin_ctz(found);
        }
    }

    void weigh(Piece& p) const {
        if (weighs) {
            MassSum sum;
            p.raw_total = 0;
            for (int64_t block = p.begin; block < p.end; ++block) {
                for (int64_t i = block * BLOCK, end = std::min(i + BLOCK, a.vocab); i < end; i += LANES)
                    sum.add(masses_of(logits_at(i) - splat(raw)));
                p.raw_total += sum.take();
            }
        }
        if (!cuts) return;
        std::memset(p.histogram, 0, sizeof p.histogram);
        MassSum sum;
        p.total = 0;
        for (int64_t block = p.begin; block < p.end; ++block) {
            const float least = least_that_matters(p.total);
            float heavy[BLOCK + LANES];
            int64_t count = 0;
            Float most = splat(0.0f);
            for (int64_t i = block * BLOCK, end = std::min(i + BLOCK, a.vocab); i < end; i += LANES) {
                const Float masses = masses_of(scaled_at(i));
                sum.add(masses);
                most = max(most, masses);
                count += compress(heavy + count, ~bits(masses < splat(least)) & 0xffff, masses);
            }
            heaviest[block] = largest(most);
            p.total += sum.take();
            for (int64_t i = 0; i < count; ++i)
                p.histogram[i % BANKS][(key_of(heavy[i]) >> KEY_SHIFT) - BOTTOM] += int64_t(heavy[i]);
        }
    }

    // Tokens lighter than this weigh, all together, less than half of (1 - top_p) of the total, of which ``some`` is
    // known already, and 2^40 always: without them top_p is reached all the same (64 allow for the rounding of what it
    // needs).
    float least_that_matters(int64_t some) const {
        const double known = std::max(double(some), 0x1p40);
        return float(std::max((1.0 - a.top_p[slot]) * 0.5 * known / double(a.vocab) - 64.0, 1.0));
    }

    void cut() {
        if (weighs) {
            int64_t total = 0;
            for (int64_t i = 0; i < pieces; ++i) total += piece[i].raw_total;
            log_total = log_of_total(total);
        }
        // No token below least_scaled has the mass: exp is to 1 ulp. What is forbidden is infinitely far below.
        least_scaled = -INFINITY;
        if (!cuts) return;
        threshold = find_threshold();
        least_scaled = largest(log(splat(threshold * 0x1p-40f))) - 0.001f;
    }

    // The mass at which top_p is reached; 0 where rounding asks for more than there is.
    float find_threshold() const {
        int64_t total = 0, histogram[BUCKETS] = {};
        for (int64_t i = 0; i < pieces; ++i) {
            total += piece[i].total;
            for (const auto& bank : piece[i].histogram)
                for (int64_t bucket = 0; bucket < BUCKETS; ++bucket) histogram[bucket] += bank[bucket];
        }
        int64_t needed = std::max<int64_t>(int64_t(std::ceil(a.top_p[slot] * double(total))), 1);
        const int64_t bucket = reach(histogram, BUCKETS, needed);
        if (bucket < 0) return 0.0f;
        uint32_t key = uint32_t(bucket + BOTTOM) << KEY_SHIFT;
        int64_t count = list(mass_of(key), mass_of(key + (1u << KEY_SHIFT)));
        for (int shift = KEY_SHIFT - DIGIT; shift >= 0; shift -= DIGIT) {
            int64_t digits[1 << DIGIT] = {}, kept = 0;
            auto digit = [&](float mass) { return key_of(mass) >> shift & ((1u << DIGIT) - 1); };
            for (int64_t i = 0; i < count; ++i) digits[digit(listed[i])] += int64_t(listed[i]);
            const uint32_t chosen = uint32_t(reach(digits, 1 << DIGIT, needed));
            for (int64_t i = 0; i < count; ++i)
                if (digit(listed[i]) == chosen) listed[kept++] = listed[i];
            count = kept;
            key |= chosen << shift;
        }
        return mass_of(key);
    }

    // Lists the masses from ``lower`` up to ``upper``; returns how many there are.
    int64_t list(float lower, float upper) const {
        int64_t count = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            if (heaviest[block] < lower) continue;
            for (int64_t i = block * BLOCK, end = std::min(i + BLOCK, a.vocab); i < end; i += LANES) {
                const Float masses = masses_of(scaled_at(i));
                count += compress(listed + count, bits(masses < splat(upper)) & ~bits(masses < splat(lower)), masses);
            }
        }
        return count;
    }

    void score(Piece& p) const {
        if (draws) draw(p);
        if (!weighs || !a.top_k) return;
        Top most{top + (&p - piece) * a.top_k, a.top_k};
        for (int64_t i = p.begin * BLOCK, end = std::min(p.end * BLOCK, a.vocab); i < end; i += LANES) {
            const Float table = logits_at(i) - splat(raw) - splat(log_total);
            if (most.full() && !bits(splat(most.least()) < table)) continue;
            float each[LANES];
            store(each, table);
            for (int64_t lane = 0; lane < std::min(LANES, end - i); ++lane) most.offer(each[lane], i + lane);
        }
        p.top_count = most.count;
    }

    void draw(Piece& p) const {
        const Noise noise{a.seed[slot], a.length[slot], a.choice[slot]};
        Best drawn;
        for (int64_t block = p.begin; block < p.end; ++block) {
            if (cuts && heaviest[block] < threshold) continue;
            if ((peaks[block] - best.value) / temperature < drawn.value - MOST_NOISE) continue;
            for (int64_t i = block * BLOCK, end = std::min(i + BLOCK, a.vocab); i < end; i += GROUP)
                draw_group(noise, i, drawn);
        }
        p.drawn = drawn;
    }

    HEADRACE_INLINE void draw_group(const Noise& noise, int64_t first, Best& drawn) const {
        // Below this a token is cut, or not even the largest noise would lift it above the best so far.
        const Float bottom = splat(std::max(least_scaled, drawn.value - MOST_NOISE));
        Float scaled[4];
        uint32_t near[4], any = 0;
        for (int v = 0; v < 4; ++v) {
            scaled[v] = scaled_at(first + v * LANES);
            any |= near[v] = bits(bottom < scaled[v]);
        }
        if (!any) return;
        Int words[4];
        noise.words_at(first, words);
        for (int v = 0; v < 4; ++v) {
            const Float uniforms = uniform(words[v]);
            near[v] &= bits(splat(drawn.value) < scaled[v] + above_gumbel(uniforms));
            if (near[v] && cuts) near[v] &= ~bits(masses_of(scaled[v]) < splat(threshold));
            if (near[v]) drawn.offer(scaled[v] + gumbel(uniforms), near[v], first + v * LANES);
        }
    }

    void conclude() {
        const Budget budget{a, slot};
        int64_t *token = a.integers + row, *phase = token + a.rows, *finish = phase + a.rows;
        *phase = forced ? int64_t(CLOSING) : a.phase[slot];
        *token = runs ? decided() : -1;
        if (a.logprobs) tell_logprobs(*token);
        if (live) a.finish[slot] = runs ? budget.advance(*token) : ERROR;
        *finish = a.finish[slot];
    }

    int64_t decided() const {
        if (forced) return Budget{a, slot}.closing_id();
        Best drawn = draws ? piece[0].drawn : best;
        for (int64_t i = 1; draws && i < pieces; ++i)
            if (drawn.value < piece[i].drawn.value) drawn = piece[i].drawn;
        return drawn.index;
    }

    void tell_logprobs(int64_t token) const {
        a.logprobs[row] = weighs ? x[token] - raw - log_total : NAN;
        int64_t* ids = a.top_ids + row * a.top_k;
        float* values = a.top_logprobs + row * a.top_k;
        if (!weighs) {
            std::fill(ids, ids + a.top_k, 0);
            std::fill(values, values + a.top_k, NAN);
            return;
        }
        Top merged{top, a.top_k, a.top_k ? piece[0].top_count : 0};
        for (int64_t i = 1; a.top_k && i < pieces; ++i)
            for (int64_t j = 0; j < piece[i].top_count; ++j) {
                const Best& next = top[i * a.top_k + j];
                merged.offer(next.value, next.index);
            }
        for (int64_t j = 0; j < merged.count; ++j) ids[j] = top[j].index, values[j] = top[j].value;
    }
};

struct Stage {
    void (Row::*work)(Piece&) const;
    void (Row::*end)();
};
constexpr Stage STAGES[] = {{&Row::extremes, &Row::open}, {&Row::weigh, &Row::cut}, {&Row::score, &Row::conclude}};
constexpr int LAST_STAGE = 2;

void advance(Row& row, int stage, int64_t piece) {
    const Stage& at = STAGES[stage];  // -fsanitize=bounds of GCC 12 loses an index within a call of a member pointer
    (row.*at.work)(row.piece[piece]);
    if (row.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < row.pieces) return;
    row.arrived.store(0, std::memory_order_relaxed);
    (row.*at.end)();
}

// Into how many pieces rows are cut: where there are many, or as many as threads, each is one thread's from end to end.
int64_t pieces_of(const SampleArgs& a, int64_t blocks, int64_t threads) {
    if (threads == 1 || a.rows % threads == 0 || a.rows >= 4 * threads || a.rows * a.vocab < Pool::FEW) return 1;
    return std::clamp<int64_t>(blocks / LEAST_BLOCKS, 1, (4 * threads + a.rows - 1) / a.rows);
}

class Seats {
public:
    Seats(Pool& pool, const SampleArgs& a, int64_t count, int64_t pieces) {
        const int64_t blocks = (a.vocab + BLOCK - 1) / BLOCK;
        const size_t bytes = size_t(count) * (padded<Row>(1) + padded<Piece>(pieces) + 2 * padded<float>(blocks) +
                                              padded<float>(a.vocab + LANES) + padded<Best>(pieces * a.top_k));
        free = pool.shared(bytes);
        rows = take<Row>(count);
        for (int64_t i = 0; i < count; ++i) {
            Piece* piece = take<Piece>(pieces);
            for (int64_t j = 0; j < pieces; ++j)
                piece[j].begin = blocks * j / pieces, piece[j].end = blocks * (j + 1) / pieces;
            float *peaks = take<float>(blocks), *heaviest = take<float>(blocks), *listed = take<float>(a.vocab + LANES);
            new (rows + i) Row{a, pieces, blocks, piece, peaks, heaviest, listed, take<Best>(pieces * a.top_k)};
        }
    }
    Row& operator[](int64_t i) const { return rows[i]; }

private:
    template <class T>
    static size_t padded(int64_t count) {
        return (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(free);
        free += padded<T>(count);
        return taken;
    }
    std::byte* free;
    Row* rows;
};

}  // namespace

void sample(Pool& pool, const SampleArgs& a) {
    const int64_t threads = pool.threads(), pieces = pieces_of(a, (a.vocab + BLOCK - 1) / BLOCK, threads);
    const bool together = pieces > 1;
    const Seats seats(pool, a, together ? a.rows : threads, pieces);
    if (together)
        for (int64_t row = 0; row < a.rows; ++row) seats[row].begin(row);
    for (int stage = 0; stage <= LAST_STAGE; ++stage) pool.items(stage, a.rows * pieces);
    auto work = [&](int thread) {
        if (!together)
            return pool.each(thread, 0, 1, [&](int64_t row, int64_t) {
                seats[thread].begin(row);
                for (int stage = 0; stage <= LAST_STAGE; ++stage) advance(seats[thread], stage, 0);
            });
        for (int stage = 0; stage <= LAST_STAGE; ++stage)
            pool.each(thread, stage, 1,
                      [&](int64_t item, int64_t) { advance(seats[item / pieces], stage, item % pieces); });
    };
    a.rows * a.vocab < Pool::FEW ? work(0) : pool.run(work);
}

}  // namespace headrace
