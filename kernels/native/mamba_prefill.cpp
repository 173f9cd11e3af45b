// Mamba-2 over a run of prompt tokens: the chunked form of Dao and Gu (2024), section 6, in blocks of at most 32.
//
// A thread walks over the blocks of one head and keeps its state in its caches. Short blocks do the least arithmetic:
// products with the state cost the same for any length, those within a block grow with it. Blocks begin at fixed places
// of a chunk, so a prompt cut at any multiple of the chunk gives the bits of the whole.

#include "mamba.h"
#include "rows.h"

namespace headrace {

namespace {

constexpr int64_t BLOCK = 32;  // tokens
constexpr int64_t HALF = BLOCK / 2;
constexpr int64_t MOST_BLOCKS = 8;  // of a pass over all heads: bounds the memory between the phases

// Blocks of a run that begins where a chunk does; a chunk's last block, and the run's, may be shorter.
struct Blocks {
    int64_t chunk, tokens, each;  // each: blocks of a chunk

    Blocks(int64_t chunk_, int64_t tokens_) : chunk(chunk_), tokens(tokens_), each((chunk_ + BLOCK - 1) / BLOCK) {}

    int64_t begin(int64_t block) const { return std::min(block / each * chunk + block % each * BLOCK, tokens); }
    int64_t count() const { return tokens / chunk * each + (tokens % chunk + BLOCK - 1) / BLOCK; }
};

// What one thread needs at a time.
struct Scratch {
    float* state;       // [state_size, head_width]
    float* values;      // [BLOCK, head_width]
    float* y;           // [BLOCK, head_width]
    float* scores;      // [BLOCK, BLOCK]
    float* transposed;  // [state_size, BLOCK]
    float *taps, *window;

    static int64_t floats(const MambaArgs& a, const Pieces& p) {
        return (p.state_size + 2 * BLOCK) * p.head_width + BLOCK * (BLOCK + p.state_size) + taps_floats(a) +
               window_floats(a);
    }
    Scratch(const MambaArgs& a, const Pieces& p, float* memory)
        : state(memory), values(state + p.state_size * p.head_width), y(values + BLOCK * p.head_width),
          scores(y + BLOCK * p.head_width), transposed(scores + BLOCK * BLOCK), taps(transposed + p.state_size * BLOCK),
          window(taps + taps_floats(a)) {}
};

// Blocks [first, last) of the run, all heads.
struct Pass {
    const MambaArgs& a;
    const Pieces pieces;
    const Blocks blocks;
    const int64_t slot, start, first, last;
    const int64_t from, tokens;  // of the run
    const int64_t heads_padded;
    const bool fresh;
    float* mixed;   // by piece: [tokens, width of the piece]
    float* dt;      // [tokens, heads_padded]
    float* total;   // [tokens, heads_padded]: log decay since the block's start
    float* scores;  // [blocks, groups, BLOCK, BLOCK]: C B^T
    float* scratch;

    Pass(Pool& pool, const MambaPrefillArgs& args, const Blocks& all, int64_t first_)
        : a(args.mamba), pieces(a), blocks(all), slot(args.slot), start(args.start), first(first_),
          last(std::min(first_ + MOST_BLOCKS, all.count())), from(all.begin(first)), tokens(all.begin(last) - from),
          heads_padded(padded(a.heads)), fresh(start + from == 0) {
        const int64_t mixed_floats = tokens * pieces.width(), times = tokens * heads_padded;
        const int64_t products = (last - first) * a.groups * BLOCK * BLOCK, own = Scratch::floats(a, pieces);
        mixed = reinterpret_cast<float*>(
            pool.shared(size_t(mixed_floats + 2 * times + products + own * pool.threads()) * sizeof(float)));
        dt = mixed + mixed_floats;
        total = dt + times;
        scores = total + times;
        scratch = scores + products;
    }

    Scratch own(int thread) const { return {a, pieces, scratch + thread * Scratch::floats(a, pieces)}; }
    float* piece(int64_t i) const { return mixed + tokens * pieces.before(i); }
    int64_t begin(int64_t block) const { return blocks.begin(first + block) - from; }
    int64_t length(int64_t block) const { return begin(block + 1) - begin(block); }
    int64_t count() const { return last - first; }
    int64_t ranges() const { return Range::number(pieces); }
    int64_t kept() const { return std::min(tokens, a.ring); }

    template <class Ring>
    void convolve(int64_t block, const Range& range, const Scratch& s) const {
        transpose_taps(a, range, s.taps);
        const Run<Ring> run(a, from, slot, start + from);
        auto out = [&](int64_t token, int64_t i, Float value) {
            const Vector& v = range.vectors[i];
            store(piece(v.piece) + token * pieces.width_of(v.piece) + v.column, value);
        };
        run.convolve(range, s.taps, begin(block), begin(block + 1), s.window, out);
    }

    // One of the newest inputs into the ring, once nobody reads what it held.
    template <class Ring>
    void keep(int64_t i) const {
        const Run<Ring> run(a, from, slot, start + from);
        for (int64_t v = 0; v < pieces.width() / LANES; ++v) run.keep(tokens - kept() + i, pieces.vector(v));
    }

    // Sixteen heads' steps in time.
    void times(int64_t block, int64_t head) const {
        const Float rate = load_some(a.a + head, std::min(LANES, a.heads - head));
        Float sum = splat(0.0f);
        for (int64_t token = begin(block); token < begin(block + 1); ++token) {
            const Float step = time_step(a, pieces, from + token, head);
            sum = fma(step, rate, sum);
            store(dt + token * heads_padded + head, step);
            store(total + token * heads_padded + head, sum);
        }
    }

    // C B^T of one block and group; lanes are the tokens of B.
    void score(int64_t block, int64_t group, const Scratch& s) const {
        const int64_t width = pieces.state_width, size = a.state_size, some = length(block);
        const float* b = piece(a.heads + group) + begin(block) * width;
        const float* c = piece(a.heads + a.groups + group) + begin(block) * width;
        float* out = scores + (block * a.groups + group) * BLOCK * BLOCK;
        std::fill_n(s.transposed, size * BLOCK, 0.0f);
        transpose<true>(b, width, some, size, s.transposed, BLOCK);
        std::fill_n(out, BLOCK * BLOCK, 0.0f);
        multiply(s.transposed, BLOCK, BLOCK / LANES, size, c, 1, width, some, out, BLOCK);
    }

    void head(int64_t head, const Scratch& s) const;
    void advance(int64_t block, int64_t head, const Scratch& s) const;
};

// A block's log decays of one head and what they become.
struct Decay {
    alignas(64) float total[BLOCK], dt[BLOCK];
    alignas(64) float grown[BLOCK];  // exp(total): since the block's start
    alignas(64) float left[BLOCK];   // dt exp(total at the end - total): a token's weight in the next state

    Decay(const Pass& pass, int64_t block, int64_t head) {
        const int64_t some = pass.length(block), at = pass.begin(block) * pass.heads_padded + head;
        for (int64_t t = 0; t < BLOCK; ++t) {
            total[t] = pass.total[at + std::min(t, some - 1) * pass.heads_padded];
            dt[t] = t < some ? pass.dt[at + t * pass.heads_padded] : 0.0f;
        }
        for (int64_t t = 0; t < BLOCK; t += LANES) {
            store(grown + t, exp(load(total + t)));
            store(left + t, load(dt + t) * exp(splat(total[BLOCK - 1]) - load(total + t)));
        }
    }
    float whole() const { return grown[BLOCK - 1]; }

    // scores exp(total_t - total_s) dt_s, zero in the future.
    void weigh(const float* scores, int64_t tokens, float* out) const {
        static const float index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t s = 0; s <= t; s += LANES) {
                const Float factor = exp(splat(total[t]) - load(total + s)) * load(dt + s);
                const Mask future = splat(float(t - s)) < load(index);
                store(out + t * BLOCK + s, select(future, splat(0.0f), load(scores + t * BLOCK + s) * factor));
            }
    }
};

void Pass::advance(int64_t block, int64_t head, const Scratch& s) const {
    const int64_t some = length(block), group = head / (a.heads / a.groups), width = pieces.head_width;
    const int64_t row = begin(block), vectors = width / LANES, state_width = pieces.state_width;
    const float* x = piece(head) + row * width;
    const float* b = piece(pieces.b(head)) + row * state_width;
    const float* c = piece(pieces.c(head)) + row * state_width;
    // Lines of the gate, and of y, that are needed when the first products are done.
    for (int64_t t = 0; t < some; ++t)
        for (int64_t p = 0; p < a.head_dim; p += LANES) {
            __builtin_prefetch(a.projected + (from + row + t) * a.stride + head * a.head_dim + p);
            __builtin_prefetch(a.y + (from + row + t) * pieces.inner() + head * a.head_dim + p, 1);
        }
    const Decay decay(*this, block, head);

    std::fill_n(s.y, some * width, 0.0f);
    multiply(s.state, width, vectors, a.state_size, c, 1, state_width, some, s.y, width);
    for (int64_t t = 0; t < some; ++t)
        for (int64_t p = 0; p < width; p += LANES)
            store(s.y + t * width + p, load(s.y + t * width + p) * splat(decay.grown[t]));
    decay.weigh(scores + (block * a.groups + group) * BLOCK * BLOCK, some, s.scores);
    // The first half of the rows has nothing in the second half of the columns.
    const int64_t half = std::min(some, HALF);
    multiply(x, width, vectors, half, s.scores, 1, BLOCK, half, s.y, width);
    if (some > half)
        multiply(x, width, vectors, some, s.scores + HALF * BLOCK, 1, BLOCK, some - half, s.y + HALF * width, width);
    for (int64_t t = 0; t < some; ++t)
        for (int64_t p = 0; p < a.head_dim; p += LANES)
            finish(a, from + row + t, head * a.head_dim + p, std::min(LANES, a.head_dim - p),
                   fma(load(x + t * width + p), splat(a.d[head]), load(s.y + t * width + p)));

    for (int64_t t = 0; t < some; ++t)
        for (int64_t p = 0; p < width; p += LANES)
            store(s.values + t * width + p, load(x + t * width + p) * splat(decay.left[t]));
    for (int64_t i = 0; i < a.state_size * width; i += LANES)
        store(s.state + i, load(s.state + i) * splat(decay.whole()));
    multiply(s.values, width, vectors, some, b, state_width, 1, a.state_size, s.state, width);
}

void Pass::head(int64_t head, const Scratch& s) const {
    float* state = a.ssm + slot * a.ssm_slot + head * a.ssm_head;
    std::fill_n(s.state, a.state_size * pieces.head_width, 0.0f);
    if (!fresh) transpose<true>(state, a.ssm_row, a.head_dim, a.state_size, s.state, pieces.head_width);
    for (int64_t block = 0; block < count(); ++block) advance(block, head, s);
    transpose<false>(s.state, pieces.head_width, a.state_size, a.head_dim, state, a.ssm_row);
}

}  // namespace

void mamba_prefill(Pool& pool, const MambaPrefillArgs& args) {
    const Blocks blocks(args.chunk, args.tokens);
    for (int64_t first = 0; first < blocks.count(); first += MOST_BLOCKS) {
        const Pass pass(pool, args, blocks, first);
        const int64_t convolutions = pass.count() * pass.ranges(), products = pass.count() * args.mamba.groups;
        const int64_t head_vectors = pass.heads_padded / LANES;
        pool.items(0, convolutions + pass.count() * head_vectors);
        pool.items(1, products + pass.kept());
        pool.items(2, args.mamba.heads);
        pool.run([&](int thread) {
            const Scratch own = pass.own(thread);
            pool.each(thread, 0, 1, [&](int64_t item, int64_t) {
                const int64_t i = item - convolutions;
                if (i >= 0) return pass.times(i / head_vectors, i % head_vectors * LANES);
                const Range range(pass.pieces, item % pass.ranges());
                with_ring(args.mamba.format, [&](auto ring) {
                    pass.convolve<decltype(ring)>(item / pass.ranges(), range, own);
                });
            });
            pool.each(thread, 1, 1, [&](int64_t item, int64_t) {
                if (item < products) return pass.score(item / args.mamba.groups, item % args.mamba.groups, own);
                with_ring(args.mamba.format, [&](auto ring) { pass.keep<decltype(ring)>(item - products); });
            });
            pool.each(thread, 2, 1, [&](int64_t head, int64_t) { pass.head(head, own); });
        });
    }
}

}  // namespace headrace
